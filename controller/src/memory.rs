// SPDX-License-Identifier: Apache-2.0

//! The memory of this process, as the kernel counts it.

use std::fs;

/// Where a container's limit is, by cgroup v2 and v1.
const LIMITS: [&str; 2] = [
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
];
/// What is more stands for no limit in cgroup v1.
const NO_LIMIT: i64 = 1 << 60;

/// Bytes in RAM (`VmRSS` of proc(5)); 0 where they are not known.
pub(crate) fn used() -> i64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    resident(&status).unwrap_or_default()
}

fn resident(status: &str) -> Option<i64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: i64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes that the container may have; 0 for no limit.
pub(crate) fn limit() -> i64 {
    let text = LIMITS.iter().find_map(|path| fs::read_to_string(path).ok());
    let limit = text.and_then(|text| text.trim().parse().ok());
    limit.filter(|bytes| *bytes < NO_LIMIT).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        let status = "Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t   512 kB\n";
        assert_eq!(resident(status), Some(512 << 10));
        assert_eq!(resident("Name:\tx\n"), None);
        assert!(used() > 1 << 20);
    }
}
