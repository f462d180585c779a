// SPDX-License-Identifier: Apache-2.0

//! A Sandbox's next Pod: from which snapshot it is restored, and what is said of that.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{
        NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodCondition,
        PodReadinessGate, PodSpec,
    },
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kiln_crds::{PodSnapshot, Sandbox, keys};
use kube::{
    Api, ResourceExt as _,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{
    build, is_ready, snapshots_of,
    suspend::{NOT_ELIGIBLE, is_of_suspension},
};
use crate::{
    cache::Key,
    condition::{self, Is, MEMORY_KEPT, condition},
    context::Context,
    error::Result,
    known::Known,
    request::FIELD_MANAGER,
};

/// Condition of a Pod by which clients know that it was restored. Its message is the snapshot's name.
const POD_RESTORED: &str = "PodRestored";

/// Condition of a Pod without which it is not ready: whether it was restored is known.
const GATE: &str = "kiln.dev/restore-decided";

/// How long after its containers are ready a Pod waits for word of its restore.
const WORD: Duration = Duration::from_secs(30);

/// Start of a Sandbox's next Pod.
pub(crate) enum Start {
    /// The Pod starts as any other.
    Plain,
    /// The Pod is to be restored from this snapshot.
    From(std::sync::Arc<Known<PodSnapshot>>),
    /// The Pod starts without the memory of the one before: a reason, and a message for people.
    Lost(&'static str, String),
}

/// Whether the last thing that happened to a Sandbox was a suspension: its conditions say so until
/// it has another Pod.
fn was_suspended(sandbox: &Sandbox) -> bool {
    let conditions = sandbox.status.as_ref().map(|s| &s.conditions[..]);
    let conditions = conditions.unwrap_or_default();
    let kept = condition::find(conditions, MEMORY_KEPT);
    condition::is_true(conditions, condition::SUSPENDED)
        || kept.is_some_and(|kept| kept.status == "Unknown")
}

/// Chooses what the next Pod of a Sandbox starts from. Only a Sandbox that was suspended is restored:
/// one whose Pod has gone otherwise has written to its volumes since.
pub(crate) fn choose(context: &Context, sandbox: &Sandbox) -> Start {
    if let Some((reason, message)) = lost(sandbox) {
        return Start::Lost(reason, message);
    }
    if !context.snapshots {
        return Start::Plain;
    }
    let mut all = snapshots_of(context, sandbox);
    all.retain(|snapshot| is_ready(snapshot));
    // A Sandbox that ran again before its suspension was through has no condition that says so.
    let is_left = |s: &PodSnapshot| is_of_suspension(s) && s.spec.restore.is_none();
    if !was_suspended(sandbox) && !all.iter().any(|snapshot| is_left(snapshot)) {
        return Start::Plain;
    }
    let annotations = sandbox.spec.pod_template.metadata.annotations.as_ref();
    let named = annotations.and_then(|a| a.get(keys::SNAPSHOT_NAME));
    let found = match named {
        Some(name) => all.iter().find(|s| s.name_any() == *name),
        None => all.first(),
    };
    let Some(snapshot) = found else {
        return named.map_or(Start::Plain, |name| {
            let message = format!("this Sandbox has no snapshot {name} that is ready");
            Start::Lost("NoSnapshot", message)
        });
    };
    let name = snapshot.name_any();
    if snapshot.spec.pod_spec_digest != build::digest(&sandbox.spec.pod_template.spec) {
        let message = format!("the Pod template was changed since snapshot {name}");
        return Start::Lost("TemplateChanged", message);
    }
    let node = &snapshot.spec.node_name;
    if context.store.nodes.get(&Key::new("", node)).is_none() {
        let message = format!("node {node}, which has snapshot {name}, is gone");
        return Start::Lost("NodeGone", message);
    }
    Start::From(std::sync::Arc::clone(snapshot))
}

/// Why the suspension of a Sandbox has lost its memory, if it has.
fn lost(sandbox: &Sandbox) -> Option<(&'static str, String)> {
    let conditions = &sandbox.status.as_ref()?.conditions;
    let kept = condition::find(conditions, MEMORY_KEPT)?;
    let is_lost = kept.status == "False" && kept.reason == NOT_ELIGIBLE;
    is_lost.then(|| (NOT_ELIGIBLE, kept.message.clone()))
}

/// Has a Pod that is about to be made be restored, or say why it is not, and what it is made from.
pub(crate) fn ask(pod: &mut Pod, sandbox: &Sandbox, start: &Start) {
    let digest = build::digest(&sandbox.spec.pod_template.spec);
    pod.annotations_mut()
        .insert(keys::POD_SPEC_DIGEST.to_owned(), digest);
    let (key, value) = match start {
        Start::Plain => return,
        Start::Lost(reason, message) => (keys::MEMORY_LOST, format!("{reason}: {message}")),
        Start::From(snapshot) => {
            if let Some(spec) = &mut pod.spec {
                bind_to(spec, &snapshot.spec.node_name);
                for container in &mut spec.containers {
                    let image = snapshot.spec.images.get(&container.name).cloned();
                    container.image = image.or(container.image.take());
                }
                let gate = PodReadinessGate {
                    condition_type: GATE.to_owned(),
                };
                spec.readiness_gates.get_or_insert_default().push(gate);
            }
            (keys::RESTORE, snapshot.name_any())
        }
    };
    pod.annotations_mut().insert(key.to_owned(), value);
}

/// Has a Pod scheduled to one node alone.
fn bind_to(spec: &mut PodSpec, node: &str) {
    let name = NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: "In".to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let affinity = spec.affinity.get_or_insert_default();
    let affinity: &mut NodeAffinity = affinity.node_affinity.get_or_insert_default();
    let required: &mut NodeSelector = affinity
        .required_during_scheduling_ignored_during_execution
        .get_or_insert_default();
    if required.node_selector_terms.is_empty() {
        required
            .node_selector_terms
            .push(NodeSelectorTerm::default());
    }
    // Each term by itself is enough.
    for term in &mut required.node_selector_terms {
        term.match_fields.get_or_insert_default().push(name.clone());
    }
}

/// The snapshot that a Sandbox's Pod asks for.
fn asked(
    context: &Context,
    sandbox: &Sandbox,
    pod: &Pod,
) -> Option<std::sync::Arc<Known<PodSnapshot>>> {
    let name = pod.annotations().get(keys::RESTORE)?;
    let mut all = snapshots_of(context, sandbox).into_iter();
    all.find(|snapshot| snapshot.name_any() == *name)
}

/// Names a Pod in the snapshot that it asks for: from then on its node may restore it.
pub(crate) async fn authorize(context: &Context, sandbox: &Sandbox, pod: &Pod) -> Result<()> {
    let Some(snapshot) = asked(context, sandbox, pod) else {
        return Ok(());
    };
    let uid = pod.uid().unwrap_or_default();
    let is_named = snapshot
        .spec
        .restore
        .as_ref()
        .is_some_and(|r| r.pod_uid == uid);
    if !is_named {
        let patch = json!({"spec": {"restore": {"podUID": uid}}});
        context
            .patch::<PodSnapshot>(&Key::of(&*snapshot), &patch)
            .await?;
    }
    Ok(())
}

/// Lets a Pod become ready when it is known whether it was restored, and says so in its conditions.
/// Returns when to look again.
pub(crate) async fn open_gate(
    context: &Context,
    sandbox: &Sandbox,
    pod: &Pod,
) -> Result<Option<Duration>> {
    if !pod.annotations().contains_key(keys::RESTORE) {
        return Ok(None);
    }
    let snapshot = asked(context, sandbox, pod);
    if find(pod, GATE).is_some() {
        // What a suspension has taken is for one resume.
        if let Some(snapshot) = snapshot.filter(|s| is_of_suspension(s)) {
            let params = DeleteParams::default();
            context.delete(snapshot.outline(), params).await?;
        }
        return Ok(None);
    }
    let status = snapshot.as_ref().and_then(|s| s.status.as_ref());
    let uid = pod.uid().unwrap_or_default();
    let word = status
        .and_then(|s| s.restored.clone())
        .filter(|r| r.pod_uid == uid);
    let failure = match word {
        Some(word) => word.failure,
        None if snapshot.is_none() => Some("the snapshot was deleted".to_owned()),
        None => match find(pod, "ContainersReady").map(since) {
            None => return Ok(None),
            Some(since) if since < WORD => return Ok(Some(WORD)),
            Some(_) => Some("its node has not said what came of the restore".to_owned()),
        },
    };
    let name = pod
        .annotations()
        .get(keys::RESTORE)
        .cloned()
        .unwrap_or_default();
    let restored = match failure {
        None => pod_condition(POD_RESTORED, "True", "Restored", &name),
        Some(why) => pod_condition(POD_RESTORED, "False", "RestoreFailed", &why),
    };
    let patch = json!({"status": {"conditions": [
        restored, pod_condition(GATE, "True", "Decided", ""),
    ]}});
    let pods: Api<Pod> =
        Api::namespaced(context.client.clone(), &pod.namespace().unwrap_or_default());
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let _writing = context.metrics.write::<Pod>("PATCH", "status");
    pods.patch_status(&pod.name_any(), &params, &Patch::Strategic(patch))
        .await?;
    Ok(None)
}

fn pod_condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({
        "type": kind, "status": status, "reason": reason, "message": message,
        "lastTransitionTime": Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
    })
}

/// A condition of a Pod that is true.
fn find<'a>(pod: &'a Pod, kind: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    conditions.find(|c| c.type_ == kind && c.status == "True")
}

/// How long a condition has been as it is.
fn since(condition: &PodCondition) -> Duration {
    let changed = condition.last_transition_time.as_ref();
    let since = changed.map(|time| Timestamp::now().duration_since(time.0));
    since
        .and_then(|since| Duration::try_from(since).ok())
        .unwrap_or_default()
}

/// Whether the memory of a Sandbox was kept, by what its Pod says.
pub(crate) fn memory_kept(sandbox: &Sandbox, pod: &Pod) -> Option<Condition> {
    let generation = sandbox.metadata.generation;
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    if let Some(restored) = conditions.find(|c| c.type_ == POD_RESTORED) {
        let message = restored.message.as_deref().unwrap_or_default();
        let (is, reason, message) = match restored.status.as_str() {
            "True" => (
                Is::True,
                "Restored",
                format!("restored from snapshot {message}"),
            ),
            _ => (Is::False, "RestoreFailed", message.to_owned()),
        };
        return Some(condition(MEMORY_KEPT, is, reason, message, generation));
    }
    let lost = pod.annotations().get(keys::MEMORY_LOST)?;
    let (reason, message) = lost.split_once(": ")?;
    Some(condition(
        MEMORY_KEPT,
        Is::False,
        reason,
        message,
        generation,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_bound_to_the_node_in_each_of_its_terms() {
        let mut spec = PodSpec::default();
        bind_to(&mut spec, "n1");
        let terms = |spec: &PodSpec| -> Value {
            let affinity = serde_json::to_value(&spec.affinity).unwrap();
            affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"].clone()
        };
        let field = json!([{"key": "metadata.name", "operator": "In", "values": ["n1"]}]);
        assert_eq!(terms(&spec), json!([{"matchFields": field}]));
        let zone = |zone: &str| json!({"matchExpressions": [{"key": "zone", "operator": "In", "values": [zone]}]});
        let mut spec: PodSpec = serde_json::from_value(json!({"containers": [], "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [zone("a"), zone("b")],
            }},
        }}))
        .unwrap();
        bind_to(&mut spec, "n1");
        for term in terms(&spec).as_array().unwrap() {
            assert_eq!(term["matchFields"], field);
            assert!(term["matchExpressions"].is_array());
        }
    }
}
