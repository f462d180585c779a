// SPDX-License-Identifier: Apache-2.0

//! Snapshots of Sandboxes' Pods: asked for by a trigger or by a suspension, taken by the agent of
//! the Pod's node, and restored into the next Pod of the same Sandbox.
//!
//! ```text
//! trigger ─┐                   agent                   new Pod of the Sandbox
//!          ├─► PodSnapshot ──────────► Ready ─────────────────────────────► restored into it,
//! suspend ─┘    (created)       └────► failed                                perhaps again
//! ```
//!
//! The controller writes the spec of a PodSnapshot, and the agent its status. What may be restored
//! into which Pod is said by `spec.restore` alone.

mod build;
mod eligible;
mod restore;
mod suspend;
mod trigger;
mod triggers;

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use kiln_crds::{PodSnapshot, PodSnapshotPolicy, Sandbox, keys};
use kube::{Client, Resource as _, ResourceExt as _, api::DeleteParams};
use serde_json::json;
use tracing::{info, warn};

use crate::{
    cache::{IndexKey, Key},
    condition,
    context::Context,
    error::{self, Result},
    known::Known,
    queue::Outcome,
};
pub(crate) use restore::{Start, ask, authorize, choose, memory_kept, open_gate};
pub(crate) use suspend::{Suspend, before_suspend, forget_failed};
pub(crate) use trigger::reconcile as reconcile_trigger;
pub(crate) use triggers::{changed, policy_changed, trigger_changed};

/// How often it is looked whether the node of a snapshot that is being deleted is still there.
const NODE: Duration = Duration::from_secs(30);

/// How often, and with which pauses, the apiserver is asked for its kinds at a start.
const TRIES: usize = 10;
const PAUSE: Duration = Duration::from_secs(1);

/// Whether the cluster has Pod snapshots that are ours to make: GKE's add-on has kinds of the same
/// names.
pub(crate) async fn are_ours(client: &Client) -> bool {
    let group = format!("{}/{}", PodSnapshot::group(&()), PodSnapshot::version(&()));
    let mut kinds = Vec::new();
    for _ in 0..TRIES {
        match client.list_api_group_resources(&group).await {
            Ok(list) => kinds = list.resources,
            Err(e) if error::is_not_found(&e) => {}
            Err(e) => {
                warn!("ask for the kinds of {group}: {e}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        }
        break;
    }
    let is_ours =
        |categories: &Vec<String>| categories.iter().any(|c| c == keys::SNAPSHOT_CATEGORY);
    let ours = kinds.iter().any(|kind| {
        kind.name == PodSnapshot::plural(&()) && kind.categories.as_ref().is_some_and(is_ours)
    });
    info!(
        "Pod snapshots are {}",
        if ours { "served" } else { "not ours to serve" }
    );
    ours
}

/// Does what a PodSnapshot needs beside its agent: keeps it no longer than its policy says, and lets
/// it go when its files are gone.
pub(crate) async fn reconcile(context: &Context, key: &Key) -> Result<Outcome> {
    let Some(snapshot) = context.store.snapshots.get(key) else {
        return Ok(Outcome::Done);
    };
    if snapshot.meta().deletion_timestamp.is_some() {
        return release(context, &snapshot).await;
    }
    let policy = snapshot.spec.policy_name.as_deref();
    let namespace = &key.namespace;
    let policy = policy.and_then(|name| {
        let key = Key::new(namespace, name);
        context.store.snapshot_policies.get(&key)
    });
    let Some(policy) = policy else {
        return Ok(Outcome::Done);
    };
    match time_left(&snapshot, &policy, Timestamp::now()) {
        Some(left) if left.is_zero() => {
            let params = DeleteParams::default();
            context.delete(snapshot.outline(), params).await?;
            Ok(Outcome::Done)
        }
        left => {
            delete_surplus(context, &snapshot, &policy).await?;
            Ok(left.map_or(Outcome::Done, Outcome::Again))
        }
    }
}

/// Takes the finalizer away when the node has removed the files, or is gone with them.
async fn release(context: &Context, snapshot: &Known<PodSnapshot>) -> Result<Outcome> {
    let status = snapshot.status.clone().unwrap_or_default();
    let node = Key::new("", &snapshot.spec.node_name);
    if !status.files_removed && context.store.nodes.get(&node).is_some() {
        return Ok(Outcome::Again(NODE));
    }
    let Some(whole) = context.fetch::<PodSnapshot>(&Key::of(snapshot)).await? else {
        return Ok(Outcome::Done);
    };
    let left = whole.finalizers().iter();
    let left: Vec<_> = left.filter(|f| *f != keys::SNAPSHOT_FILES).collect();
    let patch = json!({"metadata": {
        "finalizers": left, "resourceVersion": whole.resource_version(),
    }});
    context
        .patch::<PodSnapshot>(&Key::of(&*whole), &patch)
        .await?;
    Ok(Outcome::Done)
}

/// How long a snapshot is still kept; `None` for as long as its Sandbox.
fn time_left(
    snapshot: &PodSnapshot,
    policy: &PodSnapshotPolicy,
    now: Timestamp,
) -> Option<Duration> {
    let timeout = policy.spec.retention_config.as_ref()?;
    let timeout = timeout.last_access_timeout.as_deref()?;
    let timeout: SignedDuration = timeout.parse().ok()?;
    let taken = snapshot.status.as_ref()?.taken_at.as_ref()?.0;
    let left = taken.checked_add(timeout).ok()?.duration_since(now);
    Some(Duration::try_from(left).unwrap_or_default())
}

/// Deletes the oldest snapshots of the Sandbox that are more than its policy allows.
async fn delete_surplus(
    context: &Context,
    snapshot: &PodSnapshot,
    policy: &PodSnapshotPolicy,
) -> Result<()> {
    let groups = policy.spec.snapshot_grouping_rules.as_ref();
    let group = groups.and_then(|rules| rules.group_by_label_value.as_ref());
    let retention = group.and_then(|group| group.group_retention_policy.as_ref());
    let most = retention.and_then(|policy| policy.max_snapshot_count_per_group);
    let Some(most) = most.and_then(|most| usize::try_from(most).ok()) else {
        return Ok(());
    };
    let mut group = of_sandbox(
        context,
        &snapshot.namespace().unwrap_or_default(),
        &snapshot.spec.sandbox.uid,
    );
    group.retain(|s| is_ready(s) && s.spec.policy_name == snapshot.spec.policy_name);
    for old in group.iter().skip(most) {
        context
            .delete(old.outline(), DeleteParams::default())
            .await?;
    }
    Ok(())
}

/// The snapshots of a Sandbox that are not being deleted, the newest first.
fn of_sandbox(context: &Context, namespace: &str, uid: &str) -> Vec<Arc<Known<PodSnapshot>>> {
    let key = IndexKey::Owner {
        namespace: namespace.to_owned(),
        uid: uid.to_owned(),
    };
    let mut all = context.store.snapshots.find(&key);
    all.retain(|s| s.meta().deletion_timestamp.is_none() && s.spec.sandbox.uid == uid);
    // Times are in whole seconds. Upstream's client takes the first name of those of one second.
    all.sort_by_key(|s| {
        let made = s.meta().creation_timestamp.as_ref().map(|t| t.0);
        (std::cmp::Reverse(made), s.name_any())
    });
    all
}

/// Whether a Sandbox has snapshots.
pub(crate) fn has_any(context: &Context, sandbox: &Sandbox) -> bool {
    context.snapshots && !snapshots_of(context, sandbox).is_empty()
}

fn snapshots_of(context: &Context, sandbox: &Sandbox) -> Vec<Arc<Known<PodSnapshot>>> {
    let namespace = sandbox.namespace().unwrap_or_default();
    of_sandbox(context, &namespace, &sandbox.uid().unwrap_or_default())
}

/// Whether a snapshot can be restored, and if not, why; `None` until that is known.
fn outcome(snapshot: &PodSnapshot) -> Option<std::result::Result<(), String>> {
    let conditions = &snapshot.status.as_ref()?.conditions;
    let ready = condition::find(conditions, condition::READY)?;
    Some(match ready.status.as_str() {
        "True" => Ok(()),
        _ => Err(format!("{}: {}", ready.reason, ready.message)),
    })
}

fn is_ready(snapshot: &PodSnapshot) -> bool {
    matches!(outcome(snapshot), Some(Ok(())))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn policy(retention: &Value) -> PodSnapshotPolicy {
        serde_json::from_value(json!({
            "apiVersion": "podsnapshot.gke.io/v1", "kind": "PodSnapshotPolicy",
            "metadata": {"name": "p"},
            "spec": {"storageConfigName": "s", "retentionConfig": retention},
        }))
        .unwrap()
    }

    #[test]
    fn a_snapshot_is_kept_as_long_as_its_policy_says() {
        let snapshot: PodSnapshot = serde_json::from_value(json!({
            "apiVersion": "podsnapshot.gke.io/v1", "kind": "PodSnapshot",
            "metadata": {"name": "s"},
            "spec": {
                "nodeName": "n", "podSpecDigest": "d",
                "pod": {"name": "p", "uid": "p1"}, "sandbox": {"name": "b", "uid": "b1"},
            },
            "status": {"takenAt": "2026-01-01T00:00:00Z"},
        }))
        .unwrap();
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        for (timeout, left) in [
            (json!({}), None),
            (json!({"lastAccessTimeout": "nonsense"}), None),
            (json!({"lastAccessTimeout": "90m"}), Some(1800)),
            (json!({"lastAccessTimeout": "1h0m0s"}), Some(0)),
            (json!({"lastAccessTimeout": "30m"}), Some(0)),
        ] {
            let found = time_left(&snapshot, &policy(&timeout), now);
            assert_eq!(found, left.map(Duration::from_secs), "{timeout}");
        }
    }
}
