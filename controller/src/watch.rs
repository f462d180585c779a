// SPDX-License-Identifier: Apache-2.0

//! Watches: they fill the caches, and put into the queue what a change is about.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use k8s_openapi::api::{
    core::v1::{PersistentVolumeClaim, Pod, Service},
    networking::v1::NetworkPolicy,
};
use kiln_crds::{Sandbox, SandboxClaim, SandboxNode, SandboxTemplate, SandboxWarmPool, keys};
use kube::{
    Api, ResourceExt,
    core::error_boundary::InvalidObject,
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use tokio::sync::Notify;
use tracing::{info, warn};

use crate::{
    cache::Key,
    condition::{self, READY},
    context::{Context, Kind},
    error,
    index::IndexKey,
    known::{Known, Watched},
    marks::ownerless_claim,
    node, owner,
    queue::{Class, Work},
    template::POLICY_SUFFIX,
};

/// How long changes of a pool's Sandboxes are gathered before the pool is looked at.
pub(crate) const GATHER: Duration = Duration::from_millis(20);

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

/// Starts all watches; without `extensions` those of Sandboxes alone.
pub(crate) fn start(context: &Arc<Context>, synced: &Arc<Synced>, extensions: bool) {
    let all = || {
        let config = watcher::Config::default();
        config.timeout(LENGTH).page_size(PAGE)
    };
    let ours = all().labels(keys::SANDBOX_NAME_HASH);
    spawn::<Sandbox>(context, synced, all(), sandbox_changed);
    spawn::<Pod>(context, synced, ours.clone(), pod_changed);
    spawn::<Service>(context, synced, ours.clone(), child_changed);
    spawn::<PersistentVolumeClaim>(context, synced, ours, child_changed);
    if extensions {
        spawn::<SandboxClaim>(context, synced, all(), claim_changed);
        spawn::<SandboxWarmPool>(context, synced, all(), pool_changed);
        spawn::<SandboxTemplate>(context, synced, all(), template_changed);
        spawn::<NetworkPolicy>(context, synced, all(), policy_changed);
        spawn::<SandboxNode>(context, synced, all(), node::changed);
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
    fn is_known(&self) -> bool {
        self.old().is_some_and(|old| {
            let new = self.object();
            old.resource_version() == new.resource_version()
                && new.meta().deletion_timestamp.is_none()
        })
    }
}

/// Puts into the queue what a change concerns.
type Trigger<K> = fn(context: &Context, change: &Change<'_, K>);

fn spawn<K: Kind>(
    context: &Arc<Context>,
    synced: &Arc<Synced>,
    config: watcher::Config,
    trigger: Trigger<K>,
) {
    synced.started.fetch_add(1, Ordering::Relaxed);
    tokio::spawn(follow(
        Arc::clone(context),
        Arc::clone(synced),
        config,
        trigger,
    ));
}

/// Follows one watch for ever; the watcher itself begins anew after errors, with pauses.
async fn follow<K: Kind>(
    context: Arc<Context>,
    synced: Arc<Synced>,
    config: watcher::Config,
    trigger: Trigger<K>,
) {
    let cache = K::cache(&context);
    let api: Api<Watched<K>> = Api::all(context.client.clone());
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
                    listing = context.listing.acquire().await.ok();
                }
            }
            Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
                match object.0 {
                    Ok(object) => keep(&context, object, trigger),
                    Err(invalid) => leave_out(&context, &invalid, trigger),
                }
            }
            Ok(watcher::Event::InitDone) => {
                for gone in cache.end_list() {
                    trigger(&context, &Change::Gone(gone.outline()));
                }
                if std::mem::take(&mut is_first) {
                    synced.one_more();
                }
            }
            Ok(watcher::Event::Delete(object)) => {
                if let Ok(object) = object.0 {
                    cache.remove(object.outline());
                    trigger(&context, &Change::Gone(object.outline()));
                }
            }
            Err(e) if is_first && K::is_optional() && is_denied(&e) => {
                info!("there are no {} here: {e}", K::plural(&()));
                is_first = false;
                synced.one_more();
            }
            Err(e) if K::is_optional() && is_denied(&e) => {}
            Err(e) => warn!("watch {}: {e}", K::plural(&())),
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

fn keep<K: Kind>(context: &Context, object: Known<K>, trigger: Trigger<K>) {
    let key = Key::of(&object);
    let cache = K::cache(context);
    let old = cache.put(object);
    if let Some(new) = cache.get(&key) {
        let (new, old) = (new.outline(), old.as_deref().map(Known::outline));
        trigger(context, &Change::Seen { new, old });
    }
}

/// Tells that an object cannot be read, and knows it no longer: what would be done with an earlier
/// state of it is not what it says now.
fn leave_out<K: Kind>(context: &Arc<Context>, object: &InvalidObject, trigger: Trigger<K>) {
    context.tell_invalid::<K>(object);
    let metadata = &object.metadata;
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    let key = Key::new(namespace, metadata.name.as_deref().unwrap_or_default());
    if let Some(gone) = K::cache(context).drop_unread(&key) {
        trigger(context, &Change::Gone(gone.outline()));
    }
}

fn sandbox_changed(context: &Context, change: &Change<'_, Sandbox>) {
    let sandbox = change.object();
    if change.is_gone() {
        context.forget_sandbox(sandbox);
    }
    context.add(Class::Sandbox, Key::of(sandbox));
    if let Some(pools) = IndexKey::pools_of(sandbox) {
        for pool in context.pools.find(&pools) {
            let work = Work::new(Class::Pool, Key::of(&*pool));
            context.queue.add_after(work, GATHER);
        }
    }
    if let Some(claim) = ownerless_claim(sandbox) {
        let key = Key::new(&sandbox.namespace().unwrap_or_default(), claim);
        context.add(Class::Claim, key);
    }
    for sandbox in [Some(sandbox), change.old()].into_iter().flatten() {
        let Some(owner) = owner::controller(sandbox) else {
            continue;
        };
        let key = Key::new(&sandbox.namespace().unwrap_or_default(), &owner.name);
        if owner::is_kind::<SandboxClaim>(owner) {
            context.add(Class::Claim, key);
        } else if owner::is_kind::<SandboxWarmPool>(owner) {
            context.queue.add_after(Work::new(Class::Pool, key), GATHER);
        }
    }
}

fn pod_changed(context: &Context, change: &Change<'_, Pod>) {
    // One that nobody owns may be in the way of the Sandbox of its name.
    let pod = change.object();
    if owner::controller(pod).is_none() {
        context.add(Class::Sandbox, Key::of(pod));
    }
    child_changed(context, change);
}

fn child_changed<K: ResourceExt>(context: &Context, change: &Change<'_, K>) {
    let child = change.object();
    if let Some(owner) = owner::controller(child)
        && owner::is_kind::<Sandbox>(owner)
    {
        let key = Key::new(&child.namespace().unwrap_or_default(), &owner.name);
        context.add(Class::Sandbox, key);
    }
}

fn claim_changed(context: &Context, change: &Change<'_, SandboxClaim>) {
    if let Change::Gone(claim) = change {
        context.forget_claim(claim);
    } else if !change.is_known() {
        // Only the worker of a claim writes it, and it knows its own writes.
        context.add(Class::Claim, Key::of(change.object()));
    }
}

fn pool_changed(context: &Context, change: &Change<'_, SandboxWarmPool>) {
    if change.is_known() {
        return;
    }
    let pool = change.object();
    let key = Key::of(pool);
    if change.is_gone() {
        context.pending_statuses().remove(&key);
    }
    node::look(context);
    if let Change::Seen { new, old } = change {
        let template = |pool: &SandboxWarmPool| pool.spec.sandbox_template_ref.name.clone();
        if old.is_none_or(|old| template(old) != template(new)) {
            wake_claims(context, &IndexKey::Pool(key.clone()));
        }
    }
    context.add(Class::Pool, key);
}

fn template_changed(context: &Context, change: &Change<'_, SandboxTemplate>) {
    node::look(context);
    wake_template(context, Key::of(change.object()));
}

/// Has a template looked at, and all that is made from it.
fn wake_template(context: &Context, template: Key) {
    let of_template = IndexKey::Template(template.clone());
    for pool in context.pools.find(&of_template) {
        let pool = Key::of(&*pool);
        context.add(Class::Pool, pool.clone());
        wake_claims(context, &IndexKey::Pool(pool));
    }
    wake_claims(context, &of_template);
    context.add(Class::Template, template);
}

/// A policy is its template's, or in the way of it.
fn policy_changed(context: &Context, change: &Change<'_, NetworkPolicy>) {
    let policy = change.object();
    let owner = owner::controller(policy).filter(|o| owner::is_kind::<SandboxTemplate>(o));
    let name = policy.name_any();
    let template = owner.map(|o| o.name.as_str());
    if let Some(template) = template.or_else(|| name.strip_suffix(POLICY_SUFFIX)) {
        let namespace = policy.namespace().unwrap_or_default();
        wake_template(context, Key::new(&namespace, template));
    }
}

/// Has the claims looked at that may have waited for what is there now.
fn wake_claims(context: &Context, waiting_for: &IndexKey) {
    for claim in context.claims.find(waiting_for) {
        let conditions = claim.status.as_ref().map(|s| s.conditions.as_slice());
        if !conditions.is_some_and(|all| condition::is_true(all, READY)) {
            context.add(Class::Claim, Key::of(&*claim));
        }
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

    /// A controller without an apiserver, which knows one node.
    fn context() -> Context {
        let url = "http://127.0.0.1:1".parse().unwrap();
        let client = kube::Client::try_from(kube::Config::new(url)).unwrap();
        let args = crate::args::Args::defaults();
        let options = args.options().unwrap();
        let context = Context::new(
            client,
            options,
            args.limits(),
            crate::metrics::Metrics::new(),
        );
        let node = serde_json::json!({
            "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "n"}, "spec": {},
        });
        let node: SandboxNode = serde_json::from_value(node).unwrap();
        context.nodes.put(Known::of(node));
        context
    }

    #[tokio::test(start_paused = true)]
    async fn a_pool_that_is_gone_leaves_no_demand_and_nothing_to_the_next_of_its_name() {
        let context = context();
        let pool: SandboxWarmPool = serde_json::from_value(serde_json::json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "resourceVersion": "7"},
            "spec": {"replicas": 2, "sandboxTemplateRef": {"name": "t"}},
        }))
        .unwrap();
        let key = Key::of(&pool);
        context
            .pending_statuses()
            .insert(key.clone(), std::time::Instant::now());
        pool_changed(&context, &Change::Gone(&pool));
        assert!(!context.pending_statuses().contains_key(&key));
        let mut classes = Vec::new();
        while let Ok((work, _)) =
            tokio::time::timeout(Duration::from_secs(5), context.queue.next()).await
        {
            classes.push(work.class);
        }
        assert_eq!(classes, [Class::Pool, Class::Node]);
    }
}
