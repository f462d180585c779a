// SPDX-License-Identifier: Apache-2.0

//! What agents have put on their nodes: they are told to take it away, and are waited for.

use anyhow::{Result, bail};
use jiff::Timestamp;
use kiln_crds::{SandboxNode, keys};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    cluster::Cluster,
    manifests::NODES,
    output::say,
    rollout::{Progress, wait},
    status::{SILENCE, age, list},
};

/// Said of a node whose agent will not do what it is told.
const SILENT: &str = "its agent is silent; run `kilnctl node disable` there";

/// Tells no agent any more to take away what it has installed.
pub(crate) async fn keep(cluster: &Cluster) -> Result<()> {
    for node in list::<SandboxNode>(cluster).await? {
        if node.annotations().contains_key(keys::REMOVE) {
            annotate(cluster, &node.name_any(), &Value::Null).await?;
        }
    }
    Ok(())
}

async fn annotate(cluster: &Cluster, node: &str, value: &Value) -> Result<()> {
    let patch = json!({"metadata": {"annotations": {(keys::REMOVE): value}}});
    let api = cluster.api(&NODES, None);
    let params = PatchParams::default();
    match api
        .patch_metadata(node, &params, &Patch::Merge(&patch))
        .await
    {
        // Its node is gone.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(e) => Err(cluster.explain(e)),
        Ok(_) => Ok(()),
    }
}

/// Has every agent that installs take away what it has installed, and waits for it: to the end
/// with `all`, else only on nodes where no Pods need it. Returns whether nothing of it is left.
///
/// # Errors
/// When one cannot, or does not in time.
pub(crate) async fn clear(cluster: &Cluster, all: bool, until: Instant) -> Result<bool> {
    for node in list::<SandboxNode>(cluster).await? {
        let name = node.name_any();
        if condition(&node).is_none() {
            continue;
        }
        if is_silent(&node) {
            say(&format!("node {name}: {SILENT}"));
            continue;
        }
        annotate(cluster, &name, &json!("true")).await?;
    }
    let nodes: Api<SandboxNode> = Api::all(cluster.client());
    for node in list::<SandboxNode>(cluster).await? {
        let name = node.name_any();
        if !node.annotations().contains_key(keys::REMOVE) {
            continue;
        }
        wait(&format!("node {name}"), until, async || {
            let found = nodes.get_opt(&name).await.map_err(|e| cluster.explain(e))?;
            progress(&name, found.as_ref(), all)
        })
        .await?;
    }
    let in_use =
        |n: &SandboxNode| !is_silent(n) && condition(n).is_some_and(|c| c.0 == keys::IN_USE);
    Ok(!list::<SandboxNode>(cluster).await?.iter().any(in_use))
}

/// What a node's agent says of what it has installed; nothing where it does not.
fn condition(node: &SandboxNode) -> Option<(&str, &str)> {
    let conditions = &node.status.as_ref()?.conditions;
    let found = conditions.iter().find(|c| c.type_ == keys::INSTALLED)?;
    Some((&found.reason, &found.message))
}

fn is_silent(node: &SandboxNode) -> bool {
    let age = node.status.as_ref().and_then(|s| age(s, Timestamp::now()));
    age.is_none_or(|age| age > SILENCE)
}

fn progress(name: &str, node: Option<&SandboxNode>, all: bool) -> Result<Progress> {
    let Some(node) = node else {
        return Ok(Progress::Done("gone".to_owned()));
    };
    Ok(match condition(node) {
        Some((keys::REMOVED, words)) => Progress::Done(words.to_owned()),
        Some((keys::IN_USE, words)) => match all {
            true => Progress::Not(words.to_owned()),
            false => Progress::Done(words.to_owned()),
        },
        Some((keys::REMOVE_FAILED, why)) => bail!(
            "node {name}: {why}. See to that there, then run `kilnctl node disable` on it and \
             this again."
        ),
        _ if is_silent(node) => Progress::Done(SILENT.to_owned()),
        _ => Progress::Not("its agent takes away what it has installed".to_owned()),
    })
}
