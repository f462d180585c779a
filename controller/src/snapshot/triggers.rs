// SPDX-License-Identifier: Apache-2.0

//! Work that a change of a snapshot or a trigger makes.

use kiln_crds::{PodSnapshot, PodSnapshotManualTrigger, PodSnapshotPolicy};
use kube::ResourceExt as _;

use crate::{
    cache::{IndexKey, Key},
    context::Context,
    queue::WorkKind,
    watch::Change,
};

/// Has a snapshot looked at, its Sandbox, and the trigger that asked for it.
pub(crate) fn changed(context: &Context, change: &Change<'_, PodSnapshot>) {
    let snapshot = change.object();
    let namespace = snapshot.namespace().unwrap_or_default();
    context.add(WorkKind::Snapshot, Key::of(snapshot));
    let sandbox = Key::new(&namespace, &snapshot.spec.sandbox.name);
    context.add(WorkKind::Sandbox, sandbox);
    let trigger = IndexKey::Owner {
        namespace,
        uid: snapshot.name_any(),
    };
    for trigger in context.store.triggers.find(&trigger) {
        context.add(WorkKind::Trigger, Key::of(&*trigger));
    }
}

/// Has the snapshots looked at that a policy is for.
pub(crate) fn policy_changed(context: &Context, change: &Change<'_, PodSnapshotPolicy>) {
    let policy = change.object();
    for snapshot in context.store.snapshots.all() {
        let name = snapshot.spec.policy_name.as_deref();
        if snapshot.namespace() == policy.namespace() && name == Some(&policy.name_any()) {
            context.add(WorkKind::Snapshot, Key::of(&*snapshot));
        }
    }
}

/// Has a trigger looked at.
pub(crate) fn trigger_changed(context: &Context, change: &Change<'_, PodSnapshotManualTrigger>) {
    if !change.is_gone() {
        context.add(WorkKind::Trigger, Key::of(change.object()));
    }
}
