// SPDX-License-Identifier: Apache-2.0

//! Sandboxes that are booted before there are Pods for them. [`pool`] decides, [`keeper::Keeper`]
//! acts. What a sandbox is follows from where its file lies ([`store`]), so that an agent that starts
//! anew finds out what there is by looking.

mod boot;
pub(crate) mod bundle;
mod cgroup;
mod erofs;
mod keeper;
mod memory;
mod netns;
mod pool;
mod rlimits;
mod rootfs;
mod store;
mod ways;

pub(crate) use self::{
    boot::blocking,
    keeper::Guarding,
    pool::{Counts, Miss, Pool, Recent, Wanted},
    ways::Ways,
};
pub use keeper::Keeper;
