// SPDX-License-Identifier: Apache-2.0

//! A trigger: one snapshot of the Pod that it names, if a policy lets it.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::Pod,
    apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time},
};
use kiln_crds::{PodSnapshotManualTrigger, PodSnapshotPolicy, Sandbox, TriggerType};
use kube::{Resource as _, ResourceExt as _};
use serde_json::json;

use super::{build, eligible, outcome, snapshots_of};
use crate::{
    cache::Key,
    context::Context,
    error::{self, Result},
    known::Known,
    owner,
    pool::plan::age,
    queue::{Lane, Outcome},
};

/// How long a trigger waits for the agent of the Pod's node; upstream's client waits no longer.
const PATIENCE: Duration = Duration::from_secs(170);

/// Condition of a trigger.
const TRIGGERED: &str = "Triggered";

/// Has the snapshot taken that a trigger asks for, and says what came of it.
pub(crate) async fn reconcile(context: &Context, key: &Key, lane: Lane) -> Result<Outcome> {
    let Some(trigger) = context.store.triggers.get(key) else {
        return Ok(Outcome::Done);
    };
    let is_over = trigger
        .status
        .as_ref()
        .is_some_and(|s| !s.conditions.is_empty());
    if is_over || trigger.meta().deletion_timestamp.is_some() {
        return Ok(Outcome::Done);
    }
    // Nobody else has a name for it before it is there.
    let name = trigger.uid().unwrap_or_default();
    let snapshot = context
        .store
        .snapshots
        .get(&Key::new(&key.namespace, &name));
    let done = match &snapshot {
        Some(snapshot) => outcome(snapshot),
        None => match begin(context, &trigger, &name, lane).await? {
            Begun::Made => None,
            Begun::TooSoon(left) => return Ok(Outcome::Again(left)),
            Begun::Refused(why) => Some(Err(why)),
        },
    };
    let left = PATIENCE.saturating_sub(age(&*trigger, Timestamp::now()));
    match done {
        None if left.is_zero() => {
            let why = "the agent of the Pod's node does not answer".to_owned();
            finish(context, key, Err(why)).await
        }
        None => Ok(Outcome::Again(left)),
        Some(Ok(())) => finish(context, key, Ok(name)).await,
        Some(Err(why)) => finish(context, key, Err(why)).await,
    }
}

/// Outcome of an attempt to make a PodSnapshot.
enum Begun {
    Made,
    /// Its Sandbox had one made within this second.
    TooSoon(Duration),
    /// There can be none, for this reason.
    Refused(String),
}

/// Least time between two snapshots of a Sandbox: the newest is told by the second that it was made in.
const SPACING: Duration = Duration::from_millis(1100);

/// Makes the PodSnapshot, or says why there can be none.
async fn begin(
    context: &Context,
    trigger: &PodSnapshotManualTrigger,
    name: &str,
    lane: Lane,
) -> Result<Begun> {
    let refused = |why: String| Ok(Begun::Refused(why));
    let namespace = trigger.namespace().unwrap_or_default();
    let target = &trigger.spec.target_pod;
    let key = Key::new(&namespace, target);
    let Some(pod) = context.store.pods.get(&key) else {
        return refused(format!("Pod {target} is not there, or is no Sandbox's"));
    };
    let Some(sandbox) = sandbox_of(context, &pod, lane).await? else {
        return refused(format!("Pod {target} is no Sandbox's"));
    };
    if let Some(last) = snapshots_of(context, &sandbox).first() {
        let left = SPACING.saturating_sub(age(&**last, Timestamp::now()));
        if !left.is_zero() {
            return Ok(Begun::TooSoon(left));
        }
    }
    let Some(pod) = context.fetch::<Pod>(&key).await? else {
        return refused(format!("Pod {target} is gone"));
    };
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let Some(node) = node.filter(|_| phase == Some("Running")) else {
        return refused(format!("Pod {target} does not run"));
    };
    let policy = match policy_for(context, &pod) {
        Ok(policy) => policy,
        Err(why) => return refused(why),
    };
    if let Some(why) = eligible::ineligibility(&sandbox) {
        return refused(format!("no snapshot can be taken of the Pod: {why}"));
    }
    let after = policy.spec.trigger_config.post_checkpoint;
    let policy = Some(policy.name_any());
    let wanted = build::snapshot(name, &sandbox, &pod, &node, after, policy);
    match context.create(&wanted).await {
        Err(e) if !error::is_conflict(&e) => Err(e.into()),
        _ => Ok(Begun::Made),
    }
}

/// The Sandbox that a Pod belongs to, by namespace and UID.
async fn sandbox_of(
    context: &Context,
    pod: &Known<Pod>,
    lane: Lane,
) -> Result<Option<Arc<Sandbox>>> {
    let Some(owner) = owner::controller(pod).filter(|o| owner::is_kind::<Sandbox>(o)) else {
        return Ok(None);
    };
    let key = Key::new(&pod.namespace().unwrap_or_default(), &owner.name);
    let sandbox = context.find_whole::<Sandbox>(&key, lane).await?;
    Ok(sandbox.filter(|sandbox| owner::controls(&**sandbox, pod)))
}

/// The first policy, by name, that lets snapshots of a Pod be asked for.
fn policy_for(
    context: &Context,
    pod: &Pod,
) -> std::result::Result<Arc<Known<PodSnapshotPolicy>>, String> {
    let namespace = pod.namespace();
    let mut policies = context.store.snapshot_policies.all();
    policies.retain(|policy| {
        policy.namespace() == namespace
            && policy.spec.trigger_config.kind == TriggerType::Manual
            && selects(&policy.spec.selector, pod)
    });
    policies.sort_by_key(|policy| policy.name_any());
    let Some(policy) = policies.into_iter().next() else {
        return Err(
            "no PodSnapshotPolicy of type manual in this namespace selects the Pod".to_owned(),
        );
    };
    let name = &policy.spec.storage_config_name;
    let storage = context.store.snapshot_storage.get(&Key::new("", name));
    let is_local = storage.map(|s| s.spec.snapshot_storage_config.local.is_some());
    match is_local {
        Some(true) => Ok(policy),
        Some(false) => Err(format!(
            "PodSnapshotStorageConfig {name} is not local, and no other storage is supported"
        )),
        None => Err(format!("there is no PodSnapshotStorageConfig {name}")),
    }
}

/// Whether a selector matches the labels of a Pod.
fn selects(selector: &LabelSelector, pod: &Pod) -> bool {
    let selector: std::result::Result<kube::core::Selector, _> = selector.clone().try_into();
    selector.is_ok_and(|selector| {
        use kube::core::SelectorExt as _;
        selector.matches(pod.labels())
    })
}

async fn finish(
    context: &Context,
    key: &Key,
    done: std::result::Result<String, String>,
) -> Result<Outcome> {
    let (status, reason, message) = match &done {
        Ok(name) => ("True", "Complete", format!("snapshot {name} was taken")),
        Err(why) => ("False", "Failed", why.clone()),
    };
    let triggered = Condition {
        type_: TRIGGERED.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message,
        last_transition_time: Time(Timestamp::now()),
        observed_generation: None,
    };
    let created = done.ok().map(|name| json!({ "name": name }));
    let patch = json!({"status": {"conditions": [triggered], "snapshotCreated": created}});
    context
        .patch_status::<PodSnapshotManualTrigger>(key, &patch)
        .await?;
    Ok(Outcome::Done)
}
