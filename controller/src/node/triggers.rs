// SPDX-License-Identifier: Apache-2.0

//! Work that a change of a node makes.

use std::time::Duration;

use kiln_crds::SandboxNode;
use kube::ResourceExt;

use crate::{
    cache::Key,
    context::Context,
    enqueue,
    queue::{Work, WorkKind},
    shape::Shape,
    watch::Change,
};

/// How long changes of what nodes hold are gathered before the pools that they are for are looked
/// at: nodes report all the time.
const GATHER: Duration = Duration::from_secs(5);

/// Has all nodes looked at, and the pools if what the node holds has changed.
pub(crate) fn changed(context: &Context, change: &Change<'_, SandboxNode>) {
    note_heartbeat(context, change);
    enqueue::nodes(context);
    let holds = |node: &SandboxNode| node.status.as_ref().map(|s| s.classes.clone());
    if change.is_gone() || change.old().and_then(holds) != holds(change.object()) {
        enqueue_pools(context);
    }
}

/// Notes a heartbeat, or that a node is gone.
fn note_heartbeat(context: &Context, change: &Change<'_, SandboxNode>) {
    let node = change.object();
    let name = node.name_any();
    if change.is_gone() {
        context.observed.forget_heartbeat(&name);
    } else if let Some(beat) = node.status.as_ref().and_then(|s| s.heartbeat.as_ref()) {
        context.observed.note_heartbeat(&name, beat.0);
    }
}

/// Has the pools looked at that nodes can hold something for.
pub(super) fn enqueue_pools(context: &Context) {
    for pool in context.store.pools.all() {
        let key = Key::of(&*pool);
        let template = Key::new(&key.namespace, &pool.spec.sandbox_template_ref.name);
        let template = context.store.templates.get(&template);
        if template.is_some_and(|t| Shape::of(&t.spec.pod_template.spec).is_some()) {
            context
                .queue
                .add_after(Work::new(WorkKind::Pool, key), GATHER);
        }
    }
}
