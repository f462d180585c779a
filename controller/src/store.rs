// SPDX-License-Identifier: Apache-2.0

//! Caches of all kinds, and the Sandboxes in them that are reserved.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use k8s_openapi::api::{
    core::v1::{PersistentVolumeClaim, Pod, Service},
    networking::v1::NetworkPolicy,
};
use kiln_crds::{
    PodSnapshot, PodSnapshotManualTrigger, PodSnapshotPolicy, PodSnapshotStorageConfig, Sandbox,
    SandboxClaim, SandboxNode, SandboxTemplate, SandboxWarmPool,
};
use kube::ResourceExt;

use crate::{
    cache::{Cache, IndexKey},
    index,
    known::{Kind, Known},
    lock::lock,
};

/// Kind of object that has a cache.
pub(crate) trait Stored: Kind {
    /// The cache of this kind.
    fn cache(store: &Store) -> &Cache<Self>;
}

/// Defines the [`Store`] with a cache for each kind, and the function that gives the index keys of
/// an object.
macro_rules! store {
    ($($cache:ident: $kind:ty = $index:expr;)*) => {
        /// See the module.
        pub(crate) struct Store {
            $(pub(crate) $cache: Cache<$kind>,)*
            /// Sandboxes, by uid, that are about to be given to a claim or deleted.
            reserved: Mutex<HashSet<String>>,
        }

        impl Store {
            pub(crate) fn new() -> Self {
                Self {
                    $($cache: Cache::new($index),)*
                    reserved: Mutex::default(),
                }
            }
        }

        $(impl Stored for $kind {
            fn cache(store: &Store) -> &Cache<Self> {
                &store.$cache
            }
        })*
    };
}

store! {
    sandboxes: Sandbox = index::of_sandbox;
    claims: SandboxClaim = index::of_claim;
    pools: SandboxWarmPool = index::of_pool;
    templates: SandboxTemplate = |_| Vec::new();
    pods: Pod = index::of_owned;
    services: Service = |_| Vec::new();
    volume_claims: PersistentVolumeClaim = |_| Vec::new();
    policies: NetworkPolicy = |_| Vec::new();
    nodes: SandboxNode = |_| Vec::new();
    snapshots: PodSnapshot = index::of_owned;
    triggers: PodSnapshotManualTrigger = index::of_itself;
    snapshot_policies: PodSnapshotPolicy = |_| Vec::new();
    snapshot_storage: PodSnapshotStorageConfig = |_| Vec::new();
}

impl Store {
    /// Finds what `owner` controls in its own namespace.
    pub(crate) fn owned<K: Stored>(&self, owner: &impl ResourceExt) -> Vec<Arc<Known<K>>> {
        K::cache(self).find(&IndexKey::owned_by(owner))
    }

    /// Reserves a Sandbox until the result is dropped; `None` if it is reserved already.
    pub(crate) fn reserve(&self, sandbox: &Sandbox) -> Option<Reservation<'_>> {
        let uid = sandbox.uid()?;
        let is_new = lock(&self.reserved).insert(uid.clone());
        is_new.then_some(Reservation { store: self, uid })
    }

    pub(crate) fn is_reserved(&self, sandbox: &Sandbox) -> bool {
        let uid = sandbox.uid();
        uid.is_some_and(|uid| lock(&self.reserved).contains(&uid))
    }
}

/// Reservation of a Sandbox.
pub(crate) struct Reservation<'a> {
    store: &'a Store,
    uid: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        lock(&self.store.reserved).remove(&self.uid);
    }
}
