// SPDX-License-Identifier: Apache-2.0

//! What a pool says of the warm sandboxes that nodes hold for it.

use k8s_openapi::{api::core::v1::PodSpec, apimachinery::pkg::apis::meta::v1::Condition};
use kiln_crds::SandboxNode;

use super::{classes, live};
use crate::{
    condition::{Is, condition},
    context::Context,
    shape::Shape,
};

/// Type of a pool's condition.
pub(crate) const CAPACITY: &str = "NodeCapacity";

/// What nodes hold for a shape.
#[derive(Debug, Default, PartialEq, Eq)]
struct Capacity {
    nodes: usize,
    ready: i64,
    room: i64,
}

/// The condition by which a pool says what nodes hold for it; `None` if no node is known, or
/// its Pods have no class.
pub(crate) fn capacity(
    context: &Context,
    pod: &PodSpec,
    generation: Option<i64>,
) -> Option<Condition> {
    let shape = Shape::of(pod)?;
    if context.store.nodes.is_empty() {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{
        super::tests::{gvisor, holding, node},
        *,
    };

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
}
