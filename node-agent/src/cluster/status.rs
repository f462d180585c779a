// SPDX-License-Identifier: Apache-2.0

//! The status of a `SandboxNode`: what the agent holds.

use kiln_crds::{NodeClassStatus, NodeRuntimeWays, NodeTotal, SandboxNodeStatus};

use super::conditions::{guarded, ready};
use crate::warm::{ShapeReport, Snapshot, Ways};
use kiln_node_install::config::Config;

/// Makes the status of what the agent holds, without the time.
pub(super) fn status(
    held: &Snapshot,
    config: &Config,
    last: Option<&SandboxNodeStatus>,
) -> SandboxNodeStatus {
    let name = &config.runtime_class;
    // Those that boot hold memory, too.
    let all = held.shapes.iter();
    let all = all.map(|of| u64::from(of.ready + of.warming)).sum::<u64>();
    let bytes = held.held_bytes / all.max(1);
    let class = |of: &ShapeReport| NodeClassStatus {
        held_bytes: signed(bytes * u64::from(of.ready)),
        room: small(held.room),
        ..class_status(name, config.overhead, of)
    };
    let classes: Vec<_> = held.shapes.iter().map(class).collect();
    let runtime = held.health.active();
    let ways = runtime.map(|active| (name.clone(), runtime_ways(active.ways())));
    let version = runtime.map(|active| (name.clone(), active.version.clone()));
    SandboxNodeStatus {
        heartbeat: None,
        runtime_ways: ways.into_iter().collect(),
        runtime_versions: version.into_iter().collect(),
        // Also where it holds none of any class yet.
        total: Some(NodeTotal {
            room: small(held.room),
            ..NodeTotal::of(&classes)
        }),
        classes,
        conditions: vec![ready(&held.health, last), guarded(&held.guard, last)],
    }
}

fn runtime_ways(ways: Ways) -> NodeRuntimeWays {
    NodeRuntimeWays {
        known: ways.is_known,
        start: ways.start_name().to_owned(),
        image: ways.image,
        gofers: ways.gofers,
    }
}

/// Makes the status of the sandboxes of one shape, but for what all shapes share.
fn class_status(class: &str, overhead: u64, of: &ShapeReport) -> NodeClassStatus {
    let cpu = of.shape.cpu;
    let cpu = cpu.map(|(quota, period)| quota.saturating_mul(1000) / period.max(1));
    let memory = of.shape.memory.map(|m| m.saturating_sub(overhead));
    let boot = of.boot_time.map(|time| time.as_millis());
    NodeClassStatus {
        class: class.to_owned(),
        memory_bytes: memory.map_or(0, signed),
        cpu_milli: cpu.map_or(0, signed),
        ready: small(of.ready),
        warming: small(of.warming),
        adopted: signed(of.adopted),
        missed: signed(of.missed),
        boot_p50_ms: boot.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)),
        ..NodeClassStatus::default()
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn small(n: u32) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}
