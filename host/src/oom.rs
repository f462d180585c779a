// SPDX-License-Identifier: Apache-2.0

//! The kernel's out-of-memory killer.

use std::fs;

/// Returns the lowest `oom_score_adj` that a child of this process may be given, or `None` if any is
/// allowed: without CAP_SYS_RESOURCE it is this process's own (proc_pid_oom_score_adj(5)).
pub fn lowest_score_adj() -> Option<i64> {
    const CAP_SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    if u64::from_str_radix(effective.trim(), 16).ok()? & CAP_SYS_RESOURCE != 0 {
        return None;
    }
    let own = fs::read_to_string("/proc/self/oom_score_adj").ok()?;
    own.trim().parse().ok()
}
