// SPDX-License-Identifier: Apache-2.0

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaimSpec, PodSpec},
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One isolated, stateful environment: a Pod with a stable name, and what belongs to it.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "agents.x-k8s.io",
    version = "v1beta1",
    kind = "Sandbox",
    namespaced,
    status = "SandboxStatus",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct SandboxSpec {
    /// The Pod to run.
    pub pod_template: PodTemplate,
    /// Volume claims made for this Sandbox, as a StatefulSet makes them; immutable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_claim_templates: Option<Vec<VolumeClaimTemplate>>,
    /// Whether there is a headless Service with the Sandbox's name. Unset, one that exists stays
    /// and none is made; false removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<bool>,
    /// When the Sandbox ends.
    #[serde(
        default,
        deserialize_with = "crate::lenient::time",
        skip_serializing_if = "Option::is_none"
    )]
    pub shutdown_time: Option<Time>,
    /// What happens to the Sandbox itself when it ends; its Pod and Service go in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shutdown_policy: Option<ShutdownPolicy>,
    /// Whether the Pod should run (v1beta1). A Sandbox is suspended when this says so or
    /// `replicas` is 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operating_mode: Option<OperatingMode>,
    /// Number of Pods, 0 or 1 (v1alpha1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
}

/// A Pod to be made.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
pub struct PodTemplate {
    /// Labels and annotations of the Pod.
    #[serde(default)]
    pub metadata: PodMetadata,
    /// The Pod's spec.
    #[serde(deserialize_with = "crate::lenient::deserialize")]
    pub spec: PodSpec,
}

/// Labels and annotations of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
pub struct PodMetadata {
    /// Labels of the Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// Annotations of the Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// A volume claim to be made.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
pub struct VolumeClaimTemplate {
    /// Name, labels and annotations of the claim.
    #[serde(default)]
    pub metadata: VolumeClaimMetadata,
    /// The claim's spec.
    #[serde(deserialize_with = "crate::lenient::deserialize")]
    pub spec: PersistentVolumeClaimSpec,
}

/// Name, labels and annotations of a volume claim.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
pub struct VolumeClaimMetadata {
    /// Name of the volume; the claim is called `<name>-<sandbox>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Labels of the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// Annotations of the claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// What happens to a Sandbox at its shutdown time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ShutdownPolicy {
    /// It is deleted.
    Delete,
    /// It stays, without Pod and Service.
    #[default]
    Retain,
}

/// What a Sandbox should do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum OperatingMode {
    /// Its Pod runs.
    #[default]
    Running,
    /// It has no Pod; volumes and the Sandbox stay.
    Suspended,
}

/// What the controller has seen of a Sandbox.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SandboxStatus {
    /// DNS name of the Service.
    #[serde(
        default,
        rename = "serviceFQDN",
        skip_serializing_if = "Option::is_none"
    )]
    pub service_fqdn: Option<String>,
    /// Name of the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Ready, Suspended, PodScheduled and Finished.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// Number of Pods (v1alpha1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Label selector of the Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Addresses of the Pod.
    #[serde(default, rename = "podIPs", skip_serializing_if = "Option::is_none")]
    pub pod_ips: Option<Vec<String>>,
    /// Node of the Pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
}

impl SandboxSpec {
    /// Whether the Sandbox should have no Pod, in the words of either version.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        self.operating_mode == Some(OperatingMode::Suspended) || self.replicas == Some(0)
    }
}
