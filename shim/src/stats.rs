// SPDX-License-Identifier: Apache-2.0

//! A container's metrics in the form that containerd's CRI plugin reads: the cgroup messages of
//! the interface that the host has.
//!
//! A sandbox's containers share one host cgroup, so that memory, processes and network are the
//! sentry's own figures, and CPU is the host's figure for the sandbox divided by what the
//! sentry says each container used.

use containerd_shim_protos::{
    cgroups::metrics as v1,
    cgroups_v2::metrics as v2,
    protobuf::{MessageField, well_known_types::any::Any},
};
use runsc_wrapper::{NetworkInterface, Stats};

use crate::{
    cgroup::{Cgroup, Limits, UNLIMITED, Usage, Version},
    error::Result,
    events::pack,
};

/// The metrics of container `id`.
pub(crate) fn metrics(id: &str, stats: &Stats, cgroup: &Cgroup, limits: &Limits) -> Result<Any> {
    let usage = share(id, stats, cgroup.usage());
    let limit = limits.memory.map_or(UNLIMITED, i64::cast_unsigned);
    match cgroup.version() {
        Version::V1 => pack(
            "io.containerd.cgroups.v1",
            &metrics_v1(stats, &usage, limit),
        ),
        Version::V2 => pack(
            "io.containerd.cgroups.v2",
            &metrics_v2(stats, &usage, limit),
        ),
    }
}

/// The part of the sandbox's usage that is this container's.
fn share(id: &str, stats: &Stats, sandbox: Usage) -> Usage {
    let total: u128 = stats
        .sandbox_cpu_ns
        .iter()
        .map(|(_, ns)| u128::from(*ns))
        .sum();
    let own = stats
        .sandbox_cpu_ns
        .iter()
        .find(|(of, _)| of == id)
        .map(|(_, ns)| u128::from(*ns));
    let Some(own) = own.filter(|_| stats.sandbox_cpu_ns.len() > 1) else {
        return Usage {
            memory: memory(stats, &sandbox),
            inactive_file: inactive(stats, &sandbox),
            ..sandbox
        };
    };
    let part = |all: u64| {
        let share = (u128::from(all) * own).checked_div(total).unwrap_or(0);
        u64::try_from(share).unwrap_or(u64::MAX)
    };
    Usage {
        cpu_ns: part(sandbox.cpu_ns),
        cpu_kernel_ns: part(sandbox.cpu_kernel_ns),
        cpu_user_ns: part(sandbox.cpu_user_ns),
        memory: memory(stats, &sandbox),
        inactive_file: inactive(stats, &sandbox),
        ..sandbox
    }
}

fn memory(stats: &Stats, sandbox: &Usage) -> u64 {
    if stats.memory_bytes > 0 {
        stats.memory_bytes
    } else {
        sandbox.memory
    }
}

/// The sentry counts no idle file cache; where its figure is used there is none to subtract.
fn inactive(stats: &Stats, sandbox: &Usage) -> u64 {
    if stats.memory_bytes > 0 {
        0
    } else {
        sandbox.inactive_file
    }
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
    use super::*;

    fn stats() -> Stats {
        let shares = vec![("a".to_owned(), 30), ("b".to_owned(), 10)];
        Stats {
            sandbox_cpu_ns: shares,
            memory_bytes: 5_000,
            ..Stats::default()
        }
    }

    #[test]
    fn cpu_is_divided_by_what_the_sentry_counted() {
        let sandbox = Usage {
            cpu_ns: 4_000,
            memory: 9_000,
            ..Usage::default()
        };
        assert_eq!(share("a", &stats(), sandbox).cpu_ns, 3_000);
        assert_eq!(share("b", &stats(), sandbox).cpu_ns, 1_000);
        assert_eq!(share("a", &stats(), sandbox).memory, 5_000);
    }

    #[test]
    fn figures_that_add_up_to_nothing_are_no_division_by_zero() {
        let zero = Stats {
            sandbox_cpu_ns: vec![("a".into(), 0), ("b".into(), 0)],
            ..Stats::default()
        };
        assert_eq!(
            share(
                "a",
                &zero,
                Usage {
                    cpu_ns: 7,
                    ..Usage::default()
                }
            )
            .cpu_ns,
            0
        );
    }

    #[test]
    fn no_limit_is_never_a_limit_of_zero() {
        let metrics = metrics_v1(&stats(), &Usage::default(), UNLIMITED);
        assert!(metrics.memory.usage.limit > i64::MAX as u64 - 8192);
    }
}
