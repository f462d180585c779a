// SPDX-License-Identifier: Apache-2.0

//! Work that a change of a claim makes.

use kiln_crds::SandboxClaim;

use super::State;
use crate::{cache::Key, context::Context, queue::WorkKind, watch::Change};

/// Has a claim looked at, unless it is gone or as the controller has written it.
pub(crate) fn changed(context: &Context, state: &State, change: &Change<'_, SandboxClaim>) {
    if let Change::Gone(claim) = change {
        context.observed.forget(*claim);
        state.forget(claim);
    } else if !change.is_known() {
        // Only the worker of a claim writes it, and it knows its own writes.
        context.add(WorkKind::Claim, Key::of(change.object()));
    }
}
