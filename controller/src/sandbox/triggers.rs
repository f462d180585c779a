// SPDX-License-Identifier: Apache-2.0

//! Work that a change of a Sandbox, or of what it owns, makes.

use k8s_openapi::api::core::v1::Pod;
use kiln_crds::{Sandbox, SandboxClaim, SandboxWarmPool};
use kube::ResourceExt;

use super::State;
use crate::{
    cache::{IndexKey, Key},
    context::Context,
    enqueue,
    marks::ownerless_claim,
    owner,
    queue::WorkKind,
    watch::Change,
};

/// Has a Sandbox looked at, and who owns it, owned it, or may own it.
pub(crate) fn changed(context: &Context, state: &State, change: &Change<'_, Sandbox>) {
    let sandbox = change.object();
    if change.is_gone() {
        context.observed.forget_sandbox(sandbox);
        state.reported.forget(sandbox);
    }
    context.add(WorkKind::Sandbox, Key::of(sandbox));
    if let Some(pools) = IndexKey::pools_of(sandbox) {
        for pool in context.store.pools.find(&pools) {
            enqueue::pool(context, Key::of(&*pool));
        }
    }
    if let Some(claim) = ownerless_claim(sandbox) {
        let key = Key::new(&sandbox.namespace().unwrap_or_default(), claim);
        context.add(WorkKind::Claim, key);
    }
    for sandbox in [Some(sandbox), change.old()].into_iter().flatten() {
        let Some(owner) = owner::controller(sandbox) else {
            continue;
        };
        let key = Key::new(&sandbox.namespace().unwrap_or_default(), &owner.name);
        if owner::is_kind::<SandboxClaim>(owner) {
            context.add(WorkKind::Claim, key);
        } else if owner::is_kind::<SandboxWarmPool>(owner) {
            enqueue::pool(context, key);
        }
    }
}

/// Has the Sandbox of a Pod looked at.
pub(crate) fn pod_changed(context: &Context, change: &Change<'_, Pod>) {
    // One that nobody owns may be in the way of the Sandbox of its name.
    let pod = change.object();
    if owner::controller(pod).is_none() {
        context.add(WorkKind::Sandbox, Key::of(pod));
    }
    child_changed(context, change);
}

/// Has the Sandbox looked at that owns an object.
pub(crate) fn child_changed<K: ResourceExt>(context: &Context, change: &Change<'_, K>) {
    let child = change.object();
    if let Some(owner) = owner::controller(child)
        && owner::is_kind::<Sandbox>(owner)
    {
        let key = Key::new(&child.namespace().unwrap_or_default(), &owner.name);
        context.add(WorkKind::Sandbox, key);
    }
}
