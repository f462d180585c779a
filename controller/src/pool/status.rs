// SPDX-License-Identifier: Apache-2.0

//! Status of a pool.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_crds::{SandboxWarmPool, SandboxWarmPoolStatus, keys};
use kube::ResourceExt;

use super::{desired, plan::Member};
use crate::{
    blocked::UNSCHEDULABLE,
    condition::{self, Is, READY, condition},
    context::Context,
    error::Error,
    node,
};

/// How long it may take until a pool's status follows what nodes hold: that changes all the time,
/// and mostly comes along with what else is written.
const NODES_DELAY: Duration = Duration::from_secs(5);

/// Reason of a pool that is on its way.
const WARMING: &str = "Warming";

/// Computes the status of a pool, but for what nodes hold for it.
pub(super) fn compute(
    pool: &SandboxWarmPool,
    members: &[Member],
    failure: Option<&Error>,
    now: Timestamp,
) -> SandboxWarmPoolStatus {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let ready = members.iter().filter(|m| m.is_ready).count();
    let desired = desired(pool);
    let generation = pool.metadata.generation;
    let blocked = members.iter().find_map(|m| m.blocked.as_ref());
    let (is, reason, message) = match (failure, blocked) {
        (Some(e @ Error::TemplateNotFound(_)), _) => (Is::False, "TemplateNotFound", e.to_string()),
        (Some(e), _) => (Is::False, "SandboxCreateFailed", e.to_string()),
        (None, _) if ready >= desired => (
            Is::True,
            "PoolReady",
            format!("{ready} of {desired} Sandboxes are ready"),
        ),
        (None, Some(blocked)) => (Is::False, blocked.reason(), blocked.message().to_owned()),
        (None, None) => (
            Is::False,
            WARMING,
            format!("{ready} of {desired} Sandboxes are ready"),
        ),
    };
    let mut conditions = pool
        .status
        .as_ref()
        .map(|s| s.conditions.clone())
        .unwrap_or_default();
    condition::set(
        &mut conditions,
        condition(READY, is, reason, message, generation),
        now,
    );
    SandboxWarmPoolStatus {
        replicas: count(members.len()),
        ready_replicas: count(ready),
        selector: Some(format!(
            "{}={}",
            keys::WARM_POOL,
            keys::name_hash(&pool.name_any())
        )),
        observed_generation: generation,
        conditions,
    }
}

/// How long a new status may wait for what else changes, at most the `longest` time.
pub(super) fn delay(
    pool: &SandboxWarmPool,
    new: &SandboxWarmPoolStatus,
    failure: Option<&Error>,
    longest: Duration,
) -> Duration {
    let Some(old) = &pool.status else {
        return Duration::ZERO;
    };
    let without_nodes = |status: &SandboxWarmPoolStatus| {
        let mut status = status.clone();
        condition::remove(&mut status.conditions, node::CAPACITY);
        status
    };
    if without_nodes(old) == without_nodes(new) {
        return NODES_DELAY;
    }
    let is_full = usize::try_from(new.ready_replicas).is_ok_and(|ready| ready >= desired(pool));
    if is_full || failure.is_some() {
        return Duration::ZERO;
    }
    longest
}

/// Records why a pool is not ready, if it did not say so before: of its Sandboxes by the
/// reason alone, because others change their messages with each try.
pub(super) fn record_event(
    context: &Context,
    pool: &SandboxWarmPool,
    old: Option<&Condition>,
    new: &Condition,
    has_failed: bool,
) {
    let is_news = old
        .is_none_or(|old| old.reason != new.reason || (has_failed && old.message != new.message));
    if new.status != "False" || new.reason == WARMING || !is_news {
        return;
    }
    let reason = match new.reason.as_str() {
        // As upstream has it.
        UNSCHEDULABLE => "WarmPoolNotProgressing",
        reason => reason,
    };
    context.events.warn(pool, reason, &new.message);
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;
    use crate::{blocked::Blocked, pool::build::tests::pool};

    #[test]
    fn the_status_says_why_a_pool_is_not_ready() {
        let now = Timestamp::from_str("2026-01-01T00:00:00Z").unwrap();
        let member = |is_ready, why: Option<&str>| Member {
            name: "m".to_owned(),
            age: Duration::ZERO,
            waited: Duration::ZERO,
            is_ready,
            is_forged: false,
            is_stale: false,
            is_over: false,
            is_unplaced: why.is_some(),
            blocked: why.map(|why| Blocked::Unschedulable(why.to_owned())),
        };
        let missing = Error::TemplateNotFound("t".to_owned());
        let cases = [
            (
                vec![member(true, None), member(true, None)],
                None,
                "True PoolReady: 2 of 2 Sandboxes are ready",
            ),
            (
                vec![member(false, None)],
                None,
                "False Warming: 0 of 2 Sandboxes are ready",
            ),
            (
                vec![member(false, Some("no node"))],
                None,
                "False Unschedulable: no node",
            ),
            (
                vec![],
                Some(&missing),
                "False TemplateNotFound: SandboxTemplate \"t\" not found",
            ),
        ];
        for (members, failure, expected) in cases {
            let status = compute(&pool("p"), &members, failure, now);
            let c = &status.conditions[0];
            assert_eq!(
                format!("{} {}: {}", c.status, c.reason, c.message),
                expected
            );
            assert_eq!(status.observed_generation, Some(3));
        }
    }
}
