// SPDX-License-Identifier: Apache-2.0

//! Watches: they fill the caches, and hand on each change.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use kube::{
    Api, ResourceExt,
    core::error_boundary::InvalidObject,
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use tokio::sync::{Notify, Semaphore};
use tracing::{info, warn};

use crate::{
    cache::{Cache, Key},
    context::Context,
    error,
    known::{Known, Watched},
    store::Stored,
};

/// Seconds after which a watch begins anew where it was. Of a kind of which nothing ever changes an
/// apiserver sends nothing, not even bookmarks: only its end tells such a watch from one whose
/// apiserver has gone without a word, and until then nothing new is seen.
const LENGTH: u32 = 60;

/// Longest pause of a watch that fails: for so long the controller may be blind after the
/// apiserver has come back. It has few watches, so that an apiserver in trouble is no worse off.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Objects that a list brings at once. Each may have 1.5 MiB, which is there twice until it is decoded.
const PAGE: u32 = 20;

/// How long a watch pauses after each of its failures.
#[derive(Default)]
struct Pauses(watcher::DefaultBackoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(LONGEST_PAUSE))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// How many watches have brought their first list.
#[derive(Default)]
pub(crate) struct Synced {
    started: AtomicUsize,
    done: AtomicUsize,
    changed: Notify,
}

impl Synced {
    pub(crate) fn is_complete(&self) -> bool {
        let started = self.started.load(Ordering::Relaxed);
        started > 0 && self.done.load(Ordering::Relaxed) >= started
    }

    /// Waits until all caches are filled. For one caller.
    pub(crate) async fn complete(&self) {
        while !self.is_complete() {
            self.changed.notified().await;
        }
    }

    fn one_more(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_one();
    }
}

/// Change of an object, as a watch brings it.
pub(crate) enum Change<'a, K> {
    /// The object is there; it may have been known before.
    Seen { new: &'a K, old: Option<&'a K> },
    /// The object is gone, or cannot be read any more. This is its last known state.
    Gone(&'a K),
}

impl<'a, K: ResourceExt> Change<'a, K> {
    /// The latest known state.
    pub(crate) fn object(&self) -> &'a K {
        match self {
            Self::Seen { new, .. } | Self::Gone(new) => new,
        }
    }

    /// The state before, of an object that is still there.
    pub(crate) fn old(&self) -> Option<&'a K> {
        match self {
            Self::Seen { old, .. } => *old,
            Self::Gone(_) => None,
        }
    }

    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Gone(_))
    }

    /// Whether the controller has written the object as it is now, or has seen it so before.
    pub(crate) fn is_known(&self) -> bool {
        self.old().is_some_and(|old| {
            let new = self.object();
            old.resource_version() == new.resource_version()
                && new.meta().deletion_timestamp.is_none()
        })
    }
}

/// Watches that fill caches.
pub(crate) struct Watches {
    context: Arc<Context>,
    synced: Arc<Synced>,
    /// Held by the one watch that lists: a list brings many objects at once.
    listing: Arc<Semaphore>,
}

impl Watches {
    pub(crate) fn new(context: Arc<Context>, synced: Arc<Synced>) -> Self {
        Self {
            context,
            synced,
            listing: Arc::new(Semaphore::new(1)),
        }
    }

    /// Watches the objects of a kind that have the `label`, or all. `trigger` puts into the queue of
    /// the `controller` what a change concerns.
    pub(crate) fn start<K: Stored, C: Send + Sync + 'static>(
        &self,
        label: Option<&str>,
        controller: &Arc<C>,
        trigger: fn(&C, &Change<'_, K>),
    ) {
        let mut config = watcher::Config::default().timeout(LENGTH).page_size(PAGE);
        if let Some(label) = label {
            config = config.labels(label);
        }
        self.synced.started.fetch_add(1, Ordering::Relaxed);
        let controller = Arc::clone(controller);
        let watch = Watch {
            context: Arc::clone(&self.context),
            synced: Arc::clone(&self.synced),
            listing: Arc::clone(&self.listing),
            trigger: move |change: &Change<'_, K>| trigger(&controller, change),
        };
        tokio::spawn(watch.follow::<K>(config));
    }
}

/// Watch of one kind.
struct Watch<T> {
    context: Arc<Context>,
    synced: Arc<Synced>,
    listing: Arc<Semaphore>,
    trigger: T,
}

impl<T> Watch<T> {
    /// Follows the watch for ever; the watcher itself begins anew after errors, with pauses.
    async fn follow<K: Stored>(self, config: watcher::Config)
    where
        T: Fn(&Change<'_, K>) + Send + Sync,
    {
        let cache = K::cache(&self.context.store);
        let api: Api<Watched<K>> = Api::all(self.context.client.clone());
        let mut events = pin!(watcher(api, config).backoff(Pauses::default()));
        let mut is_first = true;
        let mut listing = None;
        while let Some(event) = events.next().await {
            if matches!(event, Ok(watcher::Event::InitDone) | Err(_)) {
                listing = None;
            }
            match event {
                Ok(watcher::Event::Init) => {
                    cache.begin_list();
                    if listing.is_none() {
                        // The list begins when the next event is waited for.
                        listing = self.listing.acquire().await.ok();
                    }
                }
                Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                    match object.0 {
                        Ok(object) => self.keep(cache, object),
                        Err(invalid) => self.leave_out(cache, &invalid),
                    }
                }
                Ok(watcher::Event::InitDone) => {
                    for gone in cache.end_list() {
                        (self.trigger)(&Change::Gone(gone.outline()));
                    }
                    if std::mem::take(&mut is_first) {
                        self.synced.one_more();
                    }
                }
                Ok(watcher::Event::Delete(object)) => {
                    if let Ok(object) = object.0 {
                        cache.remove(object.outline());
                        (self.trigger)(&Change::Gone(object.outline()));
                    }
                }
                Err(e) if is_first && K::is_optional() && is_denied(&e) => {
                    info!("there are no {} here: {e}", K::plural(&()));
                    is_first = false;
                    self.synced.one_more();
                }
                Err(e) if K::is_optional() && is_denied(&e) => {}
                Err(e) => warn!("watch {}: {e}", K::plural(&())),
            }
        }
    }

    fn keep<K: Stored>(&self, cache: &Cache<K>, object: Known<K>)
    where
        T: Fn(&Change<'_, K>),
    {
        let key = Key::of(&object);
        let old = cache.put(object);
        if let Some(new) = cache.get(&key) {
            let (new, old) = (new.outline(), old.as_deref().map(Known::outline));
            (self.trigger)(&Change::Seen { new, old });
        }
    }

    /// Records that an object cannot be read, and knows it no longer: what would be done with an
    /// earlier state of it is not what it says now.
    fn leave_out<K: Stored>(&self, cache: &Cache<K>, object: &InvalidObject)
    where
        T: Fn(&Change<'_, K>),
    {
        self.context.events.record_invalid::<K>(object);
        let metadata = &object.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let key = Key::new(namespace, metadata.name.as_deref().unwrap_or_default());
        if let Some(gone) = cache.drop_unread(&key) {
            (self.trigger)(&Change::Gone(gone.outline()));
        }
    }
}

/// Whether a kind is not served, or not ours to see.
fn is_denied(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(e) | watcher::Error::WatchStartFailed(e) => {
            matches!(error::code(e), Some(403 | 404))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_though_not_for_ever() {
        let mut pauses = Pauses::default();
        let first = pauses.next().unwrap();
        assert!(first < LONGEST_PAUSE, "{first:?}");
        assert!(pauses.by_ref().take(20).all(|pause| pause <= LONGEST_PAUSE));
        assert_eq!(pauses.next(), Some(LONGEST_PAUSE));
    }
}
