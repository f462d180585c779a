// SPDX-License-Identifier: Apache-2.0

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Sandboxes of one template that run before anybody claims them.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "extensions.agents.x-k8s.io",
    version = "v1beta1",
    kind = "SandboxWarmPool",
    namespaced,
    status = "SandboxWarmPoolStatus",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct SandboxWarmPoolSpec {
    /// Number of Sandboxes to hold ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// The template that they are made from.
    pub sandbox_template_ref: SandboxTemplateRef,
    /// What happens to them when the template changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub update_strategy: Option<UpdateStrategy>,
    /// Seconds that a Sandbox may take to become ready before it is replaced, at least 30; without
    /// it, what the controller is told by `--sandbox-warm-pool-readiness-grace-period`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness_grace_period_seconds: Option<i32>,
}

/// Names a template in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct SandboxTemplateRef {
    /// Name of the SandboxTemplate.
    pub name: String,
}

/// How a pool follows its template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct UpdateStrategy {
    /// When old Sandboxes are replaced.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<UpdateStrategyType>,
}

/// When a pool's Sandboxes of an older template are replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum UpdateStrategyType {
    /// At once.
    Recreate,
    /// When they are used up.
    #[default]
    OnReplenish,
}

/// What the controller has seen of a pool.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxWarmPoolStatus {
    /// Number of Sandboxes in the pool.
    #[serde(default)]
    pub replicas: i32,
    /// Number of those that are ready to be claimed.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Label selector of the pool's Sandboxes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready: whether the pool holds what it should, and if not, why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}
