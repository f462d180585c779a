// SPDX-License-Identifier: Apache-2.0

//! Takes away what `enable` has put on a cluster. Users' objects, and the definitions without
//! which they would go, stay unless they are purged.

use std::{
    collections::BTreeSet,
    io::{IsTerminal, stdin},
};

use anyhow::{Result, bail};
use kiln_crds::keys;
use kube::{ResourceExt, api::DynamicObject};
use tokio::time::Instant;

use crate::{
    args::Disable,
    cluster::{Cluster, Right},
    manifests::{self, KINDS, Kind, MANAGED_BY, NODES, PODS, USERS, title},
    nodes::{self, Kept},
    output::{say, write},
    owner::Owner,
    rollout::{Progress, wait},
};

/// Label of the Pods of Sandboxes.
const OF_SANDBOXES: &str = keys::SANDBOX_NAME_HASH;

/// Takes it away.
///
/// # Errors
/// When rights are missing or the agents are somebody else's, before anything was changed; when
/// something does not go in time; at the end, when nodes keep what was installed on them.
pub(crate) async fn run(cluster: &Cluster, args: &Disable) -> Result<()> {
    cluster.require(rights(args.purge)).await?;
    refuse_others_agents(cluster).await?;
    let until = Instant::now() + args.timeout;
    let mut gone = 0;
    if args.purge {
        refuse_others_definitions(cluster).await?;
        if !args.yes {
            confirm(cluster).await?;
        }
        // While the controller still runs: it is the one who lets go of what it holds.
        for kind in &USERS {
            gone += remove(cluster, kind, cluster.list(kind, "").await?, until).await?;
        }
        none_left(cluster, &PODS, OF_SANDBOXES, until).await?;
    }
    // Who wants a Pod of the class is told so, before nodes refuse them.
    let class = manifests::kind("RuntimeClass");
    gone += remove(cluster, class, cluster.list_ours(class).await?, until).await?;
    let kept = nodes::clear(cluster, args.purge, until).await?;
    let agents_stay = kept.iter().any(|k| k.in_use);
    for kind in KINDS.iter().rev().filter(|k| !k.stays()) {
        let mut ours = cluster.list_ours(kind).await?;
        if agents_stay {
            ours.retain(|object| !is_for_agents(kind, object));
        }
        gone += remove(cluster, kind, ours, until).await?;
    }
    if agents_stay {
        say(
            "Agents stay on nodes where Pods run, and take away what they have installed when those \
             have ended. Then run this again.",
        );
    } else {
        // Their agents are gone, and report no more.
        gone += remove(cluster, &NODES, cluster.list(&NODES, "").await?, until).await?;
    }
    if args.purge {
        for kind in KINDS.iter().filter(|k| k.stays()) {
            gone += remove(cluster, kind, cluster.list_ours(kind).await?, until).await?;
        }
    }
    match gone {
        0 => say("nothing was there to be taken away"),
        _ if args.purge => say("Agent Sandbox is gone"),
        _ => say(
            "Agent Sandbox is disabled. Definitions and users' objects are still there; \
             --purge removes them.",
        ),
    }
    all_clear(&kept)
}

/// Asks on the terminal whether users' objects may go, if there are any.
///
/// # Errors
/// If the answer is not yes, or there is no terminal to ask on.
async fn confirm(cluster: &Cluster) -> Result<()> {
    let mut counts = Vec::new();
    for kind in &USERS {
        match cluster.list(kind, "").await?.len() {
            0 => {}
            count => counts.push(format!("{count} {}", kind.plural)),
        }
    }
    if counts.is_empty() {
        return Ok(());
    }
    let question = format!("--purge deletes {} with their Pods", counts.join(", "));
    if !stdin().is_terminal() {
        bail!("nothing was changed, because {question}, and nobody can be asked. Add --yes.");
    }
    write(&format!("{question}. Type yes to go on: "));
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        stdin().read_line(&mut line).map(|_| line)
    });
    if answer.await??.trim() != "yes" {
        bail!("nothing was changed");
    }
    Ok(())
}

/// Fails where something is left on nodes, with what, and why on each.
fn all_clear(kept: &[Kept]) -> Result<()> {
    if kept.is_empty() {
        return Ok(());
    }
    let nodes: Vec<String> = kept
        .iter()
        .map(|k| format!("{}: {}", k.node, k.why))
        .collect();
    bail!(
        "shim, runtime, containerd's handler and the label of what was installed are still on these \
         nodes:\n  {}",
        nodes.join("\n  ")
    )
}

/// Whether agents need an object to run.
fn is_for_agents(kind: &Kind, object: &DynamicObject) -> bool {
    kind.kind == "ResourceQuota" || object.name_any() == manifests::AGENT
}

/// Everything that `run` does.
fn rights(purge: bool) -> BTreeSet<Right> {
    let mut rights = BTreeSet::new();
    let mut may_delete = |kind: &Kind| {
        for verb in ["list", "delete"] {
            rights.insert(Right::new(verb, kind, None));
        }
    };
    may_delete(&NODES);
    KINDS
        .iter()
        .filter(|k| purge || !k.stays())
        .for_each(&mut may_delete);
    if purge {
        USERS.iter().for_each(&mut may_delete);
        rights.insert(Right::new("list", &PODS, None));
    }
    rights.insert(Right::new("patch", &NODES, None));
    rights
}

/// Fails where the agents are somebody else's: they would stay, and install again what they were
/// told to take away.
async fn refuse_others_agents(cluster: &Cluster) -> Result<()> {
    let kind = manifests::kind("DaemonSet");
    for agents in cluster.list(kind, "").await? {
        let (namespace, name) = (agents.namespace(), agents.name_any());
        if namespace.as_deref() != Some(manifests::NAMESPACE) || name != manifests::AGENT {
            continue;
        }
        if let Owner::Other(owner) = Owner::of(&agents.metadata) {
            bail!(
                "nothing was changed, because {} is there by {owner}: its agents would install \
                 again what they have taken away. Tell them to take it away by\n  kubectl annotate \
                 sandboxnode --all {}=true\nWhen condition {} of each SandboxNode has reason {}, \
                 remove the objects by what has put them there, such as kubectl delete -k or helm \
                 uninstall, and then by\n  kubectl delete sandboxnode --all",
                title(kind, namespace.as_deref(), &name),
                keys::REMOVE,
                keys::INSTALLED,
                keys::REMOVED,
            );
        }
    }
    Ok(())
}

/// Fails where the definitions are somebody else's, and so, most likely, the objects.
async fn refuse_others_definitions(cluster: &Cluster) -> Result<()> {
    for manifest in manifests::all()?.iter().filter(|m| m.is_definition()) {
        let Some(found) = cluster.find(manifest).await? else {
            continue;
        };
        if let Owner::Other(owner) = Owner::of(&found.metadata) {
            bail!(
                "nothing was changed, because {} is there by {owner}, whose objects these may \
                 be. If they are to go, delete the definition, or give it the label \
                 {MANAGED_BY}=kilnctl.",
                manifest.title()
            );
        }
    }
    Ok(())
}

/// Deletes these objects, and waits until they are gone. Returns how many they were.
async fn remove(
    cluster: &Cluster,
    kind: &'static Kind,
    objects: Vec<DynamicObject>,
    until: Instant,
) -> Result<usize> {
    for object in &objects {
        cluster
            .delete(kind, object.namespace().as_deref(), &object.name_any())
            .await?;
    }
    for object in &objects {
        let (namespace, name) = (object.namespace(), object.name_any());
        let title = title(kind, namespace.as_deref(), &name);
        let api = cluster.api(kind, namespace.as_deref());
        wait(&title, until, async || {
            let found = api.get_metadata_opt(&name).await;
            let found = match found {
                // Its definition went before it.
                Err(kube::Error::Api(status)) if status.code == 404 => None,
                found => found.map_err(|e| cluster.explain(e))?,
            };
            Ok(match found {
                Some(now) if now.metadata.uid == object.metadata.uid => {
                    Progress::Not(what_holds(&now.metadata.finalizers.unwrap_or_default()))
                }
                _ => Progress::Done("removed".to_owned()),
            })
        })
        .await?;
    }
    Ok(objects.len())
}

fn what_holds(finalizers: &[String]) -> String {
    match finalizers {
        [] => "going".to_owned(),
        held => format!("going, held by {}", held.join(", ")),
    }
}

/// Waits until no object of a kind with this label is left.
async fn none_left(
    cluster: &Cluster,
    kind: &'static Kind,
    label: &str,
    until: Instant,
) -> Result<()> {
    let what = format!("{}s of Sandboxes", kind.kind);
    wait(&what, until, async || {
        Ok(match cluster.list(kind, label).await?.len() {
            0 => Progress::Done("none left".to_owned()),
            n => Progress::Not(format!("{n} still there")),
        })
    })
    .await
}
