// SPDX-License-Identifier: Apache-2.0

use std::{collections::BTreeMap, fmt::Write as _};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one node holds ready below the Pods: sandboxes that are booted before a Pod exists.
///
/// The node's agent makes the object, under the node's name and owned by the Node, and applies its
/// status; the controller applies its spec.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "node.agents.x-k8s.io",
    version = "v1alpha1",
    kind = "SandboxNode",
    status = "SandboxNodeStatus",
    derive = "Default",
    derive = "PartialEq"
)]
pub struct SandboxNodeSpec {
    /// Which warm sandboxes the node should hold; the controller writes it. At most 64 shapes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub classes: Vec<NodeClassSpec>,
}

/// The most entries of [`SandboxNodeSpec::classes`].
pub const MOST_CLASSES: usize = 64;

/// Warm sandboxes of one class and shape that a node should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeClassSpec {
    /// The class: name of a RuntimeClass.
    pub class: String,
    /// Memory limit of the Pod, which the sandbox takes for all there is, in bytes; 0 for none.
    #[serde(default)]
    pub memory_bytes: i64,
    /// CPU limit of the Pod, in thousandths of a CPU; 0 for none.
    #[serde(default)]
    pub cpu_milli: i64,
    /// Number of warm sandboxes of this shape.
    pub warm: i32,
}

/// What a node's agent reports.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxNodeStatus {
    /// When the agent has last reported. Who reports no more counts as holding nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<Time>,
    /// The classes that the node can hold warm sandboxes of, wanted or not, each with the version
    /// of its runtime.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub runtime_versions: BTreeMap<String, String>,
    /// How sandboxes of those classes are made and started, by what passed its trial on the node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub runtime_ways: BTreeMap<String, NodeRuntimeWays>,
    /// What it holds, by class and shape.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<NodeClassStatus>,
    /// All classes together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<NodeTotal>,
    /// Ready: whether the node boots sandboxes of its classes ahead, and if not, why. Installed:
    /// whether its agent has put on the node what Pods of the class need, and if not, why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// How sandboxes of a class are made and started on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeRuntimeWays {
    /// Whether the release of the runtime is one that was tested.
    #[serde(default)]
    pub known: bool,
    /// How sandboxes that were booted ahead are started: ControlSocket, or Command, which takes
    /// longer.
    #[serde(default)]
    pub start: String,
    /// Whether sandboxes read their root file system from an image, without a gofer.
    #[serde(default)]
    pub image: bool,
    /// Whether a gofer for the first container is made ahead with each sandbox.
    #[serde(default)]
    pub gofers: bool,
}

/// Warm sandboxes of one class and shape that a node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeClassStatus {
    /// The class: name of a RuntimeClass.
    pub class: String,
    /// Memory limit of the Pods that they are for, in bytes; 0 for none.
    #[serde(default)]
    pub memory_bytes: i64,
    /// CPU limit of the Pods that they are for, in thousandths of a CPU; 0 for none, and where the
    /// runtime makes no difference.
    #[serde(default)]
    pub cpu_milli: i64,
    /// Sandboxes that can be taken now.
    #[serde(default)]
    pub ready: i32,
    /// Sandboxes that are booting.
    #[serde(default)]
    pub warming: i32,
    /// How many more the node has room for, if it makes no others.
    #[serde(default)]
    pub room: i32,
    /// Sandboxes taken since the agent started.
    #[serde(default)]
    pub adopted: i64,
    /// Pods that found none since the agent started.
    #[serde(default)]
    pub missed: i64,
    /// Median time of a boot, in milliseconds.
    #[serde(default, rename = "bootP50Ms", skip_serializing_if = "Option::is_none")]
    pub boot_p50_ms: Option<i64>,
    /// Memory that those ready take on the node, in bytes.
    #[serde(default)]
    pub held_bytes: i64,
}

/// What a node holds of all classes, for people: a column of `kubectl get` shows one value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeTotal {
    /// The sandboxes that can be taken now, such as `gvisor 3, kata 0`.
    #[serde(default)]
    pub warm: String,
    /// Sandboxes that can be taken now.
    #[serde(default)]
    pub ready: i32,
    /// Sandboxes that are booting.
    #[serde(default)]
    pub warming: i32,
    /// How many more the node has room for.
    #[serde(default)]
    pub room: i32,
    /// Sandboxes taken since the agent started.
    #[serde(default)]
    pub adopted: i64,
    /// Pods that found none since the agent started.
    #[serde(default)]
    pub missed: i64,
    /// Memory that those ready take on the node, in MiB.
    #[serde(default, rename = "heldMiB")]
    pub held_mib: i64,
}

impl NodeTotal {
    /// The sum of what a node reports of its classes. Room is no sum: all of them share it.
    #[must_use]
    pub fn of(classes: &[NodeClassStatus]) -> Self {
        let mut by_class: BTreeMap<&str, i32> = BTreeMap::new();
        for class in classes {
            let ready = by_class.entry(&class.class).or_default();
            *ready = ready.saturating_add(class.ready);
        }
        let mut warm = String::new();
        for (class, ready) in by_class {
            let comma = if warm.is_empty() { "" } else { ", " };
            let name = if class.is_empty() { "other" } else { class };
            // Writing into a string cannot fail.
            write!(warm, "{comma}{name} {ready}").ok();
        }
        let sum =
            |of: fn(&NodeClassStatus) -> i32| classes.iter().map(of).fold(0, i32::saturating_add);
        let count =
            |of: fn(&NodeClassStatus) -> i64| classes.iter().map(of).fold(0, i64::saturating_add);
        Self {
            warm,
            ready: sum(|c| c.ready),
            warming: sum(|c| c.warming),
            room: classes.iter().map(|c| c.room).max().unwrap_or_default(),
            adopted: count(|c| c.adopted),
            missed: count(|c| c.missed),
            held_mib: count(|c| c.held_bytes) >> 20,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_sums_the_shapes_of_a_class_and_shares_the_room() {
        let class = |class: &str, ready, held_bytes| NodeClassStatus {
            class: class.to_owned(),
            ready,
            room: 5,
            missed: 2,
            held_bytes,
            ..NodeClassStatus::default()
        };
        let total = NodeTotal::of(&[
            class("kata", 0, 0),
            class("gvisor", 2, 30 << 20),
            class("gvisor", 1, 20 << 20),
            class("", 1, i64::MAX),
        ]);
        assert_eq!(total.warm, "other 1, gvisor 3, kata 0");
        assert_eq!((total.ready, total.room, total.missed), (4, 5, 8));
        assert_eq!(total.held_mib, i64::MAX >> 20);
        assert_eq!(NodeTotal::of(&[]), NodeTotal::default());
    }
}
