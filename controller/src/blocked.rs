// SPDX-License-Identifier: Apache-2.0

//! What keeps a Sandbox from its Pod, or the Pod from its start, and does not pass by itself.

use std::{collections::HashMap, fmt, sync::Mutex};

use k8s_openapi::{
    api::core::v1::{ContainerState, ContainerStateWaiting, ContainerStatus, Pod, PodStatus},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::ResourceExt;

use crate::{
    condition::{POD_SCHEDULED, READY, find, shorten},
    known::NAME,
    lock::lock,
};

/// Reason of a Pod that no node takes.
pub(crate) const UNSCHEDULABLE: &str = "Unschedulable";

/// Reason of a Pod that somebody keeps from being scheduled until they are ready for it.
const SCHEDULING_GATED: &str = "SchedulingGated";

/// Reason of a Sandbox for which something failed to be made.
pub(crate) const RECONCILER_ERROR: &str = "ReconcilerError";

/// Reason of a Sandbox of which the apiserver says that it can never be made: clients wait no longer.
pub(crate) const INVALID_CONFIGURATION: &str = "InvalidConfiguration";

/// Reason of a Sandbox that has more than one Pod.
pub(crate) const MULTIPLE_PODS: &str = "MultiplePods";

/// Reason of a Sandbox whose Pod or Service is not ready.
pub(crate) const DEPENDENCIES_NOT_READY: &str = "DependenciesNotReady";

/// Most characters of what a kubelet says about a container.
const MESSAGE: usize = 1024;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Blocked {
    /// Something was refused, so that there is no Pod at all.
    Refused { reason: String, message: String },
    /// No node takes the Pod.
    Unschedulable(String),
    /// A container of the Pod does not start.
    ContainerWaiting(String),
}

impl Blocked {
    /// Finds what blocks a Sandbox with these conditions and this Pod. What was refused comes first:
    /// it may be why no node takes the Pod.
    pub(crate) fn of(conditions: &[Condition], pod: Option<&Pod>) -> Option<Self> {
        let ready = find(conditions, READY).filter(|c| c.status == "False");
        if let Some(Condition {
            reason, message, ..
        }) = ready
            && [RECONCILER_ERROR, INVALID_CONFIGURATION, MULTIPLE_PODS].contains(&reason.as_str())
        {
            let (reason, message) = (reason.clone(), message.clone());
            return Some(Self::Refused { reason, message });
        }
        if let Some(scheduled) = unplaced(conditions).filter(|c| c.reason == UNSCHEDULABLE) {
            return Some(Self::Unschedulable(scheduled.message.clone()));
        }
        ready.filter(|c| c.reason == DEPENDENCIES_NOT_READY)?;
        let waiting = waiting(pod?)?;
        Some(Self::ContainerWaiting(waiting.to_string()))
    }

    /// Reason, as conditions and events have it.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Refused { reason, .. } => reason,
            Self::Unschedulable(_) => UNSCHEDULABLE,
            Self::ContainerWaiting(_) => "ContainerWaiting",
        }
    }

    pub(crate) fn message(&self) -> &str {
        match self {
            Self::Refused { message, .. }
            | Self::Unschedulable(message)
            | Self::ContainerWaiting(message) => message,
        }
    }

    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether an event about `reported` says as much. Schedulers and kubelets change their messages
    /// with each try.
    fn is_covered_by(&self, reported: &Self) -> bool {
        match (self, reported) {
            (Self::Refused { message, .. }, Self::Refused { message: old, .. }) => message == old,
            (Self::Unschedulable(_), Self::Unschedulable(_))
            | (Self::ContainerWaiting(_), Self::ContainerWaiting(_)) => true,
            _ => false,
        }
    }
}

/// The condition of a Sandbox whose Pod has not been put on a node: none takes it, or a gate keeps it.
fn unplaced(conditions: &[Condition]) -> Option<&Condition> {
    let scheduled = find(conditions, POD_SCHEDULED).filter(|c| c.status == "False");
    scheduled.filter(|c| matches!(c.reason.as_str(), UNSCHEDULABLE | SCHEDULING_GATED))
}

/// Whether a Sandbox with these conditions has a Pod that has not been put on a node: nothing can be
/// said of how long it takes to start.
pub(crate) fn is_unplaced(conditions: &[Condition]) -> bool {
    unplaced(conditions).is_some()
}

/// Container that does not start.
pub(crate) struct Waiting<'a> {
    container: &'a str,
    reason: &'a str,
    message: &'a str,
}

impl fmt::Display for Waiting<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            container,
            reason,
            message,
        } = self;
        write!(f, "container {container} is waiting: {reason}")?;
        match *message {
            "" => Ok(()),
            message => write!(f, ": {message}"),
        }
    }
}

/// Finds a container of `pod` that does not start, in the kubelet's words.
pub(crate) fn waiting(pod: &Pod) -> Option<Waiting<'_>> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    waiting_container(pod.status.as_ref()?)
}

fn waiting_container(status: &PodStatus) -> Option<Waiting<'_>> {
    /// Reasons for which every container waits at first (kubelet `kuberuntime` and `status`).
    const USUAL: [&str; 2] = ["ContainerCreating", "PodInitializing"];
    let lists = [&status.init_container_statuses, &status.container_statuses];
    lists.into_iter().flatten().flatten().find_map(|container| {
        let waiting = container.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref()?;
        let message = waiting.message.as_deref().unwrap_or_default();
        let end = message.char_indices().nth(MESSAGE);
        let is_stuck = !reason.is_empty() && !USUAL.contains(&reason);
        is_stuck.then_some(Waiting {
            container: &container.name,
            reason,
            message: end.map_or(message, |(end, _)| &message[..end]),
        })
    })
}

/// Leaves of a Pod's status the container that does not start, in little space.
pub(crate) fn outline(status: &PodStatus) -> Option<PodStatus> {
    let waiting = waiting_container(status)?;
    let state = ContainerStateWaiting {
        reason: Some(shorten(waiting.reason.to_owned(), NAME)),
        message: Some(waiting.message.to_owned()),
    };
    let container = ContainerStatus {
        name: shorten(waiting.container.to_owned(), NAME),
        state: Some(ContainerState {
            waiting: Some(state),
            ..ContainerState::default()
        }),
        ..ContainerStatus::default()
    };
    Some(PodStatus {
        container_statuses: Some(vec![container]),
        ..PodStatus::default()
    })
}

/// What the last event about each object said that blocks it, by uid.
#[derive(Default)]
pub(crate) struct Reported(Mutex<HashMap<String, Blocked>>);

impl Reported {
    /// Notes what blocks `object`, and returns whether an event should say so. An event comes with a
    /// change of the object's status: without one, whoever ran before this process has recorded it.
    pub(crate) fn is_news(
        &self,
        object: &impl ResourceExt,
        blocked: Option<&Blocked>,
        status_changes: bool,
    ) -> bool {
        let mut reported = lock(&self.0);
        let uid = object.uid().unwrap_or_default();
        let Some(blocked) = blocked else {
            reported.remove(&uid);
            return false;
        };
        let is_news = match reported.get(&uid) {
            Some(old) => !blocked.is_covered_by(old),
            None => status_changes,
        };
        if is_news {
            reported.insert(uid, blocked.clone());
        }
        is_news
    }

    /// Forgets an object that is gone.
    pub(crate) fn forget(&self, object: &impl ResourceExt) {
        lock(&self.0).remove(&object.uid().unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::{Value, json};

    use super::*;
    use crate::condition::{Is, condition};

    fn ready(reason: &str, message: &str) -> Vec<Condition> {
        vec![condition(READY, Is::False, reason, message, None)]
    }

    fn pod(status: &Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "status": status}))
            .unwrap()
    }

    fn pod_that_waits(reason: &str, message: &str) -> Pod {
        let waiting = json!({"reason": reason, "message": message});
        let container = json!({
            "name": "main", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": waiting},
        });
        pod(&json!({"phase": "Pending", "containerStatuses": [container]}))
    }

    #[test]
    fn what_passes_by_itself_blocks_nothing() {
        let unready = ready(DEPENDENCIES_NOT_READY, "Pod exists with phase: Pending");
        let stuck = pod_that_waits("ErrImagePull", "not found");
        let terminating = {
            let mut pod = stuck.clone();
            pod.metadata.deletion_timestamp = Some(Time(jiff::Timestamp::UNIX_EPOCH));
            pod
        };
        let starting = pod_that_waits("ContainerCreating", "");
        let waits = "ContainerWaiting: container main is waiting: ErrImagePull: not found";
        let suspended = ready("SandboxSuspended", "Sandbox is suspended");
        let refused = ready("ReconcilerError", "Error seen: no");
        for (conditions, pod, expected) in [
            (&vec![], Some(&stuck), None),
            (&unready, None, None),
            (&unready, Some(&starting), None),
            (&unready, Some(&terminating), None),
            (&unready, Some(&stuck), Some(waits)),
            (&suspended, Some(&stuck), None),
            (
                &refused,
                Some(&stuck),
                Some("ReconcilerError: Error seen: no"),
            ),
        ] {
            let found = Blocked::of(conditions, pod);
            let found = found.map(|b| format!("{}: {}", b.reason(), b.message()));
            assert_eq!(found.as_deref(), expected, "{conditions:?}");
        }
    }

    #[test]
    fn a_pod_that_no_node_takes_is_told_from_one_that_a_gate_keeps() {
        for (is, reason, blocks, expected) in [
            (Is::False, "Unschedulable", true, true),
            (Is::False, "SchedulingGated", false, true),
            (Is::True, "Unschedulable", false, false),
            (Is::Unknown, "Unschedulable", false, false),
            (Is::False, "Else", false, false),
        ] {
            let mut conditions = ready(DEPENDENCIES_NOT_READY, "Pod exists with phase: Pending");
            conditions.push(condition(POD_SCHEDULED, is, reason, "0/4 nodes", None));
            let found = Blocked::of(&conditions, None);
            let expected_block = blocks.then(|| Blocked::Unschedulable("0/4 nodes".to_owned()));
            assert_eq!(found, expected_block, "{reason}");
            assert_eq!(is_unplaced(&conditions), expected, "{reason}");
        }
    }

    #[test]
    fn an_outline_tells_which_container_waits_and_no_more() {
        let long = "ä".repeat(2 * MESSAGE);
        let stuck = pod_that_waits("ErrImagePull", &long);
        let short = Pod {
            status: outline(stuck.status.as_ref().unwrap()),
            ..stuck.clone()
        };
        let text = |pod: &Pod| waiting(pod).map(|waiting| waiting.to_string());
        assert_eq!(text(&short), text(&stuck));
        assert!(text(&short).unwrap().chars().count() < MESSAGE + 100);
        let starting = pod_that_waits("PodInitializing", "");
        assert_eq!(outline(starting.status.as_ref().unwrap()), None);
    }

    #[test]
    fn an_event_is_recorded_once_for_each_thing_that_blocks() {
        let (reported, object) = (Reported::default(), pod(&json!({})));
        let waiting = |why: &str| Some(Blocked::ContainerWaiting(why.to_owned()));
        let refused = |why: &str| {
            let (reason, message) = (RECONCILER_ERROR.to_owned(), why.to_owned());
            Some(Blocked::Refused { reason, message })
        };
        for (blocked, status_changes, expected) in [
            // Recorded by the process before this one.
            (waiting("a"), false, false),
            (waiting("b"), true, true),
            (waiting("c"), true, false),
            (refused("a"), true, true),
            (refused("a"), true, false),
            (refused("b"), true, true),
            (None, true, false),
            (refused("b"), true, true),
        ] {
            let is_news = reported.is_news(&object, blocked.as_ref(), status_changes);
            assert_eq!(is_news, expected, "{blocked:?}");
        }
    }
}
