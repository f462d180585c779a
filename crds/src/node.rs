// SPDX-License-Identifier: Apache-2.0

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one node holds ready below the Pods: sandboxes that are booted before a Pod exists.
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
    /// Which warm sandboxes the node should hold; the controller writes it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<NodeClassSpec>,
}

/// Warm sandboxes of one class that a node should hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeClassSpec {
    /// The class: name of a RuntimeClass.
    pub class: String,
    /// Memory that the sandbox reports, in bytes; 0 for no limit.
    #[serde(default)]
    pub memory_bytes: i64,
    /// CPUs that the sandbox reports, in thousandths; 0 for no limit.
    #[serde(default)]
    pub cpu_milli: i64,
    /// Number of warm sandboxes of this shape.
    pub warm: i32,
}

/// What a node's agent reports.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxNodeStatus {
    /// When the agent has last reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<Time>,
    /// What it holds, by class.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<NodeClassStatus>,
    /// Ready: whether the node runs Pods of its classes, and if not, why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// Warm sandboxes of one class that a node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeClassStatus {
    /// The class: name of a RuntimeClass.
    pub class: String,
    /// Version of its runtime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_version: Option<String>,
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
    /// Median time of a boot, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_millis: Option<i64>,
    /// Memory that those ready hold, in bytes.
    #[serde(default)]
    pub held_bytes: i64,
}
