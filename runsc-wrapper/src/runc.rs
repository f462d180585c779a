// SPDX-License-Identifier: Apache-2.0

//! [`Runtime`] over `runc`: the same life as with runsc, where a test has no use for a sentry.
//!
//! There is no sandbox. A container's processes are processes of the host, known by pid, and
//! their exits come from [`crate::reap`]: exact where this process is a child subreaper, else
//! 137.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use nix::{sys::signal::Signal, unistd::Pid};
use tokio::sync::watch;

use kiln_host::reap::Tracked;

use crate::{
    CheckpointOpts, Config, ContainerId, CreateOpts, Exec, ExecOpts, Exit, ExitFuture, KillTarget,
    Process, Result, Runtime, RuntimeError, Stats, Status, Stdio,
    cli::{self, Cli},
};

/// `runc`.
#[derive(Debug)]
pub struct Runc {
    cli: Cli,
    containers: Mutex<HashMap<ContainerId, Arc<Container>>>,
}

#[derive(Debug)]
struct Container {
    /// Its first process; none while a restore puts another in its place.
    init: watch::Sender<Option<Arc<Tracked>>>,
    /// Further processes, by pid.
    execs: Mutex<HashMap<u32, Arc<Tracked>>>,
}

impl Container {
    fn new(init: Tracked) -> Self {
        Self {
            init: watch::Sender::new(Some(Arc::new(init))),
            execs: Mutex::default(),
        }
    }

    fn execs(&self) -> MutexGuard<'_, HashMap<u32, Arc<Tracked>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runc {
    /// Drives runc as `config` says.
    pub fn new(config: Config) -> Self {
        Self {
            cli: Cli::new(config),
            containers: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ContainerId, Arc<Container>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The container `id`, learned from runc if need be.
    async fn container(&self, op: &'static str, id: &ContainerId) -> Result<Arc<Container>> {
        if let Some(container) = self.known().get(id) {
            return Ok(container.clone());
        }
        let pid = u32::try_from(self.cli.state(id).await?.pid).unwrap_or_default();
        if pid == 0 {
            let message = "it has no process".to_owned();
            return Err(RuntimeError::NotRunning {
                op,
                id: id.to_string(),
                message,
            });
        }
        let container = Arc::new(Container::new(track(id, pid)?));
        Ok(self.known().entry(id.clone()).or_insert(container).clone())
    }

    /// Signals a process after making sure that it is one of the container's.
    async fn kill_process(
        &self,
        id: &ContainerId,
        pid: u32,
        signal: i32,
        group: bool,
    ) -> Result<()> {
        let gone = || {
            let message = format!("no such process with PID {pid}");
            RuntimeError::NotFound {
                op: "kill",
                id: id.to_string(),
                message,
            }
        };
        let exec = self
            .known()
            .get(id)
            .and_then(|c| c.execs().get(&pid).cloned());
        let process = match exec {
            Some(exec) => exec,
            None => {
                // Held before it is looked up, so that a pid used again is not taken for it.
                let process = track(id, pid)?;
                if !self.cli.pids(id).await?.contains(&pid) {
                    return Err(gone());
                }
                Arc::new(process)
            }
        };
        if process.has_ended() {
            return Err(gone());
        }
        let sent = if group {
            signal_foreground(pid, signal)
        } else {
            process.signal(signal)
        };
        sent.map_err(|e| match e.raw_os_error() {
            Some(libc::ESRCH) => gone(),
            _ => cli::io_error(&format!("signal process {pid} of {id}"), e),
        })
    }
}

#[async_trait]
impl Runtime for Runc {
    async fn create(&self, opts: &CreateOpts) -> Result<u32> {
        let id = &opts.id;
        let pid_file = opts.bundle.join("init.pid");
        let created = self
            .cli
            .call("create", id.as_str())?
            .arg("--bundle")
            .arg(&opts.bundle)
            .arg("--pid-file")
            .arg(&pid_file)
            .option("--console-socket", opts.console_socket.as_ref())
            .id()
            .stdio(clone(&opts.stdio)?)
            .kill_tree()
            .deadline(self.cli.config.deadlines.create)
            .run()
            .await;
        let made = created.and_then(|_| {
            let pid = take_pid("create", id, &pid_file)?;
            Ok((pid, track(id, pid)?))
        });
        match made {
            Ok((pid, init)) => {
                self.known()
                    .insert(id.clone(), Arc::new(Container::new(init)));
                Ok(pid)
            }
            Err(e @ RuntimeError::AlreadyExists { .. }) => Err(e),
            Err(e) => {
                match self.cli.delete(id, true).await {
                    Ok(()) | Err(RuntimeError::NotFound { .. }) => {}
                    Err(e) => log::warn!("delete {id}, which could not be made: {e}"),
                }
                Err(e)
            }
        }
    }

    async fn start(&self, id: &ContainerId, _stdio: &Stdio) -> Result<()> {
        // The streams were given at create.
        self.cli.start(id, Stdio::default()).await
    }

    async fn restore(&self, id: &ContainerId, image: &Path, stdio: &Stdio) -> Result<()> {
        let container = self.container("restore", id).await?;
        let bundle = self.cli.state(id).await?.bundle;
        let pid_file = bundle.join("init.pid");
        // runc restores into a container of its own making.
        container.init.send_replace(None);
        self.cli.delete(id, true).await?;
        let call = self.cli.call("restore", id.as_str())?.stdio(clone(stdio)?);
        call.args(["--detach", "--image-path"])
            .arg(image)
            .arg("--bundle")
            .arg(&bundle)
            .arg("--pid-file")
            .arg(&pid_file)
            .id()
            .deadline(self.cli.config.deadlines.checkpoint)
            .run()
            .await?;
        let pid = take_pid("restore", id, &pid_file)?;
        container.init.send_replace(Some(Arc::new(track(id, pid)?)));
        Ok(())
    }

    async fn watch(&self, id: &ContainerId) -> Result<ExitFuture> {
        let container = self.container("wait", id).await?;
        let mut init = container.init.subscribe();
        Ok(Box::pin(async move {
            loop {
                // The sender lives in the container, which lives in here.
                let process = init
                    .wait_for(Option::is_some)
                    .await
                    .ok()
                    .and_then(|p| p.clone());
                let Some(process) = process else {
                    return Ok(Exit::now(Exit::KILLED));
                };
                let end = process.ended().await;
                // Not the end of the container, but of the process that a restore replaces.
                if !init.has_changed().unwrap_or(false) {
                    drop(container);
                    return Ok(end.exit());
                }
            }
        }))
    }

    async fn exec(&self, opts: &ExecOpts) -> Result<Exec> {
        let (op, id) = ("exec", &opts.container);
        let container = self.container(op, id).await?;
        let mut process = opts.process.clone();
        if let Some(process) = process.as_object_mut() {
            process.insert("terminal".to_owned(), opts.console_socket.is_some().into());
        }
        let process_file = cli::write_process(&opts.scratch, &process)?;
        let pid_file = opts.scratch.join("pid");
        let call = self.cli.call(op, id.as_str())?;
        let call = call
            .args(["--detach", "--process"])
            .arg(&process_file)
            .arg("--pid-file")
            .arg(&pid_file);
        let call = call
            .option("--console-socket", opts.console_socket.as_ref())
            .id();
        let call = call.deadline(self.cli.config.deadlines.exec);
        let call = match opts.console_socket {
            Some(_) => call,
            None => call.stdio(clone(&opts.stdio)?),
        };
        let started = call.run().await.and_then(|_| take_pid(op, id, &pid_file));
        if let Err(e) = fs::remove_file(&process_file) {
            log::warn!("remove {}: {e}", process_file.display());
        }
        let pid = started?;
        let tracked = Arc::new(track(id, pid)?);
        container.execs().insert(pid, tracked.clone());
        let exit = Box::pin(async move {
            let end = tracked.ended().await;
            container.execs().remove(&pid);
            Ok(end.exit())
        });
        Ok(Exec { pid, exit })
    }

    async fn kill(&self, id: &ContainerId, target: KillTarget, signal: i32) -> Result<()> {
        match target {
            KillTarget::Init => self.cli.kill(id, false, signal).await,
            KillTarget::All => self.cli.kill(id, true, signal).await,
            KillTarget::Process(pid) => self.kill_process(id, pid, signal, false).await,
            KillTarget::ForegroundGroup(pid) => self.kill_process(id, pid, signal, true).await,
        }
    }

    async fn delete(&self, id: &ContainerId, force: bool) -> Result<()> {
        match self.cli.delete(id, force).await {
            Ok(()) | Err(RuntimeError::NotFound { .. }) => {
                self.known().remove(id);
                Ok(())
            }
            other => other,
        }
    }

    async fn status(&self, id: &ContainerId) -> Result<Status> {
        self.cli.state(id).await?.status(id)
    }

    async fn processes(&self, id: &ContainerId) -> Result<Vec<Process>> {
        let pids = self.cli.pids(id).await?;
        let name = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let process = |pid| Process {
            pid,
            command: name(pid).trim_end().to_owned(),
        };
        Ok(pids.into_iter().map(process).collect())
    }

    async fn pause(&self, id: &ContainerId) -> Result<()> {
        self.cli.pause(id).await
    }

    async fn resume(&self, id: &ContainerId) -> Result<()> {
        self.cli.resume(id).await
    }

    async fn stats(&self, id: &ContainerId) -> Result<Stats> {
        self.cli.stats(id).await
    }

    async fn checkpoint(&self, id: &ContainerId, opts: &CheckpointOpts) -> Result<()> {
        self.cli.checkpoint(id, opts).await
    }

    async fn update(&self, id: &ContainerId, resources: &serde_json::Value) -> Result<()> {
        self.cli.update(id, resources).await
    }

    async fn port_forward(&self, id: &ContainerId, _port: u16, _stream: OwnedFd) -> Result<()> {
        // The container's network is a namespace of the host: one connects there.
        Err(RuntimeError::Unsupported {
            op: "port-forward",
            id: id.to_string(),
        })
    }

    async fn features(&self) -> Result<serde_json::Value> {
        self.cli.features().await
    }
}

fn track(id: &ContainerId, pid: u32) -> Result<Tracked> {
    Tracked::new(pid).map_err(|e| cli::io_error(&format!("watch process {pid} of {id}"), e))
}

fn clone(stdio: &Stdio) -> Result<Stdio> {
    stdio
        .try_clone()
        .map_err(|e| cli::io_error("copy the streams", e))
}

/// Reads and removes a file in which runc has left a pid.
fn take_pid(op: &'static str, id: &ContainerId, file: &Path) -> Result<u32> {
    let what = |e| cli::io_error(&format!("read {}", file.display()), e);
    let text = fs::read_to_string(file).map_err(what)?;
    fs::remove_file(file).map_err(what)?;
    text.trim().parse().map_err(|e| RuntimeError::BadAnswer {
        op,
        id: id.to_string(),
        message: format!("pid {text:?}: {e}"),
    })
}

/// Signals the foreground process group of the terminal of process `pid`.
fn signal_foreground(pid: u32, signal: i32) -> io::Result<()> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // proc(5): tpgid is the sixth field behind the name in parentheses.
    let group = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(5)?.parse().ok());
    match group {
        Some(group @ 1..) => {
            let signal = Signal::try_from(signal)?;
            Ok(nix::sys::signal::killpg(Pid::from_raw(group), signal)?)
        }
        _ => Err(io::Error::other("the process has no terminal")),
    }
}
