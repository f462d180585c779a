// SPDX-License-Identifier: Apache-2.0

//! A Sandbox: its Pod, its Service, its volume claims, its time.

mod events;
mod pod;
mod service;
mod state;
mod status;
mod triggers;

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaim, Pod, Service},
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta},
};
use kiln_crds::{Sandbox, SandboxStatus, ShutdownPolicy, VolumeClaimTemplate, keys};
use kube::{Resource, ResourceExt, api::DeleteParams};
use serde_json::json;

use crate::{
    cache::Key,
    condition,
    context::Context,
    error::{self, Error, Result},
    node,
    owner::{self, Ownership},
    patch,
    pool::plan::age,
    queue::{Lane, Outcome},
    snapshot::{self, Start, Suspend},
    store::Stored,
};
pub(crate) use state::State;
pub(crate) use triggers::{changed, child_changed, pod_changed};

/// How long the first status waits for a Pod that is about to be ready: then one write says all.
const FIRST_STATUS: Duration = Duration::from_millis(500);
/// How often a Pod or Service is looked at that stands in the way and that no watch brings.
const FOREIGN: Duration = Duration::from_secs(5);

/// Makes a Sandbox what its spec says, and its status what there is.
pub(crate) async fn reconcile(
    context: &Context,
    state: &State,
    key: &Key,
    lane: Lane,
) -> Result<Outcome> {
    let Some(sandbox) = context.find_whole::<Sandbox>(key, lane).await? else {
        return Ok(Outcome::Done);
    };
    if sandbox.meta().deletion_timestamp.is_some() {
        return Ok(Outcome::Done);
    }
    let now = Timestamp::now();
    let left = sandbox
        .spec
        .shutdown_time
        .as_ref()
        .map(|time| time.0.duration_since(now));
    if left.is_some_and(|left| left.as_nanos() <= 0) {
        return expire(context, &sandbox, now).await;
    }
    // Not its age, which is known in whole seconds.
    let is_new =
        sandbox.status.is_none() && context.observed.first_seen(&*sandbox).elapsed() < FIRST_STATUS;
    let children = Children::reconcile(context, &sandbox, lane).await;
    if children.errors.iter().any(|e| matches!(e, Error::Heavy)) {
        return Err(Error::Heavy);
    }
    let new = status::compute(
        &sandbox,
        &children.seen(),
        &context.options.cluster_domain,
        now,
    );
    if is_new
        && children.errors.is_empty()
        && !condition::is_true(&new.conditions, condition::READY)
    {
        return Ok(Outcome::Again(FIRST_STATUS));
    }
    events::record_ownerless(context, &sandbox);
    events::record_blocked(context, state, &sandbox, &new, &children);
    write_status(context, &sandbox, &new).await?;
    if children.errors.iter().any(|e| !e.is_final()) {
        return Ok(Outcome::Failed);
    }
    let over = left.and_then(|left| Duration::try_from(left).ok());
    let is_in_the_way = children.foreign || !children.errors.is_empty();
    let foreign = is_in_the_way.then_some(FOREIGN);
    Ok(over
        .into_iter()
        .chain(foreign)
        .chain(children.again)
        .min()
        .map_or(Outcome::Done, Outcome::Again))
}

async fn write_status(context: &Context, sandbox: &Sandbox, new: &SandboxStatus) -> Result<()> {
    let old = sandbox.status.clone().unwrap_or_default();
    let is_ready = condition::is_true(&new.conditions, condition::READY);
    // Where a Pod was put comes seconds before it runs: one write can say both.
    let mut same_node = new.clone();
    same_node.node_name.clone_from(&old.node_name);
    for c in &mut same_node.conditions {
        if c.type_ == condition::POD_SCHEDULED
            && c.status == "True"
            && let Some(old) = condition::find(&old.conditions, &c.type_)
        {
            *c = old.clone();
        }
    }
    if same_node == old && !is_ready {
        return Ok(());
    }
    let Some(patch) = patch::status(sandbox.status.as_ref(), new)? else {
        return Ok(());
    };
    context
        .patch_status::<Sandbox>(&Key::of(sandbox), &patch)
        .await?;
    context.metrics.sandbox_changed(sandbox, new);
    events::record_changes(context, sandbox, new);
    if is_ready && let Some(seen) = context.observed.forget(sandbox) {
        // The making is known to the second; one that is older than it was seen is from before us.
        let age = age(sandbox, Timestamp::now()).saturating_sub(Duration::from_secs(1));
        context
            .metrics
            .sandbox_ready(sandbox, age.max(seen.elapsed()));
    }
    Ok(())
}

/// Says in the status that the Sandbox is over, then ends it: who waits for it learns why it went.
async fn expire(context: &Context, sandbox: &Sandbox, now: Timestamp) -> Result<Outcome> {
    if !status::is_marked_expired(sandbox) {
        write_status(context, sandbox, &status::expired(sandbox, false, now)).await?;
        return Ok(Outcome::Again(Duration::ZERO));
    }
    for pod in context.store.owned::<Pod>(sandbox) {
        if pod.meta().deletion_timestamp.is_none() {
            context
                .delete(pod.outline(), DeleteParams::default())
                .await?;
        }
    }
    if let Some(service) = context.store.services.get(&Key::of(sandbox))
        && owner::controls(sandbox, &*service)
    {
        let params = DeleteParams::default();
        context.delete(service.outline(), params).await?;
    }
    if sandbox.spec.shutdown_policy == Some(ShutdownPolicy::Delete) {
        context.delete(sandbox, DeleteParams::default()).await?;
        return Ok(Outcome::Done);
    }
    write_status(context, sandbox, &status::expired(sandbox, true, now)).await?;
    Ok(Outcome::Done)
}

/// What belongs to a Sandbox, after it was put right.
#[derive(Default)]
struct Children {
    pod: Option<Arc<Pod>>,
    pod_is_known: bool,
    service: Option<Arc<Service>>,
    errors: Vec<Error>,
    /// Whether something of somebody else's stands in the way.
    foreign: bool,
    /// What holds up a suspension, or makes it lose memory.
    suspension: Option<Suspension>,
    /// Whether the Sandbox has snapshots.
    has_snapshots: bool,
    /// When to look at it again.
    again: Option<Duration>,
}

/// What is to be said of a suspension with memory.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Suspension {
    /// Its Pod stays for now: a reason, and a message for people.
    Held(&'static str, String),
    /// Its memory is lost: a reason, and a message for people.
    Loses(&'static str, String),
}

impl Children {
    async fn reconcile(context: &Context, sandbox: &Sandbox, lane: Lane) -> Self {
        let mut children = Self {
            pod_is_known: true,
            ..Self::default()
        };
        let volumes = volume_claims(context, sandbox).await;
        let may_make_pod = volumes.is_ok();
        children.errors.extend(volumes.err());
        children.has_snapshots = snapshot::has_any(context, sandbox);
        match reconcile_pod(context, sandbox, may_make_pod, lane, &mut children).await {
            Ok(pod) => {
                children.foreign = pod
                    .as_ref()
                    .is_some_and(|p| !owner::controls(sandbox, &**p));
                children.pod = pod;
            }
            Err(e) => {
                children.pod_is_known = false;
                children.errors.push(e);
            }
        }
        // With two Pods, a Service would lead to either.
        if !children
            .errors
            .iter()
            .any(|e| matches!(e, Error::MultiplePods(_)))
        {
            match reconcile_service(context, sandbox, lane).await {
                Ok(service) => children.service = service,
                Err(e) => children.errors.push(e),
            }
        }
        children
    }

    fn seen(&self) -> status::Seen<'_> {
        status::Seen {
            pod: self.pod.as_deref(),
            pod_is_known: self.pod_is_known,
            service: self.service.as_deref(),
            errors: &self.errors,
            suspension: self.suspension.as_ref(),
            has_snapshots: self.has_snapshots,
        }
    }
}

/// Whether a Sandbox may take over an object that nobody owns.
fn may_take_over<K: ResourceExt>(object: &K, sandbox: &Sandbox) -> bool {
    let label = |key: &str| object.labels().get(key).map(String::as_str);
    label(keys::ADOPTABLE) == Some("true")
        || label(keys::SANDBOX_NAME_HASH) == Some(&keys::name_hash(&sandbox.name_any()))
}

/// Refuses what is not the Sandbox's and cannot become it.
fn check_owner<K: ResourceExt>(kind: &'static str, object: &K, sandbox: &Sandbox) -> Result<()> {
    let name = object.name_any();
    match owner::of(object, sandbox) {
        Ownership::Ours => Ok(()),
        Ownership::Nobodys if may_take_over(object, sandbox) => Ok(()),
        Ownership::Nobodys => Err(Error::NotOurs { kind, name }),
        Ownership::Theirs => {
            let owner = owner::controller(object)
                .map(|r| format!("{}/{} (UID: {})", r.kind, r.name, r.uid));
            Err(Error::OwnedByOther {
                kind,
                name,
                owner: owner.unwrap_or_default(),
                sandbox: sandbox.name_any(),
            })
        }
    }
}

/// What `create` would make, or what is already there under its name.
async fn create_or_find<K: Stored>(context: &Context, wanted: &K) -> Result<(Arc<K>, bool)> {
    match context.create(wanted).await {
        Ok(made) => Ok((made, true)),
        Err(e) if error::is_conflict(&e) => match context.fetch(&Key::of(wanted)).await? {
            Some(found) => Ok((found, false)),
            // It went just now: the next try makes it.
            None => Err(e.into()),
        },
        Err(e) => Err(e.into()),
    }
}

async fn volume_claims(context: &Context, sandbox: &Sandbox) -> Result<()> {
    for template in sandbox.spec.volume_claim_templates.iter().flatten() {
        let wanted = volume_claim(sandbox, template);
        let key = Key::of(&wanted);
        let found = match context.store.volume_claims.get(&key) {
            Some(found) => Arc::new(found.outline().clone()),
            None => match create_or_find(context, &wanted).await? {
                (_, true) => continue,
                (found, false) => found,
            },
        };
        check_owner("PVC", &*found, sandbox)?;
        if owner::of(&*found, sandbox) == Ownership::Nobodys {
            let take_over = json!({"metadata": {"ownerReferences": [owner::reference(sandbox)]}});
            context
                .patch::<PersistentVolumeClaim>(&key, &take_over)
                .await?;
        }
    }
    Ok(())
}

fn volume_claim(sandbox: &Sandbox, template: &VolumeClaimTemplate) -> PersistentVolumeClaim {
    let volume = template.metadata.name.as_deref().unwrap_or_default();
    let mut labels = template.metadata.labels.clone().unwrap_or_default();
    labels.insert(
        keys::SANDBOX_NAME_HASH.to_owned(),
        keys::name_hash(&sandbox.name_any()),
    );
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(pod::claim_name(volume, &sandbox.name_any())),
            namespace: sandbox.namespace(),
            labels: Some(labels),
            annotations: template.metadata.annotations.clone(),
            owner_references: Some(vec![owner::reference(sandbox)]),
            ..ObjectMeta::default()
        },
        spec: Some(template.spec.clone()),
        status: None,
    }
}

/// Makes the Pod of a Sandbox what its spec says. A Pod names its volume claims, whoever owns them:
/// until all are the Sandbox's, none `may_make` it; one that is there stays.
async fn reconcile_pod(
    context: &Context,
    sandbox: &Sandbox,
    may_make: bool,
    lane: Lane,
    children: &mut Children,
) -> Result<Option<Arc<Pod>>> {
    let found = find_pod(context, sandbox, lane).await?;
    if sandbox.spec.is_suspended() {
        if let Some(pod) = &found
            && owner::controls(sandbox, &**pod)
        {
            if pod.meta().deletion_timestamp.is_none() {
                suspend(context, sandbox, pod, children).await?;
            }
            return Ok(found);
        }
        note_pod(context, sandbox, None).await?;
        return Ok(found);
    }
    let found = match found {
        Some(found) => found,
        None if !may_make || finished(sandbox).is_some() => return Ok(None),
        None => {
            let mut wanted = pod::desired(sandbox, context.options.evict_warm_pods);
            let start = snapshot::choose(context, sandbox);
            if let (Start::Plain | Start::Lost(..), Some(spec)) = (&start, &mut wanted.spec) {
                node::prefer_warm(context, spec);
            }
            if context.snapshots {
                snapshot::ask(&mut wanted, sandbox, &start);
            }
            let (pod, made) = create_or_find(context, &wanted)
                .await
                .map_err(|e| Error::PodNotMade(Box::new(e)))?;
            if made {
                snapshot::authorize(context, sandbox, &pod).await?;
                events::record_pod(context, sandbox, &pod);
                note_pod(context, sandbox, Some(&pod.name_any())).await?;
                return Ok(Some(pod));
            }
            pod
        }
    };
    check_owner("pod", &*found, sandbox)?;
    if context.snapshots && found.meta().deletion_timestamp.is_none() {
        if snapshot::forget_failed(context, sandbox, &found).await? {
            context.delete(&*found, DeleteParams::default()).await?;
            return Ok(Some(found));
        }
        snapshot::authorize(context, sandbox, &found).await?;
        children.again = snapshot::open_gate(context, sandbox, &found).await?;
    }
    let pod = match pod::metadata_patch(&found, sandbox, context.options.evict_warm_pods) {
        Some(patch) => context.patch::<Pod>(&Key::of(&*found), &patch).await?,
        None => found,
    };
    note_pod(context, sandbox, Some(&pod.name_any())).await?;
    Ok(Some(pod))
}

/// Deletes the Pod of a Sandbox that is suspended, when its memory is kept or need not be.
async fn suspend(
    context: &Context,
    sandbox: &Sandbox,
    pod: &Pod,
    children: &mut Children,
) -> Result<()> {
    children.suspension = match snapshot::before_suspend(context, sandbox, pod).await? {
        Suspend::Delete { lost } => {
            context.delete(pod, DeleteParams::default()).await?;
            lost.map(|(reason, message)| Suspension::Loses(reason, message))
        }
        Suspend::Wait => {
            children.again = Some(FOREIGN);
            let message = "A snapshot of the Pod is being taken";
            Some(Suspension::Held("SnapshotInProgress", message.to_owned()))
        }
        Suspend::Keep { reason, message } => Some(Suspension::Held(reason, message)),
    };
    Ok(())
}

/// The condition that says that the work of a Sandbox is done. It is over with a suspension.
fn finished(sandbox: &Sandbox) -> Option<&Condition> {
    let conditions = sandbox.status.as_ref().map(|s| &s.conditions);
    let finished = conditions.and_then(|all| condition::find(all, condition::FINISHED));
    finished.filter(|c| c.status == "True" && !sandbox.spec.is_suspended())
}

/// The Pod that a Sandbox owns, else one of the name that it is to have.
async fn find_pod(context: &Context, sandbox: &Sandbox, lane: Lane) -> Result<Option<Arc<Pod>>> {
    let mut owned = context.store.owned::<Pod>(sandbox);
    if owned.len() > 1 {
        return Err(Error::MultiplePods(owned.len()));
    }
    if let Some(pod) = owned.pop() {
        return Ok(Some(context.whole(&pod, lane).await?));
    }
    let noted = sandbox.annotations().get(keys::POD_NAME);
    let name = noted.cloned().unwrap_or_else(|| sandbox.name_any());
    let key = Key::new(&sandbox.namespace().unwrap_or_default(), &name);
    if let Some(pod) = context.find_whole(&key, lane).await? {
        return Ok(Some(pod));
    }
    // Pods without our label are in no cache. One in the way shows itself when ours is made; a
    // Sandbox that makes none, or looks for another name, has to ask.
    let is_known_to_be_gone = sandbox.status.as_ref().is_some_and(|s| {
        condition::find(&s.conditions, condition::SUSPENDED).is_some_and(|c| {
            c.status == "True" && c.observed_generation == sandbox.metadata.generation
        })
    });
    if (sandbox.spec.is_suspended() && !is_known_to_be_gone) || name != sandbox.name_any() {
        return context.fetch(&key).await;
    }
    Ok(None)
}

/// Writes down which Pod a Sandbox has, for clients that look there.
async fn note_pod(context: &Context, sandbox: &Sandbox, name: Option<&str>) -> Result<()> {
    if sandbox
        .annotations()
        .get(keys::POD_NAME)
        .map(String::as_str)
        == name
    {
        return Ok(());
    }
    let note = json!({"metadata": {"annotations": {keys::POD_NAME: name}}});
    match context.patch::<Sandbox>(&Key::of(sandbox), &note).await {
        Err(e) if !error::is_not_found(&e) => Err(e.into()),
        _ => Ok(()),
    }
}

async fn reconcile_service(
    context: &Context,
    sandbox: &Sandbox,
    lane: Lane,
) -> Result<Option<Arc<Service>>> {
    let key = Key::of(sandbox);
    let known = context.store.services.get(&key);
    let (service, made) = match (sandbox.spec.service, known) {
        (Some(false), Some(service)) => {
            if owner::controls(sandbox, &*service) {
                let params = DeleteParams::default();
                context.delete(service.outline(), params).await?;
            }
            return Ok(None);
        }
        (Some(false) | None, None) => return Ok(None),
        (None, Some(service)) if owner::controller(&*service).is_none() => return Ok(None),
        (_, Some(service)) => (context.whole(&service, lane).await?, false),
        (Some(true), None) => create_or_find(context, &service::desired(sandbox)).await?,
    };
    if made {
        return Ok(Some(service));
    }
    check_owner("service", &*service, sandbox)?;
    let cluster_ip = service
        .spec
        .as_ref()
        .and_then(|s| s.cluster_ip.clone())
        .unwrap_or_default();
    if !owner::controls(sandbox, &*service) && !matches!(cluster_ip.as_str(), "" | "None") {
        return Err(Error::NotHeadless {
            name: service.name_any(),
            cluster_ip,
        });
    }
    match service::drift(&service, sandbox) {
        Some(patch) => Ok(Some(context.patch::<Service>(&key, &patch).await?)),
        None => Ok(Some(service)),
    }
}
