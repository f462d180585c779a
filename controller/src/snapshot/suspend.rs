// SPDX-License-Identifier: Apache-2.0

//! A Sandbox that is suspended: whether its Pod may be deleted, or has to be snapshotted first.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kiln_crds::{PodSnapshot, PostCheckpoint, Sandbox, keys};
use kube::{Resource as _, ResourceExt as _, api::DeleteParams};

use super::{build, eligible, outcome, snapshots_of};
use crate::{
    cache::Key,
    context::Context,
    error::{self, Result},
    pool::plan::age,
};

/// How long the agent of a node may take for a snapshot.
const PATIENCE: Duration = Duration::from_secs(300);

/// Fate of the Pod of a Sandbox that is suspended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Suspend {
    /// The Pod is deleted. If its memory is lost, this says why.
    Delete { lost: Option<Lost> },
    /// A snapshot of the Pod is being taken.
    Wait,
    /// The Pod stays, because its memory must not be lost.
    Keep {
        reason: &'static str,
        message: String,
    },
}

/// Why memory is lost: a reason, and a message for people.
pub(crate) type Lost = (&'static str, String);

/// Wish of a Sandbox for its suspension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Nothing is kept.
    None,
    /// Memory is kept if that is possible.
    Snapshot,
    /// The Sandbox is not suspended without its memory.
    Required,
}

fn wish(sandbox: &Sandbox) -> Wish {
    let of_template = sandbox.spec.pod_template.metadata.annotations.as_ref();
    let own = sandbox.annotations().get(keys::ON_SUSPEND);
    let wish = own.or_else(|| of_template?.get(keys::ON_SUSPEND));
    match wish.map(String::as_str) {
        Some("snapshot") => Wish::Snapshot,
        Some("snapshot-required") => Wish::Required,
        _ => Wish::None,
    }
}

/// Start of the names of snapshots that suspensions take.
const PREFIX: &str = "suspend-";

/// Reason for which no snapshot is taken of a Pod.
pub(super) const NOT_ELIGIBLE: &str = "NotEligible";

/// Whether a suspension has taken a snapshot, and not a client.
pub(super) fn is_of_suspension(snapshot: &PodSnapshot) -> bool {
    snapshot.name_any().starts_with(PREFIX)
}

/// Name of the snapshot that a suspension takes of a Pod.
fn name_of(pod: &Pod) -> String {
    format!("{PREFIX}{}", pod.uid().unwrap_or_default())
}

/// Decides what becomes of the Pod of a Sandbox that is suspended, and has a snapshot taken first if
/// the Sandbox wants one.
pub(crate) async fn before_suspend(
    context: &Context,
    sandbox: &Sandbox,
    pod: &Pod,
) -> Result<Suspend> {
    let wish = wish(sandbox);
    let status = pod.status.as_ref();
    let runs = status.and_then(|s| s.phase.as_deref()) == Some("Running");
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
    let Some(node) = node.filter(|_| runs && wish != Wish::None) else {
        return Ok(Suspend::Delete { lost: None });
    };
    if !context.snapshots {
        return Ok(refused(
            wish,
            "this cluster has no Pod snapshots".to_owned(),
        ));
    }
    if let Some(why) = eligible::ineligibility(sandbox) {
        return Ok(refused(
            wish,
            format!("no snapshot can be taken of the Pod: {why}"),
        ));
    }
    let name = name_of(pod);
    let key = Key::new(&sandbox.namespace().unwrap_or_default(), &name);
    let Some(snapshot) = context.store.snapshots.get(&key) else {
        let Some(whole) = context.fetch::<Pod>(&Key::of(pod)).await? else {
            return Ok(Suspend::Delete { lost: None });
        };
        let wanted = build::snapshot(&name, sandbox, &whole, &node, PostCheckpoint::Stop, None);
        match context.create(&wanted).await {
            Err(e) if !error::is_conflict(&e) => return Err(e.into()),
            _ => return Ok(Suspend::Wait),
        }
    };
    Ok(match outcome(&snapshot) {
        Some(Ok(())) => Suspend::Delete { lost: None },
        Some(Err(message)) => Suspend::Keep {
            reason: "SnapshotFailed",
            message,
        },
        None if age(&*snapshot, jiff::Timestamp::now()) > PATIENCE => Suspend::Keep {
            reason: "SnapshotFailed",
            message: format!("the agent of node {node} does not answer"),
        },
        None => Suspend::Wait,
    })
}

fn refused(wish: Wish, message: String) -> Suspend {
    let reason = NOT_ELIGIBLE;
    match wish {
        Wish::Required => Suspend::Keep { reason, message },
        Wish::None | Wish::Snapshot => Suspend::Delete {
            lost: Some((reason, message)),
        },
    }
}

/// Sees to a snapshot that was taken of the Pod of a Sandbox that runs again. One that has failed is
/// deleted, so that the next suspension takes another. Returns whether the Pod was stopped by one,
/// and has to make way for a Pod that is restored.
pub(crate) async fn forget_failed(context: &Context, sandbox: &Sandbox, pod: &Pod) -> Result<bool> {
    let name = name_of(pod);
    let mut all = snapshots_of(context, sandbox);
    all.retain(|snapshot| snapshot.name_any() == name);
    let Some(snapshot) = all.pop() else {
        return Ok(false);
    };
    match outcome(&snapshot) {
        Some(Ok(())) => Ok(true),
        Some(Err(_)) => {
            let snapshot: &PodSnapshot = snapshot.outline();
            if snapshot.meta().deletion_timestamp.is_none() {
                context.delete(snapshot, DeleteParams::default()).await?;
            }
            Ok(false)
        }
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_sandboxs_own_word_goes_before_its_templates() {
        let wish_of = |own: Value, template: Value| {
            let sandbox = json!({
                "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
                "metadata": {"name": "b", "annotations": own},
                "spec": {"podTemplate": {"metadata": {"annotations": template},
                    "spec": {"containers": []}}},
            });
            wish(&serde_json::from_value(sandbox).unwrap())
        };
        let says = |what: &str| json!({keys::ON_SUSPEND: what});
        let nothing = || json!({});
        assert_eq!(wish_of(nothing(), nothing()), Wish::None);
        assert_eq!(wish_of(nothing(), says("snapshot")), Wish::Snapshot);
        assert_eq!(
            wish_of(says("snapshot-required"), says("snapshot")),
            Wish::Required
        );
        assert_eq!(wish_of(says("stop"), says("snapshot")), Wish::None);
    }

    #[test]
    fn only_a_sandbox_that_demands_it_stays_without_a_snapshot() {
        let message = || "why".to_owned();
        let kept = refused(Wish::Required, message());
        assert!(matches!(
            kept,
            Suspend::Keep {
                reason: "NotEligible",
                ..
            }
        ));
        let lost = Some(("NotEligible", message()));
        assert_eq!(refused(Wish::Snapshot, message()), Suspend::Delete { lost });
    }
}
