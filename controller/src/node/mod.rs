// SPDX-License-Identifier: Apache-2.0

//! Nodes: which warm sandboxes each should hold, and which of them have one for a Pod.
//!
//! A node's agent makes its [`SandboxNode`] and says there what it holds; the controller says how
//! much that should be. All of it only makes starts faster: without such objects nothing changes.

mod plan;
mod state;
mod status;
mod triggers;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::{
    NodeSelectorRequirement, NodeSelectorTerm, PodSpec, PreferredSchedulingTerm,
};
use kiln_crds::{NodeTotal, Sandbox, SandboxNode, SandboxNodeSpec, SandboxWarmPool};
use kube::{ResourceExt, core::ObjectMeta};

use crate::{
    condition::{self, READY},
    context::Context,
    error::Result,
    known::Known,
    lock::lock,
    queue::Outcome,
    shape::{Shape, WantedShape},
};
pub(crate) use state::State;
pub(crate) use status::{CAPACITY, capacity};
pub(crate) use triggers::changed;
use triggers::enqueue_pools;

/// How often nodes are polled without a change: a heartbeat that stays away is none, and a burst is
/// forgotten without one.
const ROUND: Duration = Duration::from_secs(30);
/// Writes at the same time.
const AT_ONCE: usize = 8;
/// Nodes that a Pod names in its affinity, at most.
const PREFERRED: usize = 16;
/// How much a warm sandbox counts among what a scheduler weighs, of 100.
const WEIGHT: i32 = 50;

/// Most warm sandboxes that a node is taken to hold, whatever its agent says.
const MOST: usize = 1024;

/// Asks nodes for other warm sandboxes, if what they should hold has changed.
pub(crate) async fn reconcile(context: &Context, state: &State) -> Result<Outcome> {
    if context.store.nodes.is_empty() {
        lock(&state.asked).clear();
        return Ok(Outcome::Done);
    }
    let live = live(context);
    let able: BTreeMap<String, BTreeSet<String>> = live
        .iter()
        .map(|node| (node.name_any(), classes(node)))
        .collect();
    note_live(context, state, able.keys().cloned().collect());
    let bursts = context.observed.bursts();
    let (templates, pools) = (context.store.templates.all(), context.store.pools.all());
    let demand = plan::demand(
        templates.iter().map(|t| t.outline()),
        pools.iter().map(|p| (p.outline(), running(context, p))),
        &bursts,
    );
    let room_of = |class: &str| {
        let holds = |node: &&Arc<Known<SandboxNode>>| able[&node.name_any()].contains(class);
        live.iter().filter(holds).map(|node| room(node)).sum()
    };
    let mut shares = plan::share(&plan::fit(&demand, room_of), &able);
    let due: Vec<_> = live
        .into_iter()
        .map(|node| {
            let share = shares.remove(&node.name_any()).unwrap_or_default();
            (node, share)
        })
        .filter(|(node, share)| is_due(state, node, share))
        .collect();
    let written = stream::iter(due)
        .map(|(node, share)| ask(context, state, node, share))
        .buffer_unordered(AT_ONCE);
    let results: Vec<Result<()>> = written.collect().await;
    results.into_iter().collect::<Result<()>>()?;
    Ok(Outcome::Again(ROUND))
}

/// The nodes whose agents report, and say that their sandboxes work.
fn live(context: &Context) -> Vec<Arc<Known<SandboxNode>>> {
    let timeout = context.options.node_heartbeat_timeout;
    let mut nodes = context.store.nodes.all();
    nodes.retain(|node| works(node) && context.observed.is_alive(&node.name_any(), timeout));
    nodes
}

/// Whether a node stays, and its agent does not say that sandboxes fail.
fn works(node: &SandboxNode) -> bool {
    let mut conditions = node.status.iter().map(|status| &status.conditions);
    let is_broken = conditions
        .any(|all| condition::find(all, READY).is_some_and(|ready| ready.status == "False"));
    !is_broken && node.metadata.deletion_timestamp.is_none()
}

/// How many Sandboxes of a pool have a Pod that runs.
fn running(context: &Context, pool: &SandboxWarmPool) -> usize {
    let members = context.store.owned::<Sandbox>(pool);
    members.iter().filter(|s| condition::is_ready(s)).count()
}

/// How many warm sandboxes a node can hold, as its agent says. One that has made none yet, and
/// does not say what it has room for, is taken to hold many.
fn room(node: &SandboxNode) -> usize {
    let total = node.status.as_ref().and_then(|s| s.total.as_ref());
    let sum = |t: &NodeTotal| t.ready.saturating_add(t.warming).saturating_add(t.room);
    match total.map(sum) {
        Some(room) if room > 0 => usize::try_from(room).unwrap_or(0).min(MOST),
        _ => MOST,
    }
}

/// The classes that a node can hold.
fn classes(node: &SandboxNode) -> BTreeSet<String> {
    let status = node.status.iter();
    let able = status.clone().flat_map(|s| s.runtime_versions.keys());
    let held = status.flat_map(|s| s.classes.iter().map(|c| &c.class));
    able.chain(held)
        .filter(|c| !c.is_empty())
        .cloned()
        .collect()
}

/// Remembers which nodes are live. Where that changes without a write of theirs, it is what pools
/// say of them that changes.
fn note_live(context: &Context, state: &State, live: BTreeSet<String>) {
    let mut known = lock(&state.live);
    if *known != live {
        *known = live;
        drop(known);
        enqueue_pools(context);
    }
}

/// Whether a node has to be asked. What others ask of it beside us stays, and is no reason to ask
/// again.
fn is_due(state: &State, node: &SandboxNode, share: &[WantedShape]) -> bool {
    let has = |wanted: &WantedShape| node.spec.classes.contains(wanted);
    let is_asked = share.iter().all(has);
    let has_more = node.spec.classes.len() > share.len();
    let asked = lock(&state.asked).get(&node.name_any()).cloned();
    !is_asked || (has_more && asked.is_none_or(|asked| asked != share))
}

async fn ask(
    context: &Context,
    state: &State,
    node: Arc<Known<SandboxNode>>,
    share: Vec<WantedShape>,
) -> Result<()> {
    let wanted = SandboxNode {
        metadata: ObjectMeta {
            name: Some(node.name_any()),
            // Not a new one, where this one has gone just now.
            uid: node.uid(),
            ..ObjectMeta::default()
        },
        spec: SandboxNodeSpec {
            classes: share.clone(),
        },
        status: None,
    };
    if context.apply_existing(&wanted).await? {
        lock(&state.asked).insert(node.name_any(), share);
    }
    Ok(())
}

/// Has a Pod prefer the nodes that hold a sandbox for it. What its user has asked for stays.
pub(crate) fn prefer_warm(context: &Context, pod: &mut PodSpec) {
    let Some(shape) = Shape::of(pod) else {
        return;
    };
    let names = warm(live(context).iter().map(|node| node.outline()), &shape);
    if names.is_empty() {
        return;
    }
    let affinity = pod.affinity.get_or_insert_default();
    let affinity = affinity.node_affinity.get_or_insert_default();
    let preferred = affinity
        .preferred_during_scheduling_ignored_during_execution
        .get_or_insert_default();
    preferred.extend(names.into_iter().map(term));
}

/// Names of the nodes that hold a sandbox of a shape, those with most of them first.
fn warm<'a>(live: impl Iterator<Item = &'a SandboxNode>, shape: &Shape) -> Vec<String> {
    let ready = |node: &SandboxNode| {
        let held = node.status.iter().flat_map(|s| &s.classes);
        let fitting = held.filter(|c| shape.is_served_by(c));
        fitting.map(|c| i64::from(c.ready)).sum::<i64>()
    };
    let mut nodes: Vec<(Reverse<i64>, String)> = live
        .map(|node| (Reverse(ready(node)), node.name_any()))
        .filter(|(ready, _)| ready.0 > 0)
        .collect();
    nodes.sort_unstable();
    nodes.truncate(PREFERRED);
    nodes.into_iter().map(|(_, name)| name).collect()
}

/// Prefers one node. A term by field takes one name.
fn term(node: String) -> PreferredSchedulingTerm {
    PreferredSchedulingTerm {
        weight: WEIGHT,
        preference: NodeSelectorTerm {
            match_fields: Some(vec![NodeSelectorRequirement {
                key: "metadata.name".to_owned(),
                operator: "In".to_owned(),
                values: Some(vec![node]),
            }]),
            match_expressions: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOON: &str = "2026-01-01T12:00:00Z";

    pub(super) fn node(name: &str, status: &Value) -> SandboxNode {
        serde_json::from_value(json!({
            "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": name}, "spec": {}, "status": status,
        }))
        .unwrap()
    }

    pub(super) fn holding(name: &str, ready: i32, room: i32) -> SandboxNode {
        let class = |memory: i64, ready: i32| json!({"class": "gvisor", "memoryBytes": memory, "ready": ready, "room": room});
        node(
            name,
            &json!({"heartbeat": NOON, "classes": [class(0, ready), class(1 << 20, 5)]}),
        )
    }

    pub(super) fn gvisor() -> Shape {
        Shape {
            class: "gvisor".to_owned(),
            memory: 0,
            cpu: 500,
        }
    }

    #[test]
    fn a_node_works_until_its_agent_says_otherwise() {
        let ready = |status: &str| json!({"conditions": [{"type": "Ready", "status": status, "reason": "R", "message": "", "lastTransitionTime": NOON}]});
        for (status, expected) in [
            (json!(null), true),
            (json!({}), true),
            (ready("True"), true),
            (ready("False"), false),
        ] {
            assert_eq!(works(&node("n", &status)), expected, "{status}");
        }
    }

    #[test]
    fn nodes_with_most_warm_ones_come_first_and_those_without_not_at_all() {
        let mut nodes = vec![
            holding("b", 1, 0),
            holding("none", 0, 9),
            holding("a", 1, 0),
            holding("c", 3, 0),
        ];
        assert_eq!(warm(nodes.iter(), &gvisor()), ["c", "a", "b"]);
        let other = Shape {
            class: "kata".to_owned(),
            ..gvisor()
        };
        assert!(warm(nodes.iter(), &other).is_empty());
        nodes.extend((0..20).map(|n| holding(&format!("n{n}"), 1, 0)));
        assert_eq!(warm(nodes.iter(), &gvisor()).len(), PREFERRED);
    }
}
