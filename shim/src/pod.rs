// SPDX-License-Identifier: Apache-2.0

//! The containers of one Pod: every operation of the Task API, free of ttrpc.
//!
//! ```text
//!         create of a sandbox           it is booted
//!  Empty ─────────────────────► Booting ────────────► Up
//!    ▲                             │
//!    └─────── it cannot be ────────┘
//! ```
//!
//! `Booting` has a `BootPlan` and no sandbox: creates of other containers are
//! refused. `Up` has a `Sandbox`, which does not change, and takes members. It
//! stays when the last container is deleted, and no other sandbox comes after it: the process ends
//! with [`Pod::shutdown`]. Each process of a container has a life of its own
//! ([`crate::state`]).
//!
//! Order that clients rely on: TaskCreate, TaskStart, TaskExit, TaskDelete, whatever the timing,
//! and TaskExit only when the output is drained. A process that ends at once keeps that order
//! because the task that waits for its end is spawned after its start was published.
//!
//! Calls that change something are run by [`crate::task`] in tasks of their own: a client that
//! hangs up leaves nothing half made.

mod create;
mod life;
mod phase;
mod snapshot;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim_protos::{
    events::task as events,
    protobuf::{Message as _, well_known_types::any::Any},
    shim::oci::CheckpointOptions,
};
use log::warn;
use runsc_wrapper::{CheckpointOpts, ContainerId, Exit, KillTarget, RuntimeError, WarmRuntime};
use serde_json::Value;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

pub(crate) use self::snapshot::Image;
use self::{phase::Phase, snapshot::Suspension};
use kiln_agent_api::NodeConfig;
use kiln_host::cgroup::{Cgroup, Limits};

use crate::{
    container::{Container, Exec, Said},
    error::{Error, Result},
    events::{EventSink, publish},
    host_dirs::HostDirs,
    io::IoSpec,
    paths,
    process::Process,
    sandbox::scratch::Scratch,
    state::{Event, State},
};

/// How long a runtime may take to list processes: less than the five seconds that containerd gives
/// to a shim that it finds when it comes back.
const PIDS: Duration = Duration::from_secs(2);

/// Makes the runtime that a node's configuration describes.
pub type RuntimeFactory =
    Box<dyn Fn(&NodeConfig, &str) -> Result<Arc<dyn WarmRuntime>> + Send + Sync>;

/// The containers of one Pod.
pub struct Pod {
    namespace: String,
    host: HostDirs,
    /// The socket that the shim serves.
    socket: PathBuf,
    runtime: RuntimeFactory,
    events: Arc<dyn EventSink>,
    phase: Mutex<Phase>,
    suspension: watch::Sender<Suspension>,
    done: CancellationToken,
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

/// What a container uses, as the runtime says and as the host can check it.
#[derive(Debug)]
pub(crate) struct Figures {
    /// The runtime's counters.
    pub(crate) said: runsc_wrapper::Stats,
    /// Nanoseconds of CPU time of each container that is charged to `cgroup`, as the runtime last
    /// said.
    pub(crate) cpu: Vec<(String, u64)>,
    /// Bytes of memory of each of them.
    pub(crate) memory: Vec<(String, u64)>,
    /// The cgroup that it is charged to.
    pub(crate) cgroup: Cgroup,
    /// The container's own limits.
    pub(crate) limits: Limits,
}

impl Pod {
    /// A Pod without containers in containerd's `namespace`, whose shim serves `socket`.
    pub fn new(
        namespace: String,
        host: HostDirs,
        socket: PathBuf,
        runtime: RuntimeFactory,
        events: Arc<dyn EventSink>,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            host,
            socket,
            runtime,
            events,
            phase: Mutex::default(),
            suspension: watch::Sender::default(),
            done: CancellationToken::new(),
        })
    }

    /// Resolves when the last container is deleted and containerd has asked for shutdown.
    pub async fn done(&self) {
        self.done.cancelled().await;
    }

    /// Adds an exec to a container; `process` is an OCI `process` object.
    pub fn exec(&self, id: &str, exec_id: &str, io: IoSpec, process: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let exec_id: ContainerId = exec_id.parse()?;
        container.init.require("exec in", |s| s == State::Running)?;
        self.require_running("exec in")?;
        let mut spec: Value = serde_json::from_slice(process)
            .map_err(|e| Error::InvalidArgument(format!("exec {exec_id}: process: {e}")))?;
        paths::clean_process(&mut spec);
        let args = spec.get("args").and_then(Value::as_array);
        if args.is_none_or(Vec::is_empty) {
            return Err(Error::InvalidArgument(format!(
                "exec {exec_id}: process.args is empty"
            )));
        }
        container.add_exec(Exec {
            process: Process::exec(exec_id.clone(), io),
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

    /// Sends a signal to a container, an exec, or with `all` to every process of a container.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let signal = i32::try_from(signal)
            .ok()
            .filter(|s| (0..=64).contains(s))
            .ok_or_else(|| Error::InvalidArgument(format!("signal {signal} does not exist")))?;
        if exec_id.is_empty() && self.end_suspended() {
            return Ok(());
        }
        let exec = exec_of(&container, exec_id)?;
        let process = exec.as_ref().map_or(&container.init, |e| &e.process);
        if process.state() == State::Created {
            // A start that is under way would go on after the process was said to have ended.
            let _order = process.lifecycle.lock().await;
            if process.state() == State::Created {
                // One that was deleted meanwhile has had its last event.
                exec_of(&*self.container(id)?, exec_id)?;
                return self.discard(&container, process, signal).await;
            }
        }
        match process.state() {
            State::Stopped(_) => {
                // containerd takes this for "already ended".
                return Err(Error::NotFound {
                    kind: "process",
                    id: process.id.to_string(),
                });
            }
            State::Paused if signal == libc::SIGKILL => self.resume(id).await?,
            State::Created | State::Running | State::Paused => {}
        }
        let target = match &exec {
            Some(exec) => KillTarget::Process(exec.process.pid()),
            None if all => KillTarget::All,
            None => KillTarget::Init,
        };
        let runtime = &container.sandbox.runtime;
        match runtime.kill(container.runtime_id(), target, signal).await {
            // The runtime may know of an end before the shim has announced it.
            Err(RuntimeError::NotRunning { .. }) => Err(Error::NotFound {
                kind: "process",
                id: process.id.to_string(),
            }),
            done => Ok(done?),
        }
    }

    /// Pauses the sandbox of a container.
    pub async fn pause(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.init.require("pause", |s| s == State::Running)?;
        let runtime = &container.sandbox.runtime;
        runtime.pause(container.runtime_id()).await?;
        self.shift_all(Event::Paused);
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
        let runtime = &container.sandbox.runtime;
        runtime.resume(container.runtime_id()).await?;
        self.shift_all(Event::Resumed);
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
    fn shift_all(&self, event: Event) {
        for container in self.containers() {
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
        let runtime = &container.sandbox.runtime;
        runtime.checkpoint(container.runtime_id(), &opts).await?;
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
        let resources: Value = serde_json::from_slice(resources)
            .map_err(|e| Error::InvalidArgument(format!("update {id}: resources: {e}")))?;
        container.update_limits(Limits::of(&resources));
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

    /// The processes of a container: pid, and the exec id where it is one; where nobody can say,
    /// its first alone. Never none: a containerd that comes back takes a task without processes
    /// for a leak, and would delete it before anybody has seen its exit code, or forget it where
    /// that is refused (`core/runtime/v2/shim_load.go`).
    pub async fn pids(&self, id: &str) -> Result<Vec<(u32, Option<String>)>> {
        let container = self.container(id)?;
        let init = vec![(container.init.pid(), None)];
        if container.init.state().exit().is_some() {
            return Ok(init);
        }
        let late = RuntimeError::Timeout {
            op: "ps",
            id: id.to_owned(),
            deadline: PIDS,
        };
        let runtime = &container.sandbox.runtime;
        let asked = runtime.processes(container.runtime_id());
        let answer = timeout(PIDS, asked).await.unwrap_or(Err(late));
        let processes = answer.unwrap_or_else(|e| {
            warn!("{e}");
            Vec::new()
        });
        if processes.is_empty() {
            return Ok(init);
        }
        let execs = container.all_execs();
        let exec_id = |pid| {
            execs
                .iter()
                .find(|e| e.process.pid() == pid)
                .map(|e| e.process.id.to_string())
        };
        Ok(processes
            .into_iter()
            .map(|p| (p.pid, exec_id(p.pid)))
            .collect())
    }

    /// What a container uses.
    pub(crate) async fn stats(&self, id: &str) -> Result<Figures> {
        let container = self.container(id)?;
        container.init.require("stat", |s| s.exit().is_none())?;
        self.require_running("stat")?;
        let sandbox = Arc::clone(&container.sandbox);
        let said = sandbox.runtime.stats(container.runtime_id()).await?;
        // From time to time is enough, and whoever asks for figures does that.
        tokio::spawn(async move { sandbox.egress.tell(&sandbox.id).await });
        let members = self.containers();
        container.said.note(said.cpu_ns, said.memory_bytes);
        // Only of containers that there are: a sentry could hide what these use behind others.
        for member in &members {
            let mut figures = said.sandbox_cpu_ns.iter();
            if let Some((_, ns)) = figures.find(|(id, _)| id == member.runtime_id().as_str()) {
                member.said.note_cpu(*ns);
            }
            if member.init.require("stat", |s| s.exit().is_none()).is_err() {
                member.said.note_memory(0);
            }
        }
        let of_each = |figure: fn(&Said) -> u64| {
            let of = |member: &Arc<Container>| (member.id.to_string(), figure(&member.said));
            members.iter().map(of).collect()
        };
        Ok(Figures {
            cpu: of_each(Said::cpu),
            memory: of_each(Said::memory),
            said,
            cgroup: container.sandbox.cgroup.clone(),
            limits: container.limits().unwrap_or_default(),
        })
    }

    /// Ends the shim if it has no containers any more; otherwise it goes on, unless it must end
    /// `now`.
    pub fn shutdown(&self, now: bool) {
        let phase = self.phase();
        if !now && !phase.is_idle() {
            return;
        }
        let removed = match &*phase {
            Phase::Empty => Ok(()),
            // The boot ends with the process.
            Phase::Booting(id) => {
                Scratch::remove_dir(&Scratch::place(&self.host, id, &self.socket))
            }
            Phase::Up(up) => up.sandbox.scratch.remove(),
        };
        drop(phase);
        if let Err(e) = removed {
            warn!("{e}");
        }
        self.done.cancel();
    }

    fn limit_sandbox(&self) {
        let Some(sandbox) = self.sandbox() else {
            return;
        };
        let limits = self.containers().into_iter().filter_map(|c| c.limits());
        sandbox.limit(&limits.collect::<Vec<_>>());
    }
}

fn exec_of(container: &Container, exec_id: &str) -> Result<Option<Arc<Exec>>> {
    if exec_id.is_empty() {
        return Ok(None);
    }
    container.exec(&exec_id.parse()?).map(Some)
}
