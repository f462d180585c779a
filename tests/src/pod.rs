// SPDX-License-Identifier: Apache-2.0

//! Pods and containers of a [`Node`], as a kubelet would make them through CRI.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cri::v1,
    netns::Netns,
    node::{Node, is_shim_of},
    process::{Proc, tail},
    wait,
};

/// The image in which containers run unless they say otherwise: busybox.
pub const BUSYBOX: &str = "docker.io/library/busybox:latest";

/// The image with the programs of crate `kiln-guest` beside busybox.
pub const GUEST: &str = "docker.io/library/kiln-guest:latest";

/// For how long the agent may be late for one Pod after the other.
const LATE: Duration = Duration::from_secs(300);

/// How long containers may take to do what tests ask of them.
const ENDS: Duration = Duration::from_secs(60);

/// Seconds for an exec.
const EXEC_SECONDS: i64 = 60;

/// A Pod to be run.
#[derive(Debug, Clone)]
#[must_use]
pub struct PodBuilder<'a> {
    node: &'a Node,
    handler: String,
    config: v1::PodSandboxConfig,
}

impl<'a> PodBuilder<'a> {
    pub(crate) fn new(node: &'a Node, handler: &str) -> Self {
        let name = node.unique(handler);
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "kiln-test".to_owned(),
                name: name.clone(),
                attempt: 0,
            }),
            hostname: name.clone(),
            log_directory: node.dir().join("logs").join(&name).display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: node.cgroup().parent(),
                ..v1::LinuxPodSandboxConfig::default()
            }),
            ..v1::PodSandboxConfig::default()
        };
        Self {
            node,
            handler: handler.to_owned(),
            config,
        }
    }

    /// Changes anything of the configuration.
    pub fn with(mut self, change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Adds an annotation.
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.with(|c| drop(c.annotations.insert(key.to_owned(), value.to_owned())))
    }

    /// Sets the limits that CRI names for the whole Pod.
    pub fn limits(self, limits: v1::LinuxContainerResources) -> Self {
        self.with(|c| c.linux.get_or_insert_default().resources = Some(limits))
    }

    /// Has the Pod use the host's network: the node's.
    pub fn host_network(self) -> Self {
        self.with(|c| {
            let security = c
                .linux
                .get_or_insert_default()
                .security_context
                .get_or_insert_default();
            security.namespace_options.get_or_insert_default().network =
                v1::NamespaceMode::Node.into();
        })
    }

    /// Runs the Pod's sandbox. One of [`WARM`](crate::node::WARM) adopts where the node has an
    /// agent.
    ///
    /// Pods that are to adopt take turns: each finds a sandbox ready that no other is after. A busy
    /// machine makes the agent late, and a Pod that has started cold for that is run again.
    ///
    /// # Errors
    /// containerd's, and why a Pod that was to adopt has started cold.
    pub async fn run(mut self) -> Result<Pod<'a>> {
        let node = self.node;
        if !node.is_warm(&self.handler) {
            return self.run_cold_or_warm().await;
        }
        // Held while a Pod starts, which is what the others wait for.
        let _turn = node.turn().await;
        let start = Instant::now();
        loop {
            node.agent()?.expect_some().await?;
            let pod = self.clone().run_cold_or_warm().await?;
            if pod.sandbox() != pod.id() {
                return Ok(pod);
            }
            let why = node.why_cold(pod.id()).await?;
            ensure!(
                is_late(&why),
                "Pod {} has started cold: {why}\n{}",
                pod.id(),
                node.log()
            );
            pod.remove().await?;
            let metadata = self.config.metadata.get_or_insert_default();
            metadata.attempt += 1;
            ensure!(
                start.elapsed() < LATE,
                "the agent was late for {} Pods\n{}",
                metadata.attempt,
                node.log()
            );
        }
    }

    /// Runs the Pod's sandbox, whether it adopts or starts cold.
    ///
    /// # Errors
    /// containerd's.
    pub async fn run_cold_or_warm(self) -> Result<Pod<'a>> {
        let Self {
            node,
            handler,
            config,
        } = self;
        let log_dir = PathBuf::from(&config.log_directory);
        std::fs::create_dir_all(&log_dir).with_context(|| format!("make {}", log_dir.display()))?;
        let request = v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.clone(),
        };
        let answer = node.cri().runtime().run_pod_sandbox(request).await;
        let answer = answer.with_context(|| format!("run a Pod of handler {handler}"))?;
        Ok(Pod {
            node,
            handler,
            config,
            id: answer.into_inner().pod_sandbox_id,
            log_dir,
        })
    }
}

/// Whether a Pod has started cold only since its agent was late, by what the shim says.
#[must_use]
pub fn is_late(why: &str) -> bool {
    why.starts_with("no answer within ") || why == "no warm sandbox: empty"
}

/// A running Pod. It stays when this is dropped; a suite removes what is left at its end.
#[derive(Debug)]
pub struct Pod<'a> {
    node: &'a Node,
    handler: String,
    config: v1::PodSandboxConfig,
    id: String,
    log_dir: PathBuf,
}

impl<'a> Pod<'a> {
    /// The id of its sandbox.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The node that it runs on.
    pub fn node(&self) -> &'a Node {
        self.node
    }

    /// The handler that it runs by.
    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// A container that runs `command` in busybox, to be described and started.
    pub fn container<A: AsRef<str>>(
        &self,
        command: impl IntoIterator<Item = A>,
    ) -> ContainerBuilder<'_, 'a> {
        ContainerBuilder::new(
            self,
            command.into_iter().map(|w| w.as_ref().to_owned()).collect(),
        )
    }

    /// A container that runs a shell script.
    pub fn script(&self, script: &str) -> ContainerBuilder<'_, 'a> {
        self.container(["sh", "-c", script])
    }

    /// Starts its first container, and waits for the shim's word that it was made in slots.
    ///
    /// # Errors
    /// When it does not run, or was made otherwise; with the end of containerd's log.
    pub async fn start_with_gofer(&self) -> Result<Container<'_, 'a>> {
        let container = self.script("echo fine; sleep 3600").start().await?;
        container.logged("fine").await?;
        let is_said = || {
            let lines = self.node.log_lines("is made in slots").unwrap_or_default();
            lines.iter().any(|line| line.contains(&self.id))
        };
        let said = wait::until_true("a container in slots", wait::SOON, is_said);
        said.await.with_context(|| self.node.log())?;
        Ok(container)
    }

    /// Fails unless a privileged container is refused, in words, and another one runs.
    ///
    /// # Errors
    /// What is otherwise.
    pub async fn expect_privileged_refused(&self) -> Result<()> {
        let refused = self.idle().privileged().start().await;
        let refused = refused.map(|c| c.id().to_owned());
        ensure!(
            refused
                .as_ref()
                .is_err_and(|e| format!("{e:#}").contains("privileged containers are refused")),
            "{refused:?}"
        );
        let other = self.idle().start().await?;
        ensure!(other.is_running().await?);
        Ok(())
    }

    /// A container that does nothing until it is told to end.
    pub fn idle(&self) -> ContainerBuilder<'_, 'a> {
        self.script("trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done")
    }

    /// The sandbox's status.
    ///
    /// # Errors
    /// containerd's.
    pub async fn status(&self) -> Result<v1::PodSandboxStatus> {
        let request = v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .node
            .cri()
            .runtime()
            .pod_sandbox_status(request)
            .await?
            .into_inner();
        answer.status.context("a Pod without status")
    }

    /// The sandbox's IP address.
    ///
    /// # Errors
    /// When it has none.
    pub async fn ip(&self) -> Result<String> {
        Ok(self
            .status()
            .await?
            .network
            .context("a Pod without network")?
            .ip)
    }

    /// The network namespace that CNI has set up for it.
    ///
    /// # Errors
    /// When it has none of its own, or is gone.
    pub fn netns(&self) -> Result<Netns> {
        let config = self.node.bundle(&self.id).join("config.json");
        let text = std::fs::read(config).context("read the Pod's spec")?;
        let spec: serde_json::Value = serde_json::from_slice(&text)?;
        let all = spec["linux"]["namespaces"].as_array();
        let network = all.and_then(|all| all.iter().find(|n| n["type"] == "network"));
        let path = network.and_then(|n| n["path"].as_str());
        Netns::open(Path::new(path.context("no network of its own")?))
    }

    /// The one shim of the Pod.
    ///
    /// # Errors
    /// When it has none, or more.
    pub fn shim(&self) -> Result<Proc> {
        self.shim_among(&self.node.processes())
    }

    /// The same where the processes of the node were listed before: there may be thousands.
    ///
    /// # Errors
    /// When it has none, or more.
    pub fn shim_among(&self, all: &[Proc]) -> Result<Proc> {
        let of_the_pod = all.iter().filter(|p| is_shim_of(p, &self.id));
        let shims: Vec<_> = of_the_pod.collect();
        ensure!(
            shims.len() == 1,
            "{} shims of Pod {}: {shims:?}",
            shims.len(),
            self.id
        );
        Ok(shims[0].clone())
    }

    /// Its host name.
    pub fn hostname(&self) -> &str {
        &self.config.hostname
    }

    /// The id by which the runtime knows the Pod's sandbox.
    pub fn sandbox(&self) -> String {
        // Without a record the Pod is gone, and its own id is as good as any.
        let known = self.node.sandbox_of(&self.id);
        known.unwrap_or_else(|_| self.id.clone())
    }

    /// The runtime's processes of the Pod whose program name starts with `name`: `runsc-sandbox`,
    /// `runsc-gofer`.
    pub fn runtime_processes(&self, name: &str) -> Vec<Proc> {
        self.runtime_processes_among(&self.node.processes(), name)
    }

    fn runtime_processes_among(&self, all: &[Proc], name: &str) -> Vec<Proc> {
        let sandbox = self.sandbox();
        let of_the_pod = all
            .iter()
            .filter(|p| p.argv.starts_with(name) && p.argv.contains(&sandbox));
        of_the_pod.cloned().collect()
    }

    /// Its sentry.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn sentry(&self) -> Result<Proc> {
        self.sentry_among(&self.node.processes())
    }

    /// The same where the processes of the node were listed before.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn sentry_among(&self, all: &[Proc]) -> Result<Proc> {
        let mut found = self.runtime_processes_among(all, "runsc-sandbox");
        ensure!(found.len() == 1, "{found:?}");
        found.pop().context("no sentry")
    }

    /// Stops the Pod's containers and its sandbox.
    ///
    /// # Errors
    /// containerd's.
    pub async fn stop(&self) -> Result<()> {
        let request = v1::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.node
            .cri()
            .runtime()
            .stop_pod_sandbox(request)
            .await
            .context("stop the Pod")?;
        Ok(())
    }

    /// Stops and removes the Pod, and checks that nothing bears its id any more.
    ///
    /// # Errors
    /// containerd's, or what is left.
    pub async fn remove(self) -> Result<()> {
        self.node.remove_pod(&self.id).await?;
        self.node.expect_gone(&self.id).await
    }
}

/// A container to be started.
#[derive(Debug)]
#[must_use]
pub struct ContainerBuilder<'p, 'n> {
    pod: &'p Pod<'n>,
    config: v1::ContainerConfig,
}

impl<'p, 'n> ContainerBuilder<'p, 'n> {
    fn new(pod: &'p Pod<'n>, args: Vec<String>) -> Self {
        let name = pod.node.unique("c");
        let image = v1::ImageSpec {
            image: BUSYBOX.to_owned(),
            ..v1::ImageSpec::default()
        };
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: name.clone(),
                attempt: 0,
            }),
            image: Some(image),
            command: args,
            log_path: format!("{name}.log"),
            linux: Some(v1::LinuxContainerConfig::default()),
            ..v1::ContainerConfig::default()
        };
        Self { pod, config }
    }

    /// Changes anything of the configuration.
    pub fn with(mut self, change: impl FnOnce(&mut v1::ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    fn linux(self, change: impl FnOnce(&mut v1::LinuxContainerConfig)) -> Self {
        self.with(|c| change(c.linux.get_or_insert_default()))
    }

    /// Runs another image.
    pub fn image(self, image: &str) -> Self {
        self.with(|c| c.image.get_or_insert_default().image = image.to_owned())
    }

    /// Limits memory, in bytes.
    pub fn memory(self, bytes: i64) -> Self {
        self.linux(|l| l.resources.get_or_insert_default().memory_limit_in_bytes = bytes)
    }

    /// Limits CPU, in thousandths of one.
    pub fn cpu(self, millis: i64) -> Self {
        self.linux(|l| {
            let resources = l.resources.get_or_insert_default();
            resources.cpu_period = 100_000;
            resources.cpu_quota = millis * 100;
        })
    }

    /// Sets a variable of its environment.
    pub fn env(self, key: &str, value: &str) -> Self {
        self.with(|c| {
            c.envs.push(v1::KeyValue {
                key: key.to_owned(),
                value: value.into(),
            });
        })
    }

    /// Mounts a file or directory of the host.
    pub fn mount(self, host: &Path, inside: &str) -> Self {
        self.mount_with(host, inside, |_| {})
    }

    /// Mounts a file or directory of the host read-only.
    pub fn mount_read_only(self, host: &Path, inside: &str) -> Self {
        self.mount_with(host, inside, |m| m.readonly = true)
    }

    fn mount_with(self, host: &Path, inside: &str, change: impl FnOnce(&mut v1::Mount)) -> Self {
        let mut mount = v1::Mount {
            host_path: host.display().to_string(),
            container_path: inside.to_owned(),
            ..v1::Mount::default()
        };
        change(&mut mount);
        self.with(|c| c.mounts.push(mount))
    }

    /// Makes its root file system read-only.
    pub fn read_only(self) -> Self {
        self.linux(|l| l.security_context.get_or_insert_default().readonly_rootfs = true)
    }

    /// Makes it privileged.
    pub fn privileged(self) -> Self {
        self.linux(|l| l.security_context.get_or_insert_default().privileged = true)
    }

    /// Gives it an input that can be attached to; `once` closes it after the first client.
    pub fn stdin(self, once: bool) -> Self {
        self.with(|c| {
            c.stdin = true;
            c.stdin_once = once;
        })
    }

    /// Gives it a terminal.
    pub fn tty(self) -> Self {
        self.with(|c| c.tty = true)
    }

    /// Creates the container without starting it.
    ///
    /// # Errors
    /// containerd's.
    pub async fn create(self) -> Result<Container<'p, 'n>> {
        let Self { pod, config } = self;
        let log = pod.log_dir.join(&config.log_path);
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = pod
            .node
            .cri()
            .runtime()
            .create_container(request)
            .await
            .context("create a container")?;
        Ok(Container {
            pod,
            id: answer.into_inner().container_id,
            log,
        })
    }

    /// Creates and starts the container.
    ///
    /// # Errors
    /// containerd's.
    pub async fn start(self) -> Result<Container<'p, 'n>> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }
}

/// What an exec left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// A container.
#[derive(Debug)]
pub struct Container<'p, 'n> {
    pod: &'p Pod<'n>,
    id: String,
    log: PathBuf,
}

impl<'p, 'n> Container<'p, 'n> {
    /// The container `id` of a Pod, of which the log is not known.
    pub fn found(pod: &'p Pod<'n>, id: &str) -> Self {
        Self {
            pod,
            id: id.to_owned(),
            log: pod.log_dir.clone(),
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its Pod.
    pub fn pod(&self) -> &'p Pod<'n> {
        self.pod
    }

    fn node(&self) -> &'n Node {
        self.pod.node
    }

    /// Starts it.
    ///
    /// # Errors
    /// containerd's.
    pub async fn start(&self) -> Result<()> {
        let request = v1::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.node()
            .cri()
            .runtime()
            .start_container(request)
            .await
            .context("start the container")?;
        Ok(())
    }

    /// Its status.
    ///
    /// # Errors
    /// containerd's.
    pub async fn status(&self) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .node()
            .cri()
            .runtime()
            .container_status(request)
            .await?
            .into_inner();
        answer.status.context("a container without status")
    }

    /// Whether it runs.
    ///
    /// # Errors
    /// containerd's.
    pub async fn is_running(&self) -> Result<bool> {
        Ok(self.status().await?.state() == v1::ContainerState::ContainerRunning)
    }

    /// Waits for its end, and returns its last status.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn ended(&self) -> Result<v1::ContainerStatus> {
        wait::until("end of the container", ENDS, async || {
            let status = self.status().await.ok()?;
            (status.state() == v1::ContainerState::ContainerExited).then_some(status)
        })
        .await
    }

    /// Waits for its end, and returns its exit code.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn exit_code(&self) -> Result<i32> {
        Ok(self.ended().await?.exit_code)
    }

    /// Runs a command in it, and returns what it left, whatever its exit code.
    ///
    /// # Errors
    /// When it could not be run.
    pub async fn exec<A: AsRef<str>>(&self, command: impl IntoIterator<Item = A>) -> Result<Ran> {
        let request = v1::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.into_iter().map(|w| w.as_ref().to_owned()).collect(),
            timeout: EXEC_SECONDS,
        };
        let answer = self
            .node()
            .cri()
            .runtime()
            .exec_sync(request)
            .await?
            .into_inner();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ran {
            code: answer.exit_code,
            stdout: text(answer.stdout),
            stderr: text(answer.stderr),
        })
    }

    /// Runs a shell script in it, and returns what it printed.
    ///
    /// # Errors
    /// When it ends with anything but 0.
    pub async fn sh(&self, script: &str) -> Result<String> {
        let ran = self.exec(["sh", "-c", script]).await?;
        if ran.code != 0 {
            bail!(
                "{script:?} ended with {}: {}{}",
                ran.code,
                ran.stderr,
                ran.stdout
            );
        }
        Ok(ran.stdout)
    }

    /// What the container has logged so far, with the lines of both streams together.
    pub fn log(&self) -> String {
        self.log_of(None)
    }

    /// What it has logged on one stream, `stdout` or `stderr`.
    pub fn log_stream(&self, stream: &str) -> String {
        self.log_of(Some(stream))
    }

    /// CRI's form: time, stream, `P` for a part of a line or `F` for its end, text.
    fn log_of(&self, wanted: Option<&str>) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let mut log = String::new();
        for line in text.lines() {
            let mut fields = line.splitn(4, ' ');
            let (_, stream, tag, words) =
                (fields.next(), fields.next(), fields.next(), fields.next());
            if wanted.is_none() || wanted == stream {
                log += words.unwrap_or_default();
                log += if tag == Some("P") { "" } else { "\n" };
            }
        }
        log
    }

    /// Waits until the log holds `text`, and returns the log.
    ///
    /// # Errors
    /// When it does not come; with the end of the log's file.
    pub async fn logged(&self, text: &str) -> Result<String> {
        let found = wait::until(&format!("{text:?} in the log"), wait::SOON, async || {
            let log = self.log();
            log.contains(text).then_some(log)
        });
        found
            .await
            .with_context(|| format!("log: {}", tail(&self.log)))
    }

    /// Its resource usage.
    ///
    /// # Errors
    /// containerd's.
    pub async fn stats(&self) -> Result<v1::ContainerStats> {
        let request = v1::ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let answer = self
            .node()
            .cri()
            .runtime()
            .container_stats(request)
            .await
            .context("stats")?;
        answer
            .into_inner()
            .stats
            .context("a container without stats")
    }

    /// Changes its limits.
    ///
    /// # Errors
    /// containerd's.
    pub async fn update(&self, linux: v1::LinuxContainerResources) -> Result<()> {
        let request = v1::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(linux),
            windows: None,
            annotations: HashMap::new(),
        };
        self.node()
            .cri()
            .runtime()
            .update_container_resources(request)
            .await
            .context("update")?;
        Ok(())
    }

    /// Stops it with a grace period in seconds.
    ///
    /// # Errors
    /// containerd's.
    pub async fn stop(&self, grace: i64) -> Result<()> {
        let request = v1::StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        self.node()
            .cri()
            .runtime()
            .stop_container(request)
            .await
            .context("stop the container")?;
        Ok(())
    }

    /// Removes it.
    ///
    /// # Errors
    /// containerd's.
    pub async fn remove(&self) -> Result<()> {
        let request = v1::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.node()
            .cri()
            .runtime()
            .remove_container(request)
            .await
            .context("remove the container")?;
        Ok(())
    }
}
