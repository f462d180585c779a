// SPDX-License-Identifier: Apache-2.0

//! The cluster that cases share, and the words that they are written in.

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kiln_cluster::cluster::Private;
use kiln_tests::{
    netns::Netns,
    process::{Background, Cmd, Output},
    suite::Fixture,
    tools, wait,
};

/// How long things may take that cost Pods of this one node.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// Configuration of an agent that holds nothing of its own accord.
pub(crate) const NOTHING_WARM: &str = "[limits]\nboots = 1\n";

pub(crate) struct Env {
    pub(crate) private: Private,
    next: AtomicU32,
}

impl Env {
    pub(crate) async fn start() -> Result<Self> {
        let program = Path::new(env!("CARGO_BIN_EXE_kiln-cluster"));
        Ok(Self {
            private: Private::start(program).await?,
            next: AtomicU32::new(0),
        })
    }

    /// A namespace in which Pods can be made.
    pub(crate) async fn namespace(&self) -> Result<Namespace<'_>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace {
            env: self,
            name: format!("case-{number}"),
        };
        namespace
            .kubectl(["create", "namespace", &namespace.name])
            .await?;
        let account = [
            "wait",
            "--for=create",
            "--timeout=30s",
            "serviceaccount/default",
        ];
        namespace.kubectl(account).await?;
        Ok(namespace)
    }

    /// A namespace that is there already.
    pub(crate) fn existing(&self, name: &str) -> Namespace<'_> {
        Namespace {
            env: self,
            name: name.to_owned(),
        }
    }
}

impl Fixture for Env {
    async fn finish(self) -> Result<()> {
        self.private.end().await
    }

    fn log(&self) -> String {
        self.private.log()
    }
}

/// A namespace of one case.
pub(crate) struct Namespace<'a> {
    env: &'a Env,
    pub(crate) name: String,
}

impl Namespace<'_> {
    fn command<'s>(&self, args: impl IntoIterator<Item = &'s str>) -> Result<Cmd> {
        Ok(self.env.private.kubectl(["-n", &self.name])?.args(args))
    }

    /// Runs kubectl, and returns what it says.
    pub(crate) async fn kubectl<'s>(
        &self,
        args: impl IntoIterator<Item = &'s str>,
    ) -> Result<String> {
        self.command(args)?.run().await
    }

    /// Runs kubectl with something to read, and returns all of what it does.
    pub(crate) async fn kubectl_with<'s>(
        &self,
        args: impl IntoIterator<Item = &'s str>,
        input: &str,
    ) -> Result<Output> {
        self.command(args)?.input(input.as_bytes()).output().await
    }

    /// Starts kubectl.
    pub(crate) fn background<'s>(
        &self,
        args: impl IntoIterator<Item = &'s str>,
    ) -> Result<Background> {
        let number = self.env.next.fetch_add(1, Ordering::Relaxed);
        let log = self.env.private.dir().join(format!("kubectl-{number}.log"));
        self.command(args)?.background(&log)
    }

    /// kubectl's words on a terminal, which `script` makes.
    pub(crate) async fn on_a_terminal(&self, args: &str) -> Result<String> {
        let kubectl = tools::program("kubectl")?;
        let words = format!("{} -n {} {args}", kubectl.display(), self.name);
        Cmd::new(&tools::program("script")?)
            .args(["-qec", &words, "/dev/null"])
            .env("KUBECONFIG", self.env.private.cluster().kubeconfig())
            .run()
            .await
    }

    /// Makes what `manifest` says.
    pub(crate) async fn apply(&self, manifest: &str) -> Result<()> {
        let done = self.kubectl_with(["apply", "-f", "-"], manifest).await?;
        ensure!(done.status.success(), "{}", done.errors());
        Ok(())
    }

    /// Makes a Pod named `name` with one container of busybox that runs `script`, and waits until
    /// it is ready. `more` are further fields of its spec, indented by two spaces.
    pub(crate) async fn pod(
        &self,
        name: &str,
        class: &str,
        script: &str,
        more: &str,
    ) -> Result<()> {
        self.apply(&pod(name, class, script, more)).await?;
        self.ready(name).await
    }

    /// Waits until a Pod is ready.
    pub(crate) async fn ready(&self, pod: &str) -> Result<()> {
        let pod = format!("pod/{pod}");
        let ready = self
            .kubectl(["wait", "--for=condition=Ready", "--timeout=50s", &pod])
            .await;
        if let Err(e) = ready {
            let why = self.kubectl(["describe", &pod]).await?;
            bail!("{e:#}\n{why}");
        }
        Ok(())
    }

    /// Runs a shell command in a Pod, and returns what it prints.
    pub(crate) async fn shell(&self, pod: &str, command: &str) -> Result<String> {
        let args = ["exec", pod, "--", "sh", "-c", command];
        Ok(self.kubectl(args).await?.trim().to_owned())
    }

    /// A field of an object, by JSONPath.
    pub(crate) async fn field(&self, object: &str, path: &str) -> Result<String> {
        let output = format!("-ojsonpath={{{path}}}");
        self.kubectl(["get", object, &output]).await
    }

    /// Waits until a field of an object is as `is` wants it.
    pub(crate) async fn until_field(
        &self,
        object: &str,
        path: &str,
        is: impl Fn(&str) -> bool,
    ) -> Result<String> {
        let what = format!("{path} of {object}");
        wait::until(&what, PATIENCE, async || {
            let found = self.field(object, path).await.ok()?;
            is(&found).then_some(found)
        })
        .await
    }
}

/// The manifest of a Pod with one container of busybox.
pub(crate) fn pod(name: &str, class: &str, script: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  runtimeClassName: {class}
  terminationGracePeriodSeconds: 1
{more}
  containers:
  - name: main
    image: busybox:1
    command: [sh, -c, {script:?}]
    readinessProbe: {{exec: {{command: [\"true\"]}}, periodSeconds: 1}}
    resources: {{requests: {{cpu: 20m, memory: 16Mi}}, limits: {{cpu: \"1\", memory: 128Mi}}}}
"
    )
}

/// A script that serves `text` on port 8080.
pub(crate) fn web(text: &str) -> String {
    format!(
        "mkdir /www && echo {text} > /www/index.html && echo serving && exec httpd -f -p 8080 -h /www"
    )
}

/// The answer of an HTTP server, for which it is asked until it gives one.
pub(crate) async fn get(netns: Option<&Netns>, address: &str) -> Result<String> {
    let start = Instant::now();
    loop {
        let mut command = Cmd::new(&tools::program("busybox")?).args([
            "timeout",
            "5",
            "busybox",
            "wget",
            "-qO-",
            &format!("http://{address}/"),
        ]);
        if let Some(netns) = netns {
            command = command.netns(netns);
        }
        match command.run().await {
            Ok(text) => return Ok(text.trim().to_owned()),
            Err(e) if start.elapsed() > wait::SOON => return Err(e).context("no answer"),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
