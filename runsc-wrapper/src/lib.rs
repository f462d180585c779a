// SPDX-License-Identifier: Apache-2.0

//! Drives an OCI sandbox runtime on behalf of a containerd shim or a node agent.
//!
//! [`Runtime`] is the seam: [`Runsc`] is the product, [`Runc`] stands in where tests need
//! the same life without a sentry, and `FakeRuntime` (feature `fake`) runs nothing at all.
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
mod id;
mod network;
mod releases;
mod runc;
mod runsc;
mod sandbox;
mod slots;
mod state;
mod stdio;
mod types;

use std::{
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use async_trait::async_trait;

pub use config::{Config, RuntimeKind};
pub use error::{Result, RuntimeError};
pub use id::{ContainerId, InvalidId};
pub use kiln_host::Exit;
pub use network::{XdpFlag, check_no_xdp};
pub use releases::{Forms, NetworkCall, Release, StartWay};
pub use runc::Runc;
pub use runsc::Runsc;
pub use slots::{PutInPlace, Slots, is_bind};
pub use types::{
    CheckpointOpts, CreateOpts, Exec, ExecOpts, ExitFuture, KillTarget, NetworkInterface, Process,
    Stats, Status, Stdio,
};

/// An OCI runtime whose containers may share one sandbox.
///
/// Methods are cancel-unsafe unless they say otherwise: a caller that may go away runs them in
/// a task of their own. Every method ends within the deadline of its kind in
/// [`config::Deadlines`] with [`RuntimeError::Timeout`], except the futures it hands out.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// Makes a container from `opts.bundle` without starting its process, and returns the host
    /// pid that stands for it: the sentry for a sandbox, the init process for runc.
    ///
    /// A failed call leaves nothing behind.
    async fn create(&self, opts: &CreateOpts) -> Result<u32>;

    /// Starts a gofer with [`Slots`] for a container of `sandbox`, from what [`Slots::prepare`] has written into `dir`. It is
    /// a child of this process, which must wait for it; `place` puts it into its cgroup.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`] from runtimes that have no gofers.
    async fn new_slots(
        &self,
        _dir: &Path,
        sandbox: &ContainerId,
        _place: PutInPlace,
    ) -> Result<Slots> {
        Err(RuntimeError::Unsupported {
            op: "start a gofer for",
            id: sandbox.to_string(),
        })
    }

    /// As [`create`](Runtime::create) of a container that is not the first of its sandbox, with
    /// its files in `slots`. The cgroup that its specification names is the caller's to make.
    /// `None` when it is one for [`create`](Runtime::create): nothing of it is left then.
    async fn create_in_slots(&self, _opts: &CreateOpts, _slots: Slots) -> Result<Option<u32>> {
        Ok(None)
    }

    /// Starts the process of a created container. `stdio` must be what [`create`] was given:
    /// runsc connects a sandbox's root container at create and the others at start.
    ///
    /// [`create`]: Runtime::create
    async fn start(&self, id: &ContainerId, stdio: &Stdio) -> Result<()>;

    /// Starts the created root container of a sandbox on the network of `netns`, which its host
    /// processes do not join: the way of a sandbox that was booted before that network was there.
    /// A network that [`StartWay::Control`] cannot give is given by the command.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`] from runtimes that make no sandboxes.
    async fn start_on_network(
        &self,
        id: &ContainerId,
        _netns: BorrowedFd<'_>,
        _way: StartWay,
    ) -> Result<()> {
        Err(RuntimeError::Unsupported {
            op: "start",
            id: id.to_string(),
        })
    }

    /// Notes that the host processes of the sandbox `id` were moved to the cgroup `path` (as in
    /// `cgroupsPath`, cgroupfs notation), where later containers of it are to join them. The
    /// caller then owns that cgroup: [`delete`](Runtime::delete) leaves it.
    ///
    /// # Errors
    /// [`RuntimeError::Unsupported`] from runtimes that make no sandboxes.
    async fn note_cgroup(&self, id: &ContainerId, _path: &str) -> Result<()> {
        Err(RuntimeError::Unsupported {
            op: "note the cgroup of",
            id: id.to_string(),
        })
    }

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

    /// Removes a container and what the runtime keeps of it; with `force` also a running one.
    /// A container that is not there is success.
    async fn delete(&self, id: &ContainerId, force: bool) -> Result<()>;

    /// Lets go of what is remembered of a container that somebody else will delete: a descriptor,
    /// and some memory.
    fn forget(&self, _id: &ContainerId) {}

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

    /// Changes resource limits; `resources` is an OCI `LinuxResources` object.
    async fn update(&self, id: &ContainerId, resources: &serde_json::Value) -> Result<()>;

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
