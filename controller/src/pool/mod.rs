// SPDX-License-Identifier: Apache-2.0

//! A pool: as many Sandboxes ready as its spec says. One task works on a pool at a time, and it
//! sees its own writes, so that it never makes one too many.

pub(crate) mod plan;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::PodSpec,
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta},
};
use kiln_crds::{
    Sandbox, SandboxSpec, SandboxTemplate, SandboxTemplateSpec, SandboxWarmPool,
    SandboxWarmPoolStatus, UpdateStrategyType, keys,
};
use kube::{Resource, ResourceExt, runtime::events::EventType};
use serde_json::json;

use crate::{
    cache::Key,
    condition::{self, Is, READY, condition},
    context::{Context, Options},
    error::{self, Error, Result},
    index::IndexKey,
    known::{Known, Print},
    marks::template_of,
    node,
    obstacle::UNSCHEDULABLE,
    owner, patch,
    queue::{Claims, Lane, Outcome},
    template,
};
use plan::{Member, batches, plan};

/// How long it may take until a pool's status follows what nodes hold: that changes all the time,
/// and mostly comes along with what else is written.
const NODES_DELAY: Duration = Duration::from_secs(5);
/// When to look again at a pool whose Sandboxes wait for claims to pass.
const HOLD_BACK: Duration = Duration::from_millis(100);
/// When to look again at a Sandbox that was to go and that a claim was about to take, or that was
/// to be taken in and that somebody else has changed.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Sandboxes that are made of a pool before others have their turn.
const TURN: usize = 256;

/// How often the time that a pool's Sandboxes have is doubled at the most: 5 minutes are 5 hours then.
const MOST_DOUBLINGS: u32 = 6;

/// Reason of a pool that is on its way.
const WARMING: &str = "Warming";

/// Letters and digits of names that Kubernetes makes up itself (`apimachinery`'s `util/rand`): no
/// vowels, so that no words come out.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Length of what is added to a pool's name, and the most that a name may have in all.
const SUFFIX: usize = 5;
const LONGEST_NAME: usize = 63;

/// Makes a pool hold what its spec says.
pub(crate) async fn reconcile(context: &Arc<Context>, key: &Key, lane: Lane) -> Result<Outcome> {
    let Some(pool) = context.find_whole::<SandboxWarmPool>(key, lane).await? else {
        context.late_rounds().remove(key);
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
        Some(source) => adopt(context, &pool, source, lane).await?,
        None => 0,
    };
    let members = members(context, &pool, source.as_ref());
    let plan = plan(
        desired(&pool),
        &members,
        replaces_stale(&pool),
        source.is_some(),
        grace(context, &pool),
    );
    if plan.late > 0 {
        note_late(context, &pool, plan.late);
    }
    let mut failure = None;
    if template.is_none() {
        failure = Some(Error::TemplateNotFound(template_name.clone()));
    }
    let mut is_taken = false;
    for name in &plan.delete {
        let key = Key::new(&key.namespace, name);
        let Some(known) = context.sandboxes.get(&key) else {
            continue;
        };
        // Held meanwhile, so that no claim takes it.
        let Some(_reservation) = context.reserve(&known) else {
            is_taken = true;
            continue;
        };
        // One may have got it just before.
        let now = context.sandboxes.get(&key);
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
        context.late_rounds().remove(key);
    }
    let pod = source.as_ref().map(|s| &s.model.spec.pod_template.spec);
    let wait = write_status(context, &pool, &members, pod, failure.as_ref()).await?;
    if failure.is_some_and(|e| !e.is_final()) {
        return Ok(Outcome::Failed);
    }
    let look = (is_taken || to_come > 0).then_some(LOOK_AGAIN);
    let held_back = (left > 0).then_some(HOLD_BACK);
    let again = [wait, plan.again, look, held_back];
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
fn grace(context: &Context, pool: &SandboxWarmPool) -> Duration {
    let own = pool.spec.readiness_grace_period_seconds;
    let own = own.and_then(|seconds| u64::try_from(seconds).ok());
    let grace = own.map_or(context.options.pool_grace, Duration::from_secs);
    let rounds = context.late_rounds().get(&Key::of(pool)).copied();
    grace.saturating_mul(1 << rounds.unwrap_or_default().min(MOST_DOUBLINGS))
}

/// Notes that Sandboxes of a pool are replaced because they are late, and tells.
fn note_late(context: &Arc<Context>, pool: &SandboxWarmPool, late: usize) {
    let had = grace(context, pool).as_secs();
    *context.late_rounds().entry(Key::of(pool)).or_default() += 1;
    let have = grace(context, pool).as_secs();
    let note = format!(
        "Sandboxes that are not ready within {had} s are replaced, now {late}; the next have {have} s"
    );
    context.tell(pool, EventType::Warning, "SandboxesNotReady", note);
}

fn desired(pool: &SandboxWarmPool) -> usize {
    usize::try_from(pool.spec.replicas.unwrap_or(1)).unwrap_or(0)
}

/// The Sandboxes that a pool holds, without those that are on their way out. One that a claim is
/// about to take counts until it has it: it may not come to that.
fn members(context: &Context, pool: &SandboxWarmPool, source: Option<&Source>) -> Vec<Member> {
    let now = Timestamp::now();
    let owned = context.owned::<Sandbox>(pool);
    owned
        .iter()
        .filter(|s| s.meta().deletion_timestamp.is_none())
        .map(|s| {
            let is_stale = source.is_some_and(|source| source.is_stale(s));
            let waited = match condition::is_ready(s) {
                true => Duration::ZERO,
                false => context.first_seen(&**s).elapsed(),
            };
            let is_genuine = is_genuine(context, s, || source);
            Member::of(s, is_genuine, is_stale, waited, now)
        })
        .collect()
}

/// Takes in Sandboxes that say that they are the pool's and that nobody owns: a pool that was
/// deleted without them and made again gets them back. Only what the pool would make itself, to the
/// last annotation, is given to claims in its name. Returns how many have changed meanwhile: the
/// watch brings what they are now.
async fn adopt(
    context: &Context,
    pool: &SandboxWarmPool,
    source: &Source,
    lane: Lane,
) -> Result<usize> {
    let mut changed = 0;
    for orphan in context.sandboxes.find(&IndexKey::members_of(pool)) {
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
            Ok(adopted) => context.note_genuine(&adopted),
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
            context.note_genuine(&*result?);
        }
        left -= now;
    }
    Ok(left)
}

/// Whether a pool is still what its Sandboxes are made for.
fn is_current(context: &Context, pool: &SandboxWarmPool) -> bool {
    context.pools.get(&Key::of(pool)).is_some_and(|now| {
        let (now, then) = (now.meta(), pool.meta());
        now.deletion_timestamp.is_none() && now.uid == then.uid && now.generation == then.generation
    })
}

/// Whether more than a quarter of a pool is ready.
fn has_enough(context: &Context, pool: &SandboxWarmPool) -> bool {
    let members = members(context, pool, None);
    members.iter().filter(|m| m.is_ready).count() * 4 > desired(pool)
}

/// What the Sandboxes of a pool are made from.
pub(crate) struct Source {
    /// All of a Sandbox but its name.
    model: Sandbox,
    /// Of the model.
    print: Option<Print>,
    prefix: String,
}

impl Source {
    pub(crate) fn new(
        pool: &SandboxWarmPool,
        template: &SandboxTemplate,
        options: &Options,
    ) -> Result<Self> {
        let mut spec = blueprint(&template.spec);
        template::secure(
            &mut spec.pod_template.spec,
            &template.spec,
            &options.dns_servers,
        );
        let label = |key: &str, value: String| (key.to_owned(), value);
        let labels = BTreeMap::from([
            label(keys::WARM_POOL, keys::name_hash(&pool.name_any())),
            label(
                keys::TEMPLATE_REF_HASH,
                keys::name_hash(&template.name_any()),
            ),
            label(keys::TEMPLATE_HASH, blueprint_hash(&template.spec)?),
            label(keys::LAUNCH_TYPE, keys::WARM.to_owned()),
            label(keys::CREATED_BY, "controller".to_owned()),
        ]);
        let mut prefix = format!("{}-", pool.name_any());
        prefix.truncate(LONGEST_NAME - SUFFIX);
        let model = Sandbox {
            metadata: ObjectMeta {
                namespace: pool.namespace(),
                labels: Some(labels),
                annotations: Some(BTreeMap::from([(
                    keys::TEMPLATE_REF.to_owned(),
                    template.name_any(),
                )])),
                owner_references: Some(vec![owner::reference(pool)]),
                ..ObjectMeta::default()
            },
            spec,
            status: None,
        };
        Ok(Self {
            print: Print::of(&model),
            model,
            prefix,
        })
    }

    /// A new one. It says at once which Pod it will have: that saves a write later.
    fn sandbox(&self) -> Sandbox {
        let mut sandbox = self.model.clone();
        let letters =
            (0..SUFFIX).map(|_| char::from(ALPHABET[rand::random_range(0..ALPHABET.len())]));
        let name: String = self.prefix.chars().chain(letters).collect();
        sandbox
            .annotations_mut()
            .insert(keys::POD_NAME.to_owned(), name.clone());
        sandbox.meta_mut().name = Some(name);
        sandbox
    }

    /// Whether a Sandbox is not what would be made now. The hash decides; where another version of
    /// the controller has computed it, what it stands for does.
    pub(crate) fn is_stale(&self, sandbox: &Known<Sandbox>) -> bool {
        if template_of(sandbox) != template_of(&self.model) {
            return true;
        }
        let hash = |s: &Sandbox| s.labels().get(keys::TEMPLATE_HASH).cloned();
        hash(sandbox) != hash(&self.model) && !self.is_alike(sandbox)
    }

    /// Whether a Sandbox makes the Pod, the volumes and the Service that one of the pool makes.
    fn is_alike(&self, sandbox: &Known<Sandbox>) -> bool {
        let prints = sandbox.print().zip(self.print.as_ref());
        prints.is_some_and(|(one, other)| one.spec == other.spec)
    }

    /// Whether a Sandbox was from its beginning what would be made now, whoever has made it: one
    /// whose spec has changed may have a Pod of what it was before.
    fn is_same(&self, sandbox: &Known<Sandbox>) -> bool {
        let is_unchanged = sandbox.meta().generation.is_none_or(|g| g == 1);
        is_unchanged
            && template_of(sandbox) == template_of(&self.model)
            && sandbox
                .print()
                .is_some_and(|print| self.print.as_ref() == Some(print))
            && !sandbox.spec.is_suspended()
            && sandbox.spec.shutdown_time.is_none()
            && !sandbox.labels().contains_key(keys::CLAIM_UID)
    }
}

/// Whether a Sandbox that bears a pool's marks is what the pool made. The marks prove nothing, since
/// whoever may create Sandboxes can write them: this process has made it, or has seen that it was
/// what the pool would make by `source`.
pub(crate) fn is_genuine<'a>(
    context: &Context,
    sandbox: &Known<Sandbox>,
    source: impl FnOnce() -> Option<&'a Source>,
) -> bool {
    if context.is_genuine(sandbox) {
        return true;
    }
    let is_same = source().is_some_and(|source| source.is_same(sandbox));
    if is_same {
        context.note_genuine(sandbox);
    }
    is_same
}

/// The part of a template that goes into its Sandboxes.
pub(crate) fn blueprint(template: &SandboxTemplateSpec) -> SandboxSpec {
    SandboxSpec {
        pod_template: template.pod_template.clone(),
        volume_claim_templates: template.volume_claim_templates.clone(),
        service: template.service,
        ..SandboxSpec::default()
    }
}

fn blueprint_hash(template: &SandboxTemplateSpec) -> Result<String> {
    Ok(keys::name_hash(&serde_json::to_string(&blueprint(
        template,
    ))?))
}

/// Writes the status where it has changed. That numbers sink is written after a while only: where
/// claims come and go, they are back by then. Returns when to look again, if it was too early.
async fn write_status(
    context: &Arc<Context>,
    pool: &SandboxWarmPool,
    members: &[Member],
    pod: Option<&PodSpec>,
    failure: Option<&Error>,
) -> Result<Option<Duration>> {
    let now = Timestamp::now();
    let mut new = status(pool, members, failure, now);
    let capacity = pod.and_then(|pod| node::capacity(context, pod, pool.metadata.generation));
    match capacity {
        Some(capacity) => condition::set(&mut new.conditions, capacity, now),
        None => condition::remove(&mut new.conditions, node::CAPACITY),
    }
    let key = Key::of(pool);
    let Some(patch) = patch::status(pool.status.as_ref(), &new)? else {
        context.pending_statuses().remove(&key);
        return Ok(None);
    };
    let delay = delay(context, pool, &new, failure);
    if !delay.is_zero() {
        let since = *context
            .pending_statuses()
            .entry(key.clone())
            .or_insert_with(Instant::now);
        let left = delay.saturating_sub(since.elapsed());
        if !left.is_zero() {
            return Ok(Some(left));
        }
    }
    context.pending_statuses().remove(&key);
    let ready = |conditions: &[Condition]| condition::find(conditions, READY).cloned();
    let old = pool.status.as_ref().and_then(|s| ready(&s.conditions));
    if let Some(new) = ready(&new.conditions) {
        tell(context, pool, old.as_ref(), &new, failure.is_some());
    }
    context
        .patch_status::<SandboxWarmPool>(&key, &patch)
        .await?;
    // What runs of a pool is what nodes hold something for.
    node::look(context);
    Ok(None)
}

/// Tells why a pool is not ready, where that is not what it said before: of its Sandboxes by the
/// reason alone, because others change their words with each try.
fn tell(
    context: &Arc<Context>,
    pool: &SandboxWarmPool,
    old: Option<&Condition>,
    new: &Condition,
    has_failed: bool,
) {
    let is_news = old
        .is_none_or(|old| old.reason != new.reason || (has_failed && old.message != new.message));
    if new.status != "False" || new.reason == WARMING || !is_news {
        return;
    }
    let reason = match new.reason.as_str() {
        // As upstream has it.
        UNSCHEDULABLE => "WarmPoolNotProgressing",
        reason => reason,
    };
    context.tell(pool, EventType::Warning, reason, new.message.clone());
}

/// How long a new status may wait for what else changes.
fn delay(
    context: &Context,
    pool: &SandboxWarmPool,
    new: &SandboxWarmPoolStatus,
    failure: Option<&Error>,
) -> Duration {
    let Some(old) = &pool.status else {
        return Duration::ZERO;
    };
    let without_nodes = |status: &SandboxWarmPoolStatus| {
        let mut status = status.clone();
        condition::remove(&mut status.conditions, node::CAPACITY);
        status
    };
    if without_nodes(old) == without_nodes(new) {
        return NODES_DELAY;
    }
    let is_full = usize::try_from(new.ready_replicas).is_ok_and(|ready| ready >= desired(pool));
    if is_full || failure.is_some() {
        return Duration::ZERO;
    }
    context.options.pool_status_delay
}

fn status(
    pool: &SandboxWarmPool,
    members: &[Member],
    failure: Option<&Error>,
    now: Timestamp,
) -> SandboxWarmPoolStatus {
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let ready = members.iter().filter(|m| m.is_ready).count();
    let desired = desired(pool);
    let generation = pool.metadata.generation;
    let obstacle = members.iter().find_map(|m| m.obstacle.as_ref());
    let (is, reason, message) = match (failure, obstacle) {
        (Some(e @ Error::TemplateNotFound(_)), _) => (Is::False, "TemplateNotFound", e.to_string()),
        (Some(e), _) => (Is::False, "SandboxCreateFailed", e.to_string()),
        (None, _) if ready >= desired => (
            Is::True,
            "PoolReady",
            format!("{ready} of {desired} Sandboxes are ready"),
        ),
        (None, Some((reason, message))) => (Is::False, reason.as_str(), message.clone()),
        (None, None) => (
            Is::False,
            WARMING,
            format!("{ready} of {desired} Sandboxes are ready"),
        ),
    };
    let mut conditions = pool
        .status
        .as_ref()
        .map(|s| s.conditions.clone())
        .unwrap_or_default();
    condition::set(
        &mut conditions,
        condition(READY, is, reason, message, generation),
        now,
    );
    SandboxWarmPoolStatus {
        replicas: count(members.len()),
        ready_replicas: count(ready),
        selector: Some(format!(
            "{}={}",
            keys::WARM_POOL,
            keys::name_hash(&pool.name_any())
        )),
        observed_generation: generation,
        conditions,
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    fn options() -> Options {
        crate::args::Args::defaults().options().unwrap()
    }

    fn template(image: &str) -> SandboxTemplate {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxTemplate",
            "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
            "spec": {"podTemplate": {"spec": {"containers": [{"name": "c", "image": image}]}}},
        }))
        .unwrap()
    }

    fn pool(name: &str) -> SandboxWarmPool {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": name, "namespace": "ns", "uid": "p", "generation": 3},
            "spec": {"replicas": 2, "sandboxTemplateRef": {"name": "t"}},
        }))
        .unwrap()
    }

    #[test]
    fn members_are_marked_as_upstream_marks_them() {
        let source = Source::new(&pool("p"), &template("i"), &options()).unwrap();
        let sandbox = source.sandbox();
        let name = sandbox.name_any();
        assert!(name.starts_with("p-") && name.len() == 7, "{name}");
        assert_eq!(sandbox.annotations()[keys::POD_NAME], name);
        assert_eq!(sandbox.labels()[keys::WARM_POOL], keys::name_hash("p"));
        assert_eq!(
            sandbox.labels()[keys::TEMPLATE_REF_HASH],
            keys::name_hash("t")
        );
        let pod = &sandbox.spec.pod_template;
        assert_eq!(pod.spec.automount_service_account_token, Some(false));
        let long = Source::new(&pool(&"x".repeat(200)), &template("i"), &options()).unwrap();
        assert_eq!(long.sandbox().name_any().len(), LONGEST_NAME);
    }

    #[test]
    fn a_changed_template_makes_members_stale_and_another_hash_of_the_same_does_not() {
        let old = Source::new(&pool("p"), &template("old"), &options()).unwrap();
        let new = Source::new(&pool("p"), &template("new"), &options()).unwrap();
        let mut sandbox = old.sandbox();
        assert!(!old.is_stale(&Known::of(sandbox.clone())));
        assert!(new.is_stale(&Known::of(sandbox.clone())));
        sandbox
            .labels_mut()
            .insert(keys::TEMPLATE_HASH.to_owned(), "else".to_owned());
        assert!(!old.is_stale(&Known::of(sandbox.clone())));
    }

    #[test]
    fn only_what_the_pool_would_make_is_the_same() {
        let source = Source::new(&pool("p"), &template("i"), &options()).unwrap();
        let changed = |change: fn(&mut Sandbox)| {
            let mut sandbox = source.sandbox();
            change(&mut sandbox);
            source.is_same(&Known::of(sandbox))
        };
        assert!(changed(|_| ()));
        assert!(changed(|s| s.metadata.owner_references = None));
        let changes: [fn(&mut Sandbox); 7] = [
            |s| s.metadata.generation = Some(2),
            |s| s.spec.pod_template.spec.host_network = Some(true),
            |s| {
                let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
                s.spec.pod_template.metadata.annotations = Some(annotations);
            },
            |s| s.spec.service = Some(true),
            |s| s.spec.replicas = Some(0),
            |s| {
                s.labels_mut()
                    .insert(keys::CLAIM_UID.to_owned(), "c".to_owned());
            },
            |s| s.metadata.annotations = None,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            assert!(!changed(change), "change {index}");
        }
    }

    #[test]
    fn the_status_says_why_a_pool_is_not_ready() {
        let now = Timestamp::from_str("2026-01-01T00:00:00Z").unwrap();
        let member = |is_ready, why: Option<&str>| Member {
            name: "m".to_owned(),
            age: Duration::ZERO,
            waited: Duration::ZERO,
            is_ready,
            is_forged: false,
            is_stale: false,
            is_over: false,
            is_unplaced: why.is_some(),
            obstacle: why.map(|why| (UNSCHEDULABLE.to_owned(), why.to_owned())),
        };
        let missing = Error::TemplateNotFound("t".to_owned());
        let cases = [
            (
                vec![member(true, None), member(true, None)],
                None,
                "True PoolReady: 2 of 2 Sandboxes are ready",
            ),
            (
                vec![member(false, None)],
                None,
                "False Warming: 0 of 2 Sandboxes are ready",
            ),
            (
                vec![member(false, Some("no node"))],
                None,
                "False Unschedulable: no node",
            ),
            (
                vec![],
                Some(&missing),
                "False TemplateNotFound: SandboxTemplate \"t\" not found",
            ),
        ];
        for (members, failure, expected) in cases {
            let status = status(&pool("p"), &members, failure, now);
            let c = &status.conditions[0];
            assert_eq!(
                format!("{} {}: {}", c.status, c.reason, c.message),
                expected
            );
            assert_eq!(status.observed_generation, Some(3));
        }
    }
}
