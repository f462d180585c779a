// SPDX-License-Identifier: Apache-2.0

//! Events about Sandboxes. What goes wrong is told always, what goes as it should where that is
//! wanted. Reasons are upstream's.

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Condition};
use kiln_crds::{Sandbox, SandboxStatus, SandboxWarmPool, keys};
use kube::{ResourceExt, runtime::events::EventType};

use crate::{
    condition::{self, FINISHED, READY, SUSPENDED},
    context::Context,
    error::Error,
    marks::ownerless_claim,
    obstacle::Obstacle,
    owner,
};

/// Reason of a Pod that the apiserver refuses.
const POD_NOT_MADE: &str = "SandboxPodCreateFailed";

/// Tells what stands in the way, with the change of the condition and not with each try. Of what a
/// pool waits for, the pool tells.
pub(super) fn tell_what_is_wrong(
    context: &Context,
    sandbox: &Sandbox,
    new: &SandboxStatus,
    errors: &[Error],
) {
    let is_pools = owner::controller(sandbox).is_some_and(owner::is_kind::<SandboxWarmPool>);
    let old = sandbox.status.as_ref();
    let Some(now) = Obstacle::of(&new.conditions) else {
        return;
    };
    let is_news = match old.and_then(|s| Obstacle::of(&s.conditions)) {
        // The others' words change with each try of somebody else.
        Some(old) if now.is_refusal() => old.message != now.message,
        Some(old) => old.reason != now.reason,
        None => true,
    };
    if is_news && (now.is_refusal() || !is_pools) {
        let is_pod = errors.iter().any(|e| matches!(e, Error::PodNotMade(_)));
        let reason = match now.is_refusal() && is_pod {
            true => POD_NOT_MADE,
            false => now.reason,
        };
        let message = now.message.to_owned();
        context
            .events
            .record(sandbox, EventType::Warning, reason, message);
    }
}

/// Tells of a Sandbox that was a claim's and that nobody owns, when it gets its first status: it runs
/// on, and nothing ends it.
pub(super) fn tell_ownerless(context: &Context, sandbox: &Sandbox) {
    let (Some(claim), None) = (ownerless_claim(sandbox), &sandbox.status) else {
        return;
    };
    let note = format!(
        "Sandbox was SandboxClaim \"{claim}\"'s and is owned by nobody, as after a restore from a \
         backup. It runs on: give it to a claim by its owner reference and the label \"{}\", or \
         delete it",
        keys::CLAIM_UID
    );
    context
        .events
        .record(sandbox, EventType::Warning, "SandboxOwnerless", note);
}

/// Tells that a Sandbox has a new Pod.
pub(super) fn tell_of_pod(context: &Context, sandbox: &Sandbox, pod: &Pod) {
    if context.options.sandbox_events {
        let note = format!("Created Pod \"{}\"", pod.name_any());
        context
            .events
            .record(sandbox, EventType::Normal, "SandboxPodCreated", note);
    }
}

/// Tells what has become of a Sandbox, once its status says so.
pub(super) fn tell_what_is_new(context: &Context, sandbox: &Sandbox, new: &SandboxStatus) {
    if !context.options.sandbox_events {
        return;
    }
    let old = sandbox.status.as_ref();
    let old = old.map_or(&[][..], |s| s.conditions.as_slice());
    for (kind, reason, note) in turns(old, &new.conditions) {
        context
            .events
            .record(sandbox, kind, reason, note.to_owned());
    }
}

/// What conditions say that they did not say before: kind, reason and words of the events.
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
    fn each_turn_is_told_once() {
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
            let told = turns(old, new);
            let told: Vec<String> = told
                .iter()
                .map(|(kind, reason, _)| format!("{kind:?} {reason}"))
                .collect();
            assert_eq!(told.join(", "), expected, "{old:?} {new:?}");
        }
    }
}
