// SPDX-License-Identifier: Apache-2.0

//! The Kubernetes types of Agent Sandbox.
//!
//! Four kinds are upstream's (kubernetes-sigs/agent-sandbox), field by field: [`Sandbox`],
//! [`SandboxTemplate`], [`SandboxWarmPool`] and [`SandboxClaim`]. Each is served as v1alpha1 and
//! as v1beta1 from one schema that has the fields of both, so that no object is ever converted
//! and no webhook is needed. Four kinds of Pod snapshots ([`PodSnapshot`] and what goes with it) are
//! those that upstream's clients speak. [`SandboxNode`] is ours.
//!
//! Objects are always read and written as v1beta1, the stored version.

#![forbid(unsafe_code)]

pub mod fair;
pub mod keys;

mod claim;
#[cfg(test)]
mod fuzz;
mod lenient;
mod manifest;
mod node;
mod sandbox;
mod schema;
mod snapshot;
mod template;
mod warm_pool;

pub use claim::{
    ClaimSandbox, ClaimShutdownPolicy, EnvVar, Lifecycle, SandboxClaim, SandboxClaimSpec,
    SandboxClaimStatus, SandboxWarmPoolRef,
};
pub use manifest::{Manifest, manifests};
pub use node::{
    MOST_CLASSES, NodeClassSpec, NodeClassStatus, NodeRuntimeWays, NodeTotal, SandboxNode,
    SandboxNodeSpec, SandboxNodeStatus,
};
pub use sandbox::{
    OperatingMode, PodMetadata, PodTemplate, Sandbox, SandboxSpec, SandboxStatus, ShutdownPolicy,
    VolumeClaimMetadata, VolumeClaimTemplate,
};
pub use snapshot::{
    GcsStorage, GroupByLabelValue, GroupRetentionPolicy, LocalStorage, PodSnapshot,
    PodSnapshotManualTrigger, PodSnapshotManualTriggerSpec, PodSnapshotManualTriggerStatus,
    PodSnapshotPolicy, PodSnapshotPolicySpec, PodSnapshotSpec, PodSnapshotStatus,
    PodSnapshotStorageConfig, PodSnapshotStorageConfigSpec, PostCheckpoint, RestoreInto,
    RestoreOutcome, RetentionConfig, SnapshotCreated, SnapshotGroupingRules, SnapshotOf,
    SnapshotStorageConfig, TriggerConfig, TriggerType,
};
pub use template::{
    InjectionPolicy, NetworkPolicyManagement, NetworkPolicyRules, SandboxTemplate,
    SandboxTemplateSpec,
};
pub use warm_pool::{
    SandboxTemplateRef, SandboxWarmPool, SandboxWarmPoolSpec, SandboxWarmPoolStatus,
    UpdateStrategy, UpdateStrategyType,
};
