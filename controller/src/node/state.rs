// SPDX-License-Identifier: Apache-2.0

//! State of nodes between two looks at them.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Mutex,
};

use kiln_crds::NodeClassSpec;

/// See the module.
#[derive(Default)]
pub(crate) struct State {
    /// Sandboxes that a node was asked for last.
    pub(super) asked: Mutex<HashMap<String, Vec<NodeClassSpec>>>,
    /// Nodes that reported when they were looked at last.
    pub(super) live: Mutex<BTreeSet<String>>,
}
