// SPDX-License-Identifier: Apache-2.0

//! What goes into and comes out of a [`Runtime`](crate::Runtime).

use kiln_host::Exit;
use std::{future::Future, io, os::fd::OwnedFd, path::PathBuf, pin::Pin};

use crate::{ContainerId, Result};

/// How a new container is made.
#[derive(Debug)]
pub struct CreateOpts {
    /// Name of the container.
    pub id: ContainerId,
    /// The sandbox it belongs to: its own id for the first container of a sandbox.
    pub sandbox: ContainerId,
    /// OCI bundle: a directory with `config.json`.
    pub bundle: PathBuf,
    /// The container's standard streams.
    pub stdio: Stdio,
    /// UNIX socket that gets the pty master when the process has a terminal.
    pub console_socket: Option<PathBuf>,
    /// Directory that the log flags' `%ID%` files lie in, for the panic log of a sandbox.
    pub log_dir: Option<PathBuf>,
}

/// Standard streams of a process; a missing one is `/dev/null`.
#[derive(Debug, Default)]
pub struct Stdio {
    /// What the process reads.
    pub stdin: Option<OwnedFd>,
    /// Where its output goes.
    pub stdout: Option<OwnedFd>,
    /// Where its errors go.
    pub stderr: Option<OwnedFd>,
}

impl Stdio {
    /// Copies of the descriptors, for the same files.
    ///
    /// # Errors
    /// When this process has no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let copy = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            stdin: copy(&self.stdin)?,
            stdout: copy(&self.stdout)?,
            stderr: copy(&self.stderr)?,
        })
    }
}

/// A further process in a running container.
#[derive(Debug)]
pub struct ExecOpts {
    /// The container it runs in.
    pub container: ContainerId,
    /// OCI `process` object.
    pub process: serde_json::Value,
    /// Its standard streams.
    pub stdio: Stdio,
    /// UNIX socket that gets the pty master; then `stdio` is not used.
    pub console_socket: Option<PathBuf>,
    /// Empty directory of the caller's, for the files that a command line needs.
    pub scratch: PathBuf,
}

/// A process started by [`Runtime::exec`](crate::Runtime::exec).
pub struct Exec {
    /// Its pid as [`Runtime::processes`](crate::Runtime::processes) shows it.
    pub pid: u32,
    /// Resolves when it has ended.
    pub exit: ExitFuture,
}

/// Resolves to the exit of a process. Dropping it stops the watch, not the process.
pub type ExitFuture = Pin<Box<dyn Future<Output = Result<Exit>> + Send>>;

/// Who gets a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillTarget {
    /// The container's first process.
    Init,
    /// Every process of the container.
    All,
    /// One process, by the pid that [`Exec::pid`] gave.
    Process(u32),
}

/// What a container is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Made, not started.
    Created,
    /// Its process runs.
    Running,
    /// Its sandbox is paused.
    Paused,
    /// Its process has ended.
    Stopped,
}

/// One process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Pid in the container's pid namespace.
    pub pid: u32,
    /// Command name.
    pub command: String,
}

/// What the runtime counts for one container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time used by the container, nanoseconds.
    pub cpu_ns: u64,
    /// CPU time used by each container of the same sandbox, nanoseconds: the shares by which
    /// the sandbox's host CPU time is divided. Empty where the runtime does not say.
    pub sandbox_cpu_ns: Vec<(String, u64)>,
    /// Memory used by the container, bytes.
    pub memory_bytes: u64,
    /// Number of processes.
    pub pids: u64,
    /// Interfaces of the sandbox's own network stack.
    pub network: Vec<NetworkInterface>,
}

/// Counters of one network interface, since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct NetworkInterface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// How a checkpoint is made.
#[derive(Debug, Clone)]
pub struct CheckpointOpts {
    /// Existing directory for the image.
    pub image: PathBuf,
    /// Whether the container goes on afterwards.
    pub leave_running: bool,
}
