// SPDX-License-Identifier: Apache-2.0

//! What keeps a Sandbox from its Pod, or the Pod from its start, and does not pass by itself: read
//! off the Sandbox's conditions, and told by events to whoever waits for it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::condition::{POD_SCHEDULED, READY, find};

/// Reason of a Pod that no node takes.
pub(crate) const UNSCHEDULABLE: &str = "Unschedulable";

/// Reason of a Pod that somebody keeps from being scheduled until they are ready for it.
const SCHEDULING_GATED: &str = "SchedulingGated";

/// Reason of a Sandbox for which something could not be made.
pub(crate) const RECONCILER_ERROR: &str = "ReconcilerError";

/// Reason of a Sandbox of which the apiserver says that it can never be made: clients wait no longer.
pub(crate) const INVALID_CONFIGURATION: &str = "InvalidConfiguration";

/// What stands between a container and the reason for which it waits, in a Sandbox's message.
pub(crate) const WAITS: &str = " is waiting: ";

/// What a Sandbox's message says of its Service, at its end.
pub(crate) const SERVICE: [&str; 2] = ["; Service Exists", "; Service does not exist"];

/// A reason, as conditions and events have them, and what there is to say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Obstacle<'a> {
    pub(crate) reason: &'a str,
    pub(crate) message: &'a str,
}

impl Obstacle<'_> {
    /// Reasons of what the apiserver has refused.
    const REFUSED: [&'static str; 3] = [RECONCILER_ERROR, INVALID_CONFIGURATION, "MultiplePods"];

    /// Whether there could be no Pod at all, rather than one that does not start.
    pub(crate) fn is_refusal(&self) -> bool {
        Self::REFUSED.contains(&self.reason)
    }
}

impl<'a> Obstacle<'a> {
    /// That of a Sandbox with these conditions. What was refused comes first: it may be why no node
    /// takes the Pod.
    pub(crate) fn of(conditions: &'a [Condition]) -> Option<Self> {
        let ready = find(conditions, READY).filter(|c| c.status == "False");
        let refused = ready.filter(|c| Self::REFUSED.contains(&c.reason.as_str()));
        if let Some(c) = refused.or_else(|| unschedulable(conditions)) {
            let (reason, message) = (&c.reason, &c.message);
            return Some(Self { reason, message });
        }
        Some(Self {
            reason: "ContainerWaiting",
            message: waiting(&ready?.message)?,
        })
    }
}

/// The condition of a Sandbox that says that no node takes its Pod.
pub(crate) fn unschedulable(conditions: &[Condition]) -> Option<&Condition> {
    let scheduled = find(conditions, POD_SCHEDULED);
    scheduled.filter(|c| c.status == "False" && c.reason == UNSCHEDULABLE)
}

/// Whether a Sandbox with these conditions has a Pod that has not been put on a node: nothing can be
/// said of how long it takes to start.
pub(crate) fn is_unplaced(conditions: &[Condition]) -> bool {
    let scheduled = find(conditions, POD_SCHEDULED).filter(|c| c.status == "False");
    scheduled.is_some_and(|c| matches!(c.reason.as_str(), UNSCHEDULABLE | SCHEDULING_GATED))
}

/// What [`crate::sandbox`] adds to the message of a Pod that is not ready where one of its
/// containers waits for something unusual; of its Service is more behind it.
fn waiting(message: &str) -> Option<&str> {
    let (_, why) = message.split_once("; ")?;
    let is_it = why.starts_with("container ") && why.contains(WAITS);
    let why = SERVICE
        .iter()
        .find_map(|end| why.strip_suffix(end))
        .unwrap_or(why);
    is_it.then_some(why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::{Is, condition};

    #[test]
    fn what_passes_by_itself_is_no_obstacle() {
        let ready =
            |reason: &str, message: &str| vec![condition(READY, Is::False, reason, message, None)];
        let waits = "container main is waiting: ErrImagePull: not found";
        let cases = [
            (vec![], None),
            (
                ready(
                    "DependenciesNotReady",
                    "Pod exists with phase: Pending; Service Exists",
                ),
                None,
            ),
            (ready("SandboxSuspended", "Sandbox is suspended"), None),
            (
                ready(
                    "DependenciesNotReady",
                    &format!("Pod exists with phase: Pending; {waits}"),
                ),
                Some(("ContainerWaiting", waits)),
            ),
            (
                ready(
                    "DependenciesNotReady",
                    &format!("Pod exists with phase: Pending; {waits}; Service Exists"),
                ),
                Some(("ContainerWaiting", waits)),
            ),
            (
                ready("ReconcilerError", "Error seen: no"),
                Some(("ReconcilerError", "Error seen: no")),
            ),
        ];
        for (conditions, expected) in cases {
            let found = Obstacle::of(&conditions).map(|o| (o.reason, o.message));
            assert_eq!(found, expected);
        }
        let no_node = |is, reason| {
            let mut conditions = ready("DependenciesNotReady", "Pod exists with phase: Pending");
            conditions.push(condition(POD_SCHEDULED, is, reason, "0/4 nodes", None));
            Obstacle::of(&conditions).map(|o| o.message.to_owned())
        };
        assert_eq!(
            no_node(Is::False, "Unschedulable").as_deref(),
            Some("0/4 nodes")
        );
        assert_eq!(no_node(Is::False, "SchedulingGated"), None);
        assert_eq!(no_node(Is::Unknown, "Unschedulable"), None);
        for (is, reason, expected) in [
            (Is::False, "Unschedulable", true),
            (Is::False, "SchedulingGated", true),
            (Is::True, "Unschedulable", false),
            (Is::False, "Else", false),
        ] {
            let conditions = [condition(POD_SCHEDULED, is, reason, "", None)];
            assert_eq!(is_unplaced(&conditions), expected, "{reason}");
        }
    }
}
