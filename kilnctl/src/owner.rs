// SPDX-License-Identifier: Apache-2.0

//! Whose an object is, by what is written in it, and how it becomes ours.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry, ObjectMeta};
use kube::api::DynamicObject;
use serde_json::{Map, Value};

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
    let entries = || metadata.managed_fields.iter().flatten();
    let wrote = entries().find(|e| writes_what_it_is_for(e));
    let wrote = wrote.or_else(|| entries().find(|e| is_of_the_object(e)));
    wrote?.manager.as_deref()
}

/// Whether an entry is of writes of the object itself, and not of a subresource such as its status.
fn is_of_the_object(entry: &ManagedFieldsEntry) -> bool {
    entry.subresource.as_deref().unwrap_or_default().is_empty()
}

/// Whether an entry's manager has written more than metadata and status.
fn writes_what_it_is_for(entry: &ManagedFieldsEntry) -> bool {
    let fields = entry.fields_v1.as_ref().and_then(|f| f.0.as_object());
    let mut parts = fields.into_iter().flat_map(Map::keys);
    is_of_the_object(entry) && parts.any(|part| !matches!(part.as_str(), "f:metadata" | "f:status"))
}

/// What `managedFields` become for us to take an object over: all that others have written of what
/// it is for, and of its metadata with it, counts as written by our own last apply. So the next
/// one takes away what we do not have. Without that, an apply only adds to what is there, such as
/// the webhook of a conversion that is none any more. Nothing if nobody else has written it.
///
/// Who has written only metadata or status keeps that, and finalizers and owners stay.
/// Kubernetes describes the fields: <https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management>.
pub(crate) fn taken_over(metadata: &ObjectMeta) -> Option<Vec<ManagedFieldsEntry>> {
    let is_ours = |entry: &ManagedFieldsEntry| {
        let (manager, operation) = (entry.manager.as_deref(), entry.operation.as_deref());
        (manager, operation) == (Some(MANAGER), Some("Apply")) && is_of_the_object(entry)
    };
    let entries = metadata.managed_fields.iter().flatten().cloned();
    let (ours, others): (Vec<_>, Vec<_>) = entries.partition(is_ours);
    let (theirs, kept): (Vec<_>, Vec<_>) = others.into_iter().partition(writes_what_it_is_for);
    let mut taken = theirs.first()?.clone();
    let mut fields = Value::Object(Map::new());
    for entry in theirs {
        let mut of_it = entry.fields_v1.map(|f| f.0).unwrap_or_default();
        if let Some(of_metadata) = of_it["f:metadata"].as_object_mut() {
            of_metadata
                .retain(|field, _| !matches!(field.as_str(), "f:finalizers" | "f:ownerReferences"));
        }
        unite(&mut fields, of_it);
    }
    for entry in ours {
        unite(
            &mut fields,
            entry.fields_v1.map(|f| f.0).unwrap_or_default(),
        );
    }
    taken.manager = Some(MANAGER.to_owned());
    taken.operation = Some("Apply".to_owned());
    taken.fields_v1 = Some(FieldsV1(fields));
    Some([vec![taken], kept].concat())
}

/// Adds the fields of one set to those of another: each is a tree of objects.
fn unite(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (field, below) in from {
                unite(into.entry(field).or_insert(Value::Null), below);
            }
        }
        (into @ Value::Null, from) => *into = from,
        _ => {}
    }
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
    fn all_that_others_have_written_of_an_object_is_taken_over() {
        let entry = |manager: &str, operation: &str, fields: Value| json!({"manager": manager, "operation": operation, "fieldsV1": fields});
        let ours = entry("kilnctl", "Apply", json!({"f:spec": {"f:scope": {}}}));
        let labeller = entry(
            "labeller",
            "Update",
            json!({"f:metadata": {"f:labels": {}}}),
        );
        let mut status = entry("kube-apiserver", "Update", json!({"f:status": {}}));
        status["subresource"] = json!("status");
        let nobody = metadata(json!({"managedFields": [ours, labeller, status]}));
        assert_eq!(taken_over(&nobody), None);
        assert_eq!(taken_over(&ObjectMeta::default()), None);

        let created = json!({
            "f:metadata": {"f:annotations": {"f:release": {}}, "f:finalizers": {}},
            "f:spec": {"f:conversion": {".": {}, "f:webhook": {}}},
        });
        let applied = json!({"f:spec": {"f:conversion": {"f:strategy": {}}}});
        let helm = entry("helm", "Update", created);
        let theirs = entry("somebody", "Apply", applied);
        let all = metadata(json!({"managedFields": [ours, labeller, status, helm, theirs]}));
        let united = json!({
            "f:metadata": {"f:annotations": {"f:release": {}}},
            "f:spec": {
                "f:scope": {},
                "f:conversion": {".": {}, "f:webhook": {}, "f:strategy": {}},
            },
        });
        let taken = entry("kilnctl", "Apply", united);
        let expected = metadata(json!({"managedFields": [taken, labeller, status]}));
        assert_eq!(taken_over(&all), expected.managed_fields);
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
