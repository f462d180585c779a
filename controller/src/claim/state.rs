// SPDX-License-Identifier: Apache-2.0

//! State of claims between two reconciles.

use std::{collections::HashMap, sync::Mutex};

use kiln_crds::SandboxClaim;
use kube::ResourceExt;

use crate::{blocked::Reported, cache::Key, lock::lock};

/// See the module.
#[derive(Default)]
pub(crate) struct State {
    /// Sandboxes whose adoption or creation for a claim, by uid, got no answer: it may have come to
    /// pass.
    pub(super) unanswered: Mutex<HashMap<String, Key>>,
    pub(super) reported: Reported,
}

impl State {
    /// Forgets all about a claim.
    pub(super) fn forget(&self, claim: &SandboxClaim) {
        lock(&self.unanswered).remove(&claim.uid().unwrap_or_default());
        self.reported.forget(claim);
    }
}
