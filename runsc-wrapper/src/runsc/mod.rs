// SPDX-License-Identifier: Apache-2.0

//! [`Runtime`] over gVisor's `runsc`.
//!
//! What sets containers up or takes them down goes by command line. What is asked of a running
//! sandbox goes by its control socket while that way is open (see [`crate::sandbox`]), and by
//! command line else. Containers are known from runsc's own state files, so that a new process
//! can take over where another has stopped.

mod exits;
mod gofer;
mod processes;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use kiln_host::blocking;
use tokio::sync::watch;

use crate::{
    CheckpointOpts, Config, ContainerId, CreateOpts, Exec, ExecOpts, ExitFuture, KillTarget,
    NetworkCall, Process, Result, Runtime, RuntimeError, StartWay, Stats, Status, Stdio,
    WarmRuntime,
    cli::{self, Cli},
    command::NetnsOverlay,
    control::{ControlError, RuntimeState, Target},
    gofer::{PrestartedGofer, PutInPlace, container::GoferContainer},
    network::Network,
    sandbox::{Answer, Paused, Sandbox},
    state::{self, State},
};

/// How long a killed sandbox may take to end before `delete` is left to deal with it.
const SANDBOX_END: Duration = Duration::from_secs(5);

/// Annotation of a runtime's features that has its version.
const VERSION: &str = "dev.gvisor.version";

/// Exit status in errors that no command has reported.
const NO_STATUS: i32 = 255;

/// gVisor's `runsc`.
#[derive(Debug)]
pub struct Runsc {
    cli: Arc<Cli>,
    containers: Mutex<HashMap<ContainerId, Arc<Container>>>,
    fallbacks: Arc<AtomicU64>,
}

/// A container that runsc knows.
#[derive(Debug)]
struct Container {
    id: ContainerId,
    sandbox: Arc<Sandbox>,
    capabilities: Option<serde_json::Value>,
    rootfs: PathBuf,
    started: watch::Sender<bool>,
    /// Whether its first process is known to have ended.
    exited: AtomicBool,
    /// What it is started with, if it has a prestarted gofer.
    member: Mutex<Option<GoferContainer>>,
}

impl Container {
    fn is_root(&self) -> bool {
        self.id.as_str() == self.sandbox.id()
    }
}

impl Runsc {
    /// Drives runsc as `config` says.
    pub fn new(config: Config) -> Self {
        Self {
            cli: Arc::new(Cli::new(config)),
            containers: Mutex::default(),
            fallbacks: Arc::default(),
        }
    }

    /// How many sandboxes have lost their control socket to an unexpected answer.
    pub fn control_fallbacks(&self) -> u64 {
        self.fallbacks.load(Ordering::Relaxed)
    }

    fn root(&self) -> &Path {
        &self.cli.config.root
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashMap<ContainerId, Arc<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The container `id`, learned from its state file if need be.
    fn container(&self, op: &'static str, id: &ContainerId) -> Result<Arc<Container>> {
        if let Some(container) = self.known().get(id) {
            return Ok(container.clone());
        }
        self.learn(op, id)?.ok_or_else(|| RuntimeError::NotFound {
            op,
            id: id.to_string(),
            message: "runsc has no state of it".to_owned(),
        })
    }

    fn exists(&self, id: &ContainerId) -> Result<bool> {
        state::exists(self.root(), id).map_err(unreadable_root)
    }

    fn learn(&self, op: &'static str, id: &ContainerId) -> Result<Option<Arc<Container>>> {
        let what = || format!("read the state of {id}");
        let loaded = State::load(self.root(), id).map_err(|e| cli::io_error(&what(), e))?;
        let Some(state) = loaded else { return Ok(None) };
        let Some(of_sandbox) = &state.sandbox else {
            let message = "runsc's state of it has no sandbox".to_owned();
            return Err(RuntimeError::BadAnswer {
                op,
                id: id.to_string(),
                message,
            });
        };
        let mut known = self.known();
        let same = |c: &&Arc<Container>| {
            c.sandbox.id() == of_sandbox.id && c.sandbox.pid() == of_sandbox.pid
        };
        let sandbox = match known.values().find(same) {
            Some(sibling) => sibling.sandbox.clone(),
            None => {
                let new = Sandbox::new(&self.cli.config, of_sandbox, self.fallbacks.clone());
                Arc::new(new.map_err(|e| cli::io_error(&format!("watch the sandbox of {id}"), e))?)
            }
        };
        let container = Arc::new(Container {
            id: id.clone(),
            sandbox,
            capabilities: state.capabilities().cloned(),
            rootfs: state.rootfs().to_owned(),
            started: watch::Sender::new(state.status != "created"),
            exited: AtomicBool::new(false),
            member: Mutex::default(),
        });
        // Two may learn at the same time; all must use the same.
        Ok(Some(known.entry(id.clone()).or_insert(container).clone()))
    }

    /// Starts a sandbox's root container by a command that sees `netns` as the sandbox's own.
    async fn start_covered(&self, container: &Container, netns: BorrowedFd<'_>) -> Result<()> {
        let id = &container.id;
        let cover = NetnsOverlay::new(container.sandbox.pid(), netns)
            .map_err(|e| cli::io_error(&format!("give {id} its network"), e))?;
        let call = self.cli.call("start", id.as_str())?;
        call.deadline(self.cli.config.deadlines.start)
            .cover(cover)
            .stdio(Stdio::default())
            .id()
            .run()
            .await?;
        Ok(())
    }

    /// Starts a sandbox's root container over its control socket. Returns `false` where that way
    /// is closed, or the network is one that only the command can give; nothing was done then.
    async fn start_by_socket(
        &self,
        container: &Arc<Container>,
        netns: BorrowedFd<'_>,
        call: NetworkCall,
    ) -> Result<bool> {
        let id = container.id.clone();
        let failed = |e: io::Error| cli::io_error(&format!("start {id} on its network"), e);
        let refused = |e: ControlError| failed(io::Error::other(e));
        let Some(client) = container.sandbox.client().await else {
            return Ok(false);
        };
        let netns = netns.try_clone_to_owned().map_err(failed)?;
        let network = match blocking(move || Network::of(netns.as_fd())).await {
            Ok(network) => network,
            Err(e) => {
                log::info!("{id} is started by command: {e}");
                return Ok(false);
            }
        };
        network.give(&client, call).await.map_err(refused)?;
        blocking(move || network.take_addresses())
            .await
            .map_err(failed)?;
        client.start_root(id.as_str()).await.map_err(refused)?;
        let root = self.root().to_owned();
        let (noted, pid) = (id.clone(), container.sandbox.pid());
        let wanted = blocking(move || state::set_running(&root, &noted)).await;
        if let Some(score) = wanted.map_err(failed)?
            && let Err(e) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        {
            log::warn!("{id}: oom_score_adj stays as it is: {e}");
        }
        Ok(true)
    }

    /// Removes what a `create` that failed with `error` may have left.
    async fn undo_create(&self, opts: &CreateOpts, error: &RuntimeError) {
        let id = &opts.id;
        if let Err(e) = self.delete(id).await {
            log::warn!("delete {id}, which could not be made: {e}");
        }
        if let Err(e) = state::remove_remains(self.root(), id) {
            log::warn!("remove what is left of {id}: {e}");
        }
        // One that was not killed has removed its own; others are perhaps not its own.
        if matches!(error, RuntimeError::Timeout { .. })
            && let Err(e) = state::remove_filestores_of(&opts.bundle, id, &opts.sandbox)
        {
            log::warn!("remove filestores of {id}: {e}");
        }
    }

    /// What a runsc without `features` can be said to do.
    async fn features_by_version(&self) -> Result<serde_json::Value> {
        let output = self.cli.version().await?;
        let spec = output
            .lines()
            .find_map(|line| line.strip_prefix("spec: "))
            .unwrap_or("1.0.0");
        let version = output
            .lines()
            .find_map(|line| line.strip_prefix("runsc version "));
        Ok(serde_json::json!({
            "ociVersionMin": "1.0.0",
            "ociVersionMax": spec.trim(),
            "annotations": { VERSION: version.unwrap_or_default().trim() },
        }))
    }
}

#[async_trait]
impl Runtime for Runsc {
    async fn create(&self, opts: &CreateOpts) -> Result<u32> {
        let (op, id) = ("create", &opts.id);
        let root_container = opts.id == opts.sandbox;
        if self.exists(id)? {
            let message = "runsc has a state of it".to_owned();
            return Err(RuntimeError::AlreadyExists {
                op,
                id: id.to_string(),
                message,
            });
        }
        // runsc would say so too, and leave a lock file for the sandbox.
        if !root_container && !self.exists(&opts.sandbox)? {
            let message = format!("runsc has no state of sandbox {}", opts.sandbox);
            return Err(RuntimeError::NotFound {
                op,
                id: id.to_string(),
                message,
            });
        }
        self.known().remove(id);
        self.cli
            .config
            .create_log_dirs(id.as_str())
            .map_err(|e| cli::io_error("make the directories of runsc's logs", e))?;
        let mut flags = Vec::new();
        if let (true, Some(dir)) = (root_container, &opts.log_dir)
            && !self.cli.config.flags.contains_key("panic-log")
        {
            flags.push(format!(
                "--panic-log={}",
                dir.join("gvisor_panic.log").display()
            ));
        }
        // Only the root container takes its streams now; the messages of others would end up
        // in the container's log.
        let stdio = if root_container {
            clone(&opts.stdio)?
        } else {
            Stdio::default()
        };
        let created = self
            .cli
            .call_with_flags(op, id.as_str(), &flags)?
            .arg("--bundle")
            .arg(&opts.bundle)
            .option("--console-socket", opts.console_socket.as_ref())
            .id()
            .stdio(stdio)
            .kill_tree()
            .deadline(self.cli.config.deadlines.create)
            .run()
            .await;
        let container = match created {
            Ok(_) => self.container(op, id),
            Err(e) => Err(e),
        };
        match container {
            Ok(container) => Ok(container.sandbox.pid()),
            Err(e) => {
                // Made by somebody else meanwhile, it is not ours to remove.
                if !matches!(e, RuntimeError::AlreadyExists { .. }) {
                    self.undo_create(opts, &e).await;
                }
                Err(self.cli.explain(e, &flags).await)
            }
        }
    }

    async fn start(&self, id: &ContainerId, stdio: &Stdio) -> Result<()> {
        let container = self.container("start", id)?;
        if self.start_with_gofer(&container, stdio).await? {
            container.started.send_replace(true);
            return Ok(());
        }
        let stdio = if container.is_root() {
            Stdio::default()
        } else {
            clone(stdio)?
        };
        self.cli.start(id, stdio).await?;
        container.started.send_replace(true);
        Ok(())
    }

    async fn restore(&self, id: &ContainerId, image: &Path, stdio: &Stdio) -> Result<()> {
        let container = self.container("restore", id)?;
        let stdio = if container.is_root() {
            Stdio::default()
        } else {
            clone(stdio)?
        };
        self.cli.restore(id, image, stdio, None).await?;
        container.started.send_replace(true);
        Ok(())
    }

    async fn watch(&self, id: &ContainerId) -> Result<ExitFuture> {
        let container = self.container("wait", id)?;
        Ok(Box::pin(exits::wait_for_container(
            self.cli.clone(),
            container,
        )))
    }

    async fn exec(&self, opts: &ExecOpts) -> Result<Exec> {
        let container = self.container("exec", &opts.container)?;
        if container.sandbox.is_paused() {
            // The sentry would make the process, and it would hang until the resume.
            let (id, message) = (
                opts.container.to_string(),
                "the sandbox is paused".to_owned(),
            );
            return Err(RuntimeError::NotRunning {
                op: "exec",
                id,
                message,
            });
        }
        // A terminal needs a process that holds its foreground group and passes ^C and size
        // changes on: that is what runsc does.
        if opts.console_socket.is_none()
            && let Some(exec) = self.exec_by_socket(&container, opts).await?
        {
            return Ok(exec);
        }
        self.exec_by_command(&container, opts).await
    }

    async fn kill(&self, id: &ContainerId, target: KillTarget, signal: i32) -> Result<()> {
        let container = self.container("kill", id)?;
        let to = match target {
            KillTarget::Init => Target::Process(0),
            KillTarget::All => Target::All,
            KillTarget::Process(pid) => Target::Process(pid),
        };
        let answer = container
            .sandbox
            .ask(async |client| client.signal(id.as_str(), to, signal).await)
            .await;
        match answer {
            Answer::Done(()) => Ok(()),
            // Asked twice at worst: a second signal of a kind is no new one for most processes.
            Answer::NotAsked | Answer::Lost(_) => {
                kill_by_command(&self.cli, &container, target, signal).await
            }
            // The sentry does not tell a process that is gone from one that never was.
            Answer::Refused(message) if !*container.started.borrow() => {
                Err(RuntimeError::NotRunning {
                    op: "kill",
                    id: id.to_string(),
                    message,
                })
            }
            other => Err(no_answer("kill", &container, other)),
        }
    }

    async fn delete(&self, id: &ContainerId) -> Result<()> {
        let deadline = self.cli.config.deadlines.delete;
        // A create that another process has begun would else finish behind our back.
        if !state::settled(self.root(), id, deadline)
            .await
            .map_err(unreadable_root)?
        {
            return Err(RuntimeError::Timeout {
                op: "delete",
                id: id.to_string(),
                deadline,
            });
        }
        if !self.exists(id)? {
            self.known().remove(id);
            state::remove_remains(self.root(), id).map_err(unreadable_root)?;
            return self.delete_members(id.as_str()).await;
        }
        let container = self.container("delete", id).ok();
        let deleted = match &container {
            // runsc would kill whoever has the pid.
            Some(container) if container.sandbox.is_reused() => {
                state::remove(self.root(), id).map_err(unreadable_root)
            }
            Some(container) => {
                self.prepare_delete(container).await;
                self.cli.delete(id).await
            }
            // A command that was killed while it wrote the state has left one that none can read.
            None if State::load(self.root(), id).is_err() => {
                state::remove(self.root(), id).map_err(unreadable_root)
            }
            None => self.cli.delete(id).await,
        };
        let gone = !self.exists(id)?;
        match deleted {
            Ok(()) | Err(RuntimeError::NotFound { .. }) => {}
            // runsc goes on after errors, and has forgotten the container all the same.
            Err(e) if gone => log::warn!("{e}"),
            // Nothing of it lives without its sentry; files are all that is left.
            Err(e) if container.as_ref().is_some_and(|c| c.sandbox.has_ended()) => {
                log::warn!("{e}");
                state::remove(self.root(), id).map_err(unreadable_root)?;
            }
            Err(e) => return Err(e),
        }
        self.known().remove(id);
        if let Some(container) = container {
            let sandbox = container.sandbox.id();
            state::remove_filestore(&container.rootfs, sandbox)
                .map_err(|e| cli::io_error(&format!("remove the filestore of {id}"), e))?;
            if sandbox == id.as_str() {
                self.delete_members(sandbox).await?;
            }
        }
        Ok(())
    }

    async fn status(&self, id: &ContainerId) -> Result<Status> {
        let container = self.container("state", id)?;
        let sandbox = &container.sandbox;
        match sandbox
            .ask(async |client| client.runtime_state(id.as_str()).await)
            .await
        {
            Answer::Done(RuntimeState::Creating) => Ok(Status::Created),
            Answer::Done(RuntimeState::Running) if sandbox.is_paused() => Ok(Status::Paused),
            Answer::Done(RuntimeState::Running) => Ok(Status::Running),
            Answer::Done(RuntimeState::Stopped) | Answer::Gone => Ok(Status::Stopped),
            Answer::NotAsked | Answer::Lost(_) => self.cli.state(id).await?.status(id),
            other => Err(no_answer("state", &container, other)),
        }
    }

    async fn processes(&self, id: &ContainerId) -> Result<Vec<Process>> {
        let container = self.container("ps", id)?;
        match container
            .sandbox
            .ask(async |client| client.processes(id.as_str()).await)
            .await
        {
            Answer::Done(list) => Ok(list
                .into_iter()
                .map(|p| Process {
                    pid: p.pid,
                    command: p.cmd,
                })
                .collect()),
            // runsc prints names only in a table that a process can forge lines of.
            Answer::NotAsked | Answer::Lost(_) => {
                let pids = self.cli.pids(id).await?;
                Ok(pids
                    .into_iter()
                    .map(|pid| Process {
                        pid,
                        command: String::new(),
                    })
                    .collect())
            }
            other => Err(no_answer("ps", &container, other)),
        }
    }

    async fn pause(&self, id: &ContainerId) -> Result<()> {
        let container = self.container("pause", id)?;
        let sandbox = &container.sandbox;
        let refuse = |message: &str| {
            let message = message.to_owned();
            Err(RuntimeError::NotRunning {
                op: "pause",
                id: id.to_string(),
                message,
            })
        };
        let mut paused = sandbox.pausing().await;
        if *paused != Paused::No {
            // Pauses add up in the sentry: a second one would need a second resume.
            return refuse("the sandbox is paused");
        }
        if !*container.started.borrow() {
            return refuse("the container is not started");
        }
        match sandbox.ask(async |client| client.pause().await).await {
            Answer::Done(()) => *paused = Paused::BySocket,
            Answer::NotAsked => {
                self.cli.pause(id).await?;
                *paused = Paused::ByCommand(id.clone());
            }
            other => return Err(no_answer("pause", &container, other)),
        }
        sandbox.set_paused(true);
        Ok(())
    }

    async fn resume(&self, id: &ContainerId) -> Result<()> {
        let container = self.container("resume", id)?;
        resume(&self.cli, &container).await
    }

    async fn stats(&self, id: &ContainerId) -> Result<Stats> {
        let container = self.container("events", id)?;
        match container
            .sandbox
            .ask(async |client| client.event(id.as_str()).await)
            .await
        {
            Answer::Done(event) => {
                let usage = event.container_usage.unwrap_or_default();
                Ok(Stats {
                    cpu_ns: usage.get(id.as_str()).copied().unwrap_or_default(),
                    sandbox_cpu_ns: usage.into_iter().collect(),
                    ..cli::stats_of(event.event)
                })
            }
            Answer::NotAsked | Answer::Lost(_) => self.cli.stats(id).await,
            other => Err(no_answer("events", &container, other)),
        }
    }

    async fn checkpoint(&self, id: &ContainerId, opts: &CheckpointOpts) -> Result<()> {
        self.container("checkpoint", id)?;
        self.cli.checkpoint(id, opts).await
    }

    async fn port_forward(
        &self,
        id: &ContainerId,
        port: u16,
        stream: std::os::fd::OwnedFd,
    ) -> Result<()> {
        let container = self.container("port-forward", id)?;
        let answer = container
            .sandbox
            .ask(async |client| client.port_forward(id.as_str(), port, stream).await)
            .await;
        match answer {
            Answer::Done(()) => Ok(()),
            Answer::NotAsked => Err(RuntimeError::Unsupported {
                op: "port-forward",
                id: id.to_string(),
            }),
            other => Err(no_answer("port-forward", &container, other)),
        }
    }

    async fn features(&self) -> Result<serde_json::Value> {
        let mut features = match self.cli.features().await {
            // Releases before the summer of 2026 have no such command.
            Err(RuntimeError::Unsupported { .. } | RuntimeError::BadAnswer { .. }) => {
                return self.features_by_version().await;
            }
            other => other?,
        };
        // It does not say which release it is.
        if features["annotations"][VERSION].is_null() {
            let own = self.features_by_version().await?;
            features["annotations"][VERSION] = own["annotations"][VERSION].clone();
        }
        Ok(features)
    }
}

#[async_trait]
impl WarmRuntime for Runsc {
    async fn start_gofer(
        &self,
        dir: &Path,
        sandbox: &ContainerId,
        place: PutInPlace,
    ) -> Result<PrestartedGofer> {
        self.start_gofer(dir, sandbox, place).await
    }

    async fn create_with_gofer(
        &self,
        opts: &CreateOpts,
        gofer: PrestartedGofer,
    ) -> Result<Option<u32>> {
        if opts.id == opts.sandbox || self.exists(&opts.id)? {
            return Ok(None);
        }
        if !self.make_with_gofer(opts, gofer).await? {
            return Ok(None);
        }
        let container = self.container("create", &opts.id)?;
        Ok(Some(container.sandbox.pid()))
    }

    async fn start_on_network(
        &self,
        id: &ContainerId,
        netns: BorrowedFd<'_>,
        way: StartWay,
    ) -> Result<()> {
        let container = self.container("start", id)?;
        let is_started = match way {
            StartWay::Command => false,
            StartWay::Control(call) => self.start_by_socket(&container, netns, call).await?,
        };
        if !is_started {
            self.start_covered(&container, netns).await?;
        }
        container.started.send_replace(true);
        Ok(())
    }

    async fn restore_on_network(
        &self,
        id: &ContainerId,
        netns: BorrowedFd<'_>,
        image: &Path,
    ) -> Result<()> {
        let container = self.container("restore", id)?;
        let overlay = NetnsOverlay::new(container.sandbox.pid(), netns)
            .map_err(|e| cli::io_error(&format!("give {id} its network"), e))?;
        let stdio = Stdio::default();
        self.cli.restore(id, image, stdio, Some(overlay)).await?;
        container.started.send_replace(true);
        Ok(())
    }

    async fn kill_sandbox(&self, id: &ContainerId) -> Result<()> {
        let container = self.container("kill", id)?;
        let killed = container.sandbox.kill();
        killed.map_err(|e| cli::io_error(&format!("kill the sandbox of {id}"), e))
    }

    async fn note_cgroup(&self, id: &ContainerId, path: &str) -> Result<()> {
        self.container("note the cgroup of", id)?;
        state::set_cgroup(self.root(), id, path)
            .map_err(|e| cli::io_error(&format!("note the cgroup of {id}"), e))
    }

    fn forget(&self, id: &ContainerId) {
        self.known().remove(id);
    }
}

impl Runsc {
    /// Deletes what is left of the containers of a sandbox that is gone: their own delete did not
    /// come to its end, say, on a node that was too busy for the command. Everything is tried, and
    /// the first error returned.
    async fn delete_members(&self, sandbox: &str) -> Result<()> {
        let mut result = Ok(());
        for member in state::members_of(self.root(), sandbox).map_err(unreadable_root)? {
            log::info!("{member} goes with its sandbox {sandbox}");
            result = result.and(self.delete(&member).await);
        }
        let left = state::remove_leftovers(self.root(), sandbox).map_err(unreadable_root);
        result.and(left)
    }

    /// Brings a container into a state that `runsc delete` gets through without waiting.
    async fn prepare_delete(&self, container: &Container) {
        let sandbox = &container.sandbox;
        if !container.is_root() {
            // The sentry waits for the processes of the container, and paused ones never end.
            if sandbox.is_paused()
                && !sandbox.has_ended()
                && let Err(e) = resume(&self.cli, container).await
            {
                log::warn!("resume before delete: {e}");
            }
            return;
        }
        // The end of the root container is the end of the sandbox. runsc would kill the sentry
        // and look every 100 ms whether it is gone.
        if let Err(e) = sandbox.kill() {
            log::warn!("kill sandbox {}: {e}", sandbox.id());
        }
        sandbox.ends_within(SANDBOX_END).await;
    }
}

async fn resume(cli: &Cli, container: &Container) -> Result<()> {
    let sandbox = &container.sandbox;
    let mut paused = sandbox.pausing().await;
    match &*paused {
        Paused::BySocket => {
            match sandbox.ask(async |client| client.resume().await).await {
                Answer::Done(()) => {}
                // runsc's own resume refuses what its own pause has not stopped.
                Answer::NotAsked => {
                    let (op, id) = ("resume", container.id.to_string());
                    return Err(RuntimeError::Unsupported { op, id });
                }
                other => return Err(no_answer("resume", container, other)),
            }
        }
        Paused::ByCommand(id) => cli.resume(id).await?,
        // Perhaps somebody else has paused it; runsc knows. Over the socket an extra resume
        // would make the sentry panic.
        Paused::No => cli.resume(&container.id).await?,
    }
    *paused = Paused::No;
    sandbox.set_paused(false);
    Ok(())
}

async fn kill_by_command(
    cli: &Cli,
    container: &Container,
    target: KillTarget,
    signal: i32,
) -> Result<()> {
    let id = &container.id;
    match target {
        KillTarget::Init => cli.kill(id, false, signal).await,
        KillTarget::All => cli.kill(id, true, signal).await,
        KillTarget::Process(pid) => cli.kill_pid(id, pid, signal).await,
    }
}

/// The error for a call that gave no result and that nobody else can make.
fn no_answer<T>(op: &'static str, container: &Container, answer: Answer<T>) -> RuntimeError {
    let id = container.id.to_string();
    match answer {
        Answer::Refused(message) => cli::refusal(op, &id, NO_STATUS, message),
        Answer::Lost(ControlError::Timeout(deadline)) => RuntimeError::Timeout { op, id, deadline },
        Answer::Lost(error) => RuntimeError::BadAnswer {
            op,
            id,
            message: error.to_string(),
        },
        Answer::Gone | Answer::NotAsked | Answer::Done(_) => {
            cli::refusal(op, &id, NO_STATUS, "sandbox is not running".to_owned())
        }
    }
}

fn unreadable_root(error: io::Error) -> RuntimeError {
    cli::io_error("read runsc's root", error)
}

/// The container keeps its streams, and a command gets copies.
fn clone(stdio: &Stdio) -> Result<Stdio> {
    stdio
        .try_clone()
        .map_err(|e| cli::io_error("copy the streams", e))
}
