// SPDX-License-Identifier: Apache-2.0

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    sandbox::{PodMetadata, VolumeClaimTemplate},
    warm_pool::SandboxTemplateRef,
};

/// Asks for one Sandbox, out of a pool where one is ready.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "extensions.agents.x-k8s.io",
    version = "v1beta1",
    kind = "SandboxClaim",
    namespaced,
    status = "SandboxClaimStatus",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct SandboxClaimSpec {
    /// The pool to take a Sandbox from (v1beta1). Either this or `sandboxTemplateRef` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_pool_ref: Option<SandboxWarmPoolRef>,
    /// The template that the Sandbox is of (v1alpha1): from any pool of that template, or made
    /// from the template where no pool has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_template_ref: Option<SandboxTemplateRef>,
    /// Beside `sandboxTemplateRef` (v1alpha1): `none` for a new Sandbox, `default` for any pool
    /// of the template, else the name of a pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warmpool: Option<String>,
    /// When and how the claim ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifecycle: Option<Lifecycle>,
    /// Labels and annotations for the Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub additional_pod_metadata: Option<PodMetadata>,
    /// Environment variables for the Pod, where the template lets a claim bring some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<Vec<EnvVar>>,
    /// Volume claims for the Sandbox, where the template lets a claim bring some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_claim_templates: Option<Vec<VolumeClaimTemplate>>,
}

/// Names a pool in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct SandboxWarmPoolRef {
    /// Name of the SandboxWarmPool.
    pub name: String,
}

/// When and how a claim ends.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lifecycle {
    /// When the claim ends. The Sandbox does not learn of it.
    #[serde(
        default,
        deserialize_with = "crate::lenient::time",
        skip_serializing_if = "Option::is_none"
    )]
    pub shutdown_time: Option<Time>,
    /// Seconds for which a claim stays after its Sandbox has finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<i32>,
    /// What goes when the claim ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shutdown_policy: Option<ClaimShutdownPolicy>,
}

/// What goes when a claim ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ClaimShutdownPolicy {
    /// The claim, and its Sandbox with it.
    Delete,
    /// The same, and the claim stays visible until Sandbox and Pod are gone.
    DeleteForeground,
    /// The Sandbox; the claim stays.
    #[default]
    Retain,
}

/// An environment variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
    /// The container or init container that gets it; the first container when unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_name: Option<String>,
}

/// What the controller has seen of a claim.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
pub struct SandboxClaimStatus {
    /// Ready and Finished.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The Sandbox that the claim has got.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<ClaimSandbox>,
}

/// The Sandbox that a claim has got.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct ClaimSandbox {
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Addresses of its Pod.
    #[serde(default, rename = "podIPs", skip_serializing_if = "Option::is_none")]
    pub pod_ips: Option<Vec<String>>,
}
