// SPDX-License-Identifier: Apache-2.0

//! Waiting until what was applied works, with words about what it waits for.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::{
    api::core::v1::{Event, Pod},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kiln_crds::{SandboxNode, keys};
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams},
};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::{cluster::Cluster, manifests::Manifest, output::say};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);

/// What of an explanation is shown.
const LINES: usize = 10;

/// How far something is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// It is there.
    Done(String),
    /// Not yet; what there is of it.
    Not(String),
}

/// Waits until `look` says that `what` is done, and tells of every change.
///
/// # Errors
/// What `look` fails by; and when the time is over, with what it said last.
pub(crate) async fn wait(
    what: &str,
    until: Instant,
    mut look: impl AsyncFnMut() -> Result<Progress>,
) -> Result<()> {
    let mut last = String::new();
    loop {
        let words = match look().await? {
            Progress::Done(words) => {
                say(&format!("{what}: {words}"));
                return Ok(());
            }
            Progress::Not(words) => words,
        };
        if Instant::now() >= until {
            bail!("{what}: {words}, and the time is over");
        }
        if words != last {
            say(&format!("{what}: {words} …"));
            last = words;
        }
        sleep(LOOK).await;
    }
}

/// Waits until a definition is served.
///
/// # Errors
/// When it is not in time, with what the apiserver says of it.
pub(crate) async fn established(
    cluster: &Cluster,
    definition: &Manifest,
    until: Instant,
) -> Result<()> {
    wait(&definition.title(), until, async || {
        let found = cluster.find(definition).await?;
        let found = found.context("somebody has deleted it")?;
        Ok(match condition(&found, "Established") {
            Some(c) if c["status"] == "True" => Progress::Done("established".to_owned()),
            Some(c) => Progress::Not(format!("not established: {}", text(&c["message"]))),
            None => Progress::Not("not established".to_owned()),
        })
    })
    .await
}

/// Waits until a Deployment or DaemonSet runs everywhere as it was applied.
///
/// # Errors
/// When it does not in time, with what its Pods lack.
pub(crate) async fn rolled_out(
    cluster: &Cluster,
    workload: &Manifest,
    until: Instant,
) -> Result<()> {
    let done = wait(&workload.title(), until, async || {
        let found = cluster.find(workload).await?;
        Ok(match progress(&found.context("somebody has deleted it")?) {
            Progress::Not(words) => Progress::Not(match lacking(cluster, workload).await.first() {
                Some(why) => format!("{words}; {why}"),
                None => words,
            }),
            done => done,
        })
    })
    .await;
    match done {
        Ok(()) => Ok(()),
        Err(e) => {
            let why = reasons(cluster, workload).await;
            bail!("{e:#}.\n{why}")
        }
    }
}

/// How far a Deployment or DaemonSet is, by its status.
pub(crate) fn progress(workload: &DynamicObject) -> Progress {
    let status = &workload.data["status"];
    let n = |key: &str| status[key].as_i64().unwrap_or(0);
    let (wanted, updated, ready) = match &workload.data["spec"]["replicas"] {
        // A DaemonSet has one for each node that it selects.
        Value::Null => (
            n("desiredNumberScheduled"),
            n("updatedNumberScheduled"),
            n("numberAvailable"),
        ),
        replicas => (
            replicas.as_i64().unwrap_or(0),
            n("updatedReplicas"),
            n("availableReplicas"),
        ),
    };
    let words = format!("{ready} of {wanted} ready");
    let seen = status["observedGeneration"].as_i64() == workload.metadata.generation;
    if !seen {
        return Progress::Not("waits for Kubernetes to take it up".to_owned());
    }
    if updated < wanted {
        return Progress::Not(format!("{words}, {updated} of them of this version"));
    }
    if ready < wanted {
        return Progress::Not(words);
    }
    Progress::Done(words)
}

/// Returns the label selector of a workload's Pods.
fn pods_of(workload: &Manifest) -> String {
    let label = &workload.object.data["spec"]["selector"]["matchLabels"]["app"];
    format!("app={}", text(label))
}

/// Returns what keeps a workload from being ready, a line each: what nodes and Pods lack, or the
/// warnings about it if it has no Pod.
async fn lacking(cluster: &Cluster, workload: &Manifest) -> Vec<String> {
    let namespace = workload.namespace.clone().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(cluster.client(), &namespace);
    let pods = ListParams::default().labels(&pods_of(workload));
    let pods = api.list(&pods).await.map(|list| list.items);
    let mut lines: Vec<String> = pods
        .unwrap_or_default()
        .iter()
        .filter_map(what_lacks)
        .collect();
    if lines.is_empty() {
        lines = warnings(cluster, workload, &namespace).await;
    }
    if workload.kind.kind == "DaemonSet" {
        lines.splice(0..0, nodes_lack(cluster).await);
    }
    lines
}

/// Explains why a workload is not ready, and how to look further.
async fn reasons(cluster: &Cluster, workload: &Manifest) -> String {
    let mut lines = lacking(cluster, workload).await;
    let more = lines.len().saturating_sub(LINES);
    lines.truncate(LINES);
    if more > 0 {
        lines.push(format!("… and {more} more"));
    }
    lines.push(format!(
        "Look with: kubectl -n {} describe pods -l {}",
        workload.namespace.as_deref().unwrap_or_default(),
        pods_of(workload)
    ));
    lines.join("\n")
}

/// What nodes lack on which an agent could not install.
async fn nodes_lack(cluster: &Cluster) -> Vec<String> {
    let nodes = cluster.all::<SandboxNode>().await.unwrap_or_default();
    let lacks = nodes.iter().filter_map(|node| {
        let conditions = &node.status.as_ref()?.conditions;
        let broken = |c: &&Condition| c.type_ == keys::INSTALLED && c.status != "True";
        let condition = conditions.iter().find(broken)?;
        (!condition.message.is_empty())
            .then(|| format!("Node {}: {}", node.name_any(), condition.message))
    });
    lacks.collect()
}

/// What a Pod lacks, if it is not ready.
fn what_lacks(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let conditions = || status.conditions.iter().flatten();
    if conditions().any(|c| c.type_ == "Ready" && c.status == "True") {
        return None;
    }
    let waits = status.container_statuses.iter().flatten().find_map(|c| {
        let waiting = c.state.as_ref()?.waiting.as_ref()?;
        let reason = waiting.reason.as_deref().unwrap_or("it waits");
        let message = waiting.message.as_deref().unwrap_or_default();
        Some(format!("{reason} {message}"))
    });
    let says = || {
        let broken = conditions().filter(|c| c.status != "True");
        let mut said = broken.filter_map(|c| c.message.clone().or(c.reason.clone()));
        said.next()
    };
    let why = waits
        .or_else(says)
        .unwrap_or_else(|| "it is not ready".to_owned());
    let node = pod.spec.as_ref().and_then(|s| s.node_name.as_deref());
    let node = node.map(|n| format!(" on node {n}")).unwrap_or_default();
    Some(format!("Pod {}{node}: {}", pod.name_any(), why.trim()))
}

async fn warnings(cluster: &Cluster, workload: &Manifest, namespace: &str) -> Vec<String> {
    let api: Api<Event> = Api::namespaced(cluster.client(), namespace);
    let events = api
        .list(&ListParams::default().fields("type=Warning"))
        .await;
    let events = events.map(|list| list.items).unwrap_or_default();
    let about = |e: &&Event| {
        let name = e.involved_object.name.as_deref().unwrap_or_default();
        name.starts_with(&workload.name)
    };
    let message = |e: &Event| e.message.clone();
    let mut messages: Vec<_> = events.iter().filter(about).filter_map(message).collect();
    messages.dedup();
    messages
}

fn condition<'a>(object: &'a DynamicObject, kind: &str) -> Option<&'a Value> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    conditions.iter().find(|c| c["type"] == kind)
}

/// Whether a condition of an object is True.
pub(crate) fn is_true(object: &DynamicObject, kind: &str) -> bool {
    condition(object, kind).is_some_and(|c| c["status"] == "True")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn workload(spec: &Value, status: &Value) -> DynamicObject {
        serde_json::from_value(
            json!({"metadata": {"name": "w", "generation": 3}, "spec": spec, "status": status}),
        )
        .unwrap()
    }

    #[test]
    fn a_rollout_is_over_when_the_new_ones_are_available() {
        let one = json!({"replicas": 1});
        let old = json!({"observedGeneration": 2, "updatedReplicas": 1, "availableReplicas": 1});
        let waits = progress(&workload(&one, &old));
        assert!(matches!(waits, Progress::Not(words) if words.contains("take it up")));
        let new = json!({"observedGeneration": 3, "availableReplicas": 1});
        let waits = progress(&workload(&one, &new));
        assert!(matches!(waits, Progress::Not(words) if words.contains("0 of them")));
        let done = json!({"observedGeneration": 3, "updatedReplicas": 1, "availableReplicas": 1});
        assert_eq!(
            progress(&workload(&one, &done)),
            Progress::Done("1 of 1 ready".to_owned())
        );
        let nodes = json!({"observedGeneration": 3, "desiredNumberScheduled": 2,
            "updatedNumberScheduled": 2, "numberAvailable": 1});
        let waits = progress(&workload(&json!({}), &nodes));
        assert_eq!(waits, Progress::Not("1 of 2 ready".to_owned()));
    }

    #[test]
    fn a_pod_says_what_it_lacks() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": []},
            "status": {
                "conditions": [{"type": "Ready", "status": "False", "message": "containers with unready status"}],
                "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}],
            },
        }))
        .unwrap();
        let said = what_lacks(&pod).unwrap();
        assert_eq!(said, "Pod p on node n: ImagePullBackOff no such image");
    }
}
