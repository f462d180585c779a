// SPDX-License-Identifier: Apache-2.0

//! Structural schemas (Kubernetes "Extend the Kubernetes API with CustomResourceDefinitions",
//! section "Specifying a structural schema") from the Rust types.
//!
//! A structural schema has no references, no null, and says of each list how it is merged. The
//! types of Kubernetes itself say that nowhere; [`merged_by`] does, after the Go types of
//! `k8s.io/api` and their `+listType` marks.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde_json::{Map, Value, json};

/// Longest description of a field that is Kubernetes' own: with all of them whole, a Sandbox's
/// definition would be too large for some clients, and its users know where to read on.
const FOREIGN_DESCRIPTION: usize = 160;

/// What a quantity looks like (`apimachinery/pkg/api/resource/quantity.go`).
const QUANTITY: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";

/// Kubernetes' types whose objects are replaced as a whole.
const ATOMIC: [&str; 16] = [
    "ConfigMapEnvSource",
    "ConfigMapKeySelector",
    "ConfigMapProjection",
    "ConfigMapVolumeSource",
    "FileKeySelector",
    "LabelSelector",
    "LocalObjectReference",
    "NodeSelector",
    "NodeSelectorTerm",
    "ObjectFieldSelector",
    "ResourceFieldSelector",
    "SecretEnvSource",
    "SecretKeySelector",
    "SecretProjection",
    "SecretReference",
    "TypedLocalObjectReference",
];

/// The structural schema of `T`.
pub(crate) fn of<T: JsonSchema>() -> Value {
    let mut generator = SchemaSettings::openapi3().into_generator();
    let root = generator.root_schema_for::<T>().to_value();
    let definitions = root.pointer("/components/schemas").cloned();
    let definitions = definitions
        .and_then(|d| d.as_object().cloned())
        .unwrap_or_default();
    let name = root
        .get("title")
        .and_then(Value::as_str)
        .unwrap_or_default();
    Inliner {
        definitions: &definitions,
    }
    .object(name, &root)
}

struct Inliner<'a> {
    definitions: &'a Map<String, Value>,
}

impl Inliner<'_> {
    /// The schema of a type called `name`.
    fn object(&self, name: &str, schema: &Value) -> Value {
        let short = name.rsplit('.').next().unwrap_or(name);
        if short == "Quantity" || short == "IntOrString" {
            return int_or_string(short == "Quantity");
        }
        if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
            let names: Vec<&Value> = variants.iter().filter_map(|v| v.get("const")).collect();
            return json!({"description": text(schema, false), "type": "string", "enum": names});
        }
        let is_foreign = name.starts_with("io.k8s.");
        let mut out = Map::new();
        for key in ["format", "minimum", "maximum"] {
            if let Some(value) = schema.get(key) {
                out.insert(key.to_owned(), value.clone());
            }
        }
        if let Some(kind) = schema.get("type") {
            // Of `[type, "null"]` the type: what is not there is left out, never null.
            let kind = kind
                .as_array()
                .and_then(|kinds| kinds.first())
                .unwrap_or(kind);
            out.insert("type".to_owned(), kind.clone());
        }
        let required = schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        let required: Vec<&Value> = required
            .filter(|field| default_of(short, field.as_str().unwrap_or_default()).is_none())
            .collect();
        if !required.is_empty() {
            out.insert("required".to_owned(), json!(required));
        }
        if let Some(description) = text(schema, is_foreign) {
            out.insert("description".to_owned(), description);
        }
        if let Some(fields) = schema.get("properties").and_then(Value::as_object) {
            let fields = fields.iter().map(|(field, schema)| {
                (field.clone(), self.field(short, field, schema, is_foreign))
            });
            out.insert("properties".to_owned(), fields.collect());
        }
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            out.insert(
                "additionalProperties".to_owned(),
                self.value(values, is_foreign),
            );
        }
        if let Some(items) = schema.get("items") {
            out.insert("items".to_owned(), self.value(items, is_foreign));
            out.insert("x-kubernetes-list-type".to_owned(), json!("atomic"));
        }
        if ATOMIC.contains(&short) && is_foreign {
            out.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
        }
        Value::Object(out)
    }

    /// The schema of a field of `owner`.
    fn field(&self, owner: &str, field: &str, schema: &Value, is_foreign: bool) -> Value {
        let mut out = self.value(schema, is_foreign);
        let Some(fields) = out.as_object_mut() else {
            return out;
        };
        if let Some(description) = text(schema, is_foreign) {
            fields.insert("description".to_owned(), description);
        }
        if let Some(keys) = merged_by(owner, field) {
            fields.insert("x-kubernetes-list-type".to_owned(), json!("map"));
            fields.insert("x-kubernetes-list-map-keys".to_owned(), json!(keys));
        }
        if let Some(default) = default_of(owner, field) {
            fields.insert("default".to_owned(), default);
        }
        if let Some(Value::Object(limits)) = limits_of(owner, field) {
            fields.extend(limits);
        }
        if owner == "PodSpec" && field == "nodeSelector" {
            fields.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
        }
        out
    }

    /// The schema of a value, wherever it stands.
    fn value(&self, schema: &Value, is_foreign: bool) -> Value {
        if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
            let name = name.trim_start_matches("#/components/schemas/");
            let definition = self.definitions.get(name).unwrap_or(&Value::Null);
            return self.object(name, definition);
        }
        let choices = ["anyOf", "allOf"]
            .iter()
            .find_map(|key| schema.get(*key)?.as_array());
        if let Some(real) = choices
            .into_iter()
            .flatten()
            .find(|c| c.get("$ref").is_some())
        {
            return self.value(real, is_foreign);
        }
        let name = if is_foreign { "io.k8s." } else { "" };
        self.object(name, schema)
    }
}

fn int_or_string(is_quantity: bool) -> Value {
    let mut schema = json!({
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "x-kubernetes-int-or-string": true,
    });
    if is_quantity {
        schema["pattern"] = json!(QUANTITY);
    }
    schema
}

/// A description on one line; of Kubernetes' own, the beginning.
fn text(schema: &Value, is_foreign: bool) -> Option<Value> {
    let whole = schema.get("description")?.as_str()?.replace('\n', " ");
    if !is_foreign {
        return Some(whole.into());
    }
    let sentence = whole.split_inclusive(". ").next().unwrap_or(&whole).trim();
    if sentence.chars().count() <= FOREIGN_DESCRIPTION {
        return Some(sentence.into());
    }
    let start: String = sentence.chars().take(FOREIGN_DESCRIPTION).collect();
    let end = start.rfind(' ').unwrap_or(start.len());
    Some(format!("{} …", &start[..end]).into())
}

/// The fields by which the items of a list are told apart when it is merged; all other lists are
/// replaced as a whole.
fn merged_by(owner: &str, field: &str) -> Option<&'static [&'static str]> {
    Some(match (owner, field) {
        (_, "conditions") => &["type"],
        (_, "classes") => &["class"],
        (
            "PodSpec",
            "containers"
            | "initContainers"
            | "ephemeralContainers"
            | "volumes"
            | "imagePullSecrets"
            | "schedulingGates"
            | "resourceClaims",
        ) => &["name"],
        ("PodSpec", "hostAliases") => &["ip"],
        ("PodSpec", "topologySpreadConstraints") => &["topologyKey", "whenUnsatisfiable"],
        ("Container" | "EphemeralContainer", "env") | ("ResourceRequirements", "claims") => {
            &["name"]
        }
        ("Container" | "EphemeralContainer", "ports") => &["containerPort", "protocol"],
        ("Container" | "EphemeralContainer", "volumeMounts") => &["mountPath"],
        ("Container" | "EphemeralContainer", "volumeDevices") => &["devicePath"],
        _ => return None,
    })
}

/// Defaults that the Go types have (`+default`). Merging needs some of them: a key that is not
/// there cannot be compared.
fn default_of(owner: &str, field: &str) -> Option<Value> {
    Some(match (owner, field) {
        (
            "LocalObjectReference"
            | "ConfigMapEnvSource"
            | "ConfigMapKeySelector"
            | "ConfigMapProjection"
            | "ConfigMapVolumeSource"
            | "SecretEnvSource"
            | "SecretKeySelector"
            | "SecretProjection",
            "name",
        )
        | ("GRPCAction", "service") => json!(""),
        ("ContainerPort", "protocol") => json!("TCP"),
        ("FileKeySelector", "optional") | ("AzureDiskVolumeSource", "readOnly") => json!(false),
        ("AzureDiskVolumeSource", "fsType") => json!("ext4"),
        ("ISCSIVolumeSource", "iscsiInterface") => json!("default"),
        ("RBDVolumeSource", "user") => json!("admin"),
        ("RBDVolumeSource", "pool") => json!("rbd"),
        ("RBDVolumeSource", "keyring") => json!("/etc/ceph/keyring"),
        ("ScaleIOVolumeSource", "fsType") => json!("xfs"),
        ("ScaleIOVolumeSource", "storageMode") => json!("ThinProvisioned"),
        _ => return None,
    })
}

/// What a field's value must be like, as the Go types have it (`apimachinery`'s `metav1.Condition`).
fn limits_of(owner: &str, field: &str) -> Option<Value> {
    Some(match (owner, field) {
        (_, "observedGeneration") | ("SandboxStatus", "replicas") => json!({"minimum": 0}),
        ("Condition", "status") => json!({"enum": ["True", "False", "Unknown"]}),
        ("Condition", "message") => json!({"maxLength": 32768}),
        ("Condition", "reason") => json!({
            "minLength": 1,
            "maxLength": 1024,
            "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
        }),
        ("Condition", "type") => json!({
            "maxLength": 316,
            "pattern": r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$",
        }),
        ("ContainerRestartRuleOnExitCodes", "values") => json!({"x-kubernetes-list-type": "set"}),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SandboxClaimSpec, SandboxSpec};

    /// What the apiserver refuses in a structural schema.
    fn check(schema: &Value, path: &str) {
        let Some(fields) = schema.as_object() else {
            return;
        };
        for key in [
            "$ref",
            "nullable",
            "oneOf",
            "allOf",
            "const",
            "title",
            "definitions",
        ] {
            assert!(!fields.contains_key(key), "{path} has {key}");
        }
        let is_either = fields.contains_key("x-kubernetes-int-or-string");
        assert!(
            fields.contains_key("type") != is_either,
            "{path} needs a type"
        );
        assert_eq!(fields.contains_key("anyOf"), is_either, "{path}");
        if schema["x-kubernetes-list-type"] == "map" {
            for key in schema["x-kubernetes-list-map-keys"].as_array().unwrap() {
                let items = &schema["items"];
                let is_required = items["required"]
                    .as_array()
                    .is_some_and(|r| r.contains(key));
                let has_default = !items["properties"][key.as_str().unwrap()]["default"].is_null();
                assert!(is_required || has_default, "{path} by {key}");
            }
        }
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            check(field, &format!("{path}.{name}"));
        }
        for part in ["items", "additionalProperties"] {
            if let Some(part) = fields.get(part) {
                check(part, &format!("{path}[]"));
            }
        }
    }

    #[test]
    fn schemas_are_structural() {
        check(&of::<SandboxSpec>(), "sandbox");
        check(&of::<SandboxClaimSpec>(), "claim");
        check(&of::<crate::SandboxTemplateSpec>(), "template");
        check(&of::<crate::SandboxNodeStatus>(), "node");
    }

    #[test]
    fn lists_of_a_pod_are_merged_as_in_a_pod() {
        let schema = of::<SandboxSpec>();
        let pod = &schema["properties"]["podTemplate"]["properties"]["spec"]["properties"];
        assert_eq!(
            pod["containers"]["x-kubernetes-list-map-keys"],
            json!(["name"])
        );
        let container = &pod["containers"]["items"]["properties"];
        assert_eq!(container["args"]["x-kubernetes-list-type"], "atomic");
        assert_eq!(
            container["ports"]["items"]["properties"]["protocol"]["default"],
            "TCP"
        );
        let limits = &container["resources"]["properties"]["limits"]["additionalProperties"];
        assert_eq!(limits["x-kubernetes-int-or-string"], true);
        assert_eq!(
            schema["properties"]["operatingMode"]["enum"],
            json!(["Running", "Suspended"])
        );
        assert_eq!(schema["properties"]["shutdownTime"]["format"], "date-time");
    }
}
