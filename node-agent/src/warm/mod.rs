// SPDX-License-Identifier: Apache-2.0

//! Warm sandboxes: sandboxes that are booted before there are Pods for them.
//!
//! The life of one, by the directory that its file is in. Every step is one rename (`store`):
//!
//! ```text
//! booting/<id> ──► ready/<id> ──► handed/<id> ──► (the shim's own directory)
//!      └──────────────┴───────────────┴──► doomed/<id> ──► gone
//! ```
//!
//! An agent that starts anew finds out by these files what there is (`recovery`). Within an agent a
//! sandbox is a value with one owner:
//!
//! | directory | the sandbox is | owner |
//! |---|---|---|
//! | `booting` | not a value yet | the task that boots it (`boot`) |
//! | `ready` | a `WarmSandbox` | `pool::Pool` |
//! | `handed` | a `HandedOut` | `sandbox::Handed`, until its shim answers |
//! | `doomed` | an id | the `Booter` that retires it |
//!
//! [`WarmManager`] is the loop: it has the runtime tried out (`reload`, `trial`), boots what the
//! pool says is lacking, retires what is surplus, and hands out.

mod boot;
mod bundle;
mod cgroup;
mod erofs;
mod manager;
mod memory;
mod metrics;
mod netns;
mod pool;
mod recovery;
mod reload;
mod rlimits;
mod rootfs;
mod runtime;
mod sandbox;
mod store;
mod trial;

pub(crate) use self::{
    boot::blocking,
    manager::Snapshot,
    metrics::Metrics,
    pool::{Miss, Recent, ShapeReport},
    reload::{Active, Guarding, Health},
    sandbox::Handout,
    trial::Ways,
};
pub use manager::WarmManager;
