// SPDX-License-Identifier: Apache-2.0

//! Memory of the node.

use std::fs;

/// Bytes of memory that the node could give without swapping, `MemAvailable` of proc_meminfo(5).
/// Blocks.
pub(crate) fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}
