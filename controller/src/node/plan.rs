// SPDX-License-Identifier: Apache-2.0

//! How many warm sandboxes of which shape each node should hold. Nothing here acts.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use kiln_crds::{MOST_CLASSES, SandboxTemplate, SandboxWarmPool, fair, keys};
use kube::ResourceExt;

use crate::{
    cache::Key,
    shape::{Shape, WantedShape},
};

/// A pool that nobody claims from holds one sandbox below its Pods for so many of them: enough to
/// replace what the first claims take, without paying for each Pod twice.
const PODS_PER_IDLE: usize = 4;
/// How many sandboxes of which shape each namespace wants, by class.
pub(crate) type Demand = BTreeMap<String, BTreeMap<String, BTreeMap<Shape, usize>>>;

/// How many sandboxes of which shape are wanted in all: for each template as many as its largest
/// burst of late took, and at least a few for the Sandboxes of its pools that run. What a pool's spec
/// asks for and no Pod has come of yet, such as for lack of quota, wants none. `pools` come with the
/// number of their Sandboxes that run.
pub(crate) fn demand<'a>(
    templates: impl IntoIterator<Item = &'a SandboxTemplate>,
    pools: impl IntoIterator<Item = (&'a SandboxWarmPool, usize)>,
    bursts: &BTreeMap<Key, usize>,
) -> Demand {
    let mut idle: BTreeMap<Key, usize> = BTreeMap::new();
    for (pool, running) in pools {
        let namespace = pool.namespace().unwrap_or_default();
        let template = Key::new(&namespace, &pool.spec.sandbox_template_ref.name);
        *idle.entry(template).or_default() += running.div_ceil(PODS_PER_IDLE);
    }
    let mut demand = Demand::new();
    for template in templates {
        let key = Key::of(template);
        let of = |from: &BTreeMap<Key, usize>| from.get(&key).copied().unwrap_or_default();
        let wanted = of(&idle).max(of(bursts));
        if let Some(shape) = Shape::of(&template.spec.pod_template.spec)
            && wanted > 0
        {
            let class = demand.entry(shape.class.clone()).or_default();
            let namespace = class.entry(key.namespace).or_default();
            *namespace.entry(shape).or_default() += wanted;
        }
    }
    demand
}

/// Cuts a demand down to the sandboxes that `room_of` a class there is for, fairly: first between
/// namespaces, then between the shapes of each.
pub(crate) fn fit(demand: &Demand, room_of: impl Fn(&str) -> usize) -> BTreeMap<Shape, usize> {
    let mut fitting = BTreeMap::new();
    for (class, namespaces) in demand {
        let sums = namespaces.iter().map(|(namespace, shapes)| {
            let sum = shapes.values().copied().fold(0, usize::saturating_add);
            (namespace, sum)
        });
        for (namespace, room) in fair::divide(&sums.collect(), room_of(class)) {
            for (shape, count) in fair::divide(&namespaces[namespace], room) {
                *fitting.entry(shape).or_default() += count;
            }
        }
    }
    fitting.retain(|_, count| *count > 0);
    fitting
}

/// Shares `demand` out among `nodes`, the classes that each can hold by its name. Each gets the
/// same, and what is left over goes to one after the other, beginning at another node for each
/// shape. Of more shapes than a node can be asked for, those that it would hold most of stay.
pub(crate) fn share(
    demand: &BTreeMap<Shape, usize>,
    nodes: &BTreeMap<String, BTreeSet<String>>,
) -> BTreeMap<String, Vec<WantedShape>> {
    let mut shares: BTreeMap<String, Vec<WantedShape>> = BTreeMap::new();
    for (shape, wanted) in demand {
        let able: Vec<&String> = nodes
            .iter()
            .filter(|(_, classes)| classes.contains(&shape.class))
            .map(|(name, _)| name)
            .collect();
        if able.is_empty() {
            continue;
        }
        let (each, rest) = (wanted / able.len(), wanted % able.len());
        let first = start(shape, able.len());
        for (index, name) in able.iter().enumerate() {
            let turn = (index + able.len() - first) % able.len();
            let warm = each + usize::from(turn < rest);
            if warm > 0 {
                let share = shares.entry((*name).clone()).or_default();
                share.push(shape.wanted(warm));
            }
        }
    }
    for share in shares.values_mut() {
        if share.len() > MOST_CLASSES {
            share.sort_by_key(|wanted| Reverse(wanted.warm));
            share.truncate(MOST_CLASSES);
        }
    }
    shares
}

fn start(shape: &Shape, nodes: usize) -> usize {
    let text = format!("{}/{}/{}", shape.class, shape.memory, shape.cpu);
    let hash = u32::from_str_radix(&keys::name_hash(&text), 16).unwrap_or_default();
    usize::try_from(hash).unwrap_or_default() % nodes
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(name: &str, class: &str, memory: &str) -> SandboxTemplate {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxTemplate",
            "metadata": {"name": name, "namespace": "ns"},
            "spec": {"podTemplate": {"spec": {
                "runtimeClassName": class,
                "containers": [{"name": "c", "resources": {"limits": {"memory": memory}}}],
            }}},
        }))
        .unwrap()
    }

    fn pool(template: &str) -> SandboxWarmPool {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": "p", "namespace": "ns"},
            "spec": {"replicas": i32::MAX, "sandboxTemplateRef": {"name": template}},
        }))
        .unwrap()
    }

    fn shape(class: &str, memory: i64) -> Shape {
        Shape {
            class: class.to_owned(),
            memory,
            cpu: 0,
        }
    }

    #[test]
    fn demand_is_what_bursts_took_and_a_few_for_idle_pools() {
        let templates = [
            template("a", "gvisor", "1Mi"),
            template("same-shape", "gvisor", "1Mi"),
            template("idle", "gvisor", "2Mi"),
            template("unused", "gvisor", "3Mi"),
            template("classless", "", "1Mi"),
        ];
        // With the number of their Sandboxes that run.
        let pools = [
            (pool("a"), 5),
            (pool("a"), 1),
            (pool("same-shape"), 1),
            (pool("idle"), 0),
            (pool("classless"), 8),
            (pool("missing"), 8),
        ];
        let bursts = BTreeMap::from([
            (Key::new("ns", "same-shape"), 7),
            (Key::new("ns", "a"), 2),
            (Key::new("other", "idle"), 9),
        ]);
        let pools = pools.iter().map(|(pool, running)| (pool, *running));
        let demand = demand(&templates, pools, &bursts);
        // Two and one for the pools of the first, more than its burst; the burst of the second.
        let wanted = BTreeMap::from([(shape("gvisor", 1 << 20), 3 + 7)]);
        let of_namespace = BTreeMap::from([("ns".to_owned(), wanted)]);
        assert_eq!(demand, Demand::from([("gvisor".to_owned(), of_namespace)]));
    }

    #[test]
    fn one_who_wants_all_leaves_the_others_their_share() {
        let wants = |all: &[(i64, usize)]| -> BTreeMap<Shape, usize> {
            let want = |(memory, count): &(i64, usize)| (shape("gvisor", *memory), *count);
            all.iter().map(want).collect()
        };
        let many: Vec<(i64, usize)> = (0..5000).map(|memory| (memory, 9)).collect();
        let of_class = BTreeMap::from([
            (
                "greedy".to_owned(),
                wants(&[(1, usize::MAX), (2, usize::MAX)]),
            ),
            ("modest".to_owned(), wants(&[(512, 2)])),
            ("varied".to_owned(), wants(&many)),
        ]);
        let demand = Demand::from([("gvisor".to_owned(), of_class)]);
        let fitting = fit(&demand, |_| 16);
        assert_eq!(fitting.values().sum::<usize>(), 16);
        assert_eq!(fitting[&shape("gvisor", 512)], 2);
        let greedy = [1, 2].map(|memory| fitting[&shape("gvisor", memory)]);
        assert!(greedy.iter().all(|n| (3..=5).contains(n)), "{greedy:?}");
        // There is room for all.
        assert_eq!(fit(&demand, |_| usize::MAX)[&shape("gvisor", 4999)], 9);
        assert!(fit(&demand, |_| 0).is_empty());
    }

    #[test]
    fn a_node_is_asked_for_as_many_shapes_as_its_object_takes() {
        let demand = (0..100).map(|memory| (shape("gvisor", memory), 1 + usize::from(memory > 90)));
        let node = BTreeMap::from([("n".to_owned(), BTreeSet::from(["gvisor".to_owned()]))]);
        let shares = share(&demand.collect(), &node);
        assert_eq!(shares["n"].len(), MOST_CLASSES);
        let most = shares["n"].iter().filter(|wanted| wanted.warm == 2);
        assert_eq!(most.count(), 9);
    }

    #[test]
    fn nodes_share_what_they_are_able_to_hold() {
        let nodes = |all: &[(&str, &[&str])]| -> BTreeMap<String, BTreeSet<String>> {
            let classes = |of: &[&str]| of.iter().map(|c| (*c).to_owned()).collect();
            let node = |(name, of): &(&str, &[&str])| ((*name).to_owned(), classes(of));
            all.iter().map(node).collect()
        };
        let three = nodes(&[
            ("a", &["gvisor"]),
            ("b", &["gvisor", "kata"]),
            ("c", &["gvisor"]),
        ]);
        let demand = BTreeMap::from([
            (shape("gvisor", 1), 7),
            (shape("gvisor", 2), 1),
            (shape("kata", 1), 2),
            (shape("unknown", 1), 9),
        ]);
        let shares = share(&demand, &three);
        let warm = |class: &str, memory: i64| -> Vec<i32> {
            let all = shares.values().flatten();
            let mut warm: Vec<i32> = all
                .filter(|c| c.class == class && c.memory_bytes == memory)
                .map(|c| c.warm)
                .collect();
            warm.sort_unstable();
            warm
        };
        assert_eq!(warm("gvisor", 1), [2, 2, 3]);
        assert_eq!(warm("gvisor", 2), [1]);
        assert_eq!(warm("kata", 1), [2]);
        assert_eq!(warm("unknown", 1), [0; 0]);
        assert!(shares["b"].contains(&shape("kata", 1).wanted(2)));
        assert!(share(&demand, &nodes(&[])).is_empty());
    }

    /// Classes by node, and how many of which shape are wanted.
    type Case = (Vec<Vec<u8>>, Vec<(u8, u8, u16)>);

    #[test]
    fn all_that_can_be_held_is_shared_out_and_nothing_else() {
        bolero::check!()
            .with_type::<Case>()
            .for_each(|(nodes, wanted)| {
                let class = |n: u8| format!("c{}", n % 3);
                let nodes: BTreeMap<String, BTreeSet<String>> = nodes
                    .iter()
                    .enumerate()
                    .map(|(n, of)| (format!("n{n}"), of.iter().map(|c| class(*c)).collect()))
                    .collect();
                let demand: BTreeMap<Shape, usize> = wanted
                    .iter()
                    .map(|(c, memory, n)| (shape(&class(*c), (*memory).into()), (*n).into()))
                    .collect();
                let shares = share(&demand, &nodes);
                for (shape, wanted) in &demand {
                    let able = nodes.values().filter(|c| c.contains(&shape.class)).count();
                    let shared = shares.values().flatten();
                    let shared: Vec<usize> = shared
                        .filter(|w| w.class == shape.class && w.memory_bytes == shape.memory)
                        .map(|w| usize::try_from(w.warm).unwrap())
                        .collect();
                    let sum: usize = shared.iter().sum();
                    assert_eq!(sum, if able > 0 { *wanted } else { 0 });
                    assert!(shared.iter().all(|n| *n > 0 && *n <= wanted.div_ceil(able)));
                }
                for (node, share) in &shares {
                    assert!(share.iter().all(|w| nodes[node].contains(&w.class)));
                }
            });
    }
}
