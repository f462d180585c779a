// SPDX-License-Identifier: Apache-2.0

//! The agent of a node: boots sandboxes before there are Pods for them, and gives each to one
//! shim, once.
//!
//! [`pool`] decides, [`keeper::Keeper`] acts, [`service`] is the socket that shims ask at. What a
//! sandbox is follows from where its directory lies, so that an agent that starts anew finds out
//! what there is by looking.

mod boot;
pub mod config;
mod cri;
mod erofs;
mod exec_dir;
pub mod http;
pub mod install;
pub mod keeper;
pub mod kube;
mod metrics;
mod netns;
pub mod pool;
pub mod presence;
mod rlimits;
pub mod service;
mod setup;
mod spec;
mod store;
mod ways;
