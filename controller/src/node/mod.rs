// SPDX-License-Identifier: Apache-2.0

//! Nodes: which warm sandboxes each should hold, and which of them have one for a Pod.
//!
//! A node's agent makes its [`SandboxNode`] and says there what it holds; the controller says how
//! much that should be. All of it only makes starts faster: without such objects nothing changes.

mod plan;
mod pulse;
mod shape;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, PodSpec, PreferredSchedulingTerm},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kiln_crds::{NodeClassSpec, NodeTotal, Sandbox, SandboxNode, SandboxNodeSpec, SandboxWarmPool};
use kube::{ResourceExt, core::ObjectMeta};

use crate::{
    cache::Key,
    condition::{self, Is, READY, condition},
    context::Context,
    error::Result,
    known::Known,
    queue::{Class, Outcome, Work},
    watch::Change,
};
pub(crate) use plan::Arrivals;
pub(crate) use pulse::Pulses;
pub(crate) use shape::{Shape, outline};

/// Least time between two writes of a node's wishes.
const PAUSE: Duration = Duration::from_secs(1);
/// How often nodes are looked at without a change: a heartbeat that stays away is none, and a
/// burst is forgotten without one.
const ROUND: Duration = Duration::from_secs(30);
/// How long changes of what nodes hold are gathered before the pools that they are for are looked
/// at: nodes report all the time.
const GATHER: Duration = Duration::from_secs(5);
/// Writes at the same time.
const AT_ONCE: usize = 8;
/// Nodes that a Pod names in its affinity, at most.
const PREFERRED: usize = 16;
/// How much a warm sandbox counts among what a scheduler weighs, of 100.
const WEIGHT: i32 = 50;

/// Most warm sandboxes that a node is taken to hold, whatever its agent says.
const MOST: usize = 1024;

/// Type of a pool's condition.
pub(crate) const CAPACITY: &str = "NodeCapacity";

/// Has the wishes of all nodes looked at soon.
pub(crate) fn look(context: &Context) {
    if !context.nodes.is_empty() {
        let work = Work::new(Class::Node, Key::new("", ""));
        context.queue.add_after(work, PAUSE);
    }
}

/// Notes a claim on a template.
pub(crate) fn claimed(context: &Context, template: Key) {
    let now = context.started.elapsed();
    context.arrivals().note(template, now);
    look(context);
}

/// Looks at what has changed of a node.
pub(crate) fn changed(context: &Context, change: &Change<'_, SandboxNode>) {
    note(context, change);
    look(context);
    let holds = |node: &SandboxNode| node.status.as_ref().map(|s| s.classes.clone());
    if change.is_gone() || change.old().and_then(holds) != holds(change.object()) {
        wake_pools(context);
    }
}

/// Notes a heartbeat, or that a node is gone.
fn note(context: &Context, change: &Change<'_, SandboxNode>) {
    let node = change.object();
    let name = node.name_any();
    if change.is_gone() {
        context.pulses().forget(&name);
    } else if let Some(beat) = node.status.as_ref().and_then(|s| s.heartbeat.as_ref()) {
        let (now, clock) = (Instant::now(), Timestamp::now());
        context.pulses().note(&name, beat.0, now, clock);
    }
}

/// Has the pools looked at that nodes can hold something for.
fn wake_pools(context: &Context) {
    for pool in context.pools.all() {
        let key = Key::of(&*pool);
        let template = Key::new(&key.namespace, &pool.spec.sandbox_template_ref.name);
        let template = context.templates.get(&template);
        if template.is_some_and(|t| Shape::of(&t.spec.pod_template.spec).is_some()) {
            context.queue.add_after(Work::new(Class::Pool, key), GATHER);
        }
    }
}

/// Writes the wishes of all nodes where they have changed.
pub(crate) async fn reconcile(context: &Arc<Context>) -> Result<Outcome> {
    if context.nodes.is_empty() {
        context.wishes().clear();
        return Ok(Outcome::Done);
    }
    let live = live(context);
    let able: BTreeMap<String, BTreeSet<String>> = live
        .iter()
        .map(|node| (node.name_any(), classes(node)))
        .collect();
    note_live(context, able.keys().cloned().collect());
    let bursts = context.arrivals().bursts(context.started.elapsed());
    let (templates, pools) = (context.templates.all(), context.pools.all());
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
        .filter(|(node, share)| is_due(context, node, share))
        .collect();
    let written = stream::iter(due)
        .map(|(node, share)| wish(context, node, share))
        .buffer_unordered(AT_ONCE);
    let results: Vec<Result<()>> = written.collect().await;
    results.into_iter().collect::<Result<()>>()?;
    Ok(Outcome::Again(ROUND))
}

/// The nodes whose agents report, and say that their sandboxes work.
fn live(context: &Context) -> Vec<Arc<Known<SandboxNode>>> {
    let timeout = context.options.node_heartbeat_timeout;
    let (pulses, now) = (context.pulses(), Instant::now());
    let mut nodes = context.nodes.all();
    nodes.retain(|node| works(node) && pulses.beats(&node.name_any(), now, timeout));
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
    let members = context.owned::<Sandbox>(pool);
    members.iter().filter(|s| condition::is_ready(s)).count()
}

/// How many warm sandboxes a node can hold, by its agent's word. One that has made none yet, and
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
fn note_live(context: &Context, live: BTreeSet<String>) {
    let mut known = context.live_nodes();
    if *known != live {
        *known = live;
        drop(known);
        wake_pools(context);
    }
}

/// Whether a node has to be told. What others ask of it beside us stays, and is no reason to ask
/// again.
fn is_due(context: &Context, node: &SandboxNode, share: &[NodeClassSpec]) -> bool {
    let has = |wish: &NodeClassSpec| node.spec.classes.contains(wish);
    let is_told = share.iter().all(has);
    let has_more = node.spec.classes.len() > share.len();
    let said = context.wishes().get(&node.name_any()).cloned();
    !is_told || (has_more && said.is_none_or(|said| said != share))
}

async fn wish(
    context: &Context,
    node: Arc<Known<SandboxNode>>,
    share: Vec<NodeClassSpec>,
) -> Result<()> {
    let wish = SandboxNode {
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
    if context.apply_existing(&wish).await? {
        context.wishes().insert(node.name_any(), share);
    }
    Ok(())
}

/// What nodes hold for a shape.
#[derive(Debug, Default, PartialEq, Eq)]
struct Capacity {
    nodes: usize,
    ready: i64,
    room: i64,
}

/// The condition by which a pool says what nodes hold for it; `None` where no node is known, or
/// its Pods have no class.
pub(crate) fn capacity(
    context: &Context,
    pod: &PodSpec,
    generation: Option<i64>,
) -> Option<Condition> {
    let shape = Shape::of(pod)?;
    if context.nodes.is_empty() {
        return None;
    }
    let capacity = count(live(context).iter().map(|node| node.outline()), &shape);
    let (is, reason) = match capacity {
        Capacity { nodes: 0, .. } => (Is::False, "NoNodes"),
        Capacity { ready: 0, .. } => (Is::False, "NoWarmSandboxes"),
        _ => (Is::True, "WarmSandboxes"),
    };
    let message = describe(&shape.class, &capacity);
    Some(condition(CAPACITY, is, reason, message, generation))
}

fn count<'a>(live: impl Iterator<Item = &'a SandboxNode>, shape: &Shape) -> Capacity {
    let mut sum = Capacity::default();
    for node in live.filter(|node| classes(node).contains(&shape.class)) {
        let held = node.status.iter().flat_map(|s| &s.classes);
        let of_class = held.filter(|c| c.class == shape.class);
        sum.nodes += 1;
        // Its shapes share the room of a node.
        sum.room += of_class
            .clone()
            .map(|c| i64::from(c.room))
            .max()
            .unwrap_or_default();
        let fitting = of_class.filter(|c| shape.is_served_by(c));
        sum.ready += fitting.map(|c| i64::from(c.ready)).sum::<i64>();
    }
    sum
}

fn describe(class: &str, capacity: &Capacity) -> String {
    let Capacity { nodes, ready, room } = capacity;
    if *nodes == 0 {
        return format!("no node holds {class} sandboxes");
    }
    let sandboxes = if *ready == 1 { "sandbox" } else { "sandboxes" };
    let of_nodes = if *nodes == 1 { "node" } else { "nodes" };
    format!("{ready} warm {class} {sandboxes} on {nodes} {of_nodes}, room for {room}")
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

    fn node(name: &str, status: &Value) -> SandboxNode {
        serde_json::from_value(json!({
            "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": name}, "spec": {}, "status": status,
        }))
        .unwrap()
    }

    fn holding(name: &str, ready: i32, room: i32) -> SandboxNode {
        let class = |memory: i64, ready: i32| json!({"class": "gvisor", "memoryBytes": memory, "ready": ready, "room": room});
        node(
            name,
            &json!({"heartbeat": NOON, "classes": [class(0, ready), class(1 << 20, 5)]}),
        )
    }

    fn gvisor() -> Shape {
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
    fn capacity_counts_what_fits_and_says_so() {
        let nodes = [
            holding("a", 3, 4),
            holding("b", 0, 8),
            node("other", &json!({"runtimeVersions": {"kata": "3"}})),
        ];
        let counted = count(nodes.iter(), &gvisor());
        assert_eq!(
            counted,
            Capacity {
                nodes: 2,
                ready: 3,
                room: 12
            }
        );
        assert_eq!(
            describe("gvisor", &counted),
            "3 warm gvisor sandboxes on 2 nodes, room for 12"
        );
        let one = count(
            nodes[..1].iter(),
            &Shape {
                memory: 1 << 20,
                ..gvisor()
            },
        );
        assert_eq!(
            describe("gvisor", &Capacity { ready: 1, ..one }),
            "1 warm gvisor sandbox on 1 node, room for 4"
        );
        let none = count(nodes[2..].iter(), &gvisor());
        assert_eq!(describe("gvisor", &none), "no node holds gvisor sandboxes");
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
