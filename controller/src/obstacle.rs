// SPDX-License-Identifier: Apache-2.0

//! What keeps a Sandbox from its Pod, or the Pod from its start, and does not pass by itself: read
//! off the Sandbox's conditions, and told by events to whoever waits for it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::condition::{POD_SCHEDULED, READY, find};

/// A reason, as conditions and events have them, and what there is to say about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Obstacle<'a> {
    pub(crate) reason: &'a str,
    pub(crate) message: &'a str,
}

impl Obstacle<'_> {
    /// Reason of a Pod that no node takes.
    pub(crate) const UNSCHEDULABLE: &'static str = "Unschedulable";
    /// Reasons of what the apiserver has refused.
    const REFUSED: [&'static str; 2] = ["ReconcilerError", "MultiplePods"];

    /// Whether there could be no Pod at all, rather than one that does not start.
    pub(crate) fn is_refusal(&self) -> bool {
        Self::REFUSED.contains(&self.reason)
    }
}

impl<'a> Obstacle<'a> {
    /// That of a Sandbox with these conditions.
    pub(crate) fn of(conditions: &'a [Condition]) -> Option<Self> {
        let is_false = |c: &&Condition| c.status == "False";
        let scheduled = find(conditions, POD_SCHEDULED).filter(is_false);
        if let Some(c) = scheduled.filter(|c| c.reason == Self::UNSCHEDULABLE) {
            let (reason, message) = (c.reason.as_str(), c.message.as_str());
            return Some(Self { reason, message });
        }
        let ready = find(conditions, READY).filter(is_false)?;
        let (reason, message) = match ready.reason.as_str() {
            reason if Self::REFUSED.contains(&reason) => (reason, ready.message.as_str()),
            _ => ("ContainerWaiting", waiting(&ready.message)?),
        };
        Some(Self { reason, message })
    }
}

/// What [`crate::sandbox`] adds to the message of a Pod that is not ready where one of its
/// containers waits for something unusual.
fn waiting(message: &str) -> Option<&str> {
    let (_, why) = message.split_once("; ")?;
    (why.starts_with("container ") && why.contains(" is waiting: ")).then_some(why)
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
    }
}
