// SPDX-License-Identifier: Apache-2.0

//! What agents have put on their nodes: they are told to take it away, and are waited for.

use anyhow::{Result, bail};
use kiln_crds::{SandboxNode, keys};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    cluster::{Clock, Cluster},
    manifests::NODES,
    output::say,
    rollout::{Progress, wait},
    status::{SILENCE, age},
};

/// Said of a node whose agent will not do what it is told.
const SILENT: &str = "its agent is silent; run `kilnctl node disable` there";

/// A node on which something of what its agent has installed is left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) node: String,
    /// Whether its agent waits until no Pod needs that any more.
    pub(crate) in_use: bool,
    /// Why it is left.
    pub(crate) why: String,
}

/// Tells no agent any more to take away what it has installed.
pub(crate) async fn keep(cluster: &Cluster) -> Result<()> {
    for node in cluster.all::<SandboxNode>().await? {
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
/// with `all`, else only on nodes where no Pods need it. Returns where something of it is left.
///
/// # Errors
/// When one cannot, or does not in time.
pub(crate) async fn clear(cluster: &Cluster, all: bool, until: Instant) -> Result<Vec<Kept>> {
    let clock = cluster.clock().await?;
    for node in cluster.all::<SandboxNode>().await? {
        let name = node.name_any();
        if condition(&node).is_none() {
            continue;
        }
        if is_silent(&node, clock) {
            say(&format!("node {name}: {SILENT}"));
            continue;
        }
        annotate(cluster, &name, &json!("true")).await?;
    }
    let nodes: Api<SandboxNode> = Api::all(cluster.client());
    for node in cluster.all::<SandboxNode>().await? {
        let name = node.name_any();
        if !node.annotations().contains_key(keys::REMOVE) {
            continue;
        }
        wait(&format!("node {name}"), until, async || {
            let found = nodes.get_opt(&name).await.map_err(|e| cluster.explain(e))?;
            progress(&name, found.as_ref(), all, clock)
        })
        .await?;
    }
    let nodes = cluster.all::<SandboxNode>().await?;
    Ok(nodes.iter().filter_map(|node| kept(node, clock)).collect())
}

/// What is left on a node, if anything is.
fn kept(node: &SandboxNode, clock: Clock) -> Option<Kept> {
    let (reason, words) = condition(node).filter(|(reason, _)| *reason != keys::REMOVED)?;
    let is_silent = is_silent(node, clock);
    Some(Kept {
        node: node.name_any(),
        in_use: !is_silent && reason == keys::IN_USE,
        why: match is_silent {
            true => SILENT.to_owned(),
            false => words.to_owned(),
        },
    })
}

/// What a node's agent says of what it has installed; nothing where it does not.
fn condition(node: &SandboxNode) -> Option<(&str, &str)> {
    let conditions = &node.status.as_ref()?.conditions;
    let found = conditions.iter().find(|c| c.type_ == keys::INSTALLED)?;
    Some((&found.reason, &found.message))
}

fn is_silent(node: &SandboxNode, clock: Clock) -> bool {
    age(node, clock.now()).is_none_or(|age| age > SILENCE)
}

fn progress(name: &str, node: Option<&SandboxNode>, all: bool, clock: Clock) -> Result<Progress> {
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
        _ if is_silent(node, clock) => Progress::Done(SILENT.to_owned()),
        _ => Progress::Not("its agent takes away what it has installed".to_owned()),
    })
}
