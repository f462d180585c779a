// SPDX-License-Identifier: Apache-2.0

//! From start to delete: what runs, what waits for its end, and what announces both.

use std::{path::Path, sync::Arc, time::Duration};

use containerd_shim_protos::events::task as events;
use log::{info, warn};
use runsc_wrapper::{ContainerId, ExecOpts, Exit, ExitFuture, KillTarget, RuntimeError, Stdio};

use super::{Pod, exec_of};
use kiln_host::cgroup::OomKills;

use crate::{
    bundle::{Network, Role},
    container::{Container, Exec},
    error::Result,
    events::{publish, timestamp},
    io::{ConsoleSocket, IoSpec, ProcessIo, SharedIo},
    port_forward,
    process::Process,
    sandbox::{
        Sandbox,
        make::{attach, clean_up},
        scratch::Scratch,
    },
    state::{Event, State},
};

/// How long a container's execs may take to follow its first process before its exit is
/// announced without them.
const EXECS_FOLLOW: Duration = Duration::from_secs(2);

impl Pod {
    /// Starts a container, or an exec of it, and returns its pid.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let container = self.container(id)?;
        match exec_of(&container, exec_id)? {
            None => self.start_init(container).await,
            Some(exec) => self.start_exec(container, exec).await,
        }
    }

    async fn start_init(self: &Arc<Self>, container: Arc<Container>) -> Result<u32> {
        let sandbox = &container.sandbox;
        let mut stdio = container.init.lifecycle.lock().await;
        container.init.require("start", |s| s == State::Created)?;
        let (runtime, id) = (&sandbox.runtime, container.runtime_id());
        let exit = runtime.watch(id).await?;
        // Memory may be gone before the runtime says that it has started.
        let oom_kills = sandbox.cgroup.oom_kills();
        match &container.restore {
            Some(image) => self.restore(&container, image, &stdio).await?,
            None if container.was_adopted() => {} // and started then
            None => runtime.start(id, &stdio).await?,
        }
        *stdio = Stdio::default();
        container.init.apply("start", Event::Started)?;
        if container.role == Role::Sandbox {
            sandbox.slacken().await;
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
        tokio::spawn(async move { pod.follow_init(container, exit, oom_kills).await });
        Ok(pid)
    }

    async fn restore(&self, container: &Container, image: &Path, stdio: &Stdio) -> Result<()> {
        let sandbox = &container.sandbox;
        let restored = sandbox
            .runtime
            .restore(container.runtime_id(), image, stdio);
        let restored = restored.await;
        if restored.is_err() {
            // Nothing can be started in it any more, and not every release ends it.
            let killed = sandbox.runtime.kill_sandbox(sandbox.runtime_id()).await;
            killed.inspect_err(|e| warn!("{e}")).ok();
        }
        if let Some(restore) = &sandbox.restore {
            match (&restored, &container.name) {
                (Err(e), _) => restore.failed(&e.to_string()),
                (Ok(()), Some(name)) => restore.restored(name),
                (Ok(()), None) => {}
            }
        }
        Ok(restored?)
    }

    fn forward_ports(&self, sandbox: &Sandbox) {
        let Network::Netns(netns) = &sandbox.network else {
            return;
        };
        if !sandbox.policy.port_forward {
            return;
        }
        let (runtime, id) = (Arc::clone(&sandbox.runtime), sandbox.runtime_id().clone());
        if let Err(e) = port_forward::serve(netns, runtime, id, self.done.clone()) {
            warn!("port-forward is not available in this Pod: {e}");
        }
    }

    async fn start_exec(
        self: &Arc<Self>,
        container: Arc<Container>,
        exec: Arc<Exec>,
    ) -> Result<u32> {
        let sandbox = &container.sandbox;
        let order = exec.process.lifecycle.lock().await;
        exec.process.require("start", |s| s == State::Created)?;
        container.init.require("exec in", |s| s == State::Running)?;
        let opts = ExecOpts {
            container: container.runtime_id().clone(),
            process: exec.spec.clone(),
            stdio: Stdio::default(),
            console_socket: None,
            scratch: sandbox.scratch.subdir()?,
        };
        let scratch = opts.scratch.clone();
        let started = run_exec(sandbox, &exec.process.io_spec, opts).await;
        if let Err(e) = Scratch::remove_dir(&scratch) {
            warn!("exec {}: {e}", exec.process.id);
        }
        let (pid, io, exit) = started?;
        exec.process.connect(pid, io);
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

    /// Waits for the end of a container's first process and announces it, with what the OOM killer
    /// has done since `oom_kills`.
    async fn follow_init(
        self: Arc<Self>,
        container: Arc<Container>,
        exit: ExitFuture,
        oom_kills: OomKills,
    ) {
        let mut exit = outcome(&container.id, exit).await;
        if self.ended_suspended().await {
            exit = Exit::now(0);
        }
        let sandbox = &container.sandbox;
        if container.shares_pids && container.role != Role::Sandbox {
            // Processes that the first one left behind have lost their container.
            match sandbox
                .runtime
                .kill(container.runtime_id(), KillTarget::All, libc::SIGKILL)
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
        if exit.code == Exit::KILLED && sandbox.cgroup.oom_kills().rose_since(&oom_kills) {
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
    /// that cannot be deleted would keep its Pod from ever ending. What lived in a sandbox goes
    /// with it, but for how it ended: a containerd that comes back deletes sandboxes first
    /// (`internal/cri/server/restart.go`).
    async fn remove(&self, container: &Arc<Container>) {
        let (id, sandbox) = (&container.id, &container.sandbox);
        let mut all = Vec::new();
        if container.role == Role::Sandbox {
            sandbox.egress.tell(&sandbox.id).await;
            // A gofer that nobody has used would keep the cgroup.
            drop(self.take_gofer());
            // runsc takes an id that begins another one for ambiguous: members first.
            all = self.containers();
            all.retain(|c| c.role != Role::Sandbox);
        }
        all.push(Arc::clone(container));
        for id in all.iter().map(|c| c.runtime_id()) {
            if let Err(e) = sandbox.runtime.delete(id).await {
                warn!("delete {id}: {e}");
            }
        }
        if let Some(io) = container.init.io() {
            io.finish().await;
        }
        if let Err(e) = clean_up(container.bundle.clone(), container.own_cgroup.clone()).await {
            warn!("clean up {id}: {e}");
        }
        self.forget(id);
        self.limit_sandbox();
        info!("deleted {id}");
    }

    /// Ends a process that never ran: nothing is there to take a signal.
    pub(super) async fn discard(
        &self,
        container: &Container,
        process: &Process,
        signal: i32,
    ) -> Result<()> {
        if !matches!(signal, libc::SIGKILL | libc::SIGTERM) {
            return process.require("signal", |s| s != State::Created);
        }
        let exit = Exit::now(128 + signal.cast_unsigned());
        self.ended(&container.id, process, exit).await;
        Ok(())
    }
}

/// Has the runtime start an exec, and returns its pid, its stdio and what resolves at its end.
async fn run_exec(
    sandbox: &Sandbox,
    io_spec: &IoSpec,
    mut opts: ExecOpts,
) -> Result<(u32, SharedIo, ExitFuture)> {
    if !io_spec.terminal {
        let (io, stdio) = ProcessIo::open(io_spec)?;
        opts.stdio = stdio;
        let exec = sandbox.runtime.exec(&opts).await?;
        return Ok((exec.pid, io.into(), exec.exit));
    }
    let console = ConsoleSocket::bind(&opts.scratch, "tty")?;
    opts.console_socket = Some(console.path().to_owned());
    let exec = sandbox.runtime.exec(&opts).await?;
    Ok((exec.pid, attach(io_spec, &console).await?, exec.exit))
}

/// How a process ended. A watch that fails has lost its sandbox.
async fn outcome(id: &ContainerId, exit: ExitFuture) -> Exit {
    exit.await.unwrap_or_else(|e| {
        warn!("wait for {id}: {e}");
        Exit::now(Exit::KILLED)
    })
}
