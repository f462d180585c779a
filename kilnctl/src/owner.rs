// SPDX-License-Identifier: Apache-2.0

//! Whose an object is, by what is written in it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};
use kube::api::DynamicObject;

use crate::manifests::{MANAGED_BY, MANAGER};

/// Whose an object is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Owner {
    /// [`enable`](crate::enable) has made it, or taken it over.
    Us,
    /// Somebody else; how to call them.
    Other(String),
}

impl Owner {
    /// Whose the object with this metadata is.
    pub(crate) fn of(metadata: &ObjectMeta) -> Self {
        match label(metadata, MANAGED_BY) {
            Some(MANAGER) => Self::Us,
            Some(name) => Self::Other(format!("{name} (label {MANAGED_BY})")),
            None => Self::Other(by_other_signs(metadata)),
        }
    }

    /// In one word or two.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Us => MANAGER,
            Self::Other(name) => name,
        }
    }
}

fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

fn by_other_signs(metadata: &ObjectMeta) -> String {
    let release = metadata.annotations.as_ref();
    if let Some(release) = release.and_then(|a| a.get("meta.helm.sh/release-name")) {
        return format!("Helm release {release}");
    }
    if let Some(mode) = label(metadata, "addonmanager.kubernetes.io/mode") {
        return format!("the cluster's addon manager (mode {mode})");
    }
    match writer(metadata) {
        Some(manager) => format!("{manager} (field manager)"),
        None => "somebody unknown".to_owned(),
    }
}

/// Who has written what the object is for, else its metadata, but not its status alone.
fn writer(metadata: &ObjectMeta) -> Option<&str> {
    let entries = || {
        let entries = metadata.managed_fields.iter().flatten();
        entries.filter(|e| e.subresource.as_deref().unwrap_or_default().is_empty())
    };
    let of_its_own = |entry: &&ManagedFieldsEntry| {
        let fields = entry.fields_v1.as_ref().and_then(|f| f.0.as_object());
        let mut parts = fields.into_iter().flat_map(|f| f.keys());
        parts.any(|part| !matches!(part.as_str(), "f:metadata" | "f:status"))
    };
    let wrote = entries().find(of_its_own).or_else(|| entries().next());
    wrote?.manager.as_deref()
}

/// Name of upstream's controller, of its Deployment and of its image.
const UPSTREAMS: &str = "agent-sandbox-controller";

/// Whether a Deployment runs a controller of the same kinds that is not ours.
pub(crate) fn is_foreign_controller(deployment: &DynamicObject) -> bool {
    if Owner::of(&deployment.metadata) == Owner::Us {
        return false;
    }
    let containers = deployment.data.pointer("/spec/template/spec/containers");
    let mut images = containers
        .and_then(|c| c.as_array())
        .into_iter()
        .flatten()
        .filter_map(|c| c["image"].as_str());
    deployment.metadata.name.as_deref() == Some(UPSTREAMS)
        || images.any(|image| program(image) == UPSTREAMS)
}

/// `name` of `registry:port/path/name:tag@digest`.
fn program(image: &str) -> &str {
    let last = image.rsplit('/').next().unwrap_or(image);
    last.split([':', '@']).next().unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn metadata(value: Value) -> ObjectMeta {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn an_owner_is_known_by_label_annotation_or_what_it_wrote() {
        let other = |value| Owner::of(&metadata(value)).name().to_owned();
        assert_eq!(
            Owner::of(&metadata(json!({"labels": {MANAGED_BY: "kilnctl"}}))),
            Owner::Us
        );
        assert!(other(json!({"labels": {MANAGED_BY: "Helm"}})).starts_with("Helm "));
        let release = json!({"annotations": {"meta.helm.sh/release-name": "sandboxes"}});
        assert_eq!(other(release), "Helm release sandboxes");
        let mode = json!({"labels": {"addonmanager.kubernetes.io/mode": "Reconcile"}});
        assert!(other(mode).contains("addon manager"));
        let fields = |part: &str| json!({part: {"f:x": {}}});
        let managed = json!({"managedFields": [
            {"manager": "kube-apiserver", "subresource": "status", "fieldsV1": fields("f:status")},
            {"manager": "labeller", "fieldsV1": fields("f:metadata")},
            {"manager": "kubectl", "operation": "Apply", "fieldsV1": fields("f:spec")},
        ]});
        assert_eq!(other(managed), "kubectl (field manager)");
        assert_eq!(other(json!({})), "somebody unknown");
    }

    #[test]
    fn a_controller_is_known_by_its_name_or_its_image() {
        let deployment = |name: &str, image: &str, labels: Value| -> DynamicObject {
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": labels},
                "spec": {"template": {"spec": {"containers": [{"image": image}]}}},
            }))
            .unwrap()
        };
        let theirs = "registry.example:5000/agent-sandbox/agent-sandbox-controller:v1@sha256:0";
        assert!(is_foreign_controller(&deployment("c", theirs, json!({}))));
        assert!(is_foreign_controller(&deployment(
            UPSTREAMS,
            "x",
            json!({})
        )));
        assert!(!is_foreign_controller(&deployment(
            "web",
            "nginx:1",
            json!({})
        )));
        let ours = json!({MANAGED_BY: "kilnctl"});
        assert!(!is_foreign_controller(&deployment(UPSTREAMS, "x", ours)));
    }
}
