// SPDX-License-Identifier: Apache-2.0

//! State of nodes between two reconciles.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Mutex,
};

use crate::shape::WantedShape;

/// See the module.
#[derive(Default)]
pub(crate) struct State {
    /// Sandboxes that a node was asked for last.
    pub(super) asked: Mutex<HashMap<String, Vec<WantedShape>>>,
    /// Nodes that reported when they were looked at last.
    pub(super) live: Mutex<BTreeSet<String>>,
}
