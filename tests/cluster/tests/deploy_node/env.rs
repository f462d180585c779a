// SPDX-License-Identifier: Apache-2.0

//! The cluster, its images, and the words that the cases are written in.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kiln_cluster::{
    account::{NAMESPACE, deploy},
    cluster::Private,
    mission::AGENT,
};
use kiln_images::release::release;
use kiln_tests::{
    agent,
    process::{Cmd, Output},
    suite::Fixture,
    tools, wait,
};
use serde_json::{Value, json};

/// The label of nodes on which Pods of the class can run.
pub(crate) const LABEL: &str = "kiln.dev/gvisor";

/// How many sandboxes the node holds, by [`AGENT`].
const WARM: i64 = 3;

/// How long `kilnctl` may take.
const DEADLINE: Duration = Duration::from_secs(400);

/// Directories that the node makes for its first Pod, whatever its handler.
const NODES_OWN: [&str; 2] = ["cni-data", "runc"];

/// Kinds of objects that an installation could leave, also in namespaces of others.
const KINDS: [&str; 17] = [
    "crd",
    "namespace",
    "clusterrole",
    "clusterrolebinding",
    "role",
    "rolebinding",
    "validatingadmissionpolicy",
    "validatingadmissionpolicybinding",
    "runtimeclass",
    "serviceaccount",
    "configmap",
    "service",
    "networkpolicy",
    "pod",
    "daemonset",
    "deployment",
    "job",
];

/// How long it may take until everything is as it was.
const SETTLED: Duration = Duration::from_secs(60);

pub(crate) struct Env {
    private: Private,
}

/// A Pod of the default namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) is_ready: bool,
    uid: String,
    restarts: i64,
}

impl Env {
    pub(crate) async fn start() -> Result<Self> {
        let program = Path::new(env!("CARGO_BIN_EXE_kiln-cluster"));
        let private = Private::start_bare(program).await?;
        let env = Self { private };
        fs::write(env.patch_file(), env.patch()?)?;
        Ok(env)
    }

    fn patch_file(&self) -> PathBuf {
        self.private.dir().join("patch.yaml")
    }

    /// The flag of `kilnctl enable` for what is different on this node.
    pub(crate) fn patched(&self) -> String {
        format!("--patch {}", self.patch_file().display())
    }

    /// What is different on this node: everything is below the cluster's directory.
    fn patch(&self) -> Result<String> {
        let place = self.private.place().name();
        let dir = self.private.cluster().dir();
        let at = |name: &str| dir.join(name).display().to_string();
        let socket = agent::socket(place);
        let state = socket.parent().context("no directory")?;
        let config = format!(
            "socket = \"{}\"\nstate = \"{}\"\nruntime_config = \"{}\"\npause = \"/kiln-pause\"\n\
             cgroup = \"/{place}/warm\"\nmetrics = \"0.0.0.0:9477\"\n{AGENT}\
             [install]\nfrom = \"/\"\ndir = \"{}\"\nruntime_root = \"{}\"\n\
             [install.containerd]\nsocket = \"{}\"\nctr = \"{}\"\nrestart = {:?}\n",
            socket.display(),
            state.display(),
            at("etc/kiln/runsc.toml"),
            at("kiln"),
            at("runsc"),
            self.private.containerd_socket().display(),
            tools::program("ctr")?.display(),
            self.private.restart_command(),
        );
        let host = |name: &str, path: &Path, kind: &str| json!({"name": name, "hostPath": {"path": path, "type": kind}});
        let mount = |name: &str, path: &Path| json!({"name": name, "mountPath": path});
        let cgroups = Path::new("/sys/fs/cgroup");
        let daemon_set = json!({
            "kind": "DaemonSet", "metadata": {"name": "kiln-node-agent"},
            "spec": {"template": {"spec": {"volumes": [
                {"name": "config", "configMap": {"name": "kiln-node-agent"}},
                host("node", dir, "Directory"),
                host("state", state, "DirectoryOrCreate"),
                host("cgroup", cgroups, "Directory"),
                {"name": "tmp", "emptyDir": {"medium": "Memory"}},
            ], "containers": [{
                "name": "kiln-node-agent", "image": "kiln-node-agent:dev",
                "args": ["--config=/etc/kiln-agent/agent.toml"],
                "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                "ports": [{"name": "metrics", "containerPort": 9477}],
                "readinessProbe": {"httpGet": {"path": "/readyz", "port": "metrics"}, "periodSeconds": 1},
                "securityContext": {"privileged": true, "readOnlyRootFilesystem": true},
                "volumeMounts": [
                    mount("config", Path::new("/etc/kiln-agent")),
                    {"name": "node", "mountPath": dir, "mountPropagation": "HostToContainer"},
                    mount("state", state),
                    mount("cgroup", cgroups),
                    mount("tmp", Path::new("/tmp")),
                ],
            }]}}},
        });
        let map = json!({"kind": "ConfigMap", "metadata": {"name": "kiln-node-agent"},
            "data": {"agent.toml": config}});
        Ok(format!("{map}\n---\n{daemon_set}\n"))
    }

    /// Makes the images with this tag, and gives them to containerd. `dev` is what was built;
    /// `broken` has a runsc that never answers, any other is another build of the same.
    pub(crate) async fn import(&self, tag: &str) -> Result<()> {
        let dir = self.private.dir().join(format!("programs-{tag}"));
        fs::create_dir_all(&dir)?;
        let target = tools::target_dir()?;
        let arch = std::env::consts::ARCH;
        let mut dirs = vec![
            target.join(format!("{arch}-unknown-linux-gnu/debug")),
            target.join("small"),
        ];
        symlink(tools::runsc()?, dir.join("runsc"))?;
        match tag {
            "dev" => {}
            "broken" => {
                fs::remove_file(dir.join("runsc"))?;
                fs::copy(tools::pause()?, dir.join("runsc"))?;
            }
            _ => {
                let shim = dir.join("containerd-shim-kiln-v2");
                let mut bytes = fs::read(tools::installed_shim()?)?;
                bytes.extend_from_slice(tag.as_bytes());
                fs::write(&shim, bytes)?;
                fs::set_permissions(&shim, fs::Permissions::from_mode(0o755))?;
            }
        }
        dirs.insert(0, dir.clone());
        let out = dir.join("images");
        let library = "docker.io/library";
        let images = tokio::task::spawn_blocking({
            let (dirs, tag) = (dirs.clone(), tag.to_owned());
            move || release(&dirs, library, &tag, None, None, &out)
        });
        let images = images
            .await?
            .context("build them with `make test-deploy-node`")?;
        ensure!(
            images.len() >= 2,
            "only {images:?}: build them with `make test-deploy-node`"
        );
        for image in images {
            Cmd::new(&tools::program("ctr")?)
                .args(["-n", "k8s.io", "-a"])
                .args([self.private.containerd_socket()])
                .args(["images", "import", &image.display().to_string()])
                .deadline(DEADLINE)
                .run()
                .await?;
        }
        Ok(fs::remove_dir_all(dir)?)
    }

    /// Runs `kilnctl`.
    pub(crate) async fn kilnctl(&self, words: &str) -> Result<Output> {
        Cmd::new(&tools::ours("kilnctl")?)
            .args(words.split_whitespace())
            .env("KUBECONFIG", self.private.cluster().kubeconfig())
            .deadline(DEADLINE)
            .output()
            .await
    }

    /// The same, and it must work.
    pub(crate) async fn does(&self, words: &str) -> Result<String> {
        let output = self.kilnctl(words).await?;
        if !output.status.success() {
            let state = self.kubectl("describe pods,sandboxnodes -A").await;
            anyhow::bail!(
                "kilnctl {words}: {}{}\n{}",
                output.text(),
                output.errors(),
                state.unwrap_or_default()
            );
        }
        Ok(output.text())
    }

    /// The same, and it must fail. Returns why.
    pub(crate) async fn kilnctl_fails(&self, words: &str) -> Result<String> {
        let output = self.kilnctl(words).await?;
        ensure!(output.code() == 1, "kilnctl {words}: {}", output.text());
        Ok(output.errors())
    }

    pub(crate) async fn kubectl(&self, words: &str) -> Result<String> {
        let command = self.private.kubectl(words.split_whitespace())?;
        command.deadline(DEADLINE).run().await
    }

    async fn get(&self, words: &str) -> Result<Value> {
        let text = self.kubectl(&format!("get -ojson {words}")).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// A manifest of the documentation.
    pub(crate) fn example(&self, name: &str) -> String {
        let path = deploy().join(format!("examples/{name}.yaml"));
        path.display().to_string()
    }

    /// The value of the node's label.
    pub(crate) async fn label(&self) -> Result<String> {
        let node = self
            .get(&format!("node {}", self.private.cluster().node()))
            .await?;
        let label = &node["metadata"]["labels"][LABEL];
        Ok(label.as_str().unwrap_or_default().to_owned())
    }

    /// Waits until the node's SandboxNode has a condition with this status.
    pub(crate) async fn expect_condition(&self, kind: &str, status: &str) -> Result<()> {
        let wanted = format!("--for=condition={kind}={status}");
        self.kubectl(&format!("wait {wanted} --timeout=60s sandboxnode --all"))
            .await
            .map(drop)
    }

    /// Takes what was installed out of containerd's own file, and starts containerd anew.
    pub(crate) async fn rewrite_containerd_config(&self) -> Result<()> {
        let config = self.private.cluster().dir().join("etc/containerd.toml");
        let text = fs::read_to_string(&config)?;
        let without = text.lines().filter(|line| !line.starts_with("imports"));
        let text: String = without.map(|line| format!("{line}\n")).collect();
        fs::write(config, text)?;
        let words = self.private.restart_command();
        let (program, args) = words.split_first().context("no command")?;
        Cmd::new(Path::new(program))
            .args(args)
            .deadline(DEADLINE)
            .run()
            .await
            .map(drop)
    }

    /// Waits for an event of the node with this reason, whose words contain `words`.
    pub(crate) async fn until_event(&self, reason: &str, words: &str) -> Result<()> {
        let of_node = format!("involvedObject.kind=Node,reason={reason}");
        let list = format!("events -n default --field-selector {of_node}");
        wait::until(&format!("an event {reason}"), SETTLED, async || {
            let events = self.get(&list).await.ok()?;
            let events = events["items"].as_array()?.clone();
            let said = |e: &Value| e["message"].as_str().is_some_and(|m| m.contains(words));
            events.iter().any(said).then_some(())
        })
        .await
    }

    /// Waits until the node holds all the sandboxes that it is to hold.
    pub(crate) async fn until_warm(&self) -> Result<()> {
        self.until_total("ready", WARM).await
    }

    /// Waits until some Pods have started in sandboxes that were booted before them.
    pub(crate) async fn until_adopted(&self) -> Result<()> {
        self.until_total("adopted", 1).await
    }

    async fn until_total(&self, field: &str, least: i64) -> Result<()> {
        let node = format!("sandboxnode {}", self.private.cluster().node());
        wait::until(&format!("{least} {field}"), SETTLED, async || {
            let node = self.get(&node).await.ok()?;
            (node["status"]["total"][field].as_i64()? >= least).then_some(())
        })
        .await
    }

    /// The Pods of the default namespace, by name.
    pub(crate) async fn pods(&self) -> Result<Vec<Pod>> {
        let list = self.get("pods").await?;
        let items = list["items"].as_array().context("no list")?;
        let mut pods: Vec<Pod> = items.iter().map(pod).collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pods)
    }

    /// Fails unless a Pod runs on gVisor, and does what it is told.
    pub(crate) async fn expect_gvisor(&self, pod: &str) -> Result<()> {
        let command = ["exec", pod, "--", "uname", "-r"];
        let kernel = self.private.kubectl(command)?.run().await?;
        ensure!(kiln_tests::is_gvisors(&kernel), "{pod} is on {kernel}");
        Ok(())
    }

    /// What is installed: the record of it.
    pub(crate) fn installed(&self) -> Result<String> {
        let record = self.private.cluster().dir().join("kiln/installed.json");
        Ok(fs::read_to_string(record)?)
    }

    /// A Pod is refused at once, and whoever makes Pods for a user is told by an event.
    pub(crate) async fn refuses_new_pods(&self) -> Result<()> {
        let spec = json!({"runtimeClassName": "gvisor", "restartPolicy": "Never",
            "containers": [{"name": "c", "image": "busybox"}]});
        let pod =
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "late"}, "spec": spec});
        let made = self.apply(&pod).await?;
        let why = "RuntimeClass \"gvisor\" not found";
        ensure!(
            !made.status.success() && made.errors().contains(why),
            "{}{}",
            made.text(),
            made.errors()
        );
        let job = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "late"},
            "spec": {"template": {"spec": spec}}});
        self.apply(&job).await?;
        wait::until("an event", SETTLED, async || {
            let events = self.get("events").await.ok()?;
            let events = events["items"].as_array()?.clone();
            let said = |e: &Value| e["message"].as_str().is_some_and(|m| m.contains(why));
            events.iter().any(said).then_some(())
        })
        .await?;
        self.kubectl("delete job late").await.map(drop)
    }

    async fn apply(&self, object: &Value) -> Result<Output> {
        let command = self.private.kubectl(["apply", "-f", "-"])?;
        command.input(object.to_string().as_bytes()).output().await
    }

    /// What there is on node and cluster that an installation could leave.
    pub(crate) async fn listing(&self) -> Result<BTreeSet<String>> {
        let dir = self.private.cluster().dir();
        let mut found = BTreeSet::new();
        for path in ["", "etc", "bin", "runsc"] {
            for entry in fs::read_dir(dir.join(path)).into_iter().flatten().flatten() {
                let path = entry.path();
                if !NODES_OWN.iter().any(|own| path.ends_with(own)) {
                    found.insert(path.display().to_string());
                }
            }
        }
        let config = fs::read_to_string(dir.join("etc/containerd.toml"))?;
        found.insert(config);
        let state = agent::socket(self.private.place().name());
        if state.parent().is_some_and(Path::exists) {
            found.insert(state.display().to_string());
        }
        let objects = self.get(&format!("-A {}", KINDS.join(","))).await?;
        let objects = objects["items"].as_array().context("no list")?;
        found.extend(objects.iter().filter_map(title));
        let node = self
            .get(&format!("node {}", self.private.cluster().node()))
            .await?;
        found.insert(node["metadata"]["labels"].to_string());
        Ok(found)
    }

    /// Waits until node and cluster are as they were.
    pub(crate) async fn until_listing(&self, wanted: &BTreeSet<String>) -> Result<()> {
        let mut now = BTreeSet::new();
        let found = wait::until("what was there before", SETTLED, async || {
            now = self.listing().await.ok()?;
            (now == *wanted).then_some(())
        });
        found.await.with_context(|| {
            let left: Vec<_> = now.difference(wanted).collect();
            let gone: Vec<_> = wanted.difference(&now).collect();
            format!("left: {left:?}, gone: {gone:?}")
        })
    }
}

/// `Kind namespace/name`; `None` for what Kubernetes makes by itself after the node has come up: an
/// account for each of its own controllers, and what these keep for themselves.
fn title(object: &Value) -> Option<String> {
    let kind = text(&object["kind"]);
    let namespace = text(&object["metadata"]["namespace"]);
    let is_its_own = ["ServiceAccount", "ConfigMap"].contains(&kind.as_str());
    if is_its_own && namespace.starts_with("kube-") {
        return None;
    }
    Some(format!(
        "{kind} {namespace}/{}",
        text(&object["metadata"]["name"])
    ))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn pod(object: &Value) -> Pod {
    let statuses = object["status"]["containerStatuses"].as_array();
    let statuses = || statuses.into_iter().flatten();
    Pod {
        name: text(&object["metadata"]["name"]),
        uid: text(&object["metadata"]["uid"]),
        is_ready: statuses().count() > 0 && statuses().all(|s| s["ready"] == true),
        restarts: statuses().filter_map(|s| s["restartCount"].as_i64()).sum(),
    }
}

impl Fixture for Env {
    async fn finish(self) -> Result<()> {
        self.private.end().await
    }

    fn log(&self) -> String {
        let pods = self.private.cluster().dir().join("log/pods");
        let agents = fs::read_dir(pods).into_iter().flatten().flatten();
        let of_ours = |p: &PathBuf| p.to_string_lossy().contains(NAMESPACE);
        let dirs = agents.map(|e| e.path()).filter(of_ours);
        let logs = dirs.flat_map(|d| {
            fs::read_dir(d.join("kiln-node-agent"))
                .into_iter()
                .flatten()
                .flatten()
        });
        let logs: String = logs.map(|l| kiln_tests::process::tail(&l.path())).collect();
        format!("{}--- logs of agents\n{logs}", self.private.log())
    }
}
