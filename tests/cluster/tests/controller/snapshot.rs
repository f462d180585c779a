// SPDX-License-Identifier: Apache-2.0

//! Snapshots of Sandboxes' Pods. The cases do what the agent of a node does: they report.

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kiln_crds::{
    PodSnapshot, PodSnapshotManualTrigger, PodSnapshotPolicy, PodSnapshotStorageConfig, Sandbox,
    SandboxNode, keys,
};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::env::{Env, Namespace, line, same};

/// Pods of Sandboxes that a policy is for.
const MARKED: &str = "kept.example/yes";

/// Makes what an administrator makes for a namespace.
async fn allow(env: &Env, ns: &Namespace<'_>) -> Result<()> {
    let storage: Api<PodSnapshotStorageConfig> = Api::all(env.plane.client());
    let config: PodSnapshotStorageConfig = serde_json::from_value(json!({
        "metadata": {"name": "on-the-node"},
        "spec": {"snapshotStorageConfig": {"local": {}}},
    }))?;
    // Another case may have made it.
    storage.create(&PostParams::default(), &config).await.ok();
    let spec = json!({
        "storageConfigName": "on-the-node",
        "selector": {"matchExpressions": [{"key": MARKED, "operator": "Exists"}]},
    });
    ns.make::<PodSnapshotPolicy>("all", json!({ "spec": spec }))
        .await?;
    Ok(())
}

/// A Sandbox that is ready, and its Pod. The agent of its node has reported.
async fn sandbox(env: &Env, ns: &Namespace<'_>, name: &str, annotations: Value) -> Result<Pod> {
    let metadata = json!({"labels": {MARKED: "yes"}, "annotations": annotations});
    ns.sandbox(name, json!({"podTemplate": {"metadata": metadata}}))
        .await?;
    ns.until_condition::<Sandbox>(name, "Ready", "True").await?;
    let pod: Pod = ns.get(name).await?;
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone());
    let node = SandboxNode::new(&node.context("no node")?, Default::default());
    let nodes: Api<SandboxNode> = Api::all(env.plane.client());
    nodes.create(&PostParams::default(), &node).await.ok();
    Ok(pod)
}

async fn trigger(ns: &Namespace<'_>, name: &str, pod: &str) -> Result<()> {
    ns.make::<PodSnapshotManualTrigger>(name, json!({"spec": {"targetPod": pod}}))
        .await
        .map(drop)
}

async fn until_triggered(ns: &Namespace<'_>, name: &str, begins: &str) -> Result<Option<String>> {
    ns.until(name, begins, |trigger: &PodSnapshotManualTrigger| {
        let status = trigger.status.as_ref()?;
        let line = line(&status.conditions, "Triggered")?;
        let created = status.snapshot_created.as_ref().map(|s| s.name.clone());
        line.starts_with(begins).then_some(created)
    })
    .await
}

/// Waits for a snapshot of the Pod with this UID.
async fn asked(ns: &Namespace<'_>, pod: &Pod) -> Result<PodSnapshot> {
    let uid = pod.uid();
    kiln_tests::wait::until("a PodSnapshot", kiln_tests::wait::SOON, async || {
        let all = ns.list::<PodSnapshot>().await.ok()?;
        all.into_iter().find(|s| {
            Some(&s.spec.pod.uid) == uid.as_ref() && s.metadata.deletion_timestamp.is_none()
        })
    })
    .await
}

/// Reports as the agent of a node does.
async fn report(ns: &Namespace<'_>, snapshot: &str, status: Value) -> Result<()> {
    let api: Api<PodSnapshot> = ns.api();
    let patch = Patch::Merge(json!({ "status": status }));
    api.patch_status(snapshot, &PatchParams::default(), &patch)
        .await?;
    Ok(())
}

fn ready(status: &str, reason: &str) -> Value {
    let now = format!("{:.0}", Timestamp::now());
    json!({
        "conditions": [{
            "type": "Ready", "status": status, "reason": reason, "message": "as it went",
            "lastTransitionTime": now,
        }],
        "takenAt": now, "sizeBytes": 1000,
    })
}

async fn mode(ns: &Namespace<'_>, sandbox: &str, mode: &str) -> Result<()> {
    let patch = json!({"spec": {"operatingMode": mode}});
    ns.patch::<Sandbox>(sandbox, patch).await.map(drop)
}

/// The Pod that has come after `old`.
async fn next_pod(ns: &Namespace<'_>, old: &Pod) -> Result<Pod> {
    let (name, uid) = (old.name_any(), old.uid());
    ns.until(&name, "another Pod", |pod: &Pod| {
        (pod.uid() != uid).then(|| pod.clone())
    })
    .await
}

fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.annotations().get(key).map(String::as_str)
}

pub(crate) async fn a_client_has_a_sandbox_snapshotted_and_restored(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    allow(env, &ns).await?;
    let old = sandbox(env, &ns, "box", json!({})).await?;
    trigger(&ns, "first", "box").await?;
    let snapshot = asked(&ns, &old).await?;
    let name = snapshot.name_any();
    let hash = snapshot.labels().get(keys::SANDBOX_NAME_HASH);
    same("label", &hash, &Some(&keys::name_hash("box")))?;
    let origin = snapshot.annotations().get(keys::ORIGIN_POD);
    same("origin", &origin.map(String::as_str), &Some("box"))?;
    report(&ns, &name, ready("True", "AllSnapshotsAvailable")).await?;
    let created = until_triggered(&ns, "first", "True Complete").await?;
    same("snapshot", &created.as_ref(), &Some(&name))?;

    mode(&ns, "box", "Suspended").await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "True")
        .await?;
    mode(&ns, "box", "Running").await?;
    let pod = next_pod(&ns, &old).await?;
    same(
        "annotation",
        &annotation(&pod, keys::RESTORE),
        &Some(&*name),
    )?;
    let node = pod.spec.as_ref().and_then(|s| s.node_name.clone());
    same("node", &node.as_ref(), &Some(&snapshot.spec.node_name))?;
    let uid = pod.uid();
    ns.until(&name, "the Pod's name", |s: &PodSnapshot| {
        let named = s.spec.restore.as_ref().map(|r| r.pod_uid.clone());
        (named == uid).then_some(())
    })
    .await?;
    report(&ns, &name, json!({"restored": {"podUID": uid}})).await?;
    ns.until("box", "PodRestored", |pod: &Pod| {
        let conditions = pod.status.as_ref()?.conditions.as_ref()?;
        let restored = conditions.iter().find(|c| c.type_ == "PodRestored")?;
        let is = restored.status == "True" && restored.message.as_deref() == Some(&name);
        is.then_some(())
    })
    .await?;
    ns.until_condition::<Sandbox>("box", "MemoryKept", "True Restored")
        .await?;
    // It is the client's, and stays until that deletes it.
    ns.delete::<PodSnapshot>(&name).await?;
    report(&ns, &name, json!({"filesRemoved": true})).await?;
    ns.until_gone::<PodSnapshot>(&name).await
}

pub(crate) async fn a_suspension_waits_for_its_snapshot(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let old = sandbox(env, &ns, "box", json!({keys::ON_SUSPEND: "snapshot"})).await?;
    mode(&ns, "box", "Suspended").await?;
    let snapshot = asked(&ns, &old).await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "False SnapshotInProgress")
        .await?;
    report(&ns, &snapshot.name_any(), ready("False", "StoreFull")).await?;
    let why = "False SnapshotFailed: StoreFull: as it went";
    ns.until_condition::<Sandbox>("box", "Suspended", why)
        .await?;
    same("the Pod", &ns.get::<Pod>("box").await?.uid(), &old.uid())?;

    // The next suspension takes another.
    mode(&ns, "box", "Running").await?;
    report(&ns, &snapshot.name_any(), json!({"filesRemoved": true})).await?;
    ns.until_gone::<PodSnapshot>(&snapshot.name_any()).await?;
    mode(&ns, "box", "Suspended").await?;
    let snapshot = asked(&ns, &old).await?;
    report(
        &ns,
        &snapshot.name_any(),
        ready("True", "AllSnapshotsAvailable"),
    )
    .await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "True")
        .await?;
    ns.until_condition::<Sandbox>("box", "MemoryKept", "Unknown Suspended")
        .await?;

    mode(&ns, "box", "Running").await?;
    let pod = next_pod(&ns, &old).await?;
    let failure = json!({"restored": {"podUID": pod.uid(), "failure": "it is damaged"}});
    report(&ns, &snapshot.name_any(), failure).await?;
    ns.until_condition::<Sandbox>("box", "MemoryKept", "False RestoreFailed: it is damaged")
        .await?;
    // It was for one resume.
    ns.until(&snapshot.name_any(), "its end", |s: &PodSnapshot| {
        s.metadata.deletion_timestamp.as_ref().map(drop)
    })
    .await?;
    report(&ns, &snapshot.name_any(), json!({"filesRemoved": true})).await?;
    ns.until_gone::<PodSnapshot>(&snapshot.name_any()).await
}

pub(crate) async fn what_cannot_be_restored_starts_cold_and_says_why(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let wish = json!({keys::ON_SUSPEND: "snapshot"});
    let others = sandbox(env, &ns, "other", wish.clone()).await?;
    let old = sandbox(env, &ns, "box", wish).await?;
    for (name, pod) in [("other", &others), ("box", &old)] {
        mode(&ns, name, "Suspended").await?;
        let snapshot = asked(&ns, pod).await?.name_any();
        report(&ns, &snapshot, ready("True", "AllSnapshotsAvailable")).await?;
        ns.until_condition::<Sandbox>(name, "Suspended", "True")
            .await?;
    }
    // Another Sandbox's memory is nobody else's.
    let theirs = asked(&ns, &others).await?.name_any();
    let named = json!({"spec": {"podTemplate": {"metadata": {
        "annotations": {keys::SNAPSHOT_NAME: theirs, keys::RESTORE: theirs},
    }}}});
    ns.patch::<Sandbox>("box", named).await?;
    mode(&ns, "box", "Running").await?;
    let pod = next_pod(&ns, &old).await?;
    same("annotation", &annotation(&pod, keys::RESTORE), &None)?;
    ns.until_condition::<Sandbox>("box", "MemoryKept", "False NoSnapshot")
        .await?;
    let snapshot: PodSnapshot = ns.get(&theirs).await?;
    ensure!(
        snapshot.spec.restore.is_none(),
        "it was given to another Sandbox"
    );

    let image = json!({"spec": {"podTemplate": {"spec": {
        "containers": [{"name": "main", "image": "pause:2"}],
    }}}});
    ns.patch::<Sandbox>("other", image).await?;
    mode(&ns, "other", "Running").await?;
    next_pod(&ns, &others).await?;
    ns.until_condition::<Sandbox>("other", "MemoryKept", "False TemplateChanged")
        .await?;
    Ok(())
}

pub(crate) async fn what_a_pod_ran_counts_and_not_what_its_template_says(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let wish = json!({keys::ON_SUSPEND: "snapshot"});
    let old = sandbox(env, &ns, "box", wish.clone()).await?;
    let image = json!({"spec": {"podTemplate": {"spec": {
        "containers": [{"name": "main", "image": "pause:2"}],
    }}}});
    ns.patch::<Sandbox>("box", image).await?;
    mode(&ns, "box", "Suspended").await?;
    let snapshot = asked(&ns, &old).await?.name_any();
    report(&ns, &snapshot, ready("True", "AllSnapshotsAvailable")).await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "True")
        .await?;
    mode(&ns, "box", "Running").await?;
    ns.until_condition::<Sandbox>("box", "MemoryKept", "False TemplateChanged")
        .await?;

    // One that is to run again before it was suspended is restored all the same.
    let old = sandbox(env, &ns, "quick", wish).await?;
    mode(&ns, "quick", "Suspended").await?;
    let snapshot = asked(&ns, &old).await?.name_any();
    mode(&ns, "quick", "Running").await?;
    ns.until_condition::<Sandbox>("quick", "Suspended", "False NotSuspended")
        .await?;
    report(&ns, &snapshot, ready("True", "AllSnapshotsAvailable")).await?;
    let pod = next_pod(&ns, &old).await?;
    let restore = annotation(&pod, keys::RESTORE);
    same("annotation", &restore, &Some(&*snapshot))
}

pub(crate) async fn a_trigger_says_why_there_is_no_snapshot(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    sandbox(env, &ns, "box", json!({})).await?;
    let containers = json!({"containers": [{"name": "c", "image": "pause"}]});
    ns.make::<Pod>("stranger", json!({ "spec": containers }))
        .await?;
    for (pod, why) in [
        ("box", "no PodSnapshotPolicy"),
        ("stranger", "is no Sandbox's"),
        ("nobody", "is not there"),
    ] {
        trigger(&ns, pod, pod).await?;
        let begins = "False Failed";
        until_triggered(&ns, pod, begins).await?;
        let trigger: PodSnapshotManualTrigger = ns.get(pod).await?;
        let conditions = trigger.status.unwrap_or_default().conditions;
        let said = line(&conditions, "Triggered").unwrap_or_default();
        ensure!(said.contains(why), "{pod}: {said}");
    }
    allow(env, &ns).await?;
    let network = json!({"podTemplate": {
        "metadata": {"labels": {MARKED: "yes"}}, "spec": {"hostUsers": false},
    }});
    ns.sandbox("users", network).await?;
    ns.until_condition::<Sandbox>("users", "Ready", "True")
        .await?;
    trigger(&ns, "users", "users").await?;
    until_triggered(&ns, "users", "False Failed: no snapshot can be taken").await?;
    // A suspension that must not lose memory does not happen.
    let required = json!({"metadata": {"annotations": {keys::ON_SUSPEND: "snapshot-required"}}});
    ns.patch::<Sandbox>("users", required).await?;
    mode(&ns, "users", "Suspended").await?;
    ns.until_condition::<Sandbox>("users", "Suspended", "False NotEligible")
        .await?;
    let wanted = json!({"metadata": {"annotations": {keys::ON_SUSPEND: "snapshot"}}});
    ns.patch::<Sandbox>("users", wanted).await?;
    ns.until_condition::<Sandbox>("users", "Suspended", "True")
        .await?;
    ns.until_condition::<Sandbox>("users", "MemoryKept", "False NotEligible")
        .await?;
    Ok(())
}
