// SPDX-License-Identifier: Apache-2.0

//! The status of a claim, from its Sandbox or from what went wrong. Reasons and messages are
//! upstream's, by which its clients tell failures that last from those that pass.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_crds::{ClaimSandbox, Sandbox, SandboxClaim, SandboxClaimStatus};
use kube::ResourceExt;

use crate::{
    condition::{self, FINISHED, Is, POD_SCHEDULED, READY, condition},
    error::Error,
};

pub(super) const EXPIRED: &str = "ClaimExpired";

/// The status of a claim that is to have a Sandbox.
pub(super) fn active(
    claim: &SandboxClaim,
    found: Result<&Sandbox, &Error>,
    now: Timestamp,
) -> SandboxClaimStatus {
    let mut status = claim.status.clone().unwrap_or_default();
    let ready = match found {
        Ok(sandbox) => forwarded(claim, sandbox),
        Err(e) => failed(claim, e),
    };
    condition::set(&mut status.conditions, ready, now);
    if let Ok(sandbox) = found {
        show(&mut status, sandbox);
    }
    // A failure that passes must not hide which Sandbox the claim has.
    status
}

/// The status of a claim whose time is over.
pub(super) fn expired(
    claim: &SandboxClaim,
    sandbox: Option<&Sandbox>,
    error: Option<&Error>,
    now: Timestamp,
) -> SandboxClaimStatus {
    let mut status = claim.status.clone().unwrap_or_default();
    let message = match error {
        Some(e) => format!("Claim expired. {e}; deletion skipped."),
        None => "Claim expired. Sandbox cleanup initiated.".to_owned(),
    };
    let generation = claim.metadata.generation;
    let over = condition(READY, Is::False, EXPIRED, message, generation);
    condition::set(&mut status.conditions, over, now);
    match sandbox {
        Some(sandbox) => show(&mut status, sandbox),
        None => status.sandbox = None,
    }
    status
}

pub(super) fn is_marked_expired(claim: &SandboxClaim) -> bool {
    let conditions = claim.status.iter().flat_map(|s| &s.conditions);
    conditions
        .into_iter()
        .any(|c| c.type_ == READY && c.reason == EXPIRED)
}

/// Whether a claim has been ready before.
pub(super) fn is_ready(status: Option<&SandboxClaimStatus>) -> bool {
    status.is_some_and(|s| condition::is_true(&s.conditions, READY))
}

/// When a claim ends: at its time, or when it has been finished for long enough.
pub(super) fn ends_at(claim: &SandboxClaim) -> Option<Timestamp> {
    let lifecycle = claim.spec.lifecycle.as_ref()?;
    let at = lifecycle.shutdown_time.as_ref().map(|time| time.0);
    let conditions = claim.status.as_ref().map(|s| s.conditions.as_slice());
    let finished = conditions
        .and_then(|all| condition::find(all, FINISHED))
        .filter(|c| c.status == "True");
    let stays = lifecycle.ttl_seconds_after_finished.map(i64::from);
    let after = finished.zip(stays).and_then(|(finished, seconds)| {
        let end = finished
            .last_transition_time
            .0
            .as_second()
            .checked_add(seconds)?;
        Timestamp::from_second(end).ok()
    });
    at.into_iter().chain(after).min()
}

fn show(status: &mut SandboxClaimStatus, sandbox: &Sandbox) {
    let theirs = sandbox.status.as_ref();
    status.sandbox = Some(ClaimSandbox {
        name: Some(sandbox.name_any()),
        pod_ips: theirs.and_then(|s| s.pod_ips.clone()),
    });
    // With the Sandbox's own time, from which the claim's time to live counts.
    condition::remove(&mut status.conditions, FINISHED);
    let finished = theirs.and_then(|s| condition::find(&s.conditions, FINISHED));
    status.conditions.extend(finished.cloned());
}

fn forwarded(claim: &SandboxClaim, sandbox: &Sandbox) -> Condition {
    let generation = claim.metadata.generation;
    let no = |reason, message| condition(READY, Is::False, reason, message, generation);
    let conditions = sandbox.status.as_ref().map(|s| s.conditions.as_slice());
    let find = |kind| conditions.and_then(|c| condition::find(c, kind));
    match find(READY) {
        Some(ready) if ready.reason == "SandboxExpired" => no(
            "SandboxExpired",
            "Underlying Sandbox resource has expired independently of the Claim.",
        ),
        Some(ready) => Condition {
            observed_generation: generation,
            message: match find(POD_SCHEDULED) {
                // Who has the claim need not be able to see its Sandbox.
                Some(not) if not.status == "False" && ready.status != "True" => {
                    format!("{}; {}: {}", ready.message, not.reason, not.message)
                }
                _ => ready.message.clone(),
            },
            ..ready.clone()
        },
        None => no("SandboxNotReady", "Sandbox is not ready"),
    }
}

/// The reason that a claim's condition and events give for an error.
pub(super) fn reason(error: &Error) -> &'static str {
    match error {
        Error::TemplateNotFound(_) => "TemplateNotFound",
        Error::WarmPoolNotFound(_) | Error::PoolOfOtherTemplate { .. } => "WarmPoolNotFound",
        Error::AdoptionConflict => "AdoptionConflict",
        Error::Metadata(_) => "InvalidMetadata",
        Error::EnvVars(_) => "EnvVarsInjectionRejected",
        Error::VolumeClaims(_) => "VolumeClaimTemplatesError",
        _ => "ReconcilerError",
    }
}

fn failed(claim: &SandboxClaim, error: &Error) -> Condition {
    let reason = reason(error);
    let message = match reason {
        "ReconcilerError" => format!("Error seen: {error}"),
        _ => error.to_string(),
    };
    condition(READY, Is::False, reason, message, claim.metadata.generation)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn claim(lifecycle: &Value, conditions: &Value) -> SandboxClaim {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
            "metadata": {"name": "c", "uid": "u", "generation": 4},
            "spec": {"lifecycle": lifecycle}, "status": {"conditions": conditions},
        }))
        .unwrap()
    }

    fn sandbox(conditions: &Value) -> Sandbox {
        serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "metadata": {"name": "box"},
            "spec": {"podTemplate": {"spec": {"containers": []}}},
            "status": {"podIPs": ["10.0.0.1"], "conditions": conditions},
        }))
        .unwrap()
    }

    fn cond(kind: &str, status: &str, reason: &str, at: &str) -> Value {
        json!({"type": kind, "status": status, "reason": reason, "message": "m", "lastTransitionTime": at, "observedGeneration": 1})
    }

    const NOON: &str = "2026-01-01T12:00:00Z";

    #[test]
    fn readiness_is_the_sandboxs_with_the_claims_generation() {
        let sandbox = sandbox(&json!([cond("Ready", "True", "DependenciesReady", NOON)]));
        let claim = claim(&json!({}), &json!([]));
        let status = active(&claim, Ok(&sandbox), NOON.parse().unwrap());
        let ready = &status.conditions[0];
        assert_eq!(
            (ready.reason.as_str(), ready.observed_generation),
            ("DependenciesReady", Some(4))
        );
        let shown = status.sandbox.unwrap();
        assert_eq!(
            (shown.name.as_deref(), shown.pod_ips),
            (Some("box"), Some(vec!["10.0.0.1".to_owned()]))
        );
    }

    #[test]
    fn a_failure_keeps_the_sandbox_that_is_known() {
        let mut claim = claim(&json!({}), &json!([]));
        claim.status.as_mut().unwrap().sandbox = Some(ClaimSandbox {
            name: Some("box".into()),
            pod_ips: None,
        });
        for (error, reason) in [
            (
                Error::TemplateNotFound("t".into()),
                "TemplateNotFound: SandboxTemplate \"t\" not found",
            ),
            (
                Error::WarmPoolNotFound("p".into()),
                "WarmPoolNotFound: SandboxWarmPool \"p\" not found",
            ),
            (
                Error::MultiplePods(2),
                "ReconcilerError: Error seen: multiple Pods (2) are controlled by this Sandbox; refusing to choose or create a Pod",
            ),
        ] {
            let status = active(&claim, Err(&error), Timestamp::UNIX_EPOCH);
            let ready = &status.conditions[0];
            assert_eq!(format!("{}: {}", ready.reason, ready.message), reason);
            assert!(status.sandbox.is_some());
        }
    }

    #[test]
    fn a_claim_ends_at_the_earlier_of_its_times() {
        let finished = json!([cond("Finished", "True", "PodSucceeded", NOON)]);
        for (lifecycle, conditions, expected) in [
            (json!({}), &finished, None),
            (
                json!({"shutdownTime": "2026-01-01T13:00:00Z"}),
                &finished,
                Some("2026-01-01T13:00:00Z"),
            ),
            (json!({"ttlSecondsAfterFinished": 60}), &json!([]), None),
            (
                json!({"ttlSecondsAfterFinished": 60}),
                &finished,
                Some("2026-01-01T12:01:00Z"),
            ),
            (json!({"ttlSecondsAfterFinished": 0}), &finished, Some(NOON)),
            (
                json!({"ttlSecondsAfterFinished": 60, "shutdownTime": "2026-01-01T12:00:30Z"}),
                &finished,
                Some("2026-01-01T12:00:30Z"),
            ),
        ] {
            let at = ends_at(&claim(&lifecycle, conditions));
            assert_eq!(at, expected.map(|t| t.parse().unwrap()), "{lifecycle}");
        }
    }

    #[test]
    fn an_expired_claim_keeps_that_it_has_finished() {
        let claim = claim(
            &json!({}),
            &json!([cond("Finished", "True", "PodFailed", NOON)]),
        );
        let status = expired(&claim, None, None, NOON.parse().unwrap());
        assert!(condition::is_true(&status.conditions, FINISHED));
        assert!(status.sandbox.is_none());
        let claim = SandboxClaim {
            status: Some(status),
            ..claim
        };
        assert!(is_marked_expired(&claim));
    }
}
