// SPDX-License-Identifier: Apache-2.0

//! A claim: gets one Sandbox, from a pool where one is there, and gives it up when its time is
//! over.
//!
//! The one commit point of an adoption is the patch that makes the claim the Sandbox's owner. A
//! controller that dies before it has done nothing; one that dies after finds the Sandbox by its
//! owner.

mod build;
mod metadata;
mod state;
mod status;
mod triggers;

use std::{
    cell::LazyCell,
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kiln_crds::{
    ClaimShutdownPolicy, Sandbox, SandboxClaim, SandboxClaimStatus, SandboxTemplate,
    SandboxWarmPool, keys,
};
use kube::{Resource, ResourceExt, api::DeleteParams};
use serde_json::json;

use crate::{
    blocked::Blocked,
    cache::{IndexKey, Key},
    condition::{self, FINISHED, READY},
    context::Context,
    enqueue,
    error::{self, Error, Result},
    known::Known,
    lock::lock,
    marks::{named_pool, template_of},
    metrics::Startup,
    options::ClaimAnnotations,
    owner, patch, pool,
    queue::{Lane, Outcome, WorkKind},
    template,
};
pub(crate) use state::State;
pub(crate) use triggers::changed;

/// How many Sandboxes are tried that others take away at the same moment.
const TRIES: usize = 3;
/// How often a claim is looked at that waits for somebody to make a pool or a template.
const WAITING: Duration = Duration::from_secs(60);

/// Sees that a claim has what it asks for.
pub(crate) async fn reconcile(
    context: &Context,
    state: &State,
    key: &Key,
    lane: Lane,
) -> Result<Outcome> {
    let Some(claim) = context.find_whole::<SandboxClaim>(key, lane).await? else {
        return Ok(Outcome::Done);
    };
    if claim.meta().deletion_timestamp.is_some() {
        context.observed.forget(&*claim);
        state.forget(&claim);
        return Ok(Outcome::Done);
    }
    context.observed.first_seen(&*claim);
    if !status::is_ready(claim.status.as_ref()) {
        context.queue.wanted(&key.namespace);
    }
    let now = Timestamp::now();
    // By its times alone, as upstream has it: a claim that is kept comes back with a later one.
    if status::ends_at(&claim).is_some_and(|at| at <= now) {
        return expire(context, &claim, now).await;
    }
    let found = obtain(context, state, &claim, lane).await;
    if let Err(e @ Error::Heavy) = found {
        return Err(e);
    }
    let new = status::active(&claim, found.as_deref(), now);
    annotate(context, &claim, found.as_deref().ok(), &new).await?;
    write_status(context, &claim, &new).await?;
    if let Ok(sandbox) = &found {
        record_ready(context, &claim, sandbox, &new);
        record_blocked(context, state, &claim, sandbox, &new);
    }
    if let Err(e) = found {
        state.reported.forget(&*claim);
        record_failure(context, &claim, &new, &e);
        return Ok(if e.is_final() {
            Outcome::Again(WAITING)
        } else {
            Outcome::Failed
        });
    }
    let current = SandboxClaim {
        status: Some(new),
        ..(*claim).clone()
    };
    let left = status::ends_at(&current).map(|at| at.duration_since(now));
    let left = left.map(|left| Duration::try_from(left).unwrap_or_default());
    Ok(left.map_or(Outcome::Done, Outcome::Again))
}

async fn write_status(
    context: &Context,
    claim: &SandboxClaim,
    new: &SandboxClaimStatus,
) -> Result<()> {
    match patch::status(claim.status.as_ref(), new)? {
        Some(patch) => {
            context
                .patch_status::<SandboxClaim>(&Key::of(claim), &patch)
                .await
        }
        None => Ok(()),
    }
}

/// Records why a claim gets no Sandbox, if its status did not say so.
fn record_failure(
    context: &Context,
    claim: &SandboxClaim,
    new: &SandboxClaimStatus,
    error: &Error,
) {
    let ready = |status: &SandboxClaimStatus| {
        let ready = condition::find(&status.conditions, READY);
        ready.map(|c| (c.reason.clone(), c.message.clone()))
    };
    if claim.status.as_ref().and_then(ready) != ready(new) {
        context
            .events
            .warn(claim, "SandboxNotProvided", error.to_string());
    }
}

/// Records what blocks the Sandbox of a claim, if that is news.
fn record_blocked(
    context: &Context,
    state: &State,
    claim: &SandboxClaim,
    sandbox: &Sandbox,
    new: &SandboxClaimStatus,
) {
    let pods = context.store.owned::<Pod>(sandbox);
    let pod = pods.first().map(|pod| pod.outline());
    let blocked = sandbox.status.as_ref();
    let blocked = blocked.and_then(|s| Blocked::of(&s.conditions, pod));
    let status_changes = claim.status.as_ref() != Some(new);
    let is_news = state
        .reported
        .is_news(claim, blocked.as_ref(), status_changes);
    if let Some(blocked) = blocked.filter(|_| is_news) {
        context
            .events
            .warn(claim, blocked.reason(), blocked.message());
    }
}

/// Counts a claim that has become ready, and how long that took.
fn record_ready(
    context: &Context,
    claim: &SandboxClaim,
    sandbox: &Sandbox,
    new: &SandboxClaimStatus,
) {
    if status::is_ready(claim.status.as_ref()) || !status::is_ready(Some(new)) {
        return;
    }
    let now = Timestamp::now();
    let since = |at: Timestamp| Duration::try_from(now.duration_since(at)).ok();
    let noted = |key: &str| claim.annotations().get(key)?.parse().ok();
    let made = claim.meta().creation_timestamp.as_ref().map(|at| at.0);
    let startup = Startup {
        since_made: noted(keys::WEBHOOK_OBSERVED_AT).or(made).and_then(since),
        since_asked: noted(keys::CLIENT_REQUESTED_AT).and_then(since),
        since_seen: context.observed.first_seen(claim).elapsed(),
    };
    context.metrics.claim_ready(sandbox, startup);
    if context.options.claim_events {
        let launch = sandbox.labels().get(keys::LAUNCH_TYPE);
        let (reason, verb) = match launch.map(String::as_str) {
            Some(keys::WARM) => ("SandboxAdopted", "Adopted"),
            _ => ("SandboxProvisioned", "Created"),
        };
        let note = format!("{verb} Sandbox \"{}\"", sandbox.name_any());
        context.events.inform(claim, reason, note);
    }
}

/// Writes down on a claim that is ready what clients and people read there, where that is wanted.
async fn annotate(
    context: &Context,
    claim: &SandboxClaim,
    sandbox: Option<&Sandbox>,
    new: &SandboxClaimStatus,
) -> Result<()> {
    let wanted = match context.options.claim_annotations {
        ClaimAnnotations::Never => false,
        ClaimAnnotations::Always => true,
        ClaimAnnotations::Auto => claim.annotations().contains_key(keys::CLIENT_REQUESTED_AT),
    };
    let Some(sandbox) = sandbox.filter(|_| wanted && status::is_ready(Some(new))) else {
        return Ok(());
    };
    let notes = notes(claim, sandbox, context.observed.first_seen(claim).elapsed());
    if notes.is_empty() {
        return Ok(());
    }
    let patch = json!({"metadata": {"annotations": notes}});
    let key = Key::of(claim);
    match context.patch::<SandboxClaim>(&key, &patch).await {
        Ok(new) => {
            // The answer brings along what others have changed, which the watch will know by then.
            if new.metadata.generation != claim.metadata.generation {
                context.add(WorkKind::Claim, key);
            }
            Ok(())
        }
        Err(e) if error::is_not_found(&e) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The annotations that a claim lacks: when it was seen, `since` before now, and ready for the first
/// time, and the Sandbox that it has from a pool. One that names another is put right.
fn notes(
    claim: &SandboxClaim,
    sandbox: &Sandbox,
    since: Duration,
) -> BTreeMap<&'static str, Option<String>> {
    let mut notes = BTreeMap::new();
    if !claim.annotations().contains_key(keys::CLAIM_READY_AT) {
        let now = Timestamp::now();
        let since = SignedDuration::try_from(since).unwrap_or_default();
        let seen = now.checked_sub(since).unwrap_or(now);
        notes.insert(keys::CONTROLLER_OBSERVED_AT, Some(format!("{seen:.9}")));
        notes.insert(keys::CLAIM_READY_AT, Some(format!("{now:.9}")));
    }
    let launch = sandbox.labels().get(keys::LAUNCH_TYPE);
    let is_warm = launch.is_some_and(|launch| launch == keys::WARM);
    let assigned = is_warm.then(|| sandbox.name_any());
    if claim.annotations().get(keys::ASSIGNED_SANDBOX) != assigned.as_ref() {
        notes.insert(keys::ASSIGNED_SANDBOX, assigned);
    }
    notes
}

/// Says in the status that the claim is over, then ends it.
async fn expire(context: &Context, claim: &SandboxClaim, now: Timestamp) -> Result<Outcome> {
    let sandbox = bound(context, claim);
    let outline = sandbox.as_deref().map(Known::outline);
    if !status::is_marked_expired(claim) {
        let new = status::expired(claim, outline, None, now);
        write_status(context, claim, &new).await?;
        context
            .events
            .inform(claim, status::EXPIRED, "Claim has expired");
        return Ok(Outcome::Again(Duration::ZERO));
    }
    let policy = claim
        .spec
        .lifecycle
        .as_ref()
        .and_then(|l| l.shutdown_policy)
        .unwrap_or_default();
    let params = match policy {
        ClaimShutdownPolicy::Delete => DeleteParams::background(),
        ClaimShutdownPolicy::DeleteForeground => DeleteParams::foreground(),
        ClaimShutdownPolicy::Retain => return retain(context, claim, sandbox, now).await,
    };
    context.delete(claim, params).await?;
    Ok(Outcome::Done)
}

async fn retain(
    context: &Context,
    claim: &SandboxClaim,
    sandbox: Option<Arc<Known<Sandbox>>>,
    now: Timestamp,
) -> Result<Outcome> {
    let mut stranger = None;
    if let Some(sandbox) = &sandbox {
        if sandbox.meta().deletion_timestamp.is_none() {
            let params = DeleteParams::default();
            context.delete(sandbox.outline(), params).await?;
        }
    } else if let Some(name) = claim
        .status
        .as_ref()
        .and_then(|s| s.sandbox.as_ref()?.name.clone())
        && context
            .store
            .sandboxes
            .get(&Key::new(&claim.namespace().unwrap_or_default(), &name))
            .is_some()
    {
        stranger = Some(Error::SandboxNotOwned {
            sandbox: name,
            claim: claim.name_any(),
        });
    }
    let outline = sandbox.as_deref().map(Known::outline);
    let new = status::expired(claim, outline, stranger.as_ref(), now);
    write_status(context, claim, &new).await?;
    Ok(Outcome::Done)
}

/// The Sandbox that a claim owns: the one that its status names; before that is written, one that
/// was also marked as the claim's when it was made or adopted. An owner reference alone may be
/// somebody's slip.
fn bound(context: &Context, claim: &SandboxClaim) -> Option<Arc<Known<Sandbox>>> {
    let owned = context.store.owned::<Sandbox>(claim);
    let known = claim
        .status
        .as_ref()
        .and_then(|s| s.sandbox.as_ref()?.name.clone());
    let same = owned.iter().find(|s| Some(s.name_any()) == known).cloned();
    same.or_else(|| owned.into_iter().find(|s| is_made_for(s, claim)))
}

/// Whether a Sandbox was made for a claim, or adopted for it.
fn is_made_for(sandbox: &Sandbox, claim: &SandboxClaim) -> bool {
    owner::controls(claim, sandbox)
        && sandbox.labels().get(keys::CLAIM_UID) == claim.meta().uid.as_ref()
}

/// The Sandbox of a claim: the one that it has, one from a pool, or a new one.
async fn obtain(
    context: &Context,
    state: &State,
    claim: &SandboxClaim,
    lane: Lane,
) -> Result<Arc<Sandbox>> {
    let uid = claim.uid().unwrap_or_default();
    let unanswered = lock(&state.unanswered).get(&uid).cloned();
    if let Some(key) = unanswered {
        // The apiserver knows; what it says goes into the cache.
        context.fetch::<Sandbox>(&key).await?;
        lock(&state.unanswered).remove(&uid);
    }
    if let Some(sandbox) = bound(context, claim) {
        let sandbox = context.whole(&sandbox, lane).await?;
        return keep_metadata(context, claim, sandbox, lane).await;
    }
    check_ownerless(context, claim)?;
    metadata::check_claim(claim, &context.options.claim_metadata)?;
    let source = Source::of(context, claim, lane).await?;
    if source.may_adopt
        && let Some(sandbox) = adopt(context, state, claim, &source, lane).await?
    {
        return Ok(sandbox);
    }
    let Some(template) = &source.template else {
        return Err(Error::TemplateNotFound(source.template_name));
    };
    let sandbox = build::cold(claim, template, &context.options.dns_servers)?;
    template::ensure_policy(context, template, lane).await?;
    match context.create(&sandbox).await {
        Ok(made) => {
            let pool = claim.spec.warm_pool_ref.as_ref();
            let pool = pool.map_or("", |pool| &pool.name);
            context.metrics.obtained(claim, &made, pool);
            note_claim(context, source.template_key(claim));
            Ok(made)
        }
        Err(e) if error::is_conflict(&e) => {
            let key = Key::of(&sandbox);
            match context.fetch::<Sandbox>(&key).await? {
                Some(found) if is_made_for(&found, claim) => Ok(found),
                Some(_) => Err(Error::NameTaken(key)),
                None => Err(e.into()),
            }
        }
        Err(e) => {
            note_unanswered(state, claim, Key::of(&sandbox), &e);
            Err(e.into())
        }
    }
}

/// Refuses a claim another Sandbox while there is one that was a claim's of its name and that nobody
/// owns. It comes back to no claim by itself: who may write the name could take what is in it.
fn check_ownerless(context: &Context, claim: &SandboxClaim) -> Result<()> {
    let key = IndexKey::Claim(Key::of(claim));
    let mut ownerless = context.store.sandboxes.find(&key).into_iter();
    match ownerless.find(|s| s.meta().deletion_timestamp.is_none()) {
        Some(sandbox) => Err(Error::Ownerless {
            sandbox: sandbox.name_any(),
        }),
        None => Ok(()),
    }
}

/// Notes a claim on a template, and has nodes hold more for it.
fn note_claim(context: &Context, template: Key) {
    context.observed.note_claim(template);
    enqueue::nodes(context);
}

/// Has the next reconcile of a claim begin with what the apiserver knows of a Sandbox, if that may have
/// become the claim's in spite of the error: else it could get a second one.
fn note_unanswered(state: &State, claim: &SandboxClaim, sandbox: Key, e: &kube::Error) {
    if error::is_unanswered(e) {
        let uid = claim.uid().unwrap_or_default();
        lock(&state.unanswered).insert(uid, sandbox);
    }
}

/// Where the Sandbox of a claim may come from.
struct Source {
    pools: Vec<Arc<Known<SandboxWarmPool>>>,
    template_name: String,
    template: Option<Arc<SandboxTemplate>>,
    /// Whether one that runs already will do.
    may_adopt: bool,
}

impl Source {
    async fn of(context: &Context, claim: &SandboxClaim, lane: Lane) -> Result<Self> {
        let namespace = claim.namespace().unwrap_or_default();
        let pool = |name: &str| {
            let found = context.store.pools.get(&Key::new(&namespace, name));
            found.ok_or_else(|| Error::WarmPoolNotFound(name.to_owned()))
        };
        let has_any = |of: Option<usize>| of.is_some_and(|n| n > 0);
        let brings = has_any(claim.spec.env.as_ref().map(Vec::len))
            || has_any(claim.spec.volume_claim_templates.as_ref().map(Vec::len));
        let (pools, template_name) =
            match (&claim.spec.warm_pool_ref, &claim.spec.sandbox_template_ref) {
                (Some(reference), _) => {
                    let pool = pool(&reference.name)?;
                    let template = pool.spec.sandbox_template_ref.name.clone();
                    (vec![pool], template)
                }
                (None, Some(reference)) => {
                    let template = reference.name.clone();
                    let pools = match named_pool(claim) {
                        Some(name) => vec![of_template(pool(name)?, &template)?],
                        None if claim.spec.warmpool.as_deref() == Some("none") => Vec::new(),
                        None => {
                            let key = Key::new(&namespace, &template);
                            context.store.pools.find(&IndexKey::Template(key))
                        }
                    };
                    (pools, template)
                }
                // The schema asks for one of both; an object from before it may have neither.
                (None, None) => return Err(Error::WarmPoolNotFound(String::new())),
            };
        let key = Key::new(&namespace, &template_name);
        Ok(Self {
            template: context.find_whole(&key, lane).await?,
            may_adopt: !brings,
            pools,
            template_name,
        })
    }

    /// What the Sandboxes of `pool`, which is one of these, are made from.
    fn of_pool(&self, context: &Context, pool: &SandboxWarmPool) -> Option<pool::Source> {
        let template = self.template.as_deref()?;
        pool::Source::new(pool, template, &context.options).ok()
    }

    fn template_key(&self, claim: &SandboxClaim) -> Key {
        Key::new(&claim.namespace().unwrap_or_default(), &self.template_name)
    }
}

fn of_template(
    pool: Arc<Known<SandboxWarmPool>>,
    template: &str,
) -> Result<Arc<Known<SandboxWarmPool>>> {
    let other = &pool.spec.sandbox_template_ref.name;
    if other == template {
        return Ok(pool);
    }
    Err(Error::PoolOfOtherTemplate {
        pool: pool.name_any(),
        other: other.clone(),
        template: template.to_owned(),
    })
}

/// Takes a Sandbox out of a pool, if one is there.
async fn adopt(
    context: &Context,
    state: &State,
    claim: &SandboxClaim,
    source: &Source,
    lane: Lane,
) -> Result<Option<Arc<Sandbox>>> {
    for _ in 0..TRIES {
        let mut candidates = candidates(context, source).into_iter();
        let taken = candidates.find_map(|s| {
            context
                .store
                .reserve(&s)
                .map(|reservation| (s, reservation))
        });
        let Some((sandbox, _reservation)) = taken else {
            return Ok(None);
        };
        let whole = context.whole(&sandbox, lane).await?;
        let patch = build::adoption(&whole, claim, source.template.as_deref())?;
        let key = Key::of(&*sandbox);
        let adopted = match context.patch::<Sandbox>(&key, &patch).await {
            Ok(adopted) => adopted,
            Err(e) if error::is_not_found(&e) => {
                context.store.sandboxes.remove(sandbox.outline());
                continue;
            }
            Err(e) if error::is_conflict(&e) => match context.fetch::<Sandbox>(&key).await? {
                // The request was sent twice on its way, and the first had come to pass.
                Some(found) if is_made_for(&found, claim) => found,
                Some(_) => continue,
                None => {
                    context.store.sandboxes.remove(sandbox.outline());
                    continue;
                }
            },
            Err(e) => {
                note_unanswered(state, claim, key, &e);
                return Err(e.into());
            }
        };
        let pool = owner::controller(&*sandbox).map_or("", |pool| &pool.name);
        context.metrics.obtained(claim, &adopted, pool);
        note_claim(context, source.template_key(claim));
        // The watch brings nothing new of it: the cache has it already.
        if let Some(pool) = owner::controller(&*sandbox) {
            enqueue::pool(context, Key::new(&key.namespace, &pool.name));
        }
        return Ok(Some(adopted));
    }
    Err(Error::AdoptionConflict)
}

/// The Sandboxes that a claim may take, the best first: those from the node that holds most of them,
/// and of these the oldest. All are ready, because a new one is as good as one that may never be.
fn candidates(context: &Context, source: &Source) -> Vec<Arc<Known<Sandbox>>> {
    let mut all = Vec::new();
    for pool in &source.pools {
        let hash = keys::name_hash(&pool.name_any());
        let owned = context.store.owned::<Sandbox>(&**pool);
        // Most Sandboxes need no comparison with it.
        let of_pool = LazyCell::new(|| source.of_pool(context, pool));
        let free = owned.into_iter();
        all.extend(free.filter(|s| {
            is_free(context, source, pool, &hash, s)
                && pool::is_genuine(context, s, || of_pool.as_ref())
                && !(pool::replaces_stale(pool)
                    && of_pool.as_ref().is_some_and(|of| of.is_stale(s)))
        }));
    }
    let mut on_node: HashMap<Option<&str>, usize> = HashMap::new();
    for sandbox in &all {
        *on_node.entry(node_of(sandbox)).or_default() += 1;
    }
    let rank = |s: &Arc<Known<Sandbox>>| {
        let made = s.meta().creation_timestamp.as_ref().map(|t| t.0);
        (Reverse(on_node.get(&node_of(s)).copied()), made)
    };
    let mut ranked: Vec<_> = all.iter().map(|s| (rank(s), s)).collect();
    ranked.sort_unstable_by(|(a, one), (b, other)| {
        a.cmp(b)
            .then_with(|| one.meta().name.cmp(&other.meta().name))
    });
    ranked.into_iter().map(|(_, s)| Arc::clone(s)).collect()
}

fn node_of(sandbox: &Sandbox) -> Option<&str> {
    sandbox.status.as_ref()?.node_name.as_deref()
}

/// Whether a Sandbox says of itself that it is the pool's, and can be given away.
fn is_free(
    context: &Context,
    source: &Source,
    pool: &SandboxWarmPool,
    hash: &str,
    sandbox: &Sandbox,
) -> bool {
    let is_pools = owner::controls(pool, sandbox)
        && sandbox.labels().get(keys::WARM_POOL).map(String::as_str) == Some(hash)
        && !sandbox.labels().contains_key(keys::CLAIM_UID);
    let is_over = sandbox
        .status
        .as_ref()
        .is_some_and(|s| condition::is_true(&s.conditions, FINISHED));
    let lives = condition::is_ready(sandbox)
        && sandbox.meta().deletion_timestamp.is_none()
        && !sandbox.spec.is_suspended()
        && sandbox.spec.shutdown_time.is_none()
        && !is_over;
    is_pools
        && lives
        && template_of(sandbox) == Some(source.template_name.as_str())
        && !context.store.is_reserved(sandbox)
}

/// Brings the labels and annotations of a claimed Sandbox up to date with its claim. What the claim
/// may not bring, or its template has another value of by now, takes nothing from it: an event says so.
async fn keep_metadata(
    context: &Context,
    claim: &SandboxClaim,
    sandbox: Arc<Sandbox>,
    lane: Lane,
) -> Result<Arc<Sandbox>> {
    let namespace = claim.namespace().unwrap_or_default();
    let Some(template) = template_of(&sandbox) else {
        return Ok(sandbox);
    };
    let template = Key::new(&namespace, template);
    let template = context.find_whole::<SandboxTemplate>(&template, lane);
    let template = template.await?;
    let (Some(template), None) = (template, &sandbox.meta().deletion_timestamp) else {
        return Ok(sandbox);
    };
    let wanted = metadata::check_claim(claim, &context.options.claim_metadata)
        .and_then(|()| metadata::merge(&template.spec.pod_template.metadata, claim));
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(e) => {
            context
                .events
                .warn(claim, status::reason(&e), e.to_string());
            return Ok(sandbox);
        }
    };
    let old = serde_json::to_value(&sandbox.spec.pod_template.metadata)?;
    match patch::diff(&old, &serde_json::to_value(&wanted)?) {
        Some(change) => {
            let patch = json!({"spec": {"podTemplate": {"metadata": change}}});
            Ok(context
                .patch::<Sandbox>(&Key::of(&*sandbox), &patch)
                .await?)
        }
        None => Ok(sandbox),
    }
}
