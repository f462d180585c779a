// SPDX-License-Identifier: Apache-2.0

//! CustomResourceDefinitions.

use kube::Resource;
use schemars::JsonSchema;
use serde_json::{Value, json};

use crate::{
    PodSnapshot, PodSnapshotManualTrigger, PodSnapshotManualTriggerSpec,
    PodSnapshotManualTriggerStatus, PodSnapshotPolicy, PodSnapshotPolicySpec, PodSnapshotSpec,
    PodSnapshotStatus, PodSnapshotStorageConfig, PodSnapshotStorageConfigSpec, Sandbox,
    SandboxClaim, SandboxClaimSpec, SandboxClaimStatus, SandboxNode, SandboxNodeSpec,
    SandboxNodeStatus, SandboxSpec, SandboxStatus, SandboxTemplate, SandboxTemplateSpec,
    SandboxWarmPool, SandboxWarmPoolSpec, SandboxWarmPoolStatus, schema,
};

/// Volume claims stay what they were when the Sandbox was made, since theirs are made just then.
const IMMUTABLE_CLAIMS: &str = "has(self.volumeClaimTemplates) == has(oldSelf.volumeClaimTemplates) && (!has(self.volumeClaimTemplates) || self.volumeClaimTemplates == oldSelf.volumeClaimTemplates)";

/// A Service has the Sandbox's name, which has to be a DNS label then. Sandboxes that have theirs
/// already can still be changed.
const SERVICE_NAME: &str = "!has(self.spec.service) || !self.spec.service || size(self.metadata.name) <= 63 || (oldSelf.hasValue() && has(oldSelf.value().spec.service) && oldSelf.value().spec.service)";

/// Where a claim's Sandbox comes from is said in the words of one version.
const ONE_SOURCE: &str = "has(self.warmPoolRef) != has(self.sandboxTemplateRef)";

/// A definition, and the name of the file that it is kept in.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// `<group>_<plural>.yaml`.
    pub file: String,
    /// The CustomResourceDefinition.
    pub definition: Value,
}

/// All definitions.
#[must_use]
pub fn manifests() -> Vec<Manifest> {
    vec![
        sandbox(),
        template(),
        warm_pool(),
        claim(),
        node(),
        snapshot(),
        manual_trigger(),
        snapshot_policy(),
        storage_config(),
    ]
}

/// One version of a kind.
struct Version {
    name: &'static str,
    is_stored: bool,
    spec: Value,
    status: Option<Value>,
    columns: Value,
    has_scale: bool,
}

/// Both of upstream's versions, with the same schema but for what `differ` changes in the spec of
/// each.
fn two_versions<Spec: JsonSchema>(
    status: Option<&Value>,
    columns: &Value,
    has_scale: bool,
    differ: impl Fn(&mut Value, bool),
) -> Vec<Version> {
    [("v1beta1", true), ("v1alpha1", false)]
        .into_iter()
        .map(|(name, is_stored)| {
            let mut spec = schema::of::<Spec>();
            differ(&mut spec, is_stored);
            Version {
                name,
                is_stored,
                spec,
                status: status.cloned(),
                columns: columns.clone(),
                has_scale,
            }
        })
        .collect()
}

fn column(name: &str, kind: &str, path: &str) -> Value {
    json!({"name": name, "type": kind, "jsonPath": path})
}

fn ready(field: &str) -> String {
    format!(".status.conditions[?(@.type=='Ready')].{field}")
}

fn age() -> Value {
    column("Age", "date", ".metadata.creationTimestamp")
}

fn sandbox() -> Manifest {
    let columns = json!([
        column("Ready", "string", &ready("status")),
        column("Reason", "string", &ready("reason")),
        age(),
    ]);
    let status = schema::of::<SandboxStatus>();
    let versions =
        two_versions::<SandboxSpec>(Some(&status), &columns, true, |spec, is_v1beta1| {
            let fields = &mut spec["properties"];
            fields["replicas"]["minimum"] = json!(0);
            fields["replicas"]["maximum"] = json!(1);
            // In both versions: the scale subresource reads it, and with it disruption budgets.
            fields["replicas"]["default"] = json!(1);
            fields["shutdownPolicy"]["default"] = json!("Retain");
            if is_v1beta1 {
                fields["operatingMode"]["default"] = json!("Running");
                rule(spec, IMMUTABLE_CLAIMS, "volumeClaimTemplates is immutable");
            }
        });
    let mut manifest = manifest::<Sandbox>(&["sandbox"], "Namespaced", versions);
    let versions = manifest.definition["spec"]["versions"].as_array_mut();
    for version in versions.into_iter().flatten() {
        version["schema"]["openAPIV3Schema"]["x-kubernetes-validations"] = json!([{
            "rule": SERVICE_NAME,
            "message": "name must be no more than 63 characters when spec.service is true",
            "optionalOldSelf": true,
        }]);
    }
    manifest
}

fn template() -> Manifest {
    let versions = two_versions::<SandboxTemplateSpec>(None, &json!([age()]), false, |spec, _| {
        let fields = &mut spec["properties"];
        fields["networkPolicyManagement"]["default"] = json!("Managed");
        fields["envVarsInjectionPolicy"]["default"] = json!("Disallowed");
        fields["volumeClaimTemplatesPolicy"]["default"] = json!("Disallowed");
    });
    manifest::<SandboxTemplate>(&["sandboxtemplate"], "Namespaced", versions)
}

fn warm_pool() -> Manifest {
    let columns = json!([
        column("Ready", "integer", ".status.readyReplicas"),
        column("Desired", "integer", ".spec.replicas"),
        column("Reason", "string", &ready("reason")),
        age(),
    ]);
    let status = schema::of::<SandboxWarmPoolStatus>();
    let versions = two_versions::<SandboxWarmPoolSpec>(Some(&status), &columns, true, |spec, _| {
        let fields = &mut spec["properties"];
        fields["replicas"]["minimum"] = json!(0);
        fields["replicas"]["default"] = json!(1);
        fields["updateStrategy"]["properties"]["type"]["default"] = json!("OnReplenish");
        fields["readinessGracePeriodSeconds"]["minimum"] = json!(30);
    });
    manifest::<SandboxWarmPool>(&["swp"], "Namespaced", versions)
}

fn claim() -> Manifest {
    let columns = json!([
        column("Ready", "string", &ready("status")),
        column("Sandbox", "string", ".status.sandbox.name"),
        column("Reason", "string", &ready("reason")),
        age(),
    ]);
    let status = schema::of::<SandboxClaimStatus>();
    let versions = two_versions::<SandboxClaimSpec>(Some(&status), &columns, false, |spec, _| {
        let lifecycle = &mut spec["properties"]["lifecycle"]["properties"];
        lifecycle["shutdownPolicy"]["default"] = json!("Retain");
        lifecycle["ttlSecondsAfterFinished"]["minimum"] = json!(0);
        rule(
            spec,
            ONE_SOURCE,
            "exactly one of warmPoolRef and sandboxTemplateRef must be set",
        );
    });
    manifest::<SandboxClaim>(&["sandboxclaim"], "Namespaced", versions)
}

fn node() -> Manifest {
    let mut spec = schema::of::<SandboxNodeSpec>();
    let mut status = schema::of::<SandboxNodeStatus>();
    let class = &mut spec["properties"]["classes"]["items"]["properties"];
    for field in ["memoryBytes", "cpuMilli", "warm"] {
        class[field]["minimum"] = json!(0);
    }
    for schema in [&mut spec, &mut status] {
        // A class is held in several shapes.
        let classes = &mut schema["properties"]["classes"];
        for field in ["memoryBytes", "cpuMilli"] {
            classes["items"]["properties"][field]["default"] = json!(0);
        }
        classes["x-kubernetes-list-map-keys"] = json!(["class", "memoryBytes", "cpuMilli"]);
    }
    let total = |field: &str| format!(".status.total.{field}");
    let wide = |mut column: Value| {
        column["priority"] = json!(1);
        column
    };
    let version = Version {
        name: "v1alpha1",
        is_stored: true,
        spec,
        status: Some(status),
        columns: json!([
            column("Ready", "string", &ready("status")),
            column("Warm", "string", &total("warm")),
            column("Warming", "integer", &total("warming")),
            column("Room", "integer", &total("room")),
            column("Adopted", "integer", &total("adopted")),
            column("Missed", "integer", &total("missed")),
            column("Heartbeat", "date", ".status.heartbeat"),
            wide(column("MiB", "integer", &total("heldMiB"))),
            wide(column("Reason", "string", &ready("reason"))),
            wide(column("Runtimes", "string", ".status.runtimeVersions")),
        ]),
        has_scale: false,
    };
    manifest::<SandboxNode>(&["sbn"], "Cluster", vec![version])
}

/// The only version of a kind of Pod snapshots.
fn v1<Spec: JsonSchema>(status: Option<Value>, columns: Value) -> Version {
    Version {
        name: "v1",
        is_stored: true,
        spec: schema::of::<Spec>(),
        status,
        columns,
        has_scale: false,
    }
}

fn snapshot() -> Manifest {
    let columns = json!([
        column("Status", "string", &ready("reason")),
        column("Policy", "string", ".spec.policyName"),
        column("Pod", "string", ".spec.pod.name"),
        column("Node", "string", ".spec.nodeName"),
        column("Bytes", "integer", ".status.sizeBytes"),
        age(),
    ]);
    let status = schema::of::<PodSnapshotStatus>();
    let version = v1::<PodSnapshotSpec>(Some(status), columns);
    let mut manifest = manifest::<PodSnapshot>(&["ps"], "Namespaced", vec![version]);
    // By which the controller knows that the kind is not that of GKE's add-on.
    manifest.definition["spec"]["names"]["categories"] = json!([crate::keys::SNAPSHOT_CATEGORY]);
    let version = &mut manifest.definition["spec"]["versions"][0];
    // By which an agent watches those of its node alone.
    version["selectableFields"] = json!([{"jsonPath": ".spec.nodeName"}]);
    manifest
}

fn manual_trigger() -> Manifest {
    let triggered = |field| format!(".status.conditions[?(@.type=='Triggered')].{field}");
    let columns = json!([
        column("Pod", "string", ".spec.targetPod"),
        column("Triggered", "string", &triggered("status")),
        column("Reason", "string", &triggered("reason")),
        column("Snapshot", "string", ".status.snapshotCreated.name"),
        age(),
    ]);
    let status = schema::of::<PodSnapshotManualTriggerStatus>();
    let mut version = v1::<PodSnapshotManualTriggerSpec>(Some(status), columns);
    version.spec["x-kubernetes-validations"] =
        json!([{"rule": "self == oldSelf", "message": "a trigger cannot be changed"}]);
    manifest::<PodSnapshotManualTrigger>(&["psmt"], "Namespaced", vec![version])
}

fn snapshot_policy() -> Manifest {
    let columns = json!([
        column("Storage", "string", ".spec.storageConfigName"),
        age(),
    ]);
    let mut version = v1::<PodSnapshotPolicySpec>(None, columns);
    let trigger = &mut version.spec["properties"]["triggerConfig"]["properties"];
    trigger["type"]["default"] = json!("manual");
    trigger["postCheckpoint"]["default"] = json!("resume");
    manifest::<PodSnapshotPolicy>(&["psp"], "Namespaced", vec![version])
}

fn storage_config() -> Manifest {
    let mut version = v1::<PodSnapshotStorageConfigSpec>(None, json!([age()]));
    let storage = &mut version.spec["properties"]["snapshotStorageConfig"];
    rule(
        storage,
        "has(self.local) != has(self.gcs)",
        "exactly one of local and gcs must be set",
    );
    manifest::<PodSnapshotStorageConfig>(&["pssc"], "Cluster", vec![version])
}

fn rule(spec: &mut Value, rule: &str, message: &str) {
    spec["x-kubernetes-validations"] = json!([{"rule": rule, "message": message}]);
}

fn manifest<K>(short_names: &[&str], scope: &str, versions: Vec<Version>) -> Manifest
where
    K: Resource<DynamicType = ()>,
{
    let (group, kind, plural) = (K::group(&()), K::kind(&()), K::plural(&()));
    let versions: Vec<Value> = versions.into_iter().map(Version::into_json).collect();
    let name = format!("{plural}.{group}");
    Manifest {
        file: format!("{group}_{plural}.yaml"),
        definition: json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": name},
            "spec": {
                "group": group,
                "names": {
                    "kind": kind,
                    "listKind": format!("{kind}List"),
                    "plural": plural,
                    "singular": kind.to_lowercase(),
                    "shortNames": short_names,
                },
                "scope": scope,
                "conversion": {"strategy": "None"},
                "versions": versions,
            },
        }),
    }
}

impl Version {
    fn into_json(self) -> Value {
        let description = self.spec["description"].clone();
        let mut fields = json!({
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": self.spec,
        });
        let mut subresources = json!({});
        if let Some(status) = self.status {
            fields["status"] = status;
            subresources["status"] = json!({});
        }
        if self.has_scale {
            subresources["scale"] = json!({
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            });
        }
        json!({
            "name": self.name,
            "served": true,
            "storage": self.is_stored,
            "subresources": subresources,
            "additionalPrinterColumns": self.columns,
            "schema": {"openAPIV3Schema": {
                "type": "object",
                "description": description,
                "required": ["spec"],
                "properties": fields,
            }},
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_fit_into_a_request_with_room_to_spare() {
        for manifest in manifests() {
            let size = manifest.definition.to_string().len();
            assert!(size < 400 << 10, "{}: {size} bytes", manifest.file);
        }
    }

    #[test]
    fn one_version_of_each_kind_is_stored() {
        for manifest in manifests() {
            let versions = manifest.definition["spec"]["versions"].as_array().unwrap();
            let stored = versions.iter().filter(|v| v["storage"] == true).count();
            assert_eq!(stored, 1, "{}", manifest.file);
        }
    }
}
