// SPDX-License-Identifier: Apache-2.0

//! State of claims between two looks at them.

use std::{collections::HashMap, sync::Mutex};

use crate::cache::Key;

/// See the module.
#[derive(Default)]
pub(crate) struct State {
    /// Sandboxes whose adoption or creation for a claim, by uid, got no answer: it may have come to
    /// pass.
    pub(super) unanswered: Mutex<HashMap<String, Key>>,
}
