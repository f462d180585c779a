// SPDX-License-Identifier: Apache-2.0

//! Work that one kind makes for another.

use std::time::Duration;

use crate::{
    cache::{IndexKey, Key},
    condition::{self, READY},
    context::Context,
    queue::{Work, WorkKind},
};

/// How long changes of a pool's Sandboxes are gathered before the pool is looked at.
const GATHER: Duration = Duration::from_millis(20);
/// Least time between two writes of what nodes should hold.
const PAUSE: Duration = Duration::from_secs(1);

/// Has a pool looked at soon.
pub(crate) fn pool(context: &Context, key: Key) {
    context
        .queue
        .add_after(Work::new(WorkKind::Pool, key), GATHER);
}

/// Has all nodes looked at soon.
pub(crate) fn nodes(context: &Context) {
    if !context.store.nodes.is_empty() {
        let work = Work::new(WorkKind::Node, Key::new("", ""));
        context.queue.add_after(work, PAUSE);
    }
}

/// Has the claims looked at that may have waited for what is there now.
pub(crate) fn claims(context: &Context, waiting_for: &IndexKey) {
    for claim in context.store.claims.find(waiting_for) {
        let conditions = claim.status.as_ref().map(|s| s.conditions.as_slice());
        if !conditions.is_some_and(|all| condition::is_true(all, READY)) {
            context.add(WorkKind::Claim, Key::of(&*claim));
        }
    }
}
