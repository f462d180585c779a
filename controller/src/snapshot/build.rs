// SPDX-License-Identifier: Apache-2.0

//! PodSnapshots as the controller makes them.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::core::v1::{Pod, PodSpec},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kiln_crds::{PodSnapshot, PodSnapshotSpec, PostCheckpoint, Sandbox, SnapshotOf, keys};
use kube::ResourceExt as _;
use sha2::{Digest as _, Sha256};

use crate::owner;

/// Makes the PodSnapshot `name` of a Sandbox's Pod, which is on `node`. All of the Pod must be known.
pub(super) fn snapshot(
    name: &str,
    sandbox: &Sandbox,
    pod: &Pod,
    node: &str,
    post_checkpoint: PostCheckpoint,
    policy_name: Option<String>,
) -> PodSnapshot {
    let hash = keys::name_hash(&sandbox.name_any());
    let of = |name: String, uid: Option<String>| SnapshotOf {
        name,
        uid: uid.unwrap_or_default(),
    };
    PodSnapshot {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: sandbox.namespace(),
            labels: Some(BTreeMap::from([(keys::SANDBOX_NAME_HASH.to_owned(), hash)])),
            annotations: Some(BTreeMap::from([(
                keys::ORIGIN_POD.to_owned(),
                pod.name_any(),
            )])),
            finalizers: Some(vec![keys::SNAPSHOT_FILES.to_owned()]),
            owner_references: Some(vec![owner::reference(sandbox)]),
            ..ObjectMeta::default()
        },
        spec: PodSnapshotSpec {
            node_name: node.to_owned(),
            pod: of(pod.name_any(), pod.uid()),
            sandbox: of(sandbox.name_any(), sandbox.uid()),
            post_checkpoint,
            pod_spec_digest: pod_digest(sandbox, pod),
            images: images(pod),
            policy_name,
            restore: None,
        },
        status: None,
    }
}

/// The images of a Pod's containers, where they are named by a digest.
fn images(pod: &Pod) -> BTreeMap<String, String> {
    let statuses = pod
        .status
        .as_ref()
        .and_then(|s| s.container_statuses.as_ref());
    let images = statuses.into_iter().flatten();
    images
        .filter(|container| container.image_id.contains('@'))
        .map(|container| (container.name.clone(), container.image_id.clone()))
        .collect()
}

/// Digest of what a Pod runs: its Sandbox's template may say something else by now.
fn pod_digest(sandbox: &Sandbox, pod: &Pod) -> String {
    let noted = pod.annotations().get(keys::POD_SPEC_DIGEST).cloned();
    noted.unwrap_or_else(|| digest(&sandbox.spec.pod_template.spec))
}

/// Digest of a Pod template.
pub(super) fn digest(spec: &PodSpec) -> String {
    let text = serde_json::to_vec(spec).unwrap_or_default();
    let digest = Sha256::digest(text);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
