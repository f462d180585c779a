// SPDX-License-Identifier: Apache-2.0

//! A containerd shim v2 that runs the Pods of one RuntimeClass through an OCI sandbox runtime,
//! gVisor's runsc.
//!
//! One process serves one Pod, on one thread. containerd runs the binary with an action
//! ([`cli`]): `start` binds the socket and spawns the server ([`server`]), which lives until
//! the Pod's last container is deleted; `delete` cleans up after a server that died. The server
//! speaks the Task API ([`task`]) and keeps what it knows of the Pod in [`pod`].

pub mod bundle;
pub mod cli;
pub mod config;
mod container;
mod error;
pub mod events;
#[cfg(test)]
mod fuzz;
mod hints;
pub mod host_dirs;
pub mod io;
mod kata;
mod logging;
mod masks;
mod paths;
pub mod pod;
mod port_forward;
mod process;
mod request;
mod rootfs;
mod sandbox;
pub mod server;
mod snapshots;
pub mod state;
mod stats;
mod systemd;
pub mod task;

pub use error::{Error, Result};
