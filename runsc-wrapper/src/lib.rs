// SPDX-License-Identifier: Apache-2.0

//! Drives `runsc` on behalf of a containerd shim or a node agent.
//!
//! [`Runtime`] is the seam: [`Runsc`] is the product, and `FakeRuntime` (feature `fake`) runs
//! nothing at all. [`WarmRuntime`] adds what turns a sandbox that was booted ahead into a Pod's.
//! Callers name containers by [`ContainerId`], give stdio as file descriptors and get
//! [`RuntimeError`]s that carry the runtime's own message. Nothing here knows containerd or
//! Kubernetes.
//!
//! [`Runsc`] talks to a sandbox in two ways: by command line, which works with every runsc
//! and is always complete, and by the sentry's control socket ([`control`]), which saves a
//! process start per call. The socket is an optimisation: the first unexpected answer moves
//! that sandbox to the command line for good.

mod cli;
pub mod command;
pub mod config;
pub mod control;
mod error;
mod exec;
#[cfg(feature = "fake")]
pub mod fake;
mod gofer;
mod id;
mod network;
mod releases;
mod runsc;
mod sandbox;
mod state;
mod stdio;
mod types;

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use async_trait::async_trait;

pub use config::Config;
pub use error::{Result, RuntimeError};
pub use gofer::{PrestartedGofer, PutInPlace, is_bind};
pub use id::{ContainerId, InvalidId};
pub use kiln_host::Exit;
pub use network::{XdpFlag, check_no_xdp};
pub use releases::{Forms, NetworkCall, Release, StartWay};
pub use runsc::Runsc;
pub use types::{
    CheckpointOpts, CreateOpts, Exec, ExecOpts, ExitFuture, KillTarget, NetworkInterface, Process,
    Stats, Status, Stdio,
};

/// An OCI runtime whose containers share one sandbox.
///
/// Methods are cancel-unsafe unless they say otherwise: a caller that may go away runs them in
/// a task of their own. Every method ends within the deadline of its kind in
/// [`config::Deadlines`] with [`RuntimeError::Timeout`], except the futures it hands out.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// Makes a container from `opts.bundle` without starting its process, and returns the host
    /// pid that stands for it: the sentry's.
    ///
    /// A failed call leaves nothing behind.
    async fn create(&self, opts: &CreateOpts) -> Result<u32>;

    /// Starts the process of a created container. `stdio` must be what [`create`] was given:
    /// runsc connects a sandbox's root container at create and the others at start.
    ///
    /// [`create`]: Runtime::create
    async fn start(&self, id: &ContainerId, stdio: &Stdio) -> Result<()>;

    /// Starts a created container from the checkpoint in `image` instead of its own command.
    async fn restore(&self, id: &ContainerId, image: &Path, stdio: &Stdio) -> Result<()>;

    /// Watches for the end of the container's process. The watch stands when this returns, so
    /// that a process which ends at once after [`start`] is not missed: call it before.
    ///
    /// The future ends with the exit of the process, or with that of the whole sandbox
    /// (137 when something killed the sentry).
    ///
    /// [`start`]: Runtime::start
    async fn watch(&self, id: &ContainerId) -> Result<ExitFuture>;

    /// Starts another process in a running container.
    async fn exec(&self, opts: &ExecOpts) -> Result<Exec>;

    /// Sends `signal` to `target` of container `id`.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`] when the target is gone, which callers often take for success.
    async fn kill(&self, id: &ContainerId, target: KillTarget, signal: i32) -> Result<()>;

    /// Removes a container, also a running one, and what the runtime keeps of it. A container
    /// that is not there is success.
    async fn delete(&self, id: &ContainerId) -> Result<()>;

    /// What the runtime says the container is doing.
    async fn status(&self, id: &ContainerId) -> Result<Status>;

    /// The processes of the container, with the pids that its own pid namespace shows.
    async fn processes(&self, id: &ContainerId) -> Result<Vec<Process>>;

    /// Stops the whole sandbox of `id` until [`resume`](Runtime::resume).
    async fn pause(&self, id: &ContainerId) -> Result<()>;

    /// Lets a paused sandbox run again.
    async fn resume(&self, id: &ContainerId) -> Result<()>;

    /// What the runtime itself counts for the container; host cgroups are the caller's.
    async fn stats(&self, id: &ContainerId) -> Result<Stats>;

    /// Writes the state of the container's sandbox to `opts.image`.
    async fn checkpoint(&self, id: &ContainerId, opts: &CheckpointOpts) -> Result<()>;

    /// Connects `stream`, one end of a UNIX stream socket pair, to TCP `port` on the loopback of
    /// the container's network stack.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`] where only the command line is left.
    async fn port_forward(&self, id: &ContainerId, port: u16, stream: OwnedFd) -> Result<()>;

    /// The OCI features document of the runtime
    /// (<https://github.com/opencontainers/runtime-spec/blob/main/features.md>).
    async fn features(&self) -> Result<serde_json::Value>;
}

/// A runtime whose sandboxes are booted before their Pods exist.
#[async_trait]
pub trait WarmRuntime: Runtime {
    /// Starts a gofer with [`PrestartedGofer`] for a container of `sandbox`, from what [`PrestartedGofer::prepare`]
    /// has written into `dir`. The gofer is a child of this process, which must wait for it;
    /// `place` puts it into its cgroup.
    async fn start_gofer(
        &self,
        dir: &Path,
        sandbox: &ContainerId,
        place: PutInPlace,
    ) -> Result<PrestartedGofer>;

    /// Makes a container as [`create`](Runtime::create) does, with its files served by `gofer`. The
    /// container is not the first of its sandbox, and the caller makes the cgroup that its
    /// specification names. `None` when only [`create`](Runtime::create) can make it: nothing of
    /// it is left then.
    async fn create_with_gofer(
        &self,
        opts: &CreateOpts,
        gofer: PrestartedGofer,
    ) -> Result<Option<u32>>;

    /// Starts the created root container of a sandbox on the network of `netns`, which its host
    /// processes do not join: the sandbox was booted before that network was there. A network
    /// that [`StartWay::Control`] cannot give is given by the command.
    async fn start_on_network(
        &self,
        id: &ContainerId,
        netns: BorrowedFd<'_>,
        way: StartWay,
    ) -> Result<()>;

    /// Restores the created root container of a sandbox from the checkpoint in `image`, on the
    /// network of `netns`, as [`start_on_network`](Self::start_on_network) starts one.
    async fn restore_on_network(
        &self,
        id: &ContainerId,
        netns: BorrowedFd<'_>,
        image: &Path,
    ) -> Result<()>;

    /// Kills the sentry of a sandbox, and with it all that runs inside. Its containers stay known
    /// until they are deleted.
    async fn kill_sandbox(&self, id: &ContainerId) -> Result<()>;

    /// Notes that the host processes of the sandbox `id` were moved to the cgroup `path` (as in
    /// `cgroupsPath`, cgroupfs notation), which later containers of the sandbox are to join. The
    /// caller then owns that cgroup: [`delete`](Runtime::delete) leaves it.
    async fn note_cgroup(&self, id: &ContainerId, path: &str) -> Result<()>;

    /// Lets go of what is remembered of a container that another process will delete: a
    /// descriptor, and some memory.
    fn forget(&self, id: &ContainerId);
}
