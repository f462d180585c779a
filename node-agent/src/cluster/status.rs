// SPDX-License-Identifier: Apache-2.0

//! The status of a `SandboxNode`: what the agent holds.

use kiln_agent_api::Shape;
use kiln_crds::{NodeClassStatus, NodeRuntimeWays, NodeTotal, SandboxNodeStatus};

use super::conditions::{guarded, ready};
use crate::warm::{Counts, Keeper, Ways};

/// What the keeper holds, without the time.
pub(super) fn status(keeper: &Keeper, last: Option<&SandboxNodeStatus>) -> SandboxNodeStatus {
    let (held, runtime) = (keeper.held(), keeper.runtime());
    let name = keeper.class().to_owned();
    let overhead = keeper.overhead();
    let guarding = keeper.guarding();
    keeper.look(|pool, problem| {
        let shapes = pool.shapes();
        // Those that boot hold memory, too.
        let all = shapes
            .iter()
            .map(|(_, _, of)| u64::from(of.ready + of.warming))
            .sum::<u64>()
            .max(1);
        let classes: Vec<_> = shapes
            .into_iter()
            .map(|(shape, _, counts)| NodeClassStatus {
                held_bytes: signed(held / all * u64::from(counts.ready)),
                room: small(pool.room()),
                ..class_status(&name, overhead, shape, &counts)
            })
            .collect();
        let runtime = runtime.filter(|_| problem.is_empty());
        let ways = runtime.as_ref().map(|(_, ways)| runtime_ways(*ways));
        SandboxNodeStatus {
            heartbeat: None,
            runtime_ways: ways.map(|w| (name.clone(), w)).into_iter().collect(),
            runtime_versions: runtime.map(|(v, _)| (name, v)).into_iter().collect(),
            // Also where it holds none of any class yet.
            total: Some(NodeTotal {
                room: small(pool.room()),
                ..NodeTotal::of(&classes)
            }),
            classes,
            conditions: vec![ready(problem, last), guarded(&guarding, last)],
        }
    })
}

fn runtime_ways(ways: Ways) -> NodeRuntimeWays {
    NodeRuntimeWays {
        known: ways.is_known,
        start: ways.start_name().to_owned(),
        image: ways.image,
        gofers: ways.gofers,
    }
}

/// What is said of the sandboxes of one shape, but for what all shapes share.
fn class_status(class: &str, overhead: u64, shape: &Shape, counts: &Counts) -> NodeClassStatus {
    let cpu = shape
        .cpu
        .map(|(quota, period)| quota.saturating_mul(1000) / period.max(1));
    let boot = counts.boot_time().map(|t| t.as_millis());
    NodeClassStatus {
        class: class.to_owned(),
        memory_bytes: shape
            .memory
            .map_or(0, |m| signed(m.saturating_sub(overhead))),
        cpu_milli: cpu.map_or(0, signed),
        ready: small(counts.ready),
        warming: small(counts.warming),
        adopted: signed(counts.adopted),
        missed: signed(counts.missed),
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
