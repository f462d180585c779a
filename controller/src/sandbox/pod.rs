// SPDX-License-Identifier: Apache-2.0

//! The Pod of a Sandbox: how it is made, and which labels and annotations it keeps having.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{PersistentVolumeClaimVolumeSource, Pod, Volume},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kiln_crds::{Sandbox, SandboxClaim, SandboxWarmPool, keys};
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::{marks::template_of, owner, patch};

/// Labels of a Pod that follow from who owns its Sandbox.
const OF_OWNER: [&str; 4] = [
    keys::WARM_POOL,
    keys::TEMPLATE_REF_HASH,
    keys::TEMPLATE_NAME_DIGEST,
    keys::CLAIM_UID,
];

/// The Pod that a Sandbox runs.
pub(super) fn desired(sandbox: &Sandbox, evict_warm: bool) -> Pod {
    let Metadata {
        labels,
        annotations,
    } = Metadata::of(sandbox, evict_warm);
    let mut spec = sandbox.spec.pod_template.spec.clone();
    let claims = sandbox.spec.volume_claim_templates.iter().flatten();
    let claimed: Vec<Volume> = claims
        .filter_map(|template| template.metadata.name.as_deref())
        .map(|name| claim_volume(name, &sandbox.name_any()))
        .collect();
    if !claimed.is_empty() {
        let volumes = spec.volumes.get_or_insert_default();
        volumes.retain(|v| claimed.iter().all(|c| c.name != v.name));
        volumes.extend(claimed);
    }
    Pod {
        metadata: ObjectMeta {
            name: Some(sandbox.name_any()),
            namespace: sandbox.namespace(),
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            owner_references: Some(vec![owner::reference(sandbox)]),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    }
}

/// Name of the volume claim that is made from the template called `volume`.
pub(super) fn claim_name(volume: &str, sandbox: &str) -> String {
    format!("{volume}-{sandbox}")
}

fn claim_volume(volume: &str, sandbox: &str) -> Volume {
    Volume {
        name: volume.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim_name(volume, sandbox),
            read_only: None,
        }),
        ..Volume::default()
    }
}

/// Labels and annotations that a Pod has from its Sandbox.
struct Metadata {
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
}

impl Metadata {
    /// What a user's template says, without the system's own keys: with those it could take over
    /// the traffic or the policies of others.
    fn of(sandbox: &Sandbox, evict_warm: bool) -> Self {
        let template = &sandbox.spec.pod_template.metadata;
        let users = |map: &Option<BTreeMap<String, String>>| -> BTreeMap<String, String> {
            let entries = map.iter().flatten().filter(|(key, _)| !is_reserved(key));
            entries.map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        let mut labels = users(&template.labels);
        let mut annotations = users(&template.annotations);
        let keys_of = |map: &BTreeMap<String, String>| {
            map.keys().map(String::as_str).collect::<Vec<_>>().join(",")
        };
        for (annotation, keys) in [
            (keys::PROPAGATED_LABELS, keys_of(&labels)),
            (keys::PROPAGATED_ANNOTATIONS, keys_of(&annotations)),
        ] {
            if !keys.is_empty() {
                annotations.insert(annotation.to_owned(), keys);
            }
        }
        if evict_warm && is_pools(sandbox) {
            let annotation = annotations.entry(keys::SAFE_TO_EVICT.to_owned());
            annotation.or_insert_with(|| "true".to_owned());
        }
        labels.extend(of_owner(sandbox));
        if let Some(creator) = created_by(sandbox) {
            labels.insert(keys::CREATED_BY.to_owned(), creator.to_owned());
        }
        labels.extend(identity(sandbox));
        Self {
            labels,
            annotations,
        }
    }
}

/// The labels by which the Pod of a Sandbox is found. Upstream's clients look for the first; the
/// second is no other Sandbox's.
pub(super) fn identity(sandbox: &Sandbox) -> BTreeMap<String, String> {
    let name = sandbox.name_any();
    BTreeMap::from([
        (keys::SANDBOX_NAME_HASH.to_owned(), keys::name_hash(&name)),
        (
            keys::SANDBOX_NAME_DIGEST.to_owned(),
            keys::name_digest(&name),
        ),
    ])
}

/// Keys that a user's template cannot set.
fn is_reserved(key: &str) -> bool {
    key.starts_with("agents.x-k8s.io/")
        || key.starts_with("extensions.agents.x-k8s.io/")
        || [
            keys::MEMORY_LOST,
            keys::POD_SPEC_DIGEST,
            keys::RESTORE,
            keys::TRACE_CONTEXT,
            keys::SANDBOX_NAME_DIGEST,
            keys::TEMPLATE_NAME_DIGEST,
        ]
        .contains(&key)
}

/// Labels that only an owner of ours brings: a Sandbox of its own could else name any pool or
/// template in them.
fn of_owner(sandbox: &Sandbox) -> BTreeMap<String, String> {
    let Some(controller) = owner::controller(sandbox) else {
        return BTreeMap::new();
    };
    let is_pools = owner::is_kind::<SandboxWarmPool>(controller);
    let is_claims = owner::is_kind::<SandboxClaim>(controller);
    let label = |key: &str, applies: bool| {
        let value = sandbox
            .labels()
            .get(key)
            .filter(|v| applies && !v.is_empty())?;
        Some((key.to_owned(), value.clone()))
    };
    let mut labels: BTreeMap<String, String> = [
        label(keys::WARM_POOL, is_pools),
        label(keys::TEMPLATE_REF_HASH, is_pools || is_claims),
    ]
    .into_iter()
    .flatten()
    .collect();
    if let Some(template) = template_of(sandbox).filter(|_| is_pools || is_claims) {
        let digest = keys::name_digest(template);
        labels.insert(keys::TEMPLATE_NAME_DIGEST.to_owned(), digest);
    }
    if is_claims {
        labels.insert(keys::CLAIM_UID.to_owned(), controller.uid.clone());
    }
    labels
}

/// Whether nobody has claimed a Sandbox of a pool yet.
fn is_pools(sandbox: &Sandbox) -> bool {
    owner::controller(sandbox).is_some_and(owner::is_kind::<SandboxWarmPool>)
}

fn created_by(sandbox: &Sandbox) -> Option<&'static str> {
    let creator = sandbox
        .labels()
        .get(keys::CREATED_BY)
        .filter(|c| !c.is_empty())?;
    let known = keys::CREATORS.into_iter().find(|known| known == creator);
    Some(known.unwrap_or("unknown"))
}

/// The patch that gives an existing Pod the labels, annotations and owner that it should have;
/// `None` where it has them. What the Sandbox once set and no longer does is taken away, and what
/// anybody else has set stays.
pub(super) fn metadata_patch(pod: &Pod, sandbox: &Sandbox, evict_warm: bool) -> Option<Value> {
    let wanted = Metadata::of(sandbox, evict_warm);
    let mut labels = pod.labels().clone();
    let mut annotations = pod.annotations().clone();
    for key in propagated(pod, keys::PROPAGATED_LABELS) {
        labels.remove(&key);
    }
    for key in propagated(pod, keys::PROPAGATED_ANNOTATIONS) {
        annotations.remove(&key);
    }
    for key in OF_OWNER.into_iter().chain([keys::CREATED_BY]) {
        labels.remove(key);
    }
    annotations.remove(keys::PROPAGATED_LABELS);
    annotations.remove(keys::PROPAGATED_ANNOTATIONS);
    if pod.labels().contains_key(keys::WARM_POOL) {
        annotations.remove(keys::SAFE_TO_EVICT);
    }
    labels.extend(wanted.labels);
    annotations.extend(wanted.annotations);
    let old = json!({"labels": pod.labels(), "annotations": pod.annotations()});
    let mut patch = patch::diff(&old, &json!({"labels": labels, "annotations": annotations}));
    if owner::of(pod, sandbox) != owner::Ownership::Ours {
        let owners = json!([owner::reference(sandbox)]);
        patch.get_or_insert_with(|| json!({}))["ownerReferences"] = owners;
    }
    patch.map(|metadata| json!({ "metadata": metadata }))
}

fn propagated(pod: &Pod, annotation: &str) -> Vec<String> {
    let list = pod.annotations().get(annotation);
    let keys = list.into_iter().flat_map(|list| list.split(','));
    keys.filter(|key| !key.is_empty() && *key != keys::SANDBOX_NAME_HASH)
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(value: &Value) -> Sandbox {
        let mut whole = json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": "box", "namespace": "ns", "uid": "u1"},
            "spec": {"podTemplate": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
        });
        merge(&mut whole, value);
        serde_json::from_value(whole).unwrap()
    }

    fn merge(into: &mut Value, from: &Value) {
        match (into, from) {
            (Value::Object(into), Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key.clone()).or_insert(Value::Null), value);
                }
            }
            (into, from) => *into = from.clone(),
        }
    }

    #[test]
    fn a_template_cannot_set_the_systems_labels() {
        let sandbox = sandbox(&json!({
            "metadata": {"labels": {keys::WARM_POOL: "stolen", keys::CREATED_BY: "me"}},
            "spec": {"podTemplate": {"metadata": {
                "labels": {"app": "x", keys::SANDBOX_NAME_HASH: "victim", keys::CLAIM_UID: "victim",
                    keys::SANDBOX_NAME_DIGEST: "victim", keys::TEMPLATE_NAME_DIGEST: "victim"},
                "annotations": {"note": "y", keys::TRACE_CONTEXT: "z"},
            }}},
        }));
        let pod = desired(&sandbox, true);
        let mut labels = json!({"app": "x", keys::CREATED_BY: "unknown"});
        merge(
            &mut labels,
            &serde_json::to_value(identity(&sandbox)).unwrap(),
        );
        assert_eq!(serde_json::to_value(pod.labels()).unwrap(), labels);
        assert_eq!(
            serde_json::to_value(pod.annotations()).unwrap(),
            json!({"note": "y", keys::PROPAGATED_LABELS: "app", keys::PROPAGATED_ANNOTATIONS: "note"})
        );
    }

    #[test]
    fn volume_claims_take_the_place_of_volumes_of_their_name() {
        let sandbox = sandbox(&json!({"spec": {
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}],
            "podTemplate": {"spec": {"volumes": [{"name": "data", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]}},
        }}));
        let volumes = desired(&sandbox, true).spec.unwrap().volumes.unwrap();
        let names: Vec<_> = volumes.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(names, ["tmp", "data"]);
        let claim = volumes[1].persistent_volume_claim.as_ref().unwrap();
        assert_eq!(claim.claim_name, "data-box");
    }

    #[test]
    fn an_adopted_pod_loses_its_pools_marks_and_gets_its_claims() {
        let pooled = sandbox(&json!({
            "metadata": {
                "labels": {keys::WARM_POOL: "p", keys::TEMPLATE_REF_HASH: "t"},
                "ownerReferences": [{"apiVersion": "extensions.agents.x-k8s.io/v1alpha1", "kind": "SandboxWarmPool", "name": "p", "uid": "p1", "controller": true}],
            },
        }));
        let mut pod = desired(&pooled, true);
        assert!(metadata_patch(&pod, &pooled, true).is_none());
        pod.labels_mut().insert("operators".into(), "own".into());
        let claimed = sandbox(&json!({"metadata": {
            "labels": {keys::TEMPLATE_REF_HASH: "t"},
            "ownerReferences": [{"apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim", "name": "c", "uid": "c1", "controller": true}],
        }}));
        assert_eq!(
            metadata_patch(&pod, &claimed, true).unwrap(),
            json!({"metadata": {
                "labels": {keys::WARM_POOL: null, keys::CLAIM_UID: "c1"},
                "annotations": {keys::SAFE_TO_EVICT: null},
            }})
        );
    }
}
