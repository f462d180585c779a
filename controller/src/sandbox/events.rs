// SPDX-License-Identifier: Apache-2.0

//! Events about Sandboxes. What goes wrong is always recorded, what goes as it should if that is
//! wanted. Reasons are upstream's.

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Condition};
use kiln_crds::{Sandbox, SandboxStatus, SandboxWarmPool, keys};
use kube::{ResourceExt, runtime::events::EventType};

use super::{Children, State};
use crate::{
    blocked::Blocked,
    condition::{self, FINISHED, READY, SUSPENDED},
    context::Context,
    error::Error,
    marks::ownerless_claim,
    owner,
};

/// Reason of a Pod that the apiserver refuses.
const POD_NOT_MADE: &str = "SandboxPodCreateFailed";

/// Records what blocks a Sandbox, if that is news. For what a pool waits for, the pool records it.
pub(super) fn record_blocked(
    context: &Context,
    state: &State,
    sandbox: &Sandbox,
    new: &SandboxStatus,
    children: &Children,
) {
    let old = sandbox.status.as_ref();
    let status_changes = old.is_none_or(|old| old.conditions != new.conditions);
    let blocked = Blocked::of(&new.conditions, children.pod.as_deref());
    let is_news = state
        .reported
        .is_news(sandbox, blocked.as_ref(), status_changes);
    let Some(blocked) = blocked.filter(|_| is_news) else {
        return;
    };
    let is_pools = owner::controller(sandbox).is_some_and(owner::is_kind::<SandboxWarmPool>);
    if blocked.is_refusal() || !is_pools {
        let mut errors = children.errors.iter();
        let is_pod = errors.any(|e| matches!(e, Error::PodNotMade(_)));
        let reason = match blocked.is_refusal() && is_pod {
            true => POD_NOT_MADE,
            false => blocked.reason(),
        };
        context.events.warn(sandbox, reason, blocked.message());
    }
}

/// Records that a Sandbox was a claim's and that nobody owns it, when it gets its first status: it
/// runs on, and nothing ends it.
pub(super) fn record_ownerless(context: &Context, sandbox: &Sandbox) {
    let (Some(claim), None) = (ownerless_claim(sandbox), &sandbox.status) else {
        return;
    };
    let note = format!(
        "Sandbox was SandboxClaim \"{claim}\"'s and is owned by nobody, as after a restore from a \
         backup. It runs on: give it to a claim by its owner reference and the label \"{}\", or \
         delete it",
        keys::CLAIM_UID
    );
    context.events.warn(sandbox, "SandboxOwnerless", note);
}

/// Records that a Sandbox has a new Pod.
pub(super) fn record_pod(context: &Context, sandbox: &Sandbox, pod: &Pod) {
    if context.options.sandbox_events {
        let note = format!("Created Pod \"{}\"", pod.name_any());
        context.events.inform(sandbox, "SandboxPodCreated", note);
    }
}

/// Records what has become of a Sandbox, once its status says so.
pub(super) fn record_changes(context: &Context, sandbox: &Sandbox, new: &SandboxStatus) {
    if !context.options.sandbox_events {
        return;
    }
    let old = sandbox.status.as_ref();
    let old = old.map_or(&[][..], |s| s.conditions.as_slice());
    for (kind, reason, note) in turns(old, &new.conditions) {
        context.events.record(sandbox, kind, reason, note);
    }
}

/// Finds what conditions say that they did not say before: kind, reason and note of the events.
fn turns<'a>(old: &[Condition], new: &'a [Condition]) -> Vec<(EventType, &'a str, &'a str)> {
    let turned = |kind: &str| {
        let now = condition::find(new, kind).filter(|c| c.status == "True");
        now.filter(|_| !condition::is_true(old, kind))
    };
    let mut turns = Vec::new();
    if let Some(now) = turned(READY) {
        turns.push((EventType::Normal, "SandboxReady", now.message.as_str()));
    }
    if let Some(now) = turned(SUSPENDED) {
        turns.push((EventType::Normal, "SandboxSuspended", now.message.as_str()));
    }
    if let Some(now) = turned(FINISHED) {
        let kind = match now.reason.as_str() {
            "PodFailed" => EventType::Warning,
            _ => EventType::Normal,
        };
        turns.push((kind, now.reason.as_str(), now.message.as_str()));
    }
    let expired =
        |all: &'a [Condition]| condition::find(all, READY).filter(|c| c.reason == "SandboxExpired");
    let was = condition::find(old, READY).is_some_and(|c| c.reason == "SandboxExpired");
    if let Some(now) = expired(new).filter(|_| !was) {
        turns.push((EventType::Normal, now.reason.as_str(), now.message.as_str()));
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::{Is, condition};

    #[test]
    fn each_turn_is_recorded_once() {
        let of = |kind: &str, is, reason: &str| vec![condition(kind, is, reason, "why", Some(1))];
        let ready = of(READY, Is::True, "DependenciesReady");
        let unready = of(READY, Is::False, "DependenciesNotReady");
        let over = of(READY, Is::False, "SandboxExpired");
        let failed = of(FINISHED, Is::True, "PodFailed");
        let succeeded = of(FINISHED, Is::True, "PodSucceeded");
        let suspended = of(SUSPENDED, Is::True, "PodTerminated");
        let none = Vec::new();
        for (old, new, expected) in [
            (&none, &ready, "Normal SandboxReady"),
            (&ready, &ready, ""),
            (&ready, &unready, ""),
            (&unready, &over, "Normal SandboxExpired"),
            (&over, &over, ""),
            (&none, &failed, "Warning PodFailed"),
            (&none, &succeeded, "Normal PodSucceeded"),
            (&succeeded, &succeeded, ""),
            (&none, &suspended, "Normal SandboxSuspended"),
        ] {
            let recorded = turns(old, new);
            let recorded: Vec<String> = recorded
                .iter()
                .map(|(kind, reason, _)| format!("{kind:?} {reason}"))
                .collect();
            assert_eq!(recorded.join(", "), expected, "{old:?} {new:?}");
        }
    }
}
