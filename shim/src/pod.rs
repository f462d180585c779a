// SPDX-License-Identifier: Apache-2.0

//! The containers of one Pod: every operation of the Task API, free of ttrpc.
//!
//! Order that clients rely on: TaskCreate, TaskStart, TaskExit, TaskDelete, whatever the timing,
//! and TaskExit only when the output is drained. A process that ends at once keeps that order
//! because the task that waits for its end is spawned after its start was published.
//!
//! Calls that change something are run by [`crate::task`] in tasks of their own: a client that
//! hangs up leaves nothing half made.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    api::Mount,
    protobuf::{MessageField, well_known_types::any::Any},
    shim::oci::CheckpointOptions,
};
use containerd_shim_protos::{events::task as events, protobuf::Message as _};
use log::{info, warn};
use runsc_wrapper::{
    CheckpointOpts, ContainerId, CreateOpts, ExecOpts, Exit, ExitFuture, KillTarget, Runtime,
    RuntimeError, RuntimeKind, Stdio,
};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{
    bundle::{Network, Role, Spec},
    cgroup::{self, Cgroup, Limits},
    config::NodeConfig,
    container::{Container, Exec, Parts},
    error::{Error, Result},
    events::{EventSink, publish, timestamp},
    io::{ConsoleSocket, IoSpec, ProcessIo},
    port_forward,
    process::Process,
    rootfs,
    sandbox::{RUN_DIR, Record, Sandbox, Scratch},
    state::{Event, State},
};

/// How long a container's execs may take to follow its first process before its exit is
/// announced without them.
const EXECS_FOLLOW: Duration = Duration::from_secs(2);

/// Makes the runtime that a node's configuration describes.
pub type RuntimeFactory = Box<dyn Fn(&NodeConfig, &str) -> Result<Arc<dyn Runtime>> + Send + Sync>;

/// A request to make a container.
#[derive(Debug, Default)]
pub struct CreateRequest {
    /// Its id.
    pub id: String,
    /// Its OCI bundle.
    pub bundle: PathBuf,
    /// What to mount as its root file system.
    pub rootfs: Vec<Mount>,
    /// Its stdio.
    pub io: IoSpec,
    /// A checkpoint that containerd has unpacked, empty for none.
    pub checkpoint: String,
    /// The options of the handler in containerd's configuration.
    pub options: Option<Any>,
}

/// The containers of one Pod.
pub struct Pod {
    namespace: String,
    host: HostDirs,
    runtime: RuntimeFactory,
    events: Arc<dyn EventSink>,
    sandbox: OnceLock<Sandbox>,
    containers: Mutex<BTreeMap<ContainerId, Option<Arc<Container>>>>,
    done: CancellationToken,
}

/// Directories of the host that a shim works in; tests have their own.
#[derive(Debug, Clone)]
pub struct HostDirs {
    /// Where cgroup file systems are mounted.
    pub cgroups: PathBuf,
    /// Where shims keep sockets and files of calls in flight.
    pub run: PathBuf,
}

impl Default for HostDirs {
    fn default() -> Self {
        Self {
            cgroups: cgroup::MOUNT.into(),
            run: RUN_DIR.into(),
        }
    }
}

/// What a process is doing, for the Task API.
#[derive(Debug)]
pub struct Report {
    /// The container's bundle.
    pub bundle: PathBuf,
    /// Host pid that stands for it, or an exec's pid inside.
    pub pid: u32,
    /// Its state.
    pub state: State,
    /// Its stdio.
    pub io: IoSpec,
}

impl Pod {
    /// A Pod without containers in containerd's `namespace`.
    pub fn new(
        namespace: String,
        host: HostDirs,
        runtime: RuntimeFactory,
        events: Arc<dyn EventSink>,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            host,
            runtime,
            events,
            sandbox: OnceLock::new(),
            containers: Mutex::default(),
            done: CancellationToken::new(),
        })
    }

    /// Resolves when the last container is deleted and containerd has asked for shutdown.
    pub async fn done(&self) {
        self.done.cancelled().await;
    }

    /// Makes a container and returns the host pid that stands for it.
    pub async fn create(&self, request: CreateRequest) -> Result<u32> {
        let id: ContainerId = request.id.parse()?;
        let slot = Slot::reserve(self, &id)?;
        let bundle = checked_bundle(&request.bundle)?;
        let spec = blocking({
            let bundle = bundle.clone();
            move || Spec::load(&bundle)
        })
        .await?;
        if spec.terminal() != request.io.terminal {
            let words = "process.terminal and the request disagree".to_owned();
            return Err(Error::InvalidArgument(words));
        }
        let role = spec.role()?;
        let sandbox = self
            .sandbox_for(&id, &role, &spec, request.options.as_ref())
            .await?;
        let result = self
            .create_in(sandbox, &id, role, spec, bundle, request)
            .await;
        match result {
            Ok(container) => {
                let pid = container.init.pid();
                slot.fill(container);
                self.limit_sandbox();
                Ok(pid)
            }
            Err(e) => {
                warn!("create {id}: {e}");
                Err(e)
            }
        }
    }

    /// The Pod's sandbox; the first container brings it with it.
    async fn sandbox_for(
        &self,
        id: &ContainerId,
        role: &Role,
        spec: &Spec,
        options: Option<&Any>,
    ) -> Result<&Sandbox> {
        match (role, self.sandbox.get()) {
            (Role::Member(of), Some(sandbox)) if *of == sandbox.id => {
                spec.check(&sandbox.policy, sandbox.pid())?;
                Ok(sandbox)
            }
            (Role::Member(of), _) => Err(Error::InvalidArgument(format!(
                "sandbox {of} is not in this shim"
            ))),
            (Role::Sandbox, Some(sandbox)) => Err(Error::InvalidArgument(format!(
                "this shim serves sandbox {}, and {id} is a sandbox of its own",
                sandbox.id
            ))),
            (Role::Sandbox, None) => {
                let sandbox = self.new_sandbox(id, spec, options).await?;
                // The slot of `id` is reserved, and no other id makes a sandbox before this one.
                self.sandbox
                    .set(sandbox)
                    .map_err(|_| Error::AlreadyExists {
                        kind: "sandbox",
                        id: id.to_string(),
                    })?;
                self.sandbox.get().ok_or(Error::NotFound {
                    kind: "sandbox",
                    id: id.to_string(),
                })
            }
        }
    }

    async fn new_sandbox(
        &self,
        id: &ContainerId,
        spec: &Spec,
        options: Option<&Any>,
    ) -> Result<Sandbox> {
        let options = options.cloned();
        let mut config = blocking(move || NodeConfig::from_options(options.as_ref())).await?;
        spec.check(&config.policy, None)?;
        let network = spec.network();
        if network == Network::Host && config.runtime.kind == RuntimeKind::Runsc {
            config
                .runtime
                .flags
                .insert("network".to_owned(), "host".to_owned());
        }
        let fallback = format!("/{}/{id}", self.namespace);
        let path = spec.cgroups_path().unwrap_or(&fallback);
        let cgroup = Cgroup::new(&self.host.cgroups, path)?;
        let runtime = (self.runtime)(&config, &self.namespace)?;
        let (run, owner) = (self.host.run.clone(), id.clone());
        let scratch = blocking(move || Scratch::new(&run, &owner)).await?;
        Ok(Sandbox {
            id: id.clone(),
            kind: config.runtime.kind,
            runtime,
            policy: config.policy,
            config_file: config.file,
            network,
            cgroup,
            pod_limits: spec.pod_limits(),
            scratch,
            pid: 0.into(),
            empty: OnceLock::new(),
        })
    }

    async fn create_in(
        &self,
        sandbox: &Sandbox,
        id: &ContainerId,
        role: Role,
        spec: Spec,
        bundle: PathBuf,
        request: CreateRequest,
    ) -> Result<Arc<Container>> {
        let cgroup = match (&role, spec.cgroups_path()) {
            (Role::Member(_), Some(path)) => Cgroup::new(&self.host.cgroups, path)?,
            _ => sandbox.cgroup.clone(),
        };
        let restore = restore_image(sandbox, &spec, &request.checkpoint)?;
        let limits = spec.limits();
        let shares_pids = spec.shares_pids();
        let log_dir = spec.log_dir();
        let init = Process::new(id.clone(), request.io.clone());
        let opts = CreateOpts {
            id: id.clone(),
            sandbox: sandbox.id.clone(),
            bundle: bundle.clone(),
            stdio: Stdio::default(),
            console_socket: None,
            user_log: None,
            log_dir,
        };
        let made = match prepare(sandbox, &role, spec, &cgroup, &bundle, &request.rootfs).await {
            Ok(()) => make(sandbox, &init, opts).await,
            Err(e) => Err(e),
        };
        if let Err(e) = made {
            undo_create(sandbox, id, &role, &bundle, &e).await;
            return Err(e);
        }
        let charged = if sandbox.is_shared() {
            sandbox.cgroup.clone()
        } else {
            cgroup
        };
        if role == Role::Sandbox {
            sandbox.set_pid(init.pid());
        }
        let parts = Parts {
            id: id.clone(),
            role,
            bundle,
            init,
            cgroup: charged,
            shares_pids,
            restore,
            limits,
        };
        let container = Arc::new(Container::new(parts));
        publish(
            &*self.events,
            &events::TaskCreate {
                container_id: id.to_string(),
                bundle: request.bundle.display().to_string(),
                rootfs: request.rootfs,
                io: MessageField::some(events::TaskIO {
                    stdin: request.io.stdin,
                    stdout: request.io.stdout,
                    stderr: request.io.stderr,
                    terminal: request.io.terminal,
                    ..events::TaskIO::default()
                }),
                checkpoint: request.checkpoint,
                pid: container.init.pid(),
                ..events::TaskCreate::default()
            },
        );
        info!("created {id}, pid {}", container.init.pid());
        Ok(container)
    }

    /// Starts a container, or an exec of it, and returns its pid.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.container(id)?;
        match exec_of(&container, exec_id)? {
            None => self.start_init(container).await,
            Some(exec) => self.start_exec(container, exec).await,
        }
    }

    async fn start_init(self: &Arc<Self>, container: Arc<Container>) -> Result<u32> {
        let sandbox = self.sandbox()?;
        let mut stdio = container.init.lifecycle.lock().await;
        container.init.require("start", |s| s == State::Created)?;
        let exit = sandbox.runtime.watch(&container.id).await?;
        let (runtime, id) = (&sandbox.runtime, &container.id);
        match &container.restore {
            Some(image) => runtime.restore(id, image, &stdio).await,
            None => runtime.start(id, &stdio).await,
        }?;
        *stdio = Stdio::default();
        container.init.apply("start", Event::Started)?;
        if container.role == Role::Sandbox {
            self.forward_ports(sandbox);
        }
        let pid = container.init.pid();
        let container_id = container.id.to_string();
        publish(
            &*self.events,
            &events::TaskStart {
                container_id,
                pid,
                ..events::TaskStart::default()
            },
        );
        let pod = Arc::clone(self);
        let container = Arc::clone(&container);
        tokio::spawn(async move { pod.follow_init(container, exit).await });
        Ok(pid)
    }

    fn forward_ports(&self, sandbox: &Sandbox) {
        let Network::Netns(netns) = &sandbox.network else {
            return;
        };
        if !sandbox.policy.port_forward || !sandbox.is_shared() {
            return;
        }
        let (runtime, id) = (Arc::clone(&sandbox.runtime), sandbox.id.clone());
        if let Err(e) = port_forward::serve(netns, runtime, id, self.done.clone()) {
            warn!("port-forward is not available in this Pod: {e}");
        }
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: Arc<Container>,
        exec: Arc<Exec>,
    ) -> Result<u32> {
        let sandbox = self.sandbox()?;
        let order = exec.process.lifecycle.lock().await;
        exec.process.require("start", |s| s == State::Created)?;
        container.init.require("exec in", |s| s == State::Running)?;
        let opts = ExecOpts {
            container: container.id.clone(),
            process: exec.spec.clone(),
            stdio: Stdio::default(),
            console_socket: None,
            scratch: sandbox.scratch.dir().to_owned(),
        };
        let (pid, exit) = run_exec(sandbox, &exec.process, opts).await?;
        exec.process.set_pid(pid);
        exec.process.apply("start", Event::Started)?;
        publish(
            &*self.events,
            &events::TaskExecStarted {
                container_id: container.id.to_string(),
                exec_id: exec.process.id.to_string(),
                pid,
                ..events::TaskExecStarted::default()
            },
        );
        drop(order);
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            let exit = outcome(&exec.process.id, exit).await;
            pod.ended(&container.id, &exec.process, exit).await;
        });
        Ok(pid)
    }

    /// Waits for the end of a container's first process and announces it.
    async fn follow_init(self: Arc<Self>, container: Arc<Container>, exit: ExitFuture) {
        let kills_before = container.cgroup.oom_kills();
        let exit = outcome(&container.id, exit).await;
        let Ok(sandbox) = self.sandbox() else { return };
        if container.shares_pids && container.role != Role::Sandbox && sandbox.is_shared() {
            // Processes that the first one left behind have lost their container.
            match sandbox
                .runtime
                .kill(&container.id, KillTarget::All, libc::SIGKILL)
                .await
            {
                Ok(()) | Err(RuntimeError::NotFound { .. }) => {}
                Err(e) => warn!("kill what is left of {}: {e}", container.id),
            }
        }
        let execs = container.all_execs();
        let running = execs.iter().filter(|e| e.process.state() != State::Created);
        for exec in running {
            if tokio::time::timeout(EXECS_FOLLOW, exec.process.exited())
                .await
                .is_err()
            {
                warn!(
                    "exec {} outlives container {}",
                    exec.process.id, container.id
                );
            }
        }
        if exit.code == Exit::KILLED && container.cgroup.oom_kills() > kills_before {
            let container_id = container.id.to_string();
            publish(
                &*self.events,
                &events::TaskOOM {
                    container_id,
                    ..events::TaskOOM::default()
                },
            );
        }
        self.ended(&container.id, &container.init, exit).await;
    }

    /// Drains the output of a process that has ended, and announces its exit.
    async fn ended(&self, container: &ContainerId, process: &Process, exit: Exit) {
        if let Some(io) = process.io() {
            io.finish().await;
        }
        if process.apply("end", Event::Exited(exit)).is_err() {
            return; // its end was announced when it was discarded
        }
        info!("{} of {container} ended with {}", process.id, exit.code);
        publish(
            &*self.events,
            &events::TaskExit {
                container_id: container.to_string(),
                id: process.id.to_string(),
                pid: process.pid(),
                exit_status: exit.code,
                exited_at: timestamp(exit.at),
                ..events::TaskExit::default()
            },
        );
    }

    /// Adds an exec to a container; `process` is an OCI `process` object.
    pub fn exec(&self, id: &str, exec_id: &str, io: IoSpec, process: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let exec_id: ContainerId = exec_id.parse()?;
        container.init.require("exec in", |s| s == State::Running)?;
        let spec: Value = serde_json::from_slice(process)
            .map_err(|e| Error::InvalidArgument(format!("exec {exec_id}: process: {e}")))?;
        let args = spec.get("args").and_then(Value::as_array);
        if args.is_none_or(Vec::is_empty) {
            return Err(Error::InvalidArgument(format!(
                "exec {exec_id}: process.args is empty"
            )));
        }
        container.add_exec(Exec {
            process: Process::new(exec_id.clone(), io),
            spec,
        })?;
        publish(
            &*self.events,
            &events::TaskExecAdded {
                container_id: container.id.to_string(),
                exec_id: exec_id.to_string(),
                ..events::TaskExecAdded::default()
            },
        );
        Ok(())
    }

    /// Removes an ended (or never started) container or exec, and returns its pid and exit.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let container = self.container(id)?;
        let removable = |s: State| s == State::Created || s.exit().is_some();
        if let Some(exec) = exec_of(&container, exec_id)? {
            let _order = exec.process.lifecycle.lock().await;
            exec.process.require("delete", removable)?;
            container.remove_exec(&exec.process.id);
            return Ok((
                exec.process.pid(),
                exec.process.state().exit().unwrap_or(Exit::now(0)),
            ));
        }
        let _order = container.init.lifecycle.lock().await;
        container.init.require("delete", removable)?;
        self.remove(&container).await;
        let pid = container.init.pid();
        let exit = container.init.state().exit().unwrap_or(Exit::now(0));
        publish(
            &*self.events,
            &events::TaskDelete {
                container_id: container.id.to_string(),
                pid,
                exit_status: exit.code,
                exited_at: timestamp(exit.at),
                ..events::TaskDelete::default()
            },
        );
        Ok((pid, exit))
    }

    /// Takes everything of a container away. What fails is logged and the rest goes on: a task
    /// that cannot be deleted would keep its Pod from ever ending.
    async fn remove(&self, container: &Arc<Container>) {
        let id = &container.id;
        if let Ok(sandbox) = self.sandbox()
            && let Err(e) = sandbox.runtime.delete(id, true).await
        {
            warn!("delete {id}: {e}");
        }
        if let Some(io) = container.init.io() {
            io.finish().await;
        }
        let cgroup = (container.role == Role::Sandbox).then(|| container.cgroup.clone());
        if let Err(e) = clean_up(container.bundle.clone(), cgroup).await {
            warn!("clean up {id}: {e}");
        }
        self.map().remove(id);
        self.limit_sandbox();
        info!("deleted {id}");
    }

    /// Sends a signal to a container, an exec, or with `all` to every process of a container.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let sandbox = self.sandbox()?;
        let signal = i32::try_from(signal)
            .ok()
            .filter(|s| (0..=64).contains(s))
            .ok_or_else(|| Error::InvalidArgument(format!("signal {signal} does not exist")))?;
        let exec = exec_of(&container, exec_id)?;
        let process = exec.as_ref().map_or(&container.init, |e| &e.process);
        let target = match &exec {
            Some(exec) => KillTarget::Process(exec.process.pid()),
            None if all => KillTarget::All,
            None => KillTarget::Init,
        };
        match process.state() {
            State::Stopped(_) => {
                // containerd takes this for "already ended".
                return Err(Error::NotFound {
                    kind: "process",
                    id: process.id.to_string(),
                });
            }
            State::Created => return self.discard(&container, process, signal).await,
            State::Paused if signal == libc::SIGKILL => self.resume(id).await?,
            State::Running | State::Paused => {}
        }
        match sandbox.runtime.kill(&container.id, target, signal).await {
            // The runtime may know of an end before the shim has announced it.
            Err(RuntimeError::NotRunning { .. }) => Err(Error::NotFound {
                kind: "process",
                id: process.id.to_string(),
            }),
            done => Ok(done?),
        }
    }

    /// Ends a process that never ran: nothing is there to take a signal.
    async fn discard(&self, container: &Container, process: &Process, signal: i32) -> Result<()> {
        if !matches!(signal, libc::SIGKILL | libc::SIGTERM) {
            return process.require("signal", |s| s != State::Created);
        }
        let exit = Exit::now(128 + signal.cast_unsigned());
        self.ended(&container.id, process, exit).await;
        Ok(())
    }

    /// Pauses the sandbox of a container.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.init.require("pause", |s| s == State::Running)?;
        self.sandbox()?.runtime.pause(&container.id).await?;
        self.shift_all(&container, Event::Paused);
        let container_id = container.id.to_string();
        publish(
            &*self.events,
            &events::TaskPaused {
                container_id,
                ..events::TaskPaused::default()
            },
        );
        Ok(())
    }

    /// Lets a paused sandbox go on.
    pub async fn resume(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.init.require("resume", |s| s == State::Paused)?;
        self.sandbox()?.runtime.resume(&container.id).await?;
        self.shift_all(&container, Event::Resumed);
        let container_id = container.id.to_string();
        publish(
            &*self.events,
            &events::TaskResumed {
                container_id,
                ..events::TaskResumed::default()
            },
        );
        Ok(())
    }

    /// Pausing stops a whole sandbox, so that its other containers follow.
    fn shift_all(&self, asked: &Arc<Container>, event: Event) {
        let shared = self.sandbox.get().is_some_and(Sandbox::is_shared);
        let affected = if shared {
            self.all()
        } else {
            vec![Arc::clone(asked)]
        };
        for container in affected {
            // Those that have not started or have ended stay what they are.
            container.init.apply("pause", event).ok();
        }
    }

    /// Writes a checkpoint of a container's sandbox to the directory `path`.
    pub async fn checkpoint(&self, id: &str, path: &str, options: Option<&Any>) -> Result<()> {
        let container = self.container(id)?;
        container.init.require("checkpoint", |s| {
            matches!(s, State::Running | State::Paused)
        })?;
        let image = PathBuf::from(path);
        if !image.is_absolute() {
            return Err(Error::InvalidArgument(format!(
                "checkpoint path {path:?} is not absolute"
            )));
        }
        let exit = options
            .and_then(|any| CheckpointOptions::parse_from_bytes(&any.value).ok())
            .is_some_and(|o| o.exit);
        let opts = CheckpointOpts {
            image,
            leave_running: !exit,
        };
        self.sandbox()?
            .runtime
            .checkpoint(&container.id, &opts)
            .await?;
        publish(
            &*self.events,
            &events::TaskCheckpointed {
                container_id: container.id.to_string(),
                checkpoint: path.to_owned(),
                ..events::TaskCheckpointed::default()
            },
        );
        Ok(())
    }

    /// Changes a container's limits; `resources` is an OCI `LinuxResources` object.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let sandbox = self.sandbox()?;
        let resources: Value = serde_json::from_slice(resources)
            .map_err(|e| Error::InvalidArgument(format!("update {id}: resources: {e}")))?;
        if !sandbox.is_shared() {
            return Ok(sandbox.runtime.update(&container.id, &resources).await?);
        }
        let (old, new) = (container.limits(), Limits::of(&resources));
        container.set_limits(new.or(&old));
        self.limit_sandbox();
        Ok(())
    }

    /// Closes the input of a process.
    pub fn close_io(&self, id: &str, exec_id: &str) -> Result<()> {
        let container = self.container(id)?;
        match exec_of(&container, exec_id)? {
            Some(exec) => exec.process.close_stdin(),
            None => container.init.close_stdin(),
        }
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let cells = |n: u32| {
            u16::try_from(n).map_err(|_| Error::InvalidArgument(format!("terminal size {n}")))
        };
        let (width, height) = (cells(width)?, cells(height)?);
        let container = self.container(id)?;
        let exec = exec_of(&container, exec_id)?;
        let process = exec.as_ref().map_or(&container.init, |e| &e.process);
        process.io().map_or(Ok(()), |io| io.resize(width, height))
    }

    /// What a process is doing.
    pub fn report(&self, id: &str, exec_id: &str) -> Result<Report> {
        let container = self.container(id)?;
        let exec = exec_of(&container, exec_id)?;
        let process = exec.as_ref().map_or(&container.init, |e| &e.process);
        Ok(Report {
            bundle: container.bundle.clone(),
            pid: process.pid(),
            state: process.state(),
            io: process.io_spec.clone(),
        })
    }

    /// Waits for the end of a process.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit> {
        let container = self.container(id)?;
        let exec = exec_of(&container, exec_id)?;
        Ok(exec
            .as_ref()
            .map_or(&container.init, |e| &e.process)
            .exited()
            .await)
    }

    /// The processes of a container: pid, and the exec id where it is one.
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, Option<String>)>> {
        let container = self.container(id)?;
        let execs = container.all_execs();
        let exec_id = |pid| {
            execs
                .iter()
                .find(|e| e.process.pid() == pid)
                .map(|e| e.process.id.to_string())
        };
        let processes = self.sandbox()?.runtime.processes(&container.id).await?;
        Ok(processes
            .into_iter()
            .map(|p| (p.pid, exec_id(p.pid)))
            .collect())
    }

    /// What a container uses: the runtime's counters, those of the cgroup it is charged to, and
    /// the container's own limits.
    pub async fn stats(&self, id: &str) -> Result<(runsc_wrapper::Stats, Cgroup, Limits)> {
        let container = self.container(id)?;
        container.init.require("stat", |s| s.exit().is_none())?;
        let stats = self.sandbox()?.runtime.stats(&container.id).await?;
        Ok((stats, container.cgroup.clone(), container.limits()))
    }

    /// Ends the shim if it has no containers any more; otherwise it goes on.
    pub fn shutdown(&self) {
        if !self.map().is_empty() {
            return;
        }
        if let Some(sandbox) = self.sandbox.get()
            && let Err(e) = sandbox.scratch.remove()
        {
            warn!("{e}");
        }
        self.done.cancel();
    }

    fn limit_sandbox(&self) {
        let Some(sandbox) = self.sandbox.get() else {
            return;
        };
        let members = self.all();
        let members = members
            .iter()
            .filter(|c| c.role != Role::Sandbox)
            .map(|c| c.limits());
        sandbox.limit(&members.collect::<Vec<_>>());
    }

    fn sandbox(&self) -> Result<&Sandbox> {
        self.sandbox.get().ok_or(Error::NotFound {
            kind: "sandbox",
            id: String::new(),
        })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>> {
        let id: ContainerId = id.parse()?;
        let container = self.map().get(&id).cloned().flatten();
        container.ok_or_else(|| Error::NotFound {
            kind: "container",
            id: id.to_string(),
        })
    }

    fn all(&self) -> Vec<Arc<Container>> {
        self.map().values().flatten().cloned().collect()
    }

    fn map(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Option<Arc<Container>>>> {
        // A map has no invariant that a panic elsewhere could break.
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// An id that is taken while its container is being made, and free again if that fails.
struct Slot<'a> {
    pod: &'a Pod,
    id: ContainerId,
    filled: bool,
}

impl<'a> Slot<'a> {
    fn reserve(pod: &'a Pod, id: &ContainerId) -> Result<Self> {
        let mut map = pod.map();
        if map.contains_key(id) {
            return Err(Error::AlreadyExists {
                kind: "container",
                id: id.to_string(),
            });
        }
        map.insert(id.clone(), None);
        Ok(Self {
            pod,
            id: id.clone(),
            filled: false,
        })
    }

    fn fill(mut self, container: Arc<Container>) {
        self.pod.map().insert(self.id.clone(), Some(container));
        self.filled = true;
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if !self.filled {
            self.pod.map().remove(&self.id);
        }
    }
}

fn exec_of(container: &Container, exec_id: &str) -> Result<Option<Arc<Exec>>> {
    if exec_id.is_empty() {
        return Ok(None);
    }
    container.exec(&exec_id.parse()?).map(Some)
}

fn checked_bundle(bundle: &Path) -> Result<PathBuf> {
    if bundle.is_absolute() {
        return Ok(bundle.to_owned());
    }
    Err(Error::InvalidArgument(format!(
        "bundle {} is not absolute",
        bundle.display()
    )))
}

/// The checkpoint that a container starts from: what containerd unpacked, or what the Pod names
/// below a directory that the node allows.
fn restore_image(sandbox: &Sandbox, spec: &Spec, checkpoint: &str) -> Result<Option<PathBuf>> {
    if !checkpoint.is_empty() {
        return Ok(Some(checkpoint.into()));
    }
    let Some(named) = spec.restore_image() else {
        return Ok(None);
    };
    let denied = || {
        Error::Denied(format!(
            "restoring from {named:?} is not allowed on this node (restore_dirs)"
        ))
    };
    let image = Path::new(named).canonicalize().map_err(|_| denied())?;
    if sandbox
        .policy
        .restore_dirs
        .iter()
        .any(|dir| image.starts_with(dir))
    {
        return Ok(Some(image));
    }
    Err(denied())
}

/// Changes the spec as the runtime must see it, leaves the record for a later clean-up, and
/// mounts the root file system.
async fn prepare(
    sandbox: &Sandbox,
    role: &Role,
    mut spec: Spec,
    cgroup: &Cgroup,
    bundle: &Path,
    mounts: &[Mount],
) -> Result<()> {
    // The limits of the pause container mean nothing for the sandbox around all others.
    let limits = (*role == Role::Sandbox && sandbox.is_shared()).then(|| sandbox.boot_limits());
    spec.rewrite(sandbox.kind, cgroup, limits.as_ref());
    let sandbox_cgroup = if *role == Role::Sandbox {
        cgroup.spec_path()
    } else {
        String::new()
    };
    let record = Record::new(&sandbox.id, sandbox.config_file.clone(), sandbox_cgroup);
    let (bundle, mounts, shared) = (bundle.to_owned(), mounts.to_vec(), sandbox.is_shared());
    blocking(move || {
        let rootfs = bundle.join("rootfs");
        record.save(&bundle)?;
        rootfs::mount(&mounts, &rootfs)?;
        if shared {
            spec.mount_masks(&rootfs)?;
        }
        spec.save(&bundle)
    })
    .await
}

/// Has the runtime make a container, with its stdio or terminal connected.
async fn make(sandbox: &Sandbox, init: &Process, mut opts: CreateOpts) -> Result<()> {
    if !init.io_spec.terminal {
        let (io, stdio) = ProcessIo::open(&init.io_spec)?;
        opts.stdio = stdio;
        init.set_pid(sandbox.runtime.create(&opts).await?);
        init.set_io(io.into());
        *init.lifecycle.lock().await = opts.stdio;
        return Ok(());
    }
    let console = ConsoleSocket::bind(sandbox.scratch.dir(), &sandbox.scratch.name())?;
    opts.console_socket = Some(console.path().to_owned());
    init.set_pid(sandbox.runtime.create(&opts).await?);
    attach(init, &console).await
}

/// Takes away what a create that failed with `error` may have left.
async fn undo_create(
    sandbox: &Sandbox,
    id: &ContainerId,
    role: &Role,
    bundle: &Path,
    error: &Error,
) {
    // A container of this name that was there before is not ours to delete.
    let theirs = matches!(error, Error::Runtime(RuntimeError::AlreadyExists { .. }));
    if !theirs && let Err(e) = sandbox.runtime.delete(id, true).await {
        warn!("undo create {id}: {e}");
    }
    let cgroup = (*role == Role::Sandbox && !theirs).then(|| sandbox.cgroup.clone());
    if let Err(e) = clean_up(bundle.to_owned(), cgroup).await {
        warn!("undo create {id}: {e}");
    }
}

/// Takes away what the runtime leaves to its caller.
async fn clean_up(bundle: PathBuf, cgroup: Option<Cgroup>) -> Result<()> {
    blocking(move || {
        let unmounted = rootfs::unmount(&bundle.join("rootfs"));
        cgroup.map_or(Ok(()), |c| c.remove()).and(unmounted)?;
        // containerd runs `delete` also after a shim that ended well; without a record it knows
        // that nothing is left to do.
        Record::remove(&bundle)
    })
    .await
}

/// Connects the terminal that the runtime has made.
async fn attach(process: &Process, console: &ConsoleSocket) -> Result<()> {
    let io = ProcessIo::default();
    io.attach_terminal(&process.io_spec, console.receive().await?)?;
    process.set_io(io.into());
    Ok(())
}

/// Has the runtime start an exec, and returns its pid and what resolves at its end.
async fn run_exec(
    sandbox: &Sandbox,
    process: &Process,
    mut opts: ExecOpts,
) -> Result<(u32, ExitFuture)> {
    if !process.io_spec.terminal {
        let (io, stdio) = ProcessIo::open(&process.io_spec)?;
        opts.stdio = stdio;
        let exec = sandbox.runtime.exec(&opts).await?;
        process.set_io(io.into());
        return Ok((exec.pid, exec.exit));
    }
    let console = ConsoleSocket::bind(sandbox.scratch.dir(), &sandbox.scratch.name())?;
    opts.console_socket = Some(console.path().to_owned());
    let exec = sandbox.runtime.exec(&opts).await?;
    attach(process, &console).await?;
    Ok((exec.pid, exec.exit))
}

/// How a process ended. A watch that fails has lost its sandbox.
async fn outcome(id: &ContainerId, exit: ExitFuture) -> Exit {
    exit.await.unwrap_or_else(|e| {
        warn!("wait for {id}: {e}");
        Exit::now(Exit::KILLED)
    })
}

/// Runs what blocks on a thread that may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| {
        Err(Error::Io {
            what: "run blocking work".to_owned(),
            source: e.into(),
        })
    })
}
