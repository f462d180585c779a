// SPDX-License-Identifier: Apache-2.0

//! A container's metrics in the form that containerd's CRI plugin reads: the cgroup messages of
//! the interface that the host has.
//!
//! A sandbox's containers share one host cgroup. CPU and memory are the host's figures for the
//! sandbox, divided by what the sentry says each container used: a sentry that lies shifts them
//! from one container to another, and their sum stays the host's. Processes and network are the
//! sentry's own figures.

use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{MessageField, well_known_types::any::Any},
};
use kiln_host::cgroup::{UNLIMITED, Usage, Version};
use runsc_wrapper::{NetworkInterface, Stats};

use crate::{error::Result, events::pack, pod::Figures};

/// The metrics of container `id`.
pub(crate) fn metrics(id: &str, figures: &Figures) -> Result<Any> {
    let (said, cgroup) = (&figures.said, &figures.cgroup);
    let usage = share(id, figures, cgroup.usage());
    let limit = figures.limits.memory;
    let limit = limit.map_or(UNLIMITED, i64::cast_unsigned);
    match cgroup.version() {
        Version::V1 => pack("io.containerd.cgroups.v1", &metrics_v1(said, &usage, limit)),
        Version::V2 => pack("io.containerd.cgroups.v2", &metrics_v2(said, &usage, limit)),
    }
}

/// The part of the sandbox's usage that is this container's.
fn share(id: &str, figures: &Figures, sandbox: Usage) -> Usage {
    let cpu = |all| part(id, &figures.cpu, all);
    let memory = |all| part(id, &figures.memory, all);
    Usage {
        cpu_ns: cpu(sandbox.cpu_ns),
        cpu_kernel_ns: cpu(sandbox.cpu_kernel_ns),
        cpu_user_ns: cpu(sandbox.cpu_user_ns),
        memory: match sandbox.memory {
            // The host counts none, and there is nothing to divide.
            0 => figures.said.memory_bytes,
            all => memory(all),
        },
        inactive_file: memory(sandbox.inactive_file),
        ..sandbox
    }
}

/// The part of `all` that is `id`'s, by figures of each container. Parts are equal where the figures
/// are all 0; without a figure of another container there is but one part.
fn part(id: &str, figures: &[(String, u64)], all: u64) -> u64 {
    if figures.len() < 2 {
        return all;
    }
    let total: u128 = figures.iter().map(|(_, figure)| u128::from(*figure)).sum();
    let own = figures.iter().find(|(of, _)| of == id);
    let own = own.map_or(0, |(_, figure)| u128::from(*figure));
    let (own, total) = match total {
        0 => (1, figures.len() as u128),
        total => (own, total),
    };
    // Not above `all`, because `own` is one of those in `total`.
    u64::try_from(u128::from(all) * own / total).unwrap_or(all)
}

fn metrics_v1(stats: &Stats, usage: &Usage, limit: u64) -> v1::Metrics {
    let entry = v1::MemoryEntry {
        usage: usage.memory,
        limit,
        ..v1::MemoryEntry::default()
    };
    let anonymous = usage.memory.saturating_sub(usage.inactive_file);
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: stats.pids,
            ..v1::PidsStat::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(v1::CPUUsage {
                total: usage.cpu_ns,
                kernel: usage.cpu_kernel_ns,
                user: usage.cpu_user_ns,
                ..v1::CPUUsage::default()
            }),
            throttling: MessageField::some(v1::Throttle {
                periods: usage.periods,
                throttled_periods: usage.throttled_periods,
                throttled_time: usage.throttled_ns,
                ..v1::Throttle::default()
            }),
            ..v1::CPUStat::default()
        }),
        memory: MessageField::some(v1::MemoryStat {
            usage: MessageField::some(entry),
            rss: anonymous,
            total_rss: anonymous,
            inactive_file: usage.inactive_file,
            total_inactive_file: usage.inactive_file,
            hierarchical_memory_limit: limit,
            ..v1::MemoryStat::default()
        }),
        network: stats.network.iter().map(network_v1).collect(),
        ..v1::Metrics::default()
    }
}

fn metrics_v2(stats: &Stats, usage: &Usage, limit: u64) -> v2::Metrics {
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: stats.pids,
            ..v2::PidsStat::default()
        }),
        cpu: MessageField::some(v2::CPUStat {
            usage_usec: usage.cpu_ns / 1_000,
            user_usec: usage.cpu_user_ns / 1_000,
            system_usec: usage.cpu_kernel_ns / 1_000,
            nr_periods: usage.periods,
            nr_throttled: usage.throttled_periods,
            throttled_usec: usage.throttled_ns / 1_000,
            ..v2::CPUStat::default()
        }),
        memory: MessageField::some(v2::MemoryStat {
            usage: usage.memory,
            usage_limit: limit,
            anon: usage.memory.saturating_sub(usage.inactive_file),
            inactive_file: usage.inactive_file,
            ..v2::MemoryStat::default()
        }),
        ..v2::Metrics::default()
    }
}

fn network_v1(i: &NetworkInterface) -> v1::NetworkStat {
    v1::NetworkStat {
        name: i.name.clone(),
        rx_bytes: i.rx_bytes,
        rx_packets: i.rx_packets,
        rx_errors: i.rx_errors,
        rx_dropped: i.rx_dropped,
        tx_bytes: i.tx_bytes,
        tx_packets: i.tx_packets,
        tx_errors: i.tx_errors,
        tx_dropped: i.tx_dropped,
        ..v1::NetworkStat::default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use kiln_host::cgroup::{Cgroup, Limits};

    /// Of containers `a` and `b`, or of `a` alone.
    fn figures(cpu: &[u64], memory: &[u64]) -> Figures {
        let of_each = |figures: &[u64]| {
            let ids = ["a", "b"].map(str::to_owned).into_iter();
            ids.zip(figures.iter().copied()).collect()
        };
        Figures {
            said: Stats {
                memory_bytes: memory[0],
                ..Stats::default()
            },
            cpu: of_each(cpu),
            memory: of_each(memory),
            cgroup: Cgroup::new(Path::new("/nowhere"), "/pod").unwrap(),
            limits: Limits::default(),
        }
    }

    const SANDBOX: Usage = Usage {
        cpu_ns: 4_000,
        cpu_kernel_ns: 0,
        cpu_user_ns: 0,
        periods: 0,
        throttled_periods: 0,
        throttled_ns: 0,
        memory: 9_000,
        inactive_file: 900,
        pids: 0,
    };

    #[test]
    fn the_hosts_figures_are_divided_by_what_the_sentry_counted() {
        let figures = figures(&[30, 10], &[5_000, 1_000]);
        let [a, b] = ["a", "b"].map(|id| share(id, &figures, SANDBOX));
        assert_eq!((a.cpu_ns, a.memory, a.inactive_file), (3_000, 7_500, 750));
        assert_eq!((b.cpu_ns, b.memory, b.inactive_file), (1_000, 1_500, 150));
    }

    #[test]
    fn a_sentry_that_lies_changes_no_sum() {
        for said in [[1, 0], [0, 0], [u64::MAX, u64::MAX], [u64::MAX, 1]] {
            let figures = figures(&said, &said);
            let [a, b] = ["a", "b"].map(|id| share(id, &figures, SANDBOX));
            // The division may take one off.
            let is_all = |a: u64, b: u64, all: u64| (all - 1..=all).contains(&(a + b));
            assert!(is_all(a.cpu_ns, b.cpu_ns, SANDBOX.cpu_ns), "{said:?}");
            assert!(is_all(a.memory, b.memory, SANDBOX.memory), "{said:?}");
        }
        let only = share("a", &figures(&[0], &[0]), SANDBOX);
        assert_eq!(only, SANDBOX);
    }

    #[test]
    fn a_host_that_counts_no_memory_leaves_the_sentrys_figure() {
        let uncounted = Usage {
            memory: 0,
            ..SANDBOX
        };
        let figures = figures(&[1, 1], &[5_000, 1_000]);
        assert_eq!(share("a", &figures, uncounted).memory, 5_000);
    }

    #[test]
    fn no_limit_is_never_a_limit_of_zero() {
        let metrics = metrics_v1(&Stats::default(), &Usage::default(), UNLIMITED);
        assert!(metrics.memory.usage.limit > i64::MAX as u64 - 8192);
    }
}
