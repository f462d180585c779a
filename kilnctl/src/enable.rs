// SPDX-License-Identifier: Apache-2.0

//! Puts Agent Sandbox on a cluster: looks whether it may, whether somebody else's is there, and
//! only then writes.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use kube::{
    ResourceExt,
    api::{DynamicObject, ObjectMeta},
};
use tokio::time::Instant;

use crate::{
    args::Enable,
    cluster::{AT_ONCE, Cluster, Right},
    manifests::{self, KINDS, Manifest, NODES, title},
    nodes,
    output::say,
    owner::{Owner, is_foreign_controller},
    rollout,
};

/// What is to be done about an object.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// It is written.
    Apply,
    /// It is somebody's, and as good.
    Leave(String),
    /// It is somebody's, and we want it.
    Refuse(String),
}

/// What became of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Became {
    Created,
    Changed,
    Unchanged,
}

/// Puts it there.
///
/// # Errors
/// When rights are missing or somebody else's is there, before anything was changed; when
/// something cannot be written, or does not work in time.
pub(crate) async fn run(cluster: &Cluster, args: &Enable) -> Result<()> {
    let mut manifests = manifests::all()?;
    for file in &args.patch {
        std::fs::read_to_string(file)
            .map_err(anyhow::Error::from)
            .and_then(|text| manifests::patch(&mut manifests, &text))
            .with_context(|| format!("patch by {}", file.display()))?;
    }
    manifests::set_images(&mut manifests, &args.images);
    manifests::set_node_selector(&mut manifests, &args.node_selector);
    cluster.require(rights(&manifests)).await?;
    let found = look(cluster, &manifests).await?;
    let steps = decide(&manifests, &found, args.take_over);
    refuse(
        &manifests,
        &steps,
        &controllers(cluster, args.take_over).await?,
    )?;

    let until = Instant::now() + args.waiting.timeout;
    nodes::keep(cluster).await?;
    let mut changes = 0;
    let mut written = manifests.iter().zip(&found).zip(&steps).peekable();
    while let Some(((manifest, found), step)) = written.next() {
        match step {
            Step::Leave(owner) => {
                say(&format!("{}: left as {owner} has it", manifest.title()));
            }
            _ => changes += apply(cluster, manifest, found.as_ref(), args.take_over).await?,
        }
        let last_definition = manifest.is_definition()
            && !written
                .peek()
                .is_some_and(|((next, _), _)| next.is_definition());
        if last_definition {
            // Controller and agents would only fail without.
            for definition in manifests.iter().filter(|m| m.is_definition()) {
                rollout::established(cluster, definition, until).await?;
            }
        }
    }
    changes += prune(cluster, &manifests).await?;
    if changes == 0 {
        say("nothing had to be changed");
    }
    if args.waiting.wait {
        for workload in manifests.iter().filter(|m| m.kind.group == "apps") {
            rollout::rolled_out(cluster, workload, until).await?;
        }
    }
    Ok(())
}

/// Everything that `run` does.
fn rights(manifests: &[Manifest]) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    for manifest in manifests {
        for verb in ["get", "create", "patch"] {
            rights.insert(Right::new(
                verb,
                manifest.kind,
                manifest.namespace.as_deref(),
            ));
        }
    }
    for kind in KINDS.iter().filter(|k| !k.stays()) {
        rights.insert(Right::new("list", kind, None));
    }
    for verb in ["list", "patch"] {
        rights.insert(Right::new(verb, &NODES, None));
    }
    rights
}

async fn look(cluster: &Cluster, manifests: &[Manifest]) -> Result<Vec<Option<DynamicObject>>> {
    let finds = stream::iter(manifests).map(|manifest| cluster.find(manifest));
    finds.buffered(AT_ONCE).try_collect().await
}

fn decide(manifests: &[Manifest], found: &[Option<DynamicObject>], take_over: bool) -> Vec<Step> {
    let decide = |(manifest, found): (&Manifest, &Option<DynamicObject>)| match found {
        None => Step::Apply,
        Some(found) => match Owner::of(&found.metadata) {
            Owner::Other(owner) if manifest.may_be_anybodys() => Step::Leave(owner),
            Owner::Other(owner) if !take_over => Step::Refuse(owner),
            _ => Step::Apply,
        },
    };
    manifests.iter().zip(found).map(decide).collect()
}

/// Somebody else's controllers, which would work on the same objects.
async fn controllers(cluster: &Cluster, take_over: bool) -> Result<Vec<String>> {
    let deployments = cluster.list(manifests::kind("Deployment"), "").await?;
    let foreign = deployments.iter().filter(|d| is_foreign_controller(d));
    let names = foreign.filter_map(|d| {
        let (namespace, name) = (d.namespace()?, d.name_any());
        // That one is replaced.
        let is_taken_over = namespace == manifests::NAMESPACE && name == manifests::CONTROLLER;
        (!(take_over && is_taken_over)).then(|| {
            let owner = Owner::of(&d.metadata);
            format!("Deployment {namespace}/{name} of {}", owner.name())
        })
    });
    Ok(names.collect())
}

/// Fails where somebody else's is in the way.
fn refuse(manifests: &[Manifest], steps: &[Step], controllers: &[String]) -> Result<()> {
    if !controllers.is_empty() {
        bail!(
            "nothing was changed, because another controller of Agent Sandbox is on this \
             cluster:\n  {}\nTwo would work against each other. Remove it first (on GKE: gcloud \
             beta container clusters update CLUSTER --region REGION --no-enable-agent-sandbox).",
            controllers.join("\n  ")
        );
    }
    let theirs = manifests
        .iter()
        .zip(steps)
        .filter_map(|(manifest, step)| match step {
            Step::Refuse(owner) => Some(format!("{} of {owner}", manifest.title())),
            _ => None,
        });
    let theirs: Vec<String> = theirs.collect();
    if theirs.is_empty() {
        return Ok(());
    }
    bail!(
        "nothing was changed, because Agent Sandbox was put on this cluster by somebody else:\n  \
         {}\nRemove that first (on GKE: gcloud beta container clusters update CLUSTER --region \
         REGION --no-enable-agent-sandbox), or replace it by --take-over.",
        theirs.join("\n  ")
    )
}

/// Writes an object, and counts it if that changed something.
async fn apply(
    cluster: &Cluster,
    manifest: &Manifest,
    found: Option<&DynamicObject>,
    take_over: bool,
) -> Result<u32> {
    // What others have changed of our definitions may be another version in use: that is for a
    // person to decide. In everything else, what was asked for is that it be as we have it.
    let force = take_over || !manifest.is_definition();
    // Whoever was there before has fields that do not fit what we have.
    let is_others = |found: &DynamicObject| matches!(Owner::of(&found.metadata), Owner::Other(_));
    if take_over && (manifest.is_definition() || found.is_some_and(is_others)) {
        cluster.take_over(manifest).await?;
    }
    let now = cluster.apply(manifest, force).await?;
    let became = match found {
        None => Became::Created,
        Some(before) if is_same(&before.metadata, &now.metadata) => Became::Unchanged,
        Some(_) => Became::Changed,
    };
    Ok(match became {
        Became::Unchanged => 0,
        Became::Created | Became::Changed => {
            say(&format!(
                "{}: {}",
                manifest.title(),
                format!("{became:?}").to_lowercase()
            ));
            1
        }
    })
}

/// Whether an object that was written is what it was. Where others write the status of a kind, its
/// version is a new one also when nothing of ours has changed.
fn is_same(before: &ObjectMeta, now: &ObjectMeta) -> bool {
    let ours = |of: &ObjectMeta| (of.generation, of.labels.clone(), of.annotations.clone());
    before.resource_version == now.resource_version
        || (now.generation.is_some() && ours(before) == ours(now))
}

/// Removes what an earlier version of this program has made and this one has not. Returns how
/// many that were.
async fn prune(cluster: &Cluster, manifests: &[Manifest]) -> Result<u32> {
    let mut pruned = 0;
    for kind in KINDS.iter().rev().filter(|k| !k.stays()) {
        for object in cluster.list_ours(kind).await? {
            let (namespace, name) = (object.namespace(), object.name_any());
            let known = |m: &Manifest| m.kind == kind && m.name == name && m.namespace == namespace;
            if manifests.iter().any(known) {
                continue;
            }
            cluster.delete(kind, namespace.as_deref(), &name).await?;
            say(&format!(
                "{}: removed",
                title(kind, namespace.as_deref(), &name)
            ));
            pruned += 1;
        }
    }
    Ok(pruned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_somebody_elses_is_refused_left_or_taken_over() {
        let manifests = manifests::all().unwrap();
        let theirs: DynamicObject =
            serde_json::from_value(json!({"metadata": {"name": "x"}})).unwrap();
        let found = vec![Some(theirs); manifests.len()];
        let steps = decide(&manifests, &found, false);
        for (manifest, step) in manifests.iter().zip(&steps) {
            let left = matches!(step, Step::Leave(_));
            assert_eq!(left, manifest.may_be_anybodys(), "{}", manifest.title());
            assert!(left || matches!(step, Step::Refuse(_)));
        }
        let words = refuse(&manifests, &steps, &[]).unwrap_err().to_string();
        assert!(words.contains("CustomResourceDefinition sandboxes.agents.x-k8s.io of somebody"));
        assert!(words.contains("--take-over"));
        let steps = decide(&manifests, &found, true);
        refuse(&manifests, &steps, &[]).unwrap();
        let other = ["Deployment a/b of somebody".to_owned()];
        let words = refuse(&manifests, &steps, &other).unwrap_err().to_string();
        assert!(words.contains("Deployment a/b"));
        let none = vec![None; manifests.len()];
        assert!(
            decide(&manifests, &none, false)
                .iter()
                .all(|s| *s == Step::Apply)
        );
    }
}
