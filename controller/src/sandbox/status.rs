// SPDX-License-Identifier: Apache-2.0

//! The status of a Sandbox, from what there is of it. Reasons and messages are upstream's, which
//! its clients and tests compare (its `controllers/sandbox_controller.go`).

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Pod, Service},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kiln_crds::{Sandbox, SandboxStatus};
use kube::ResourceExt;

use super::{Suspension, pod};
use crate::{
    blocked::{
        DEPENDENCIES_NOT_READY, INVALID_CONFIGURATION, MULTIPLE_PODS, RECONCILER_ERROR, waiting,
    },
    condition::{self, FINISHED, Is, MEMORY_KEPT, POD_SCHEDULED, READY, SUSPENDED, condition},
    error::Error,
    owner, snapshot,
};

/// What was found of a Sandbox.
pub(super) struct Seen<'a> {
    /// Its Pod, or another of the name that it should have.
    pub(super) pod: Option<&'a Pod>,
    /// Whether what is known of the Pod can be relied on.
    pub(super) pod_is_known: bool,
    pub(super) service: Option<&'a Service>,
    pub(super) errors: &'a [Error],
    /// What is to be said of a suspension with memory.
    pub(super) suspension: Option<&'a Suspension>,
    pub(super) has_snapshots: bool,
}

/// The status that follows from `seen`.
pub(super) fn compute(
    sandbox: &Sandbox,
    seen: &Seen<'_>,
    cluster_domain: &str,
    now: Timestamp,
) -> SandboxStatus {
    let old = sandbox.status.clone().unwrap_or_default();
    let own = seen.pod.filter(|pod| owner::controls(sandbox, *pod));
    let mut status = SandboxStatus {
        selector: match seen.pod {
            Some(_) => Some(selector(sandbox)),
            None => old.selector,
        },
        pod_ips: own.and_then(pod_ips),
        node_name: own.and_then(|pod| pod.spec.as_ref()?.node_name.clone()),
        replicas: Some(i32::from(own.is_some())),
        conditions: old.conditions,
        service: None,
        service_fqdn: None,
    };
    if let Some(service) = seen.service {
        let namespace = service.namespace().unwrap_or_default();
        let name = service.name_any();
        status.service_fqdn = Some(format!("{name}.{namespace}.svc.{cluster_domain}"));
        status.service = Some(name);
    }
    let conditions = &mut status.conditions;
    condition::set(conditions, suspended(sandbox, seen), now);
    match memory_kept(sandbox, seen, own, conditions) {
        Some(new) => condition::set(conditions, new, now),
        None => condition::remove(conditions, MEMORY_KEPT),
    }
    for (kind, new) in [
        (FINISHED, finished(sandbox, own)),
        (POD_SCHEDULED, pod_scheduled(sandbox, seen, own)),
    ] {
        match new {
            Some(new) => condition::set(conditions, new, now),
            None => condition::remove(conditions, kind),
        }
    }
    condition::set(conditions, ready(sandbox, seen), now);
    status
}

/// What selects the Pod of a Sandbox, as a label selector in text.
fn selector(sandbox: &Sandbox) -> String {
    let labels = pod::identity(sandbox).into_iter();
    let terms: Vec<String> = labels
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    terms.join(",")
}

/// The status of a Sandbox whose time is over: before its Pod goes, or after.
pub(super) fn expired(sandbox: &Sandbox, is_torn_down: bool, now: Timestamp) -> SandboxStatus {
    let old = sandbox.status.clone().unwrap_or_default();
    let mut status = if is_torn_down {
        SandboxStatus {
            conditions: old.conditions,
            ..SandboxStatus::default()
        }
    } else {
        old
    };
    let generation = sandbox.metadata.generation;
    let over = condition(
        READY,
        Is::False,
        "SandboxExpired",
        "Sandbox has expired",
        generation,
    );
    condition::set(&mut status.conditions, over, now);
    condition::remove(&mut status.conditions, POD_SCHEDULED);
    status
}

pub(super) fn is_marked_expired(sandbox: &Sandbox) -> bool {
    let conditions = sandbox.status.iter().flat_map(|s| &s.conditions);
    conditions
        .into_iter()
        .any(|c| c.type_ == READY && c.reason == "SandboxExpired")
}

fn pod_ips(pod: &Pod) -> Option<Vec<String>> {
    let ips = pod.status.as_ref()?.pod_ips.as_ref()?;
    let ips: Vec<String> = ips.iter().map(|ip| ip.ip.clone()).collect();
    (!ips.is_empty()).then_some(ips)
}

fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|s| s.phase.as_deref())
        .unwrap_or_default()
}

/// Whether the Sandbox has its memory again. While it is suspended that is not known yet.
fn memory_kept(
    sandbox: &Sandbox,
    seen: &Seen<'_>,
    own: Option<&Pod>,
    old: &[Condition],
) -> Option<Condition> {
    let new = |is, reason, message: &str| {
        let generation = sandbox.metadata.generation;
        Some(condition(MEMORY_KEPT, is, reason, message, generation))
    };
    let live = own.filter(|pod| pod.metadata.deletion_timestamp.is_none());
    match (seen.suspension, live) {
        (Some(Suspension::Loses(reason, message)), _) => new(Is::False, reason, message),
        (Some(Suspension::Held(..)), _) => new(Is::Unknown, "Suspending", "The Pod still runs"),
        (None, Some(pod)) if !sandbox.spec.is_suspended() => snapshot::memory_kept(sandbox, pod),
        (None, _) if sandbox.spec.is_suspended() && seen.has_snapshots => {
            let message = "There is a snapshot; the next resume says whether it was restored";
            new(Is::Unknown, "Suspended", message)
        }
        (None, _) => condition::find(old, MEMORY_KEPT).cloned(),
    }
}

fn suspended(sandbox: &Sandbox, seen: &Seen<'_>) -> Condition {
    let (is, reason, message) = if !sandbox.spec.is_suspended() {
        (Is::False, "NotSuspended", "Sandbox is not suspended")
    } else if let Some(Suspension::Held(reason, message)) = seen.suspension {
        (Is::False, *reason, message.as_str())
    } else if seen.pod.is_none() && !seen.pod_is_known {
        (
            Is::Unknown,
            "PodStateUnknown",
            "Pod state is unknown. Sandbox suspension cannot be confirmed",
        )
    } else {
        match seen.pod {
            None => (
                Is::True,
                "PodTerminated",
                "Pod has been terminated. Sandbox is suspended",
            ),
            Some(pod) if !owner::controls(sandbox, pod) => (
                Is::False,
                "PodNotOwned",
                "Refused to delete pod because it is not owned by this sandbox",
            ),
            Some(_) => (
                Is::False,
                "PodTerminating",
                "Pod is terminating. Sandbox is suspending",
            ),
        }
    };
    condition(SUSPENDED, is, reason, message, sandbox.metadata.generation)
}

/// `(reason, message)` of a Pod that has come to its end.
fn end_of(pod: &Pod) -> Option<(&'static str, &'static str)> {
    match phase(pod) {
        "Succeeded" => Some(("PodSucceeded", "Pod completed successfully")),
        "Failed" => Some(("PodFailed", "Pod failed")),
        _ => None,
    }
}

/// That the Pod has come to its end: also when it is gone, because whoever collects Pods that have
/// ended takes no work back. It begins anew when the Sandbox was suspended.
fn finished(sandbox: &Sandbox, own: Option<&Pod>) -> Option<Condition> {
    let Some(pod) = own else {
        return super::finished(sandbox).cloned();
    };
    let (reason, message) = end_of(pod)?;
    let generation = sandbox.metadata.generation;
    Some(condition(FINISHED, Is::True, reason, message, generation))
}

/// The Pod's own condition, for those who may see the Sandbox and not its Pod.
fn pod_scheduled(sandbox: &Sandbox, seen: &Seen<'_>, own: Option<&Pod>) -> Option<Condition> {
    let generation = sandbox.metadata.generation;
    let unknown = |message: &str| {
        let reason = "PodSchedulingUnknown";
        Some(condition(
            POD_SCHEDULED,
            Is::Unknown,
            reason,
            message,
            generation,
        ))
    };
    if seen.pod.is_none() && !seen.pod_is_known {
        return unknown("Pod state is unknown. Pod scheduling cannot be determined");
    }
    let conditions = own?.status.as_ref().and_then(|s| s.conditions.as_ref());
    let Some(pods) = conditions
        .into_iter()
        .flatten()
        .find(|c| c.type_ == POD_SCHEDULED)
    else {
        return unknown("Pod has not reported a PodScheduled condition yet");
    };
    let is = match pods.status.as_str() {
        "True" => Is::True,
        "False" => Is::False,
        _ => Is::Unknown,
    };
    let message = pods.message.clone().unwrap_or_default();
    let (reason, message) = match pods.reason.as_deref() {
        Some(reason) if condition::is_reason(reason) => (reason, message),
        // Other schedulers write what they like into a Pod, and a Sandbox would be refused for it.
        Some(text) if !text.is_empty() => ("PodSchedulingUnknown", format!("{text}: {message}")),
        _ if is == Is::True => ("PodScheduled", message),
        _ => ("PodSchedulingUnknown", message),
    };
    Some(condition(POD_SCHEDULED, is, reason, message, generation))
}

fn ready(sandbox: &Sandbox, seen: &Seen<'_>) -> Condition {
    let generation = sandbox.metadata.generation;
    let no =
        |reason: &str, message: String| condition(READY, Is::False, reason, message, generation);
    if let Some(many) = seen
        .errors
        .iter()
        .find(|e| matches!(e, Error::MultiplePods(_)))
    {
        return no(MULTIPLE_PODS, many.to_string());
    }
    if !seen.errors.is_empty() {
        let texts: Vec<String> = seen.errors.iter().map(Error::to_string).collect();
        let reason = match seen.errors.iter().any(Error::is_invalid) {
            true => INVALID_CONFIGURATION,
            false => RECONCILER_ERROR,
        };
        return no(reason, format!("Error seen: {}", texts.join("\n")));
    }
    if sandbox.spec.is_suspended() {
        let message = match seen.pod {
            Some(_) => "Sandbox is suspending",
            None => "Sandbox is suspended",
        };
        return no("SandboxSuspended", message.to_owned());
    }
    if let Some((reason, message)) = seen.pod.and_then(end_of) {
        return no(reason, message.to_owned());
    }
    if let Some(end) = super::finished(sandbox).filter(|_| seen.pod.is_none()) {
        return no(&end.reason, end.message.clone());
    }
    let (pod_is_ready, mut message) = seen
        .pod
        .map_or_else(|| (false, "Pod does not exist".to_owned()), readiness);
    let wants_service = sandbox.spec.service.unwrap_or(seen.service.is_some());
    if wants_service {
        message.push_str(match seen.service {
            Some(_) => "; Service Exists",
            None => "; Service does not exist",
        });
    }
    if pod_is_ready && (!wants_service || seen.service.is_some()) {
        return condition(READY, Is::True, "DependenciesReady", message, generation);
    }
    no(DEPENDENCIES_NOT_READY, message)
}

fn readiness(pod: &Pod) -> (bool, String) {
    // It still runs, and serves whoever is connected, but nobody is to begin with it.
    if pod.metadata.deletion_timestamp.is_some() {
        return (false, "Pod is terminating".to_owned());
    }
    let (is_ready, mut text) = phase_and_readiness(pod);
    if !is_ready && let Some(waiting) = waiting(pod) {
        text = format!("{text}; {waiting}");
    }
    (is_ready, text)
}

fn phase_and_readiness(pod: &Pod) -> (bool, String) {
    if phase(pod) != "Running" {
        return (false, format!("Pod exists with phase: {}", phase(pod)));
    }
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let is_ready = conditions
        .into_iter()
        .flatten()
        .any(|c| c.type_ == READY && c.status == "True");
    let (ready, text) = match (is_ready, pod_ips(pod)) {
        (false, _) => (false, "Pod is Running but not Ready"),
        (true, None) => (false, "Pod is Ready but has no podIPs yet"),
        (true, Some(_)) => (true, "Pod is Ready"),
    };
    (ready, text.to_owned())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use kiln_crds::{OperatingMode, keys};
    use serde_json::{Value, json};

    use super::*;

    fn sandbox(spec: &Value) -> Sandbox {
        let mut template = json!({"podTemplate": {"spec": {"containers": []}}});
        template
            .as_object_mut()
            .unwrap()
            .extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": "box", "namespace": "ns", "uid": "u1", "generation": 7},
            "spec": template,
        }))
        .unwrap()
    }

    fn pod(owner: &str, status: &Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "box", "namespace": "ns", "ownerReferences": [{
                "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "name": "box", "uid": owner, "controller": true,
            }]},
            "spec": {"containers": [], "nodeName": "n1"},
            "status": status,
        }))
        .unwrap()
    }

    fn service() -> Service {
        serde_json::from_value(json!({"metadata": {"name": "box", "namespace": "ns"}})).unwrap()
    }

    fn running(ready: &str) -> Value {
        json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [
            {"type": "Ready", "status": ready}, {"type": "PodScheduled", "status": "True"},
        ]})
    }

    /// Type, status, reason and message of each condition.
    fn lines(status: &SandboxStatus) -> Vec<String> {
        let mut lines: Vec<String> = status
            .conditions
            .iter()
            .map(|c| {
                assert_eq!(c.observed_generation, Some(7));
                format!("{} {} {}: {}", c.type_, c.status, c.reason, c.message)
            })
            .collect();
        lines.sort();
        lines
    }

    fn status_of(
        sandbox: &Sandbox,
        pod: Option<&Pod>,
        service: Option<&Service>,
        errors: &[Error],
    ) -> SandboxStatus {
        let seen = Seen {
            pod,
            pod_is_known: true,
            service,
            errors,
            suspension: None,
            has_snapshots: false,
        };
        compute(sandbox, &seen, "cluster.local", Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn a_running_sandbox_has_the_whole_status() {
        let service = service();
        let pod = pod("u1", &running("True"));
        let status = status_of(
            &sandbox(&json!({"service": true})),
            Some(&pod),
            Some(&service),
            &[],
        );
        assert_eq!(
            lines(&status),
            [
                "PodScheduled True PodScheduled: ",
                "Ready True DependenciesReady: Pod is Ready; Service Exists",
                "Suspended False NotSuspended: Sandbox is not suspended",
            ]
        );
        assert_eq!(
            status.service_fqdn.as_deref(),
            Some("box.ns.svc.cluster.local")
        );
        assert_eq!(status.pod_ips, Some(vec!["10.0.0.1".to_owned()]));
        assert_eq!(status.node_name.as_deref(), Some("n1"));
        let selector = format!(
            "agents.x-k8s.io/sandbox-name-hash={},kiln.dev/sandbox-name-digest={}",
            keys::name_hash("box"),
            keys::name_digest("box")
        );
        assert_eq!(status.selector, Some(selector));
    }

    #[test]
    fn a_pod_that_terminates_is_not_ready() {
        let mut pod = pod("u1", &running("True"));
        pod.metadata.deletion_timestamp = Some(Time(Timestamp::UNIX_EPOCH));
        let status = status_of(&sandbox(&json!({})), Some(&pod), None, &[]);
        let is = "Ready False DependenciesNotReady: Pod is terminating";
        assert!(lines(&status).contains(&is.to_owned()), "{status:?}");
    }

    #[test]
    fn what_has_finished_stays_so_until_it_is_suspended() {
        let ended = pod("u1", &json!({"phase": "Succeeded"}));
        let mut sandbox = sandbox(&json!({}));
        sandbox.status = Some(status_of(&sandbox, Some(&ended), None, &[]));
        let gone = status_of(&sandbox, None, None, &[]);
        for line in [
            "Finished True PodSucceeded: Pod completed successfully",
            "Ready False PodSucceeded: Pod completed successfully",
        ] {
            assert!(lines(&gone).contains(&line.to_owned()), "{gone:?}");
        }
        sandbox.spec.operating_mode = Some(OperatingMode::Suspended);
        let suspended = status_of(&sandbox, None, None, &[]);
        assert!(condition::find(&suspended.conditions, FINISHED).is_none());
    }

    #[test]
    fn reasons_of_other_schedulers_are_taken_as_words() {
        for (reason, expected) in [
            ("SchedulingGated", "False SchedulingGated: why"),
            (
                "pod-group not ready",
                "False PodSchedulingUnknown: pod-group not ready: why",
            ),
            ("", "False PodSchedulingUnknown: why"),
        ] {
            let scheduled = json!({"type": "PodScheduled", "status": "False", "reason": reason, "message": "why"});
            let pod = pod(
                "u1",
                &json!({"phase": "Pending", "conditions": [scheduled]}),
            );
            let status = status_of(&sandbox(&json!({})), Some(&pod), None, &[]);
            assert!(
                lines(&status).contains(&format!("PodScheduled {expected}")),
                "{status:?}"
            );
        }
    }

    #[test]
    fn readiness_says_what_is_missing() {
        let waiting = |reason: &str, message: &str| {
            json!({"phase": "Pending", "containerStatuses": [
                {"name": "main", "ready": false, "restartCount": 0, "image": "i", "imageID": "",
                    "state": {"waiting": {"reason": reason, "message": message}}},
            ]})
        };
        let cases: [(Value, Option<Value>, &str); 10] = [
            (
                json!({}),
                Some(waiting("ContainerCreating", "")),
                "False DependenciesNotReady: Pod exists with phase: Pending",
            ),
            (
                json!({}),
                Some(waiting("ImagePullBackOff", "Back-off pulling image \"i\"")),
                "False DependenciesNotReady: Pod exists with phase: Pending; container main is waiting: ImagePullBackOff: Back-off pulling image \"i\"",
            ),
            (
                json!({}),
                None,
                "False DependenciesNotReady: Pod does not exist",
            ),
            (
                json!({}),
                Some(json!({"phase": "Pending"})),
                "False DependenciesNotReady: Pod exists with phase: Pending",
            ),
            (
                json!({}),
                Some(running("False")),
                "False DependenciesNotReady: Pod is Running but not Ready",
            ),
            (
                json!({}),
                Some(
                    json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
                ),
                "False DependenciesNotReady: Pod is Ready but has no podIPs yet",
            ),
            (
                json!({"service": true}),
                Some(running("True")),
                "False DependenciesNotReady: Pod is Ready; Service does not exist",
            ),
            (
                json!({}),
                Some(json!({"phase": "Succeeded"})),
                "False PodSucceeded: Pod completed successfully",
            ),
            (
                json!({}),
                Some(json!({"phase": "Failed"})),
                "False PodFailed: Pod failed",
            ),
            (
                json!({"operatingMode": "Suspended"}),
                None,
                "False SandboxSuspended: Sandbox is suspended",
            ),
        ];
        for (spec, status, expected) in cases {
            let pod = status.map(|status| pod("u1", &status));
            let status = status_of(&sandbox(&spec), pod.as_ref(), None, &[]);
            let ready = condition::find(&status.conditions, READY).unwrap();
            assert_eq!(
                format!("{} {}: {}", ready.status, ready.reason, ready.message),
                expected
            );
        }
    }

    #[test]
    fn suspension_in_either_version_waits_for_the_pod_to_go() {
        for spec in [
            json!({"operatingMode": "Suspended"}),
            json!({"replicas": 0}),
        ] {
            let sandbox = sandbox(&spec);
            let reason = |pod: Option<&Pod>| {
                let status = status_of(&sandbox, pod, None, &[]);
                condition::find(&status.conditions, SUSPENDED)
                    .unwrap()
                    .reason
                    .clone()
            };
            assert_eq!(reason(Some(&pod("u1", &running("True")))), "PodTerminating");
            assert_eq!(reason(Some(&pod("other", &running("True")))), "PodNotOwned");
            assert_eq!(reason(None), "PodTerminated");
        }
    }

    #[test]
    fn a_strangers_pod_says_nothing_about_the_sandbox() {
        let pod = pod("other", &running("True"));
        let status = status_of(&sandbox(&json!({"replicas": 0})), Some(&pod), None, &[]);
        assert!(status.pod_ips.is_none() && status.node_name.is_none());
        assert!(condition::find(&status.conditions, POD_SCHEDULED).is_none());
    }

    #[test]
    fn errors_are_shown_and_two_pods_before_all() {
        let status = |errors: &[Error]| {
            let status = status_of(&sandbox(&json!({})), None, None, errors);
            let ready = condition::find(&status.conditions, READY).unwrap();
            format!("{}: {}", ready.reason, ready.message)
        };
        let other = Error::TemplateNotFound("t".to_owned());
        assert_eq!(
            status(&[other]),
            "ReconcilerError: Error seen: SandboxTemplate \"t\" not found"
        );
        let both = [Error::AdoptionConflict, Error::MultiplePods(2)];
        assert!(status(&both).starts_with("MultiplePods: multiple Pods (2)"));
    }

    #[test]
    fn an_expired_sandbox_keeps_that_it_has_finished() {
        let mut sandbox = sandbox(&json!({}));
        let pod = pod("u1", &json!({"phase": "Succeeded"}));
        sandbox.status = Some(status_of(&sandbox, Some(&pod), None, &[]));
        let marked = expired(&sandbox, false, Timestamp::UNIX_EPOCH);
        assert!(marked.selector.is_some());
        sandbox.status = Some(marked);
        assert!(is_marked_expired(&sandbox));
        let over = expired(&sandbox, true, Timestamp::UNIX_EPOCH);
        assert_eq!(
            lines(&over),
            [
                "Finished True PodSucceeded: Pod completed successfully",
                "Ready False SandboxExpired: Sandbox has expired",
                "Suspended False NotSuspended: Sandbox is not suspended",
            ]
        );
        assert!(over.selector.is_none());
    }

    /// What there is of a Sandbox: of its Pod the phase, readiness, address and owner.
    #[derive(Debug, Clone, bolero::TypeGenerator)]
    struct World {
        suspended: bool,
        service: Option<bool>,
        has_service: bool,
        pod: Option<(u8, bool, bool, bool)>,
        is_known: bool,
        has_error: bool,
        has_two_pods: bool,
    }

    impl World {
        fn phase(&self) -> Option<&'static str> {
            let phases = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];
            self.pod
                .map(|(phase, ..)| phases[usize::from(phase) % phases.len()])
        }

        fn sandbox(&self) -> Sandbox {
            let mode = if self.suspended {
                "Suspended"
            } else {
                "Running"
            };
            let mut spec = json!({"operatingMode": mode});
            if let Some(service) = self.service {
                spec["service"] = json!(service);
            }
            sandbox(&spec)
        }

        fn pod(&self) -> Option<Pod> {
            let (_, is_ready, has_ip, is_ours) = self.pod?;
            let ready = if is_ready { "True" } else { "False" };
            let mut status = running(ready);
            status["phase"] = json!(self.phase());
            if !has_ip {
                status["podIPs"] = json!([]);
            }
            Some(pod(if is_ours { "u1" } else { "other" }, &status))
        }

        fn errors(&self) -> Vec<Error> {
            let other = self
                .has_error
                .then(|| Error::TemplateNotFound("t".to_owned()));
            let two = self.has_two_pods.then_some(Error::MultiplePods(2));
            other.into_iter().chain(two).collect()
        }

        /// Upstream's word for it, from its documentation of conditions.
        fn ready(&self) -> String {
            let two = "multiple Pods (2) are controlled by this Sandbox; refusing to choose or create a Pod";
            match (self.has_two_pods, self.has_error, self.suspended) {
                (true, _, _) => return format!("False MultiplePods: {two}"),
                (_, true, _) => {
                    return "False ReconcilerError: Error seen: SandboxTemplate \"t\" not found"
                        .to_owned();
                }
                (_, _, true) if self.pod.is_some() => {
                    return "False SandboxSuspended: Sandbox is suspending".to_owned();
                }
                (_, _, true) => return "False SandboxSuspended: Sandbox is suspended".to_owned(),
                _ => {}
            }
            let pod = match (self.phase(), self.pod) {
                (Some("Succeeded"), _) => {
                    return "False PodSucceeded: Pod completed successfully".to_owned();
                }
                (Some("Failed"), _) => return "False PodFailed: Pod failed".to_owned(),
                (Some("Running"), Some((_, false, ..))) => "Pod is Running but not Ready",
                (Some("Running"), Some((_, true, false, _))) => {
                    "Pod is Ready but has no podIPs yet"
                }
                (Some("Running"), _) => "Pod is Ready",
                (Some("Pending"), _) => "Pod exists with phase: Pending",
                (Some(_), _) => "Pod exists with phase: Unknown",
                (None, _) => "Pod does not exist",
            };
            let service = match (self.service, self.has_service) {
                (Some(false), _) | (None, false) => "",
                (_, true) => "; Service Exists",
                (Some(true), false) => "; Service does not exist",
            };
            let is_ready = pod == "Pod is Ready" && service != "; Service does not exist";
            let (is, reason) = match is_ready {
                true => ("True", "DependenciesReady"),
                false => ("False", "DependenciesNotReady"),
            };
            format!("{is} {reason}: {pod}{service}")
        }
    }

    #[test]
    fn any_state_has_upstreams_words_and_a_second_look_changes_nothing() {
        bolero::check!().with_type::<World>().for_each(|world| {
            let mut sandbox = world.sandbox();
            let (pod, errors) = (world.pod(), world.errors());
            let service = world.has_service.then(service);
            let seen = Seen {
                pod: pod.as_ref(),
                pod_is_known: world.is_known,
                service: service.as_ref(),
                errors: &errors,
                suspension: None,
                has_snapshots: false,
            };
            let first = compute(&sandbox, &seen, "cluster.local", Timestamp::UNIX_EPOCH);
            let ready = condition::find(&first.conditions, READY).unwrap();
            let line = format!("{} {}: {}", ready.status, ready.reason, ready.message);
            assert_eq!(line, world.ready());
            let is_ours = world.pod.is_some_and(|(.., is_ours)| is_ours);
            let has_ended = matches!(world.phase(), Some("Succeeded" | "Failed"));
            let is_finished = condition::is_true(&first.conditions, FINISHED);
            assert_eq!(is_finished, is_ours && has_ended);
            let suspended = condition::find(&first.conditions, SUSPENDED).unwrap();
            let is_away = world.suspended && world.pod.is_none() && world.is_known;
            assert_eq!(suspended.status == "True", is_away);
            sandbox.status = Some(first.clone());
            let later = Timestamp::from_second(60).unwrap();
            assert_eq!(compute(&sandbox, &seen, "cluster.local", later), first);
        });
    }
}
