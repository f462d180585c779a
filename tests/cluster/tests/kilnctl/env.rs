// SPDX-License-Identifier: Apache-2.0

//! The cluster of the cases, and how they call `kilnctl`.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Node;
use kiln_cluster::{account::deploy, control_plane::ControlPlane, standin::Standin};
use kiln_tests::{
    process::{Cmd, Output},
    suite::Fixture,
    tools, wait,
};
use kube::{
    Api, Discovery, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::discovery::verbs,
};
use serde_json::{Value, json};

/// Where controller and agents run.
pub(crate) const NAMESPACE: &str = "agent-sandbox-system";

/// How long `kilnctl` may take.
const DEADLINE: Duration = Duration::from_secs(300);

/// How long nothing new must come before a cluster counts as complete.
const SETTLES: Duration = Duration::from_secs(1);

/// Requests for lists at a time.
const AT_ONCE: usize = 16;

/// What comes and goes by itself.
const RESTLESS: [&str; 2] = ["Event", "Lease"];

pub(crate) struct Env {
    pub(crate) plane: ControlPlane,
    standin: Standin,
}

impl Env {
    pub(crate) async fn start() -> Result<Self> {
        let plane = ControlPlane::bare().await?;
        let standin = Standin::start(plane.client());
        let env = Self { plane, standin };
        env.add_node().await?;
        env.until_settled().await?;
        Ok(env)
    }

    /// Waits until the apiserver has made what every cluster has: its roles, priorities, services.
    async fn until_settled(&self) -> Result<()> {
        let mut last = BTreeSet::new();
        wait::until("an apiserver that is done", wait::SOON, async || {
            self.plane
                .kubectl(&["get", "--raw", "/readyz"])
                .await
                .ok()?;
            tokio::time::sleep(SETTLES).await;
            let now = self.everything().await.ok()?;
            let is_settled = now == last;
            last = now;
            is_settled.then_some(())
        })
        .await
    }

    /// A node, so that a DaemonSet has something to do.
    async fn add_node(&self) -> Result<()> {
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "node-0", "labels": {"kubernetes.io/os": "linux"}},
        });
        let nodes: Api<Node> = Api::all(self.plane.client());
        nodes
            .create(&PostParams::default(), &serde_json::from_value(node)?)
            .await?;
        // Admission has every new node wait for its kubelet.
        let ready = Patch::Merge(json!({"spec": {"taints": null}}));
        nodes
            .patch("node-0", &PatchParams::default(), &ready)
            .await?;
        Ok(())
    }

    /// Runs `kilnctl` as who has all rights, and returns what it left.
    pub(crate) async fn kilnctl(&self, words: &str) -> Result<Output> {
        self.kilnctl_as(self.plane.kubeconfig(), words).await
    }

    pub(crate) async fn kilnctl_as(&self, kubeconfig: &Path, words: &str) -> Result<Output> {
        run(&program()?, kubeconfig, &[], words).await
    }

    /// The same, and it must work. Returns what it says.
    pub(crate) async fn does(&self, words: &str) -> Result<String> {
        let output = self.kilnctl(words).await?;
        ensure!(
            output.status.success(),
            "kilnctl {words}: {}\n{}{}",
            output.status,
            output.text(),
            output.errors()
        );
        Ok(output.text())
    }

    /// The same, and it must fail, and name all of `names`.
    pub(crate) async fn refuses(&self, words: &str, names: &[&str]) -> Result<()> {
        let output = self.kilnctl(words).await?;
        fails(&output, names).with_context(|| format!("kilnctl {words}"))
    }

    /// Takes everything away.
    pub(crate) async fn purge(&self) -> Result<()> {
        self.does("disable --purge --yes").await.map(drop)
    }

    /// Takes away what a case that failed has left, for the sake of the next one.
    pub(crate) async fn recover(&self) {
        // What this cannot take away fails the next case too.
        self.kilnctl("disable --purge --yes").await.ok();
        // Also what a case made in the name of others.
        let definitions = deploy().join("crds").display().to_string();
        for words in [
            &["namespace", NAMESPACE][..],
            &["runtimeclass", "gvisor"],
            &["-f", &definitions],
        ] {
            let delete = [&["delete", "--ignore-not-found"], words].concat();
            self.plane.kubectl(&delete).await.ok();
        }
    }

    /// What kubectl says about objects, as JSON.
    pub(crate) async fn get(&self, words: &str) -> Result<Value> {
        let args: Vec<&str> = ["get", "-ojson"]
            .into_iter()
            .chain(words.split_whitespace())
            .collect();
        Ok(serde_json::from_str(&self.plane.kubectl(&args).await?)?)
    }

    /// Whether an object is there.
    pub(crate) async fn is_there(&self, words: &str) -> Result<bool> {
        let args: Vec<&str> = ["get", "--ignore-not-found", "-oname"]
            .into_iter()
            .chain(words.split_whitespace())
            .collect();
        Ok(!self.plane.kubectl(&args).await?.trim().is_empty())
    }

    /// Makes objects.
    pub(crate) async fn make(&self, objects: &[Value]) -> Result<()> {
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
        self.plane
            .kubectl_with(&["create", "-f", "-"], &list.to_string())
            .await?;
        Ok(())
    }

    /// Every object of the cluster: kind, namespace and name.
    pub(crate) async fn everything(&self) -> Result<BTreeSet<String>> {
        Ok(self.objects("").await?.iter().map(title).collect())
    }

    /// Every object with such labels.
    pub(crate) async fn objects(&self, labels: &str) -> Result<Vec<DynamicObject>> {
        let client = self.plane.client();
        // A kind that was just defined is named before it is served.
        let discover = async || Discovery::new(client.clone()).run().await.ok();
        let all = wait::until("every kind to be served", wait::SOON, discover).await?;
        let kinds = all
            .groups()
            .flat_map(kube::discovery::ApiGroup::recommended_resources);
        let kinds = kinds.filter(|(kind, can)| {
            can.supports_operation(verbs::LIST) && !RESTLESS.contains(&kind.kind.as_str())
        });
        let params = ListParams::default().labels(labels);
        let lists: Vec<Vec<DynamicObject>> = stream::iter(kinds.collect::<Vec<_>>())
            .map(|(kind, _)| {
                let api: Api<DynamicObject> = Api::all_with(client.clone(), &kind);
                let params = &params;
                async move {
                    let mut found = match api.list(params).await {
                        // It has gone since it was discovered.
                        Err(kube::Error::Api(status)) if status.code == 404 => {
                            return Ok(Vec::new());
                        }
                        found => found?.items,
                    };
                    for object in &mut found {
                        object.types = Some(kube::api::TypeMeta {
                            api_version: kind.api_version.clone(),
                            kind: kind.kind.clone(),
                        });
                    }
                    Ok::<_, kube::Error>(found)
                }
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        Ok(lists.concat())
    }

    /// Waits until there are these objects and no others.
    pub(crate) async fn until_only(&self, wanted: &BTreeSet<String>) -> Result<()> {
        let mut now = BTreeSet::new();
        let found = wait::until("what was there before", wait::SOON, async || {
            now = self.everything().await.ok()?;
            (now == *wanted).then_some(())
        });
        found.await.with_context(|| {
            let left: Vec<_> = now.difference(wanted).collect();
            let gone: Vec<_> = wanted.difference(&now).collect();
            format!("left: {left:?}, gone: {gone:?}")
        })
    }
}

impl Fixture for Env {
    async fn finish(self) -> Result<()> {
        drop(self.standin);
        self.plane.stop()
    }

    fn log(&self) -> String {
        let log = self.plane.dir().join("kube-controller-manager.log");
        format!(
            "--- end of kube-controller-manager's log\n{}",
            kiln_tests::process::tail(&log)
        )
    }
}

/// `Kind namespace/name`.
pub(crate) fn title(object: &DynamicObject) -> String {
    let kind = object.types.as_ref().map_or("?", |t| &t.kind);
    let namespace = object.namespace().unwrap_or_default();
    format!("{kind} {namespace}/{}", object.name_any())
}

/// Fails unless a command has failed with 1 and with words that hold all of `names`.
pub(crate) fn fails(output: &Output, names: &[&str]) -> Result<()> {
    let words = output.errors();
    ensure!(
        output.code() == 1,
        "code {}: {}{words}",
        output.code(),
        output.text()
    );
    for name in names {
        ensure!(words.contains(name), "no {name:?} in {words}");
    }
    Ok(())
}

/// Runs a program on the cluster of a kubeconfig, with more variables in its environment.
pub(crate) async fn run(
    program: &Path,
    kubeconfig: &Path,
    variables: &[(&str, &str)],
    words: &str,
) -> Result<Output> {
    let mut command = Cmd::new(program)
        .args(words.split_whitespace())
        .env("KUBECONFIG", kubeconfig)
        .deadline(DEADLINE);
    for (name, value) in variables {
        command = command.env(name, value);
    }
    command.output().await
}

/// The program of this workspace.
pub(crate) fn program() -> Result<PathBuf> {
    tools::ours("kilnctl").context("build it with `cargo build -p kilnctl`")
}
