// SPDX-License-Identifier: Apache-2.0

//! Facts that this process has observed by its own clock, or has checked itself, and that no object
//! says. Several kinds read them.

mod claim_rate;
mod heartbeat;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Mutex,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use kiln_crds::Sandbox;
use kube::{Resource, ResourceExt};

use crate::{cache::Key, lock::lock};
use claim_rate::ClaimRate;
use heartbeat::Heartbeats;

/// See the module.
pub(crate) struct Observed {
    /// When this process started.
    started: Instant,
    /// When a claim, or a Sandbox that is not ready yet, was seen first, by uid.
    seen: Mutex<HashMap<String, Instant>>,
    /// Generations of the Sandboxes that were found to be what their pool made, by uid.
    genuine: Mutex<HashMap<String, Option<i64>>>,
    claim_rate: Mutex<ClaimRate>,
    heartbeats: Mutex<Heartbeats>,
}

impl Observed {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            seen: Mutex::default(),
            genuine: Mutex::default(),
            claim_rate: Mutex::default(),
            heartbeats: Mutex::default(),
        }
    }

    /// Returns when an object was seen first.
    pub(crate) fn first_seen<K: ResourceExt>(&self, object: &K) -> Instant {
        let mut seen = lock(&self.seen);
        *seen
            .entry(object.uid().unwrap_or_default())
            .or_insert_with(Instant::now)
    }

    /// Forgets when an object was seen first, and returns it.
    pub(crate) fn forget<K: ResourceExt>(&self, object: &K) -> Option<Instant> {
        lock(&self.seen).remove(&object.uid().unwrap_or_default())
    }

    /// Notes that a Sandbox is what its pool made, as long as its spec stays what it is.
    pub(crate) fn note_genuine(&self, sandbox: &Sandbox) {
        if let Some(uid) = sandbox.uid() {
            lock(&self.genuine).insert(uid, sandbox.meta().generation);
        }
    }

    /// Whether a Sandbox is known to be what its pool made.
    pub(crate) fn is_genuine(&self, sandbox: &Sandbox) -> bool {
        let uid = sandbox.uid();
        let known = uid.and_then(|uid| lock(&self.genuine).get(&uid).copied());
        known == Some(sandbox.meta().generation)
    }

    /// Forgets all about a Sandbox.
    pub(crate) fn forget_sandbox(&self, sandbox: &Sandbox) {
        self.forget(sandbox);
        lock(&self.genuine).remove(&sandbox.uid().unwrap_or_default());
    }

    /// Notes a claim on a template.
    pub(crate) fn note_claim(&self, template: Key) {
        lock(&self.claim_rate).note(template, self.started.elapsed());
    }

    /// Returns the most claims of a burst, by template.
    pub(crate) fn bursts(&self) -> BTreeMap<Key, usize> {
        lock(&self.claim_rate).bursts(self.started.elapsed())
    }

    /// Notes the heartbeat of a node.
    pub(crate) fn note_heartbeat(&self, node: &str, beat: Timestamp) {
        lock(&self.heartbeats).note(node, beat, Instant::now(), Timestamp::now());
    }

    /// Forgets the heartbeat of a node.
    pub(crate) fn forget_heartbeat(&self, node: &str) {
        lock(&self.heartbeats).forget(node);
    }

    /// Whether the last heartbeat of a node came within `timeout`.
    pub(crate) fn is_alive(&self, node: &str, timeout: Duration) -> bool {
        lock(&self.heartbeats).is_alive(node, Instant::now(), timeout)
    }
}
