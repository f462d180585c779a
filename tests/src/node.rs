// SPDX-License-Identifier: Apache-2.0

//! A containerd of a test's own.
//!
//! All of it is in one [`Place`], which takes it away however the test ends.
//!
//! Handlers (see `node/config.rs`): `gvisor`, our shim with runsc; `gvisor-cli`, the same without
//! the sentry's control socket; `gvisor-warm`, the same with the node's agent, where it has one;
//! `runsc-go`, gVisor's own shim; `runc`, containerd's.

mod config;

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use kiln_images::Registry;
use nix::sys::signal::Signal;
use tokio::sync::{Mutex, MutexGuard};

use self::config::PAUSE;
pub use self::config::WARM;
use crate::{
    agent::Agent,
    cgroup::Cgroup,
    cri::{Cri, v1},
    images, mounts,
    netns::Netns,
    place::{CONTAINERD_SOCKET, Place, TASKS},
    pod::{BUSYBOX, GUEST, PodBuilder},
    process::{self, Cmd, Daemon, Proc},
    spans::Spans,
    tools, wait,
};

/// Directory of containerd's registry configuration, in the place.
pub(crate) const CERTS: &str = "certs.d";

/// How long containerd may take to serve, and to end.
const CONTAINERD: Duration = Duration::from_secs(180);

/// How a node differs from the usual.
#[derive(Debug, Clone)]
pub struct NodeOpts {
    /// More keys of the `[kiln]` table of our handlers, as TOML.
    pub kiln: String,
    /// Runs an agent for handler `gvisor-warm`, with this further configuration.
    pub agent: Option<String>,
    /// Flags of runsc for our handlers, without dashes.
    pub runsc_flags: Vec<(String, String)>,
    /// Another runsc than the current one, for all handlers.
    pub runsc: Option<PathBuf>,
    /// Another shim than the one of this workspace.
    pub shim: Option<PathBuf>,
    /// Adds handler `kata`: our shim under a name of Kata's.
    pub kata: Option<Kata>,
    /// Annotations of Pods that containerd passes on to runtimes, as patterns: usually none.
    pub pod_annotations: Vec<String>,
    /// Keeps containerd's spans.
    pub spans: bool,
    /// Level of containerd's log; `debug` has the shims log more, too.
    pub log_level: String,
    /// Leaves CPU time to other nodes, where there is not enough for all.
    pub in_background: bool,
}

/// Whose shim ours becomes under a name of Kata's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kata {
    /// A stand-in, that notes how it is called and runs Pods by runc.
    Standin,
    /// The Kata of the machine, by its own configuration.
    Installed,
}

impl Default for NodeOpts {
    fn default() -> Self {
        Self {
            kiln: String::new(),
            agent: None,
            runsc_flags: Vec::new(),
            runsc: None,
            shim: None,
            kata: None,
            pod_annotations: Vec::new(),
            spans: false,
            log_level: "info".to_owned(),
            in_background: false,
        }
    }
}

/// A running containerd with what it needs.
#[derive(Debug)]
pub struct Node {
    place: Place,
    containerd: Mutex<Option<Daemon>>,
    cri: Cri,
    agent: Option<Agent>,
    /// Whose turn it is to adopt.
    turn: Mutex<()>,
    spans: Option<Spans>,
    next: AtomicU64,
    _registry: Registry,
}

impl Node {
    /// Starts a node and waits until it can run Pods.
    ///
    /// # Errors
    /// When a program is missing or containerd does not come up; then with the end of its log.
    pub async fn start(opts: NodeOpts) -> Result<Self> {
        let place = Place::new()?;
        if opts.in_background {
            place.cgroup().yield_cpu()?;
        }
        mounts::make_shared(place.dir())?;
        config::write(place.dir(), place.name(), &opts)?;
        // `ctr` names a runtime by its type, for which containerd looks on its PATH.
        let shim = opts.shim.clone().map_or_else(tools::shim, Ok)?;
        fs::create_dir(place.dir().join("bin"))?;
        symlink(shim, place.dir().join("bin/containerd-shim-kiln-v2"))?;
        let registry = images::serve(place.netns(), &place.dir().join(CERTS)).await?;
        let cri = Cri::new(&place.dir().join(CONTAINERD_SOCKET))?;
        let agent = opts.agent.as_ref().map(|more| {
            let runtime = place.dir().join(format!("{WARM}.toml"));
            Agent::new(&place, &runtime, more)
        });
        let spans = opts.spans.then(|| Spans::receive(place.netns()));
        let mut node = Self {
            agent: agent.transpose()?,
            turn: Mutex::default(),
            place,
            containerd: Mutex::default(),
            cri,
            spans: spans.transpose()?,
            next: AtomicU64::new(0),
            _registry: registry,
        };
        node.start_containerd().await?;
        for image in [BUSYBOX, GUEST, PAUSE] {
            node.pull(image).await?;
        }
        node.place.set_baseline()?;
        if let Some(agent) = &node.agent {
            agent.run(&node.place).await?;
        }
        Ok(node)
    }

    /// Starts containerd and waits until it is ready for Pods.
    ///
    /// # Errors
    /// When it ends or does not come up, with the end of its log.
    pub async fn start_containerd(&self) -> Result<()> {
        let config = self.dir().join("containerd.toml");
        let args = [OsStr::new("-c"), config.as_os_str()];
        // Volumes with mount propagation must lie below a mount that is shared.
        let bin = self.dir().join("bin");
        let path = std::env::join_paths([bin].into_iter().chain(std::env::split_paths(
            &std::env::var_os("PATH").unwrap_or_default(),
        )))?;
        let mut envs = vec![("TMPDIR", self.dir().as_os_str()), ("PATH", &path)];
        let spans = self.spans.as_ref().map(Spans::environment);
        envs.extend(
            spans
                .iter()
                .flatten()
                .map(|(name, value)| (*name, OsStr::new(value))),
        );
        let program = tools::program("containerd")?;
        let log = self.place.log();
        let mut daemon = Daemon::start(
            &program,
            &args,
            &envs,
            Some(self.netns()),
            self.cgroup(),
            &log,
        )?;
        let start = Instant::now();
        while !self.is_ready().await {
            if let Some(status) = daemon.ended()? {
                bail!("containerd: {status}\n{}", daemon.tail());
            }
            if start.elapsed() > CONTAINERD {
                bail!("containerd is not ready\n{}", daemon.tail());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        *self.containerd.lock().await = Some(daemon);
        Ok(())
    }

    async fn is_ready(&self) -> bool {
        let answer = self
            .cri
            .runtime()
            .status(v1::StatusRequest::default())
            .await;
        let conditions = answer
            .ok()
            .and_then(|a| a.into_inner().status)
            .map(|s| s.conditions)
            .unwrap_or_default();
        let holds = |kind: &str| conditions.iter().any(|c| c.r#type == kind && c.status);
        holds("RuntimeReady") && holds("NetworkReady")
    }

    /// Ends containerd and leaves its shims running.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop_containerd(&self, signal: Signal) -> Result<()> {
        match self.containerd.lock().await.take() {
            Some(mut daemon) => daemon
                .stop(signal, CONTAINERD)
                .await
                .context("stop containerd"),
            None => Ok(()),
        }
    }

    /// containerd's pid, while it runs.
    pub async fn containerd_pid(&self) -> Option<u32> {
        self.containerd.lock().await.as_ref().and_then(Daemon::pid)
    }

    /// Ends containerd by `signal` and starts it again, with its Pods running on.
    ///
    /// # Errors
    /// When it does not end or come back.
    pub async fn restart_containerd(&self, signal: Signal) -> Result<()> {
        self.stop_containerd(signal).await?;
        self.start_containerd().await
    }

    /// Pulls an image from the node's registry.
    ///
    /// # Errors
    /// containerd's.
    pub async fn pull(&self, image: &str) -> Result<()> {
        let image = Some(v1::ImageSpec {
            image: image.to_owned(),
            ..v1::ImageSpec::default()
        });
        let request = v1::PullImageRequest {
            image,
            ..v1::PullImageRequest::default()
        };
        self.cri
            .images()
            .pull_image(request)
            .await
            .context("pull an image")?;
        Ok(())
    }

    /// Where everything of the node is.
    pub fn dir(&self) -> &Path {
        self.place.dir()
    }

    /// The node's name, which its cgroup and its network have, too.
    pub fn name(&self) -> &str {
        self.place.name()
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir().join(CONTAINERD_SOCKET)
    }

    /// The node's network namespace.
    pub fn netns(&self) -> &Netns {
        self.place.netns()
    }

    /// The node's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        self.place.cgroup()
    }

    /// The CRI services.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// The node's agent.
    ///
    /// # Errors
    /// When it has none.
    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("this node has no agent")
    }

    /// What containerd's calls took.
    ///
    /// # Errors
    /// When the node does not keep it.
    pub fn spans(&self) -> Result<&Spans> {
        self.spans.as_ref().context("this node keeps no spans")
    }

    /// Starts the agent again.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn run_agent(&self) -> Result<()> {
        self.run_agent_by(&[]).await
    }

    /// Starts the agent again by the words of a command that becomes it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn run_agent_by(&self, command: &[&str]) -> Result<()> {
        self.agent()?.run_by(&self.place, command).await
    }

    /// A Pod of a handler, to be described and run.
    pub fn pod(&self, handler: &str) -> PodBuilder<'_> {
        PodBuilder::new(self, handler)
    }

    /// A name that nothing else of the node has.
    pub fn unique(&self, stem: &str) -> String {
        format!("{stem}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A new directory for volumes of one Pod.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn volume(&self) -> Result<PathBuf> {
        let dir = self.dir().join("volumes").join(self.unique("v"));
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(dir)
    }

    /// The state directory of a runtime, as the handler's configuration names it.
    pub fn runtime_root(&self, handler: &str) -> PathBuf {
        let name = match handler {
            "gvisor" => "rs",
            "gvisor-cli" => "rc",
            WARM => "rw",
            _ => "rg",
        };
        self.dir().join(name).join("k8s.io")
    }

    /// The id by which the runtime knows the sandbox of the Pod `id`: another one where the shim
    /// has adopted it.
    ///
    /// # Errors
    /// When the shim has left no record.
    pub fn sandbox_of(&self, id: &str) -> Result<String> {
        let record = self.bundle(id).join("kiln.json");
        let text = fs::read(&record).with_context(|| format!("read {}", record.display()))?;
        let record: serde_json::Value = serde_json::from_slice(&text)?;
        let adopted = record["adopted"].as_str().filter(|other| !other.is_empty());
        Ok(adopted.unwrap_or(id).to_owned())
    }

    /// The bundle of the Pod or container `id`.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.dir().join(TASKS).join("k8s.io").join(id)
    }

    /// Whether the Pods of `handler` are to adopt what the node's agent holds.
    pub(crate) fn is_warm(&self, handler: &str) -> bool {
        handler == WARM && self.agent.is_some()
    }

    /// Waits until no other Pod is about to adopt, and keeps it so.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// A command that runs in the node's network namespace.
    pub fn command(&self, program: &Path) -> Cmd {
        Cmd::new(program)
            .netns(self.netns())
            .env("TMPDIR", self.dir())
    }

    /// The processes of the node: all in its cgroup, and all that name its directory.
    pub fn processes(&self) -> Vec<Proc> {
        self.place.processes()
    }

    /// The shims of the Pod or container `id`.
    pub fn shims_of(&self, id: &str) -> Vec<Proc> {
        let mut all = self.processes();
        all.retain(|p| is_shim_of(p, id));
        all
    }

    /// The end of containerd's log, in which those of the shims are.
    pub fn log(&self) -> String {
        process::tail(&self.place.log())
    }

    /// The lines of that log with `words` in them.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn log_lines(&self, words: &str) -> Result<Vec<String>> {
        let log = std::fs::read_to_string(self.place.log())?;
        let lines = log.lines().filter(|line| line.contains(words));
        Ok(lines.map(str::to_owned).collect())
    }

    /// Why the Pod `id` has started cold, by what its shim says, which may come late.
    ///
    /// # Errors
    /// When it does not say it.
    pub async fn why_cold(&self, id: &str) -> Result<String> {
        let its = format!("id={id}");
        let find = || {
            let lines = self.log_lines("starts cold: ").ok()?;
            let line = lines.iter().find(|line| line.contains(&its))?;
            let why = line.split("starts cold: ").nth(1)?.split('"').next()?;
            Some(why.to_owned())
        };
        let what = format!("a reason why {id} has started cold");
        wait::until_true(&what, wait::SOON, || find().is_some()).await?;
        find().context(what)
    }

    /// Waits until nothing on the node bears `id` any more.
    ///
    /// # Errors
    /// What is left.
    pub async fn expect_gone(&self, id: &str) -> Result<()> {
        self.place.expect_gone(id).await
    }

    /// Removes all Pods through CRI, and says what is left of them.
    ///
    /// # Errors
    /// When a Pod cannot be removed, or something stays.
    pub async fn check_for_leaks(&self) -> Result<()> {
        self.remove_all_pods().await?;
        if let Some(agent) = &self.agent {
            agent.drain().await?;
        }
        self.place.check_for_leaks().await
    }

    /// Removes all Pods through CRI.
    ///
    /// # Errors
    /// The first Pod that cannot be removed; the others are removed all the same.
    pub async fn remove_all_pods(&self) -> Result<()> {
        let pods = self
            .cri
            .runtime()
            .list_pod_sandbox(v1::ListPodSandboxRequest::default())
            .await?
            .into_inner()
            .items;
        let mut result = Ok(());
        for pod in pods {
            result = result.and(self.remove_pod(&pod.id).await);
        }
        result
    }

    /// Stops and removes the Pod `id`.
    ///
    /// # Errors
    /// containerd's.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let pod_sandbox_id = id.to_owned();
        let stop = v1::StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.cri
            .runtime()
            .stop_pod_sandbox(stop)
            .await
            .with_context(|| format!("stop Pod {id}"))?;
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id };
        self.cri
            .runtime()
            .remove_pod_sandbox(remove)
            .await
            .with_context(|| format!("remove Pod {id}"))?;
        Ok(())
    }

    /// Ends everything of the node and removes it.
    ///
    /// # Errors
    /// The first thing that stays.
    pub async fn stop(self) -> Result<()> {
        self.stop_containerd(Signal::SIGTERM).await?;
        self.place.destroy()
    }
}

/// Whether a process is a shim of the Pod or container `id`.
pub(crate) fn is_shim_of(process: &Proc, id: &str) -> bool {
    process.argv.contains("containerd-shim") && process.argv.contains(id)
}
