// SPDX-License-Identifier: Apache-2.0

//! What the controller knows of the cluster: objects by name, and by what they belong to.
//!
//! A cache is fed by a watch, and by the controller's own writes as soon as the apiserver has
//! answered them. So a decision never builds on a state that the controller itself has changed
//! since, which is what makes it count Sandboxes twice or hand one out twice.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use kube::ResourceExt;

use crate::known::Known;

/// Deleted objects that are remembered, so that a late answer does not bring one back.
const REMEMBERED: usize = 4096;

/// Namespace and name of an object.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }

    pub(crate) fn of<K: ResourceExt>(object: &K) -> Self {
        Self {
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Key of an index. Each is of one namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum IndexKey {
    /// Objects that the owner with this uid controls. Owners and what they own are in one namespace:
    /// a uid alone could be claimed by whoever has read it.
    Owner { namespace: String, uid: String },
    /// Sandboxes that have this hash in [`kiln_crds::keys::WARM_POOL`] and that nobody owns, and the pools with
    /// this hash.
    Member { namespace: String, hash: String },
    /// Sandboxes that were this claim's and that nobody owns.
    Claim(Key),
    /// Pools and claims of this template.
    Template(Key),
    /// Claims of this pool.
    Pool(Key),
}

/// Objects of one kind.
pub(crate) struct Cache<K> {
    inner: RwLock<Inner<K>>,
    /// Gives the keys under which an object can be found, apart from its name.
    index: fn(&K) -> Vec<IndexKey>,
}

struct Inner<K> {
    objects: HashMap<Key, Arc<Known<K>>>,
    found_by: HashMap<IndexKey, BTreeSet<Key>>,
    /// While a list is under way: what it has brought, and what was written meanwhile.
    listed: Option<HashSet<Key>>,
    /// What was deleted, by uid, with the resource version of that.
    gone: HashMap<String, u64>,
    gone_order: VecDeque<String>,
}

impl<K: ResourceExt> Cache<K> {
    pub(crate) fn new(index: fn(&K) -> Vec<IndexKey>) -> Self {
        Self {
            inner: RwLock::new(Inner {
                objects: HashMap::new(),
                found_by: HashMap::new(),
                listed: None,
                gone: HashMap::new(),
                gone_order: VecDeque::new(),
            }),
            index,
        }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Known<K>>> {
        self.read().objects.get(key).cloned()
    }

    /// The objects that the index has under `key`, by name.
    pub(crate) fn find(&self, key: &IndexKey) -> Vec<Arc<Known<K>>> {
        let inner = self.read();
        let keys = inner.found_by.get(key).into_iter().flatten();
        keys.filter_map(|key| inner.objects.get(key).cloned())
            .collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.read().objects.is_empty()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Known<K>>> {
        self.read().objects.values().cloned().collect()
    }

    /// Takes in what a watch or a write has brought, unless something newer is there. Returns
    /// what was there before.
    pub(crate) fn put(&self, object: Known<K>) -> Option<Arc<Known<K>>> {
        let key = Key::of(&object);
        let mut inner = self.write();
        if let Some(listed) = &mut inner.listed {
            listed.insert(key.clone());
        }
        let old = inner.objects.get(&key).cloned();
        let last = object.uid().and_then(|uid| inner.gone.get(&uid).copied());
        if last.is_some_and(|last| version(object.outline()).is_none_or(|version| version <= last))
        {
            return old;
        }
        if old
            .as_deref()
            .is_some_and(|old| is_newer(old.outline(), object.outline()))
        {
            return old;
        }
        if let Some(old) = &old {
            inner.forget(&key, (self.index)(old));
        }
        for index_key in (self.index)(&object) {
            inner
                .found_by
                .entry(index_key)
                .or_default()
                .insert(key.clone());
        }
        inner.objects.insert(key, Arc::new(object));
        old
    }

    /// Takes out what was deleted, or what a watch no longer shows: that may come back, when it has
    /// its label again.
    pub(crate) fn remove(&self, object: &K) {
        let key = Key::of(object);
        let mut inner = self.write();
        if let Some(uid) = object.uid() {
            // What has no number never comes back.
            inner.remember_gone(uid, version(object).unwrap_or(u64::MAX));
        }
        let same = inner
            .objects
            .get(&key)
            .is_some_and(|o| o.uid() == object.uid());
        if same {
            inner.take(&key, self.index);
        }
    }

    /// Takes out what cannot be read any more, whatever it is now.
    pub(crate) fn drop_unread(&self, key: &Key) -> Option<Arc<Known<K>>> {
        self.write().take(key, self.index)
    }

    /// A list begins: what it does not bring is gone.
    pub(crate) fn begin_list(&self) {
        self.write().listed = Some(HashSet::new());
    }

    /// A list is complete. Returns what has gone since the one before.
    pub(crate) fn end_list(&self) -> Vec<Arc<Known<K>>> {
        let mut inner = self.write();
        let Some(listed) = inner.listed.take() else {
            return Vec::new();
        };
        let missing: Vec<Key> = inner
            .objects
            .keys()
            .filter(|key| !listed.contains(*key))
            .cloned()
            .collect();
        missing
            .iter()
            .filter_map(|key| inner.take(key, self.index))
            .collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner<K>> {
        // Nothing panics with the lock held.
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner<K>> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K> Inner<K> {
    fn take(&mut self, key: &Key, index: fn(&K) -> Vec<IndexKey>) -> Option<Arc<Known<K>>> {
        let object = self.objects.remove(key)?;
        self.forget(key, index(&object));
        Some(object)
    }

    fn forget(&mut self, key: &Key, index_keys: Vec<IndexKey>) {
        for index_key in index_keys {
            if let Some(keys) = self.found_by.get_mut(&index_key) {
                keys.remove(key);
                if keys.is_empty() {
                    self.found_by.remove(&index_key);
                }
            }
        }
    }

    fn remember_gone(&mut self, uid: String, version: u64) {
        if let Some(last) = self.gone.get_mut(&uid) {
            *last = version.max(*last);
            return;
        }
        self.gone.insert(uid.clone(), version);
        self.gone_order.push_back(uid);
        if self.gone_order.len() > REMEMBERED
            && let Some(oldest) = self.gone_order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }
}

/// Whether `known` is a later state of the same object than `other`.
fn is_newer<K: ResourceExt>(known: &K, other: &K) -> bool {
    known.uid() == other.uid() && version(known) > version(other)
}

/// Resource versions of one kind are numbers that grow (Kubernetes API concepts, "Resource
/// versions", since 1.35).
fn version<K: ResourceExt>(object: &K) -> Option<u64> {
    object.resource_version()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use kiln_crds::keys;
    use serde_json::json;

    use super::*;

    fn known(name: &str, uid: &str, version: u32, app: &str) -> Known<Pod> {
        Known::of(pod(name, uid, version, app))
    }

    fn pod(name: &str, uid: &str, version: u32, app: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {
            "name": name, "namespace": "ns", "uid": uid,
            "resourceVersion": version.to_string(), "labels": {keys::WARM_POOL: app},
        }}))
        .unwrap()
    }

    fn cache() -> Cache<Pod> {
        Cache::new(|pod| {
            let app = pod.labels().get(keys::WARM_POOL);
            app.map(|app| of(app)).into_iter().collect()
        })
    }

    fn of(app: &str) -> IndexKey {
        IndexKey::Pool(Key::new("ns", app))
    }

    #[test]
    fn what_is_older_than_what_is_known_is_left_out() {
        let cache = cache();
        cache.put(known("a", "1", 10, "new"));
        cache.put(known("a", "1", 9, "old"));
        assert_eq!(cache.find(&of("new")).len(), 1);
        assert!(cache.find(&of("old")).is_empty());
        // Another object of the same name is not an older state.
        cache.put(known("a", "2", 3, "other"));
        assert!(cache.find(&of("new")).is_empty());
        assert_eq!(cache.find(&of("other")).len(), 1);
    }

    #[test]
    fn what_was_deleted_does_not_come_back() {
        let cache = cache();
        cache.put(known("a", "1", 10, "x"));
        cache.remove(&pod("a", "1", 11, "x"));
        cache.put(known("a", "1", 10, "x"));
        assert!(cache.get(&Key::new("ns", "a")).is_none());
        assert!(cache.find(&of("x")).is_empty());
        // A late deletion of an object does not take the next of its name away.
        cache.put(known("a", "2", 12, "x"));
        cache.remove(&pod("a", "1", 11, "x"));
        assert_eq!(cache.find(&of("x")).len(), 1);
    }

    #[test]
    fn what_a_watch_no_longer_showed_comes_back_with_a_later_state() {
        let cache = cache();
        cache.put(known("a", "1", 10, "x"));
        cache.remove(&pod("a", "1", 11, "x"));
        // Found out once more, by an older state.
        cache.remove(&pod("a", "1", 10, "x"));
        cache.put(known("a", "1", 11, "x"));
        assert!(cache.find(&of("x")).is_empty());
        cache.put(known("a", "1", 12, "x"));
        assert_eq!(cache.find(&of("x")).len(), 1);
    }

    #[test]
    fn a_list_takes_away_what_it_does_not_bring_but_not_what_was_written_meanwhile() {
        let cache = cache();
        cache.put(known("stays", "1", 1, "x"));
        cache.put(known("goes", "2", 2, "x"));
        cache.begin_list();
        cache.put(known("stays", "1", 1, "x"));
        cache.put(known("written", "3", 9, "x"));
        let gone = cache.end_list();
        assert_eq!(gone[0].name_any(), "goes");
        assert_eq!(gone.len(), 1);
        assert_eq!(cache.find(&of("x")).len(), 2);
    }
}
