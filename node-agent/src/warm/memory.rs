// SPDX-License-Identifier: Apache-2.0

//! Memory of the node, and of its warm sandboxes.

use std::fs;

use super::{
    cgroup,
    store::{Place, Store},
};

/// Bytes of memory that the node could give without swapping, `MemAvailable` of proc_meminfo(5).
/// Blocks.
pub(super) fn available() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Bytes of memory that sandboxes hold which are ready or boot, in cgroups below `cgroup`. In that
/// one itself is also what sandboxes took before they were adopted. Blocks.
pub(super) fn held(store: &Store, cgroup: &str) -> u64 {
    // What cannot be read counts as nothing: booting goes on without that number.
    let held = [Place::Booting, Place::Ready].map(|place| store.ids(place).unwrap_or_default());
    let of = |id: &String| cgroup::held_memory(&cgroup::cgroup_of(cgroup, id));
    held.iter().flatten().map(of).sum()
}
