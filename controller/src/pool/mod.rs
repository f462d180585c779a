// SPDX-License-Identifier: Apache-2.0

//! A pool: as many Sandboxes ready as its spec says. One task works on a pool at a time, and it
//! sees its own writes, so that it never makes one too many.

mod build;
pub(crate) mod plan;
mod state;
mod status;
mod triggers;

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Pod, PodSpec},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kiln_crds::{Sandbox, SandboxTemplate, SandboxWarmPool, UpdateStrategyType, keys};
use kube::{Resource, ResourceExt};
use serde_json::json;

use crate::{
    cache::{IndexKey, Key},
    condition::{self, READY},
    context::Context,
    enqueue,
    error::{self, Error, Result},
    lock::lock,
    node, owner, patch,
    queue::{Claims, Lane, Outcome},
    template,
};
pub(crate) use build::{Source, blueprint, is_genuine};
use plan::{Member, batches, plan};
pub(crate) use state::State;
pub(crate) use triggers::changed;

/// When to look again at a pool whose Sandboxes wait for claims to pass.
const HOLD_BACK: Duration = Duration::from_millis(100);
/// When to look again at a Sandbox that was to go and that a claim was about to take, or that was
/// to be reclaimed and that somebody else has changed.
const RETRY: Duration = Duration::from_secs(1);

/// Sandboxes that are made of a pool before others have their turn.
const TURN: usize = 256;

/// How often the time that a pool's Sandboxes have is doubled at the most: 5 minutes are 5 hours then.
const MOST_DOUBLINGS: u32 = 6;

/// Makes a pool hold what its spec says.
pub(crate) async fn reconcile(
    context: &Context,
    state: &State,
    key: &Key,
    lane: Lane,
) -> Result<Outcome> {
    let Some(pool) = context.find_whole::<SandboxWarmPool>(key, lane).await? else {
        state.forget(key);
        return Ok(Outcome::Done);
    };
    if pool.meta().deletion_timestamp.is_some() {
        return Ok(Outcome::Done);
    }
    let template_name = &pool.spec.sandbox_template_ref.name;
    let template = Key::new(&key.namespace, template_name);
    let template = context.find_whole::<SandboxTemplate>(&template, lane);
    let template = template.await?;
    let source = template
        .as_deref()
        .map(|t| Source::new(&pool, t, &context.options))
        .transpose()?;
    let to_come = match &source {
        Some(source) => reclaim(context, &pool, source, lane).await?,
        None => 0,
    };
    let members = members(context, &pool, source.as_ref());
    let plan = plan(
        desired(&pool),
        &members,
        replaces_stale(&pool),
        source.is_some(),
        grace(context, state, &pool),
    );
    if plan.late > 0 {
        note_late(context, state, &pool, plan.late);
    }
    let mut failure = None;
    if template.is_none() {
        failure = Some(Error::TemplateNotFound(template_name.clone()));
    }
    let mut is_taken = false;
    for name in &plan.delete {
        let key = Key::new(&key.namespace, name);
        let Some(known) = context.store.sandboxes.get(&key) else {
            continue;
        };
        // Held meanwhile, so that no claim takes it.
        let Some(_reservation) = context.store.reserve(&known) else {
            is_taken = true;
            continue;
        };
        // One may have got it just before.
        let now = context.store.sandboxes.get(&key);
        if let Some(sandbox) = now.filter(|now| now.uid() == known.uid())
            && owner::controls(&*pool, &*sandbox)
        {
            context.delete_unchanged(sandbox.outline()).await?;
        }
    }
    let mut left = 0;
    if let Some(template) = &template
        && let Err(e) = template::ensure_policy(context, template, lane).await
    {
        failure = Some(e);
    } else if let Some(source) = &source {
        let missing = plan.make.saturating_sub(to_come);
        match make(context, &pool, source, missing, lane).await {
            Ok(held_back) => left = held_back,
            Err(e) => failure = Some(e),
        }
    }
    if let Some(e @ Error::Heavy) = failure {
        return Err(e);
    }
    let members = self::members(context, &pool, source.as_ref());
    if members.iter().filter(|m| m.is_ready).count() >= desired(&pool) {
        lock(&state.late_rounds).remove(key);
    }
    let pod = source.as_ref().map(|s| &s.model.spec.pod_template.spec);
    let wait = write_status(context, state, &pool, &members, pod, failure.as_ref()).await?;
    if failure.is_some_and(|e| !e.is_final()) {
        return Ok(Outcome::Failed);
    }
    let retry = (is_taken || to_come > 0).then_some(RETRY);
    let held_back = (left > 0).then_some(HOLD_BACK);
    let again = [wait, plan.again, retry, held_back];
    let again = again.into_iter().flatten().min();
    Ok(again.map_or(Outcome::Done, Outcome::Again))
}

/// Whether a pool replaces the Sandboxes of an earlier state of its template, and gives none away.
pub(crate) fn replaces_stale(pool: &SandboxWarmPool) -> bool {
    let strategy = pool.spec.update_strategy.as_ref().and_then(|s| s.kind);
    strategy == Some(UpdateStrategyType::Recreate)
}

/// How long a Sandbox of a pool may take to become ready: twice as long after each time that one was
/// replaced for it, so that what never can be ready in time is not made again and again.
fn grace(context: &Context, state: &State, pool: &SandboxWarmPool) -> Duration {
    let own = pool.spec.readiness_grace_period_seconds;
    let own = own.and_then(|seconds| u64::try_from(seconds).ok());
    let grace = own.map_or(context.options.pool_grace, Duration::from_secs);
    let rounds = lock(&state.late_rounds).get(&Key::of(pool)).copied();
    grace.saturating_mul(1 << rounds.unwrap_or_default().min(MOST_DOUBLINGS))
}

/// Notes that Sandboxes of a pool are replaced because they are late, and records it.
fn note_late(context: &Context, state: &State, pool: &SandboxWarmPool, late: usize) {
    let had = grace(context, state, pool).as_secs();
    *lock(&state.late_rounds).entry(Key::of(pool)).or_default() += 1;
    let have = grace(context, state, pool).as_secs();
    let note = format!(
        "Sandboxes that are not ready within {had} s are replaced, now {late}; the next have {have} s"
    );
    context.events.warn(pool, "SandboxesNotReady", note);
}

fn desired(pool: &SandboxWarmPool) -> usize {
    usize::try_from(pool.spec.replicas.unwrap_or(1)).unwrap_or(0)
}

/// The Sandboxes that a pool holds, without those that are on their way out. One that a claim is
/// about to take counts until it has it: it may not come to that.
fn members(context: &Context, pool: &SandboxWarmPool, source: Option<&Source>) -> Vec<Member> {
    let now = Timestamp::now();
    let owned = context.store.owned::<Sandbox>(pool);
    owned
        .iter()
        .filter(|s| s.meta().deletion_timestamp.is_none())
        .map(|s| {
            let is_stale = source.is_some_and(|source| source.is_stale(s));
            let (waited, pods) = match condition::is_ready(s) {
                true => (Duration::ZERO, Vec::new()),
                false => {
                    let waited = context.observed.first_seen(&**s).elapsed();
                    (waited, context.store.owned::<Pod>(&**s))
                }
            };
            let pod = pods.first().map(|pod| pod.outline());
            let is_genuine = is_genuine(context, s, || source);
            Member::of(s, pod, is_genuine, is_stale, waited, now)
        })
        .collect()
}

/// Reclaims Sandboxes that say that they are the pool's and that nobody owns: a pool that was
/// deleted without them and made again gets them back. Only what the pool would make itself, to the
/// last annotation, is given to claims in its name. Returns how many have changed meanwhile: the
/// watch brings what they are now.
async fn reclaim(
    context: &Context,
    pool: &SandboxWarmPool,
    source: &Source,
    lane: Lane,
) -> Result<usize> {
    let mut changed = 0;
    for orphan in context.store.sandboxes.find(&IndexKey::members_of(pool)) {
        if orphan.meta().deletion_timestamp.is_some() || !source.is_same(&orphan) {
            continue;
        }
        let orphan = context.whole(&orphan, lane).await?;
        let mut owners = orphan.owner_references().to_vec();
        owners.push(owner::reference(pool));
        let patch = json!({"metadata": {
            "uid": orphan.uid(),
            "resourceVersion": orphan.resource_version(),
            "labels": {keys::LAUNCH_TYPE: keys::WARM},
            "ownerReferences": owners,
        }});
        match context.patch::<Sandbox>(&Key::of(&*orphan), &patch).await {
            Ok(reclaimed) => context.observed.note_genuine(&reclaimed),
            Err(e) if error::is_not_found(&e) => {}
            Err(e) if error::is_conflict(&e) => changed += 1,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(changed)
}

/// Makes `count` Sandboxes: first one, then twice as many each time, so that what cannot work
/// fails once and not a hundred times. While claims come, they are made one at a time, and while
/// many come, those of a pool that has enough wait: the claims need the apiserver more. Returns how
/// many are left.
async fn make(
    context: &Context,
    pool: &SandboxWarmPool,
    source: &Source,
    count: usize,
    lane: Lane,
) -> Result<usize> {
    let mut left = count;
    let namespace = pool.namespace().unwrap_or_default();
    for batch in batches(context.options.pool_batch) {
        if left == 0 || count - left >= TURN || !is_current(context, pool) {
            break;
        }
        let now = match context.queue.claims(&namespace) {
            _ if lane == Lane::Heavy => 1,
            Claims::None => batch.min(left),
            Claims::Many if has_enough(context, pool) => break,
            Claims::Few | Claims::Many => 1,
        };
        let made = stream::iter(0..now)
            .map(|_| async { context.create(&source.sandbox()).await })
            .buffer_unordered(now);
        let results: Vec<_> = made.collect().await;
        for result in results {
            context.observed.note_genuine(&*result?);
        }
        left -= now;
    }
    Ok(left)
}

/// Whether a pool is still what its Sandboxes are made for.
fn is_current(context: &Context, pool: &SandboxWarmPool) -> bool {
    context.store.pools.get(&Key::of(pool)).is_some_and(|now| {
        let (now, then) = (now.meta(), pool.meta());
        now.deletion_timestamp.is_none() && now.uid == then.uid && now.generation == then.generation
    })
}

/// Whether more than a quarter of a pool is ready.
fn has_enough(context: &Context, pool: &SandboxWarmPool) -> bool {
    let members = members(context, pool, None);
    members.iter().filter(|m| m.is_ready).count() * 4 > desired(pool)
}

/// Writes the status where it has changed. That numbers sink is written after a while only: where
/// claims come and go, they are back by then. Returns when to look again, if it was too early.
async fn write_status(
    context: &Context,
    state: &State,
    pool: &SandboxWarmPool,
    members: &[Member],
    pod: Option<&PodSpec>,
    failure: Option<&Error>,
) -> Result<Option<Duration>> {
    let now = Timestamp::now();
    let mut new = status::compute(pool, members, failure, now);
    let capacity = pod.and_then(|pod| node::capacity(context, pod, pool.metadata.generation));
    match capacity {
        Some(capacity) => condition::set(&mut new.conditions, capacity, now),
        None => condition::remove(&mut new.conditions, node::CAPACITY),
    }
    let key = Key::of(pool);
    let Some(patch) = patch::status(pool.status.as_ref(), &new)? else {
        lock(&state.pending_statuses).remove(&key);
        return Ok(None);
    };
    let delay = status::delay(pool, &new, failure, context.options.pool_status_delay);
    if !delay.is_zero() {
        let since = *lock(&state.pending_statuses)
            .entry(key.clone())
            .or_insert_with(Instant::now);
        let left = delay.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Some(left));
        }
    }
    lock(&state.pending_statuses).remove(&key);
    let ready = |conditions: &[Condition]| condition::find(conditions, READY).cloned();
    let old = pool.status.as_ref().and_then(|s| ready(&s.conditions));
    if let Some(new) = ready(&new.conditions) {
        status::record_event(context, pool, old.as_ref(), &new, failure.is_some());
    }
    context
        .patch_status::<SandboxWarmPool>(&key, &patch)
        .await?;
    // What runs of a pool is what nodes hold something for.
    enqueue::nodes(context);
    Ok(None)
}
