// SPDX-License-Identifier: Apache-2.0

//! The cluster that cases share, and the words that they are written in.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kiln_cluster::cluster::Cluster;
use kiln_tests::{
    mounts,
    netns::Netns,
    place::Place,
    process::{Background, Cmd, Output, Proc, tail},
    suite::Fixture,
    tools, wait,
};

/// How long a start of the cluster may take.
const UP: Duration = Duration::from_secs(300);

/// What clusters change of the host for as long as they run.
const HOST_DIRS: [&str; 3] = ["/var/log/containers", "/var/lib/cni/results", "/run/kiln"];

pub(crate) struct Env {
    pub(crate) cluster: Cluster,
    cgroup: String,
    sysctls: BTreeMap<&'static str, String>,
    next: AtomicU32,
    /// Takes the cluster away when the test does not.
    place: Place,
}

impl Env {
    pub(crate) async fn start() -> Result<Self> {
        let place = Place::new()?;
        let cgroup = format!("{}/cluster", place.name());
        let env = Self {
            cluster: Cluster::new(&place.dir().join("c"), &cgroup)?,
            cgroup,
            sysctls: sysctls()?,
            next: AtomicU32::new(0),
            place,
        };
        env.kiln_cluster("up").await?;
        Ok(env)
    }

    /// Runs `kiln-cluster` on the cluster, and returns what it says.
    pub(crate) async fn kiln_cluster(&self, command: &str) -> Result<String> {
        self.kiln_cluster_in(self.cluster.dir(), command).await
    }

    pub(crate) async fn kiln_cluster_in(&self, dir: &Path, command: &str) -> Result<String> {
        Cmd::new(Path::new(env!("CARGO_BIN_EXE_kiln-cluster")))
            .args([command, "--cgroup", &self.cgroup])
            .env("KILN_CLUSTER", dir)
            .deadline(UP)
            .run()
            .await
    }

    /// The ids of what containerd keeps as the sandboxes of a namespace's Pods.
    pub(crate) async fn sandboxes(&self, namespace: &Namespace<'_>) -> Result<Vec<String>> {
        let socket = format!("unix://{}", self.cluster.dir().join("c.sock").display());
        let ids = Cmd::new(&tools::program("crictl")?)
            .args([
                "-r",
                &socket,
                "pods",
                "-q",
                "--no-trunc",
                "--namespace",
                &namespace.name,
            ])
            .run()
            .await?;
        Ok(ids.lines().map(str::to_owned).collect())
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// A namespace in which Pods can be made.
    pub(crate) async fn namespace(&self) -> Result<Namespace<'_>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let namespace = Namespace {
            env: self,
            name: format!("case-{number}"),
        };
        self.kubectl()
            .args(["create", "namespace", &namespace.name])
            .run()
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

    fn kubectl(&self) -> Cmd {
        // Without it, the error of the first run says what is missing.
        let program = tools::program("kubectl").unwrap_or_else(|_| PathBuf::from("kubectl"));
        Cmd::new(&program)
            .env("KUBECONFIG", self.cluster.kubeconfig())
            .env("HOME", self.place.dir())
    }

    fn expect_nothing_left(&self, netns: &Netns) -> Result<()> {
        let dir = self.cluster.dir();
        ensure!(!dir.exists(), "{} is left", dir.display());
        let mounts = mounts::below(dir)?;
        ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
        let processes = Proc::with(&dir.display().to_string());
        ensure!(processes.is_empty(), "processes are left: {processes:?}");
        let cgroups = self.cluster.cgroup().dirs();
        ensure!(cgroups.is_empty(), "cgroups are left: {cgroups:?}");
        // Only this test's descriptor keeps the namespace.
        let links = netns.links()?;
        ensure!(
            !links.contains(&"eth0".to_owned()),
            "links are left: {links:?}"
        );
        let now = sysctls()?;
        ensure!(now == self.sysctls, "{:?} became {now:?}", self.sysctls);
        let network = self.cgroup.replace('/', "-");
        for entry in HOST_DIRS.iter().flat_map(fs::read_dir).flatten().flatten() {
            let path = entry.path();
            let target = fs::read_link(&path).unwrap_or_default();
            let is_ours = target.starts_with(dir) || path.to_string_lossy().contains(&network);
            ensure!(!is_ours, "{} is left", path.display());
        }
        Ok(())
    }
}

/// After a failure: the place would end the cluster, but not put sysctls back.
impl Drop for Env {
    #[expect(clippy::print_stderr, reason = "there is nobody to return an error to")]
    fn drop(&mut self) {
        let done = std::process::Command::new(env!("CARGO_BIN_EXE_kiln-cluster"))
            .args(["down", "--cgroup", &self.cgroup])
            .env("KILN_CLUSTER", self.cluster.dir())
            .stdout(Stdio::null())
            .status();
        if let Err(e) = done {
            eprintln!("kiln-cluster down: {e}");
        }
    }
}

impl Fixture for Env {
    async fn finish(self) -> Result<()> {
        let netns = self.cluster.netns()?;
        self.kiln_cluster("down").await?;
        self.expect_nothing_left(&netns)?;
        // A second time there is nothing to do.
        self.kiln_cluster("down").await?;
        self.place.destroy()
    }

    fn log(&self) -> String {
        let logs = ["containerd", "kubelet"];
        logs.map(|name| {
            let log = self.cluster.dir().join(format!("log/{name}.log"));
            format!("--- end of {name}'s log\n{}\n", tail(&log))
        })
        .concat()
    }
}

/// What kubelet sets.
fn sysctls() -> Result<BTreeMap<&'static str, String>> {
    let names = [
        "vm/overcommit_memory",
        "kernel/panic",
        "kernel/panic_on_oops",
    ];
    let read = |name| Ok((name, fs::read_to_string(Path::new("/proc/sys").join(name))?));
    names.into_iter().map(read).collect()
}

/// A namespace of one case.
pub(crate) struct Namespace<'a> {
    env: &'a Env,
    name: String,
}

impl Namespace<'_> {
    fn command<'s>(&self, args: impl IntoIterator<Item = &'s str>) -> Cmd {
        self.env.kubectl().args(["-n", &self.name]).args(args)
    }

    /// Runs kubectl, and returns what it says.
    pub(crate) async fn kubectl<'s>(
        &self,
        args: impl IntoIterator<Item = &'s str>,
    ) -> Result<String> {
        self.command(args).run().await
    }

    /// Runs kubectl with something to read, and returns all of what it does.
    pub(crate) async fn kubectl_with<'s>(
        &self,
        args: impl IntoIterator<Item = &'s str>,
        input: &str,
    ) -> Result<Output> {
        self.command(args).input(input.as_bytes()).output().await
    }

    /// Starts kubectl.
    pub(crate) fn background<'s>(
        &self,
        args: impl IntoIterator<Item = &'s str>,
    ) -> Result<Background> {
        let number = self.env.next.fetch_add(1, Ordering::Relaxed);
        let log = self.env.place.dir().join(format!("kubectl-{number}.log"));
        self.command(args).background(&log)
    }

    /// kubectl's words on a terminal, which `script` makes.
    pub(crate) async fn on_a_terminal(&self, args: &str) -> Result<String> {
        let kubectl = tools::program("kubectl")?;
        let words = format!("{} -n {} {args}", kubectl.display(), self.name);
        Cmd::new(&tools::program("script")?)
            .args(["-qec", &words, "/dev/null"])
            .env("KUBECONFIG", self.env.cluster.kubeconfig())
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
        wait::until(&what, Duration::from_secs(60), async || {
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
