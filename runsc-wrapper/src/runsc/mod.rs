// SPDX-License-Identifier: Apache-2.0

//! [`Runtime`] over gVisor's `runsc`.
//!
//! What sets containers up or takes them down goes by command line. What is asked of a running
//! sandbox goes by its control socket while that way is open (see [`crate::sandbox`]), and by
//! command line else. Containers are known from runsc's own state files, so that a new process
//! can take over where another has stopped.

use std::{
    collections::HashMap,
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde::Deserialize;
use tokio::sync::watch;

use crate::{
    CheckpointOpts, Config, ContainerId, CreateOpts, Exec, ExecOpts, Exit, ExitFuture, KillTarget,
    Process, Result, Runtime, RuntimeError, Stats, Status, Stdio,
    cli::{self, Cli},
    command::{Cause, Running},
    control::{RuntimeState, Target},
    exec::{self, Descriptors, RawSockets},
    reap::{self, End},
    sandbox::{Answer, Paused, Sandbox},
    state::{self, State},
};

/// How long a killed sandbox may take to end before `delete` is left to deal with it.
const SANDBOX_END: Duration = Duration::from_secs(5);

/// How long after the end of a sandbox its last reply may still be read from the socket.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Pauses between looks at a container that was made but not started through this object.
const START_POLL: Duration = Duration::from_millis(500);

/// Pauses between looks at the file in which `exec` leaves a pid: it takes some 30 ms.
const PID_FILE_POLL: Duration = Duration::from_millis(5);

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
    started: watch::Sender<bool>,
    /// Whether its first process is known to have ended.
    exited: AtomicBool,
    /// The `runsc exec` commands that stand for processes, by these processes' pids.
    companions: Mutex<HashMap<u32, Arc<reap::Watch>>>,
}

impl Container {
    fn is_root(&self) -> bool {
        self.id.as_str() == self.sandbox.id()
    }

    fn companions(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Arc<reap::Watch>>> {
        self.companions.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn learn(&self, op: &'static str, id: &ContainerId) -> Result<Option<Arc<Container>>> {
        let what = || format!("read the state of {id}");
        let loaded = State::load(self.root(), id).map_err(|e| cli::io_error(&what(), e))?;
        let Some(state) = loaded else { return Ok(None) };
        let Some(of_sandbox) = &state.sandbox else {
            let message = "runsc's state of it has no sandbox".to_owned();
            return Err(RuntimeError::BadAnswer { op, id: id.to_string(), message });
        };
        let mut known = self.known();
        let same = |c: &&Arc<Container>| c.sandbox.id() == of_sandbox.id && c.sandbox.pid() == of_sandbox.pid;
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
            started: watch::Sender::new(state.status != "created"),
            exited: AtomicBool::new(false),
            companions: Mutex::default(),
        });
        known.insert(id.clone(), container.clone());
        Ok(Some(container))
    }

    /// Removes what a failed `create` may have left.
    async fn undo_create(&self, id: &ContainerId) {
        let left = state::exists(self.root(), id).unwrap_or(true);
        if left && let Err(e) = self.cli.delete(id, true).await {
            log::warn!("delete {id}, which could not be made: {e}");
        }
        if let Err(e) = state::remove_remains(self.root(), id) {
            log::warn!("remove what is left of {id}: {e}");
        }
    }

    /// Starts a process over the control socket. `None` when the command line must do it.
    async fn exec_by_socket(&self, container: &Arc<Container>, opts: &ExecOpts) -> Result<Option<Exec>> {
        let (op, id) = ("exec", container.id.to_string());
        // Asked first, so that nothing is prepared in vain.
        if container.sandbox.client().await.is_none() && !container.sandbox.has_ended() {
            return Ok(None);
        }
        let raw = if self.cli.config.is_on("net-raw") { RawSockets::Allowed } else { RawSockets::Denied };
        let args = exec::exec_args(&id, &opts.process, container.capabilities.as_ref(), raw)
            .map_err(|message| RuntimeError::Failed { op, id: id.clone(), status: NO_STATUS, message })?;
        let streams = Descriptors::of(&opts.stdio)
            .map_err(|e| cli::io_error("open a null device", e))?;
        streams
            .give_to(container.sandbox.owner)
            .map_err(|e| cli::io_error("give the streams to the sandbox", e.into()))?;
        let answer =
            container.sandbox.ask(async |client| client.exec(&args, streams.all()).await).await;
        let pid = match answer {
            Answer::Done(pid) => pid,
            Answer::NotAsked => return Ok(None),
            other => return Err(no_answer(op, container, other)),
        };
        let exit = Box::pin(wait_for_process(self.cli.clone(), container.clone(), pid));
        Ok(Some(Exec { pid, exit }))
    }

    /// Starts a process by `runsc exec`, which stays as long as the process does.
    async fn exec_by_command(&self, container: &Arc<Container>, opts: &ExecOpts) -> Result<Exec> {
        let mut process = opts.process.clone();
        if let Some(process) = process.as_object_mut() {
            process.insert("terminal".to_owned(), opts.console_socket.is_some().into());
        }
        let process_file = cli::write_process(&opts.scratch, &process)?;
        let pid_file = opts.scratch.join("internal-pid");
        // Left over from an earlier exec, it would be taken for the new one.
        remove_if_there(&pid_file)?;
        let started = self.start_exec(container, opts, &process_file, &pid_file).await;
        for file in [&process_file, &pid_file] {
            if let Err(e) = remove_if_there(file) {
                log::warn!("{e}");
            }
        }
        let (running, pid) = started?;
        let companion = reap::watch(running.pid()).map(Arc::new);
        match companion {
            Ok(watch) => drop(container.companions().insert(pid, watch)),
            Err(e) => log::warn!("watch runsc exec: {e}"),
        }
        Ok(Exec { pid, exit: Box::pin(wait_for_companion(container.clone(), pid, running)) })
    }

    async fn start_exec(
        &self,
        container: &Container,
        opts: &ExecOpts,
        process_file: &Path,
        pid_file: &Path,
    ) -> Result<(Running, u32)> {
        let call = self.cli.call("exec", container.id.as_str())?;
        let call = call.arg("--process").arg(process_file).arg("--internal-pid-file").arg(pid_file).id();
        let call = match &opts.console_socket {
            // Not left to `--console-socket`: that works with `--detach` only, which starts
            // runsc twice and at times takes a process that ends at once for one that failed.
            Some(console) => call.terminal(
                exec::open_terminal(console)
                    .await
                    .map_err(|e| cli::io_error(&format!("open a terminal for {}", console.display()), e))?,
            ),
            None => call.stdio(clone(&opts.stdio)?),
        };
        let mut running = call.start()?;
        let deadline = tokio::time::Instant::now() + self.cli.config.deadlines.exec;
        loop {
            if let Some(pid) = read_pid(pid_file) {
                return Ok((running, pid));
            }
            let look_again = tokio::time::timeout(PID_FILE_POLL, running.output()).await;
            if let Ok(output) = look_again {
                let output =
                    output.map_err(|e| cli::command_error("exec", container.id.as_str(), e))?;
                return match read_pid(pid_file) {
                    // It ended between two looks.
                    Some(pid) => Ok((Running::ended(output), pid)),
                    None => Err(cli::failure("exec", container.id.as_str(), &output)),
                };
            }
            if tokio::time::Instant::now() > deadline {
                running.kill();
                return Err(RuntimeError::Timeout {
                    op: "exec",
                    id: container.id.to_string(),
                    deadline: self.cli.config.deadlines.exec,
                });
            }
        }
    }

    /// What a runsc without `features` can be said to do.
    async fn features_by_version(&self) -> Result<serde_json::Value> {
        let output = self.cli.version().await?;
        let spec = output.lines().find_map(|line| line.strip_prefix("spec: ")).unwrap_or("1.0.0");
        let version = output.lines().find_map(|line| line.strip_prefix("runsc version "));
        Ok(serde_json::json!({
            "ociVersionMin": "1.0.0",
            "ociVersionMax": spec.trim(),
            "annotations": { "dev.gvisor.version": version.unwrap_or_default().trim() },
        }))
    }
}

/// Exit status in errors that no command has reported.
const NO_STATUS: i32 = 255;

#[async_trait]
impl Runtime for Runsc {
    async fn create(&self, opts: &CreateOpts) -> Result<u32> {
        let (op, id) = ("create", &opts.id);
        let root_container = opts.id == opts.sandbox;
        if state::exists(self.root(), id).map_err(|e| cli::io_error("read runsc's root", e))? {
            let message = "runsc has a state of it".to_owned();
            return Err(RuntimeError::AlreadyExists { op, id: id.to_string(), message });
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
            flags.push(format!("--panic-log={}", dir.join("gvisor_panic.log").display()));
        }
        // Only the root container takes its streams now; the messages of others would end up
        // in the container's log.
        let stdio = if root_container { clone(&opts.stdio)? } else { Stdio::default() };
        let created = self
            .cli
            .call_with_flags(op, id.as_str(), &flags)?
            .arg("--bundle")
            .arg(&opts.bundle)
            .option("--console-socket", opts.console_socket.as_ref())
            .option("--user-log", opts.user_log.as_ref().filter(|_| root_container))
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
                    self.undo_create(id).await;
                }
                Err(e)
            }
        }
    }

    async fn start(&self, id: &ContainerId, stdio: &Stdio) -> Result<()> {
        let container = self.container("start", id)?;
        let stdio = if container.is_root() { Stdio::default() } else { clone(stdio)? };
        self.cli.start(id, stdio).await?;
        container.started.send_replace(true);
        Ok(())
    }

    async fn restore(&self, id: &ContainerId, image: &Path, stdio: &Stdio) -> Result<()> {
        let container = self.container("restore", id)?;
        let stdio = if container.is_root() { Stdio::default() } else { clone(stdio)? };
        let call = self.cli.call("restore", id.as_str())?.stdio(stdio);
        let call = call.arg("--image-path").arg(image).arg("--detach").id();
        call.deadline(self.cli.config.deadlines.checkpoint).run().await?;
        container.started.send_replace(true);
        Ok(())
    }

    async fn watch(&self, id: &ContainerId) -> Result<ExitFuture> {
        let container = self.container("wait", id)?;
        Ok(Box::pin(wait_for_container(self.cli.clone(), container)))
    }

    async fn exec(&self, opts: &ExecOpts) -> Result<Exec> {
        let container = self.container("exec", &opts.container)?;
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
            KillTarget::ForegroundGroup(pid) => Target::ForegroundGroup(pid),
        };
        let answer =
            container.sandbox.ask(async |client| client.signal(id.as_str(), to, signal).await).await;
        match answer {
            Answer::Done(()) => Ok(()),
            // Asked twice at worst: a second signal of a kind is no new one for most processes.
            Answer::NotAsked | Answer::Lost(_) => kill_by_command(&self.cli, &container, target, signal).await,
            other => Err(no_answer("kill", &container, other)),
        }
    }

    async fn delete(&self, id: &ContainerId, force: bool) -> Result<()> {
        let unreadable = |e| cli::io_error("read runsc's root", e);
        let deadline = self.cli.config.deadlines.delete;
        // A create that another process has begun would else finish behind our back.
        if !state::settled(self.root(), id, deadline).await.map_err(unreadable)? {
            return Err(RuntimeError::Timeout { op: "delete", id: id.to_string(), deadline });
        }
        if !state::exists(self.root(), id).map_err(unreadable)? {
            self.known().remove(id);
            return state::remove_remains(self.root(), id).map_err(unreadable);
        }
        if let Ok(container) = self.container("delete", id) {
            self.prepare_delete(&container, force).await;
        }
        let deleted = self.cli.delete(id, force).await;
        let gone = !state::exists(self.root(), id).map_err(unreadable)?;
        match deleted {
            Ok(()) | Err(RuntimeError::NotFound { .. }) => {}
            // runsc goes on after errors, and has forgotten the container all the same.
            Err(e) if gone => log::warn!("{e}"),
            Err(e) => return Err(e),
        }
        self.known().remove(id);
        Ok(())
    }

    async fn status(&self, id: &ContainerId) -> Result<Status> {
        let container = self.container("state", id)?;
        let sandbox = &container.sandbox;
        match sandbox.ask(async |client| client.runtime_state(id.as_str()).await).await {
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
        match container.sandbox.ask(async |client| client.processes(id.as_str()).await).await {
            Answer::Done(list) => {
                Ok(list.into_iter().map(|p| Process { pid: p.pid, command: p.cmd }).collect())
            }
            // runsc prints names only in a table that a process can forge lines of.
            Answer::NotAsked | Answer::Lost(_) => {
                let pids = self.cli.pids(id).await?;
                Ok(pids.into_iter().map(|pid| Process { pid, command: String::new() }).collect())
            }
            other => Err(no_answer("ps", &container, other)),
        }
    }

    async fn pause(&self, id: &ContainerId) -> Result<()> {
        let container = self.container("pause", id)?;
        let sandbox = &container.sandbox;
        let refuse = |message: &str| {
            let message = message.to_owned();
            Err(RuntimeError::NotRunning { op: "pause", id: id.to_string(), message })
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
        match container.sandbox.ask(async |client| client.event(id.as_str()).await).await {
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

    async fn update(&self, id: &ContainerId, resources: &serde_json::Value) -> Result<()> {
        self.container("update", id)?;
        self.cli.update(id, resources).await
    }

    async fn port_forward(&self, id: &ContainerId, port: u16, stream: std::os::fd::OwnedFd) -> Result<()> {
        let container = self.container("port-forward", id)?;
        let answer = container
            .sandbox
            .ask(async |client| client.port_forward(id.as_str(), port, stream).await)
            .await;
        match answer {
            Answer::Done(()) => Ok(()),
            Answer::NotAsked => {
                Err(RuntimeError::Unsupported { op: "port-forward", id: id.to_string() })
            }
            other => Err(no_answer("port-forward", &container, other)),
        }
    }

    async fn features(&self) -> Result<serde_json::Value> {
        match self.cli.features().await {
            // Releases before the summer of 2026 have no such command.
            Err(RuntimeError::Unsupported { .. } | RuntimeError::BadAnswer { .. }) => {
                self.features_by_version().await
            }
            other => other,
        }
    }
}

impl Runsc {
    /// Brings a container into a state that `runsc delete` gets through without waiting.
    async fn prepare_delete(&self, container: &Container, force: bool) {
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
        // and look every 100 ms whether it is gone; and would not delete one on its way out.
        if force || container.exited.load(Ordering::Relaxed) {
            if !force && sandbox.ends_within(SANDBOX_END).await {
                return;
            }
            if let Err(e) = sandbox.kill() {
                log::warn!("kill sandbox {}: {e}", sandbox.id());
            }
            sandbox.ends_within(SANDBOX_END).await;
        }
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
        KillTarget::ForegroundGroup(pid) => {
            // The command that stands for the process passes on what it can catch.
            let companion = container.companions().get(&pid).cloned();
            let catchable = signal != libc::SIGKILL && signal != libc::SIGSTOP;
            match companion {
                Some(companion) if catchable => companion
                    .signal(signal)
                    .map_err(|e| cli::io_error(&format!("signal runsc exec in {id}"), e)),
                _ => Err(RuntimeError::Unsupported { op: "kill", id: id.to_string() }),
            }
        }
    }
}

/// Waits for the end of a container's first process.
async fn wait_for_container(cli: Arc<Cli>, container: Arc<Container>) -> Result<Exit> {
    let exit = {
        let told = ask_for_exit(&cli, &container);
        tokio::pin!(told);
        race_with_sandbox(&container, told, |end| match end {
            // The sentry ends with the exit code of its root container (gVisor
            // `runsc/cmd/boot.go`); what it was killed by is the container's end too.
            End::Reaped(exit) if container.is_root() => exit,
            End::Reaped(_) | End::Gone => Exit::now(Exit::KILLED),
        })
        .await
    };
    if exit.is_ok() {
        container.exited.store(true, Ordering::Relaxed);
    }
    exit
}

/// Waits for the end of a process that was started over the control socket.
async fn wait_for_process(cli: Arc<Cli>, container: Arc<Container>, pid: u32) -> Result<Exit> {
    let told = async {
        let Some(client) = container.sandbox.client().await else {
            return wait_by_command(&cli, &container, Some(pid)).await;
        };
        match client.wait_pid(container.id.as_str(), pid).await {
            Ok(status) => Ok(Some(Exit::from_wait_status(status))),
            Err(error) => match container.sandbox.judge::<()>(error).await {
                Answer::Gone => Ok(None),
                Answer::NotAsked | Answer::Lost(_) => wait_by_command(&cli, &container, Some(pid)).await,
                other => Err(no_answer("wait", &container, other)),
            },
        }
    };
    tokio::pin!(told);
    race_with_sandbox(&container, told, |_| Exit::now(Exit::KILLED)).await
}

/// Waits for the end of a `runsc exec` and the process that it stands for.
async fn wait_for_companion(container: Arc<Container>, pid: u32, mut running: Running) -> Result<Exit> {
    let output = running.output().await;
    container.companions().remove(&pid);
    let output = output.map_err(|e| cli::command_error("exec", container.id.as_str(), e))?;
    if output.status.success() || output.message().is_empty() {
        return Ok(output.exit());
    }
    // It lost sight of the process: most likely because the sandbox is gone.
    match cli::failure("exec", container.id.as_str(), &output) {
        _ if container.sandbox.ends_within(SANDBOX_END).await => Ok(Exit::now(Exit::KILLED)),
        error => Err(error),
    }
}

/// Takes what `told` says, or makes an exit of the sandbox's end if that says more.
async fn race_with_sandbox(
    container: &Container,
    mut told: std::pin::Pin<&mut impl Future<Output = Result<Option<Exit>>>>,
    exit_of: impl FnOnce(End) -> Exit,
) -> Result<Exit> {
    tokio::select! {
        biased;
        told = &mut told => {
            if let Some(exit) = told? {
                return Ok(exit);
            }
        }
        _ = container.sandbox.ended() => {
            // A reply sent just before the end is still in the socket.
            if let Ok(Ok(Some(exit))) = tokio::time::timeout(LAST_WORDS, told).await {
                return Ok(exit);
            }
        }
    }
    Ok(exit_of(container.sandbox.ended().await))
}

/// Asks the sandbox for the end of a container. `None` when the sandbox ends without a word.
async fn ask_for_exit(cli: &Cli, container: &Container) -> Result<Option<Exit>> {
    let mut started = container.started.subscribe();
    loop {
        // It may also have been started by somebody else: look now and then. The sender lives
        // in the container, so `wait_for` cannot fail.
        let _ = tokio::time::timeout(START_POLL, started.wait_for(|started| *started)).await;
        let known_started = *container.started.borrow();
        let Some(client) = container.sandbox.client().await else {
            if known_started {
                return wait_by_command(cli, container, None).await;
            }
            if container.sandbox.has_ended() {
                return Ok(None);
            }
            if cli.state(&container.id).await?.status(&container.id)? != Status::Created {
                container.started.send_replace(true);
            }
            continue;
        };
        let error = match client.wait(container.id.as_str()).await {
            Ok(status) => return Ok(Some(Exit::from_wait_status(status))),
            Err(error) => error,
        };
        match container.sandbox.judge::<()>(error).await {
            Answer::Gone => return Ok(None),
            Answer::Refused(message)
                if !known_started && Cause::of(&message) == Cause::NotRunning => {}
            Answer::NotAsked | Answer::Lost(_) => {}
            other => return Err(no_answer("wait", container, other)),
        }
    }
}

/// Lets a `runsc wait` wait. It dies with this future.
async fn wait_by_command(cli: &Cli, container: &Container, pid: Option<u32>) -> Result<Option<Exit>> {
    #[derive(Deserialize)]
    struct Waited {
        #[serde(rename = "exitStatus")]
        status: u32,
    }
    struct KillOnDrop(Running);
    impl Drop for KillOnDrop {
        fn drop(&mut self) {
            self.0.kill();
        }
    }
    let (op, id) = ("wait", container.id.as_str());
    let call = cli.call(op, id)?.option("--pid", pid.map(|pid| pid.to_string())).id();
    let mut waiter = KillOnDrop(call.start()?);
    let output = waiter.0.output().await.map_err(|e| cli::command_error(op, id, e))?;
    if output.status.success() {
        let waited: Waited = serde_json::from_slice(&output.stdout).map_err(|e| {
            RuntimeError::BadAnswer { op, id: id.to_owned(), message: e.to_string() }
        })?;
        return Ok(Some(Exit::now(waited.status)));
    }
    let error = cli::failure(op, id, &output);
    // The sandbox went away under it.
    if container.sandbox.ends_within(SANDBOX_END).await { Ok(None) } else { Err(error) }
}

/// The error for a call that gave no result and that nobody else can make.
fn no_answer<T>(op: &'static str, container: &Container, answer: Answer<T>) -> RuntimeError {
    let id = container.id.to_string();
    match answer {
        Answer::Refused(message) => cli::refusal(op, &id, NO_STATUS, message),
        Answer::Lost(crate::control::ControlError::Timeout(deadline)) => {
            RuntimeError::Timeout { op, id, deadline }
        }
        Answer::Lost(error) => RuntimeError::BadAnswer { op, id, message: error.to_string() },
        Answer::Gone | Answer::NotAsked | Answer::Done(_) => {
            cli::refusal(op, &id, NO_STATUS, "sandbox is not running".to_owned())
        }
    }
}

/// The container keeps its streams, and a command gets copies.
fn clone(stdio: &Stdio) -> Result<Stdio> {
    stdio.try_clone().map_err(|e| cli::io_error("copy the streams", e))
}

fn read_pid(file: &Path) -> Option<u32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn remove_if_there(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(cli::io_error(&format!("remove {}", file.display()), e))
        }
        _ => Ok(()),
    }
}
