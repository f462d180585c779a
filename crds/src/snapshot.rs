// SPDX-License-Identifier: Apache-2.0

//! Pod snapshots: the kinds of group `podsnapshot.gke.io` that clients of Agent Sandbox speak, and
//! what Kiln's controller and agents write into them.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, Time};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A request for one snapshot of a running Pod.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "podsnapshot.gke.io",
    version = "v1",
    kind = "PodSnapshotManualTrigger",
    namespaced,
    status = "PodSnapshotManualTriggerStatus",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct PodSnapshotManualTriggerSpec {
    /// Name of the Pod, in the trigger's namespace. It must be that of a Sandbox.
    pub target_pod: String,
}

/// Outcome of a request for a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSnapshotManualTriggerStatus {
    /// `Triggered`: True with reason `Complete` once the snapshot is ready, False with reason
    /// `Failed` if there will be none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The snapshot that was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_created: Option<SnapshotCreated>,
}

/// Names the PodSnapshot that a trigger has made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct SnapshotCreated {
    /// Name of the PodSnapshot, in the trigger's namespace.
    pub name: String,
}

/// The processes, memory and files of a Sandbox's Pod, as they were at one moment.
///
/// The controller makes the object, and the agent of the node takes the snapshot and reports it.
/// Deleting the object deletes the files.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "podsnapshot.gke.io",
    version = "v1",
    kind = "PodSnapshot",
    namespaced,
    status = "PodSnapshotStatus",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct PodSnapshotSpec {
    /// Name of the node that runs the Pod and keeps the files.
    pub node_name: String,
    /// The Pod.
    pub pod: SnapshotOf,
    /// The Sandbox that the Pod belongs to, and to which alone the snapshot is restored.
    pub sandbox: SnapshotOf,
    /// Whether the Pod goes on after the snapshot, or is stopped.
    #[serde(default)]
    pub post_checkpoint: PostCheckpoint,
    /// Digest of what the Pod runs. A Pod that would run something else starts cold.
    pub pod_spec_digest: String,
    /// The images that its containers ran, by the containers' names. A Pod that is restored runs
    /// these, whatever their tags mean by then.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub images: BTreeMap<String, String>,
    /// Name of the PodSnapshotPolicy that the snapshot was made by, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_name: Option<String>,
    /// The Pod that may be restored from the snapshot now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreInto>,
}

/// Names an object that a snapshot is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct SnapshotOf {
    /// Name, in the snapshot's namespace.
    pub name: String,
    /// UID: another object of the same name is not meant.
    pub uid: String,
}

/// Names the Pod that may be restored from a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreInto {
    /// UID of the Pod.
    #[serde(rename = "podUID")]
    pub pod_uid: String,
}

/// Fate of a Pod after its snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PostCheckpoint {
    /// The Pod goes on.
    #[default]
    Resume,
    /// The Pod is stopped: nothing that it does after the snapshot is lost.
    Stop,
}

/// Report of a node's agent about a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodSnapshotStatus {
    /// `Ready`: True with reason `AllSnapshotsAvailable` while the Sandbox can be restored from the
    /// snapshot, False with the reason why it cannot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// When the Pod was paused for the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken_at: Option<Time>,
    /// How long the Pod was paused, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused_milliseconds: Option<i64>,
    /// Size of the files, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// Number of processes started by exec, which are not restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_execs: Option<i32>,
    /// Outcome of the last restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<RestoreOutcome>,
    /// Whether the node has removed the files of a snapshot that is being deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub files_removed: bool,
}

/// Outcome of a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RestoreOutcome {
    /// UID of the Pod.
    #[serde(rename = "podUID")]
    pub pod_uid: String,
    /// Why the Pod started cold, for people; absent if it was restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
}

/// Says which Pods may be snapshotted, and how snapshots are kept.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "podsnapshot.gke.io",
    version = "v1",
    kind = "PodSnapshotPolicy",
    namespaced,
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct PodSnapshotPolicySpec {
    /// Name of the PodSnapshotStorageConfig that says where snapshots are kept.
    pub storage_config_name: String,
    /// The Pods, by their labels.
    #[serde(default)]
    pub selector: LabelSelector,
    /// Who asks for snapshots, and what happens to the Pod after one.
    #[serde(default)]
    pub trigger_config: TriggerConfig,
    /// How long snapshots are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention_config: Option<RetentionConfig>,
    /// Which snapshots belong together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_grouping_rules: Option<SnapshotGroupingRules>,
}

/// Who asks for snapshots, and what happens to the Pod after one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TriggerConfig {
    /// Who asks for snapshots. `manual`, the default: PodSnapshotManualTriggers. `workload` is not
    /// supported.
    #[serde(rename = "type", default)]
    pub kind: TriggerType,
    /// Whether the Pod goes on after its snapshot (`resume`, the default) or is stopped (`stop`).
    #[serde(default)]
    pub post_checkpoint: PostCheckpoint,
}

/// Who asks for snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TriggerType {
    /// PodSnapshotManualTriggers.
    #[default]
    Manual,
    /// The application, over a file of its sandbox.
    Workload,
}

/// How long snapshots are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RetentionConfig {
    /// How long a snapshot is kept after it was taken, such as `72h`; without it, as long as its
    /// Sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_access_timeout: Option<String>,
}

/// Which snapshots belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SnapshotGroupingRules {
    /// Snapshots of one Sandbox and policy belong together, whatever the labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_by_label_value: Option<GroupByLabelValue>,
}

/// A group by values of labels.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupByLabelValue {
    /// The labels.
    #[serde(default)]
    pub labels: Vec<String>,
    /// How many snapshots of a group are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_retention_policy: Option<GroupRetentionPolicy>,
}

/// How many snapshots of a group are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupRetentionPolicy {
    /// The most snapshots of a group; the oldest are deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_snapshot_count_per_group: Option<i32>,
}

/// Says where snapshots are kept.
#[derive(CustomResource, Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[kube(
    group = "podsnapshot.gke.io",
    version = "v1",
    kind = "PodSnapshotStorageConfig",
    derive = "Default",
    derive = "PartialEq"
)]
#[serde(rename_all = "camelCase")]
pub struct PodSnapshotStorageConfigSpec {
    /// The place.
    pub snapshot_storage_config: SnapshotStorageConfig,
}

/// Place for snapshots: exactly one member is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct SnapshotStorageConfig {
    /// On the node that took them, in the directory that the node's agent is configured with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalStorage>,
    /// In a bucket of Google Cloud Storage. Not supported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gcs: Option<GcsStorage>,
}

/// Storage on the node. Nothing of it can be set here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub struct LocalStorage {}

/// A place in Google Cloud Storage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GcsStorage {
    /// Name of the bucket.
    pub bucket: String,
    /// Path in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}
