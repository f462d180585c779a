// SPDX-License-Identifier: Apache-2.0

//! State of pools between two reconciles.

use std::{collections::HashMap, sync::Mutex, time::Instant};

use crate::{cache::Key, lock::lock};

/// See the module.
#[derive(Default)]
pub(crate) struct State {
    /// How often Sandboxes of a pool were replaced, because they were not ready in time, since it was
    /// full.
    pub(super) late_rounds: Mutex<HashMap<Key, u32>>,
    /// Since when the status of a pool should be written.
    pub(super) pending_statuses: Mutex<HashMap<Key, Instant>>,
}

impl State {
    /// Forgets all about a pool.
    pub(super) fn forget(&self, pool: &Key) {
        lock(&self.late_rounds).remove(pool);
        lock(&self.pending_statuses).remove(pool);
    }
}
