// SPDX-License-Identifier: Apache-2.0

//! The agent of a node: boots sandboxes before there are Pods for them, and gives each to one
//! shim, once.
//!
//! [`warm`] has the sandboxes, [`serve`] the sockets that shims ask at, and [`cluster`] what the
//! apiserver is told.

pub mod cluster;
pub mod config;
mod cri;
mod exec_dir;
pub mod install;
mod metrics;
pub mod presence;
pub mod serve;
mod setup;
pub mod warm;
