// SPDX-License-Identifier: Apache-2.0

//! Tools of every reconcile: the way to the apiserver, the caches, and the queue. Kinds use them, and
//! none of them knows a kind.

use kube::Client;

use crate::{
    cache::Key,
    event::Events,
    metrics::Metrics,
    observed::Observed,
    options::Options,
    queue::{Limits, Queue, Work, WorkKind},
    store::Store,
};

/// See the module.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) options: Options,
    /// Whether the cluster has Pod snapshots, and they are ours to make.
    pub(crate) snapshots: bool,
    pub(crate) metrics: Metrics,
    pub(crate) queue: Queue,
    pub(crate) events: Events,
    pub(crate) store: Store,
    pub(crate) observed: Observed,
}

impl Context {
    pub(crate) fn new(
        client: Client,
        options: Options,
        snapshots: bool,
        limits: Limits,
        metrics: Metrics,
    ) -> Self {
        Self {
            events: Events::new(client.clone()),
            client,
            options,
            snapshots,
            metrics,
            queue: Queue::new(limits),
            store: Store::new(),
            observed: Observed::new(),
        }
    }

    /// Has an object looked at soon.
    pub(crate) fn add(&self, kind: WorkKind, key: Key) {
        self.queue.add(Work::new(kind, key));
    }
}
