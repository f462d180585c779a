// SPDX-License-Identifier: Apache-2.0

//! What `enable` puts on a cluster: the files of `deploy/`, as they were when this program was
//! built.

use anyhow::{Context, Result};
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::{Value, json};

use crate::args::Images;

/// Who writes, and whose things are labelled as such.
pub(crate) const MANAGER: &str = "kilnctl";

/// Label of Kubernetes' own for who looks after an object; what has [`MANAGER`] there is ours.
pub(crate) const MANAGED_BY: &str = "app.kubernetes.io/managed-by";

/// Label of every object of ours, whoever has put it there.
pub(crate) const PART_OF: (&str, &str) = ("app.kubernetes.io/part-of", "kiln");

/// Label of every object: version of the program that has put it there.
pub(crate) const VERSION: &str = "app.kubernetes.io/version";

/// Where controller and agents run.
pub(crate) const NAMESPACE: &str = "agent-sandbox-system";
/// The controller's Deployment, under upstream's name.
pub(crate) const CONTROLLER: &str = "agent-sandbox-controller";
/// The router's Deployment.
pub(crate) const ROUTER: &str = "sandbox-router-deployment";
/// The agents' DaemonSet.
pub(crate) const AGENT: &str = "kiln-node-agent";

/// In the order in which they are applied.
const FILES: [&str; 18] = [
    include_str!("../../deploy/crds/agents.x-k8s.io_sandboxes.yaml"),
    include_str!("../../deploy/crds/extensions.agents.x-k8s.io_sandboxclaims.yaml"),
    include_str!("../../deploy/crds/extensions.agents.x-k8s.io_sandboxtemplates.yaml"),
    include_str!("../../deploy/crds/extensions.agents.x-k8s.io_sandboxwarmpools.yaml"),
    include_str!("../../deploy/crds/node.agents.x-k8s.io_sandboxnodes.yaml"),
    include_str!("../../deploy/crds/podsnapshot.gke.io_podsnapshots.yaml"),
    include_str!("../../deploy/crds/podsnapshot.gke.io_podsnapshotmanualtriggers.yaml"),
    include_str!("../../deploy/crds/podsnapshot.gke.io_podsnapshotpolicies.yaml"),
    include_str!("../../deploy/crds/podsnapshot.gke.io_podsnapshotstorageconfigs.yaml"),
    include_str!("../../deploy/base/namespace.yaml"),
    include_str!("../../deploy/base/quota.yaml"),
    include_str!("../../deploy/base/rbac.yaml"),
    include_str!("../../deploy/base/people.yaml"),
    include_str!("../../deploy/base/runtimeclass.yaml"),
    include_str!("../../deploy/base/admission.yaml"),
    include_str!("../../deploy/base/controller.yaml"),
    include_str!("../../deploy/base/agent.yaml"),
    include_str!("../../deploy/base/router.yaml"),
];

/// A kind of objects, as the apiserver's paths have it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) namespaced: bool,
}

impl Kind {
    const fn new(
        group: &'static str,
        version: &'static str,
        kind: &'static str,
        plural: &'static str,
        namespaced: bool,
    ) -> Self {
        Self {
            group,
            version,
            kind,
            plural,
            namespaced,
        }
    }

    /// How kube names it.
    pub(crate) fn resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(self.group, self.version, self.kind);
        ApiResource::from_gvk_with_plural(&gvk, self.plural)
    }

    /// Whether `disable` leaves objects of the kind unless it purges.
    pub(crate) fn stays(&self) -> bool {
        matches!(self.kind, "CustomResourceDefinition" | "Namespace")
    }
}

const RBAC: &str = "rbac.authorization.k8s.io";
const ADMISSION: &str = "admissionregistration.k8s.io";

/// Every kind that `enable` writes. They are taken away in the reverse order: first who works,
/// then its rights.
pub(crate) static KINDS: [Kind; 16] = [
    Kind::new(
        "apiextensions.k8s.io",
        "v1",
        "CustomResourceDefinition",
        "customresourcedefinitions",
        false,
    ),
    Kind::new("", "v1", "Namespace", "namespaces", false),
    Kind::new("node.k8s.io", "v1", "RuntimeClass", "runtimeclasses", false),
    Kind::new(
        ADMISSION,
        "v1",
        "ValidatingAdmissionPolicy",
        "validatingadmissionpolicies",
        false,
    ),
    Kind::new(
        ADMISSION,
        "v1",
        "ValidatingAdmissionPolicyBinding",
        "validatingadmissionpolicybindings",
        false,
    ),
    Kind::new("", "v1", "ResourceQuota", "resourcequotas", true),
    Kind::new("", "v1", "ServiceAccount", "serviceaccounts", true),
    Kind::new(RBAC, "v1", "ClusterRole", "clusterroles", false),
    Kind::new(
        RBAC,
        "v1",
        "ClusterRoleBinding",
        "clusterrolebindings",
        false,
    ),
    Kind::new(RBAC, "v1", "Role", "roles", true),
    Kind::new(RBAC, "v1", "RoleBinding", "rolebindings", true),
    Kind::new("", "v1", "ConfigMap", "configmaps", true),
    Kind::new(
        "networking.k8s.io",
        "v1",
        "NetworkPolicy",
        "networkpolicies",
        true,
    ),
    Kind::new("", "v1", "Service", "services", true),
    Kind::new("apps", "v1", "Deployment", "deployments", true),
    Kind::new("apps", "v1", "DaemonSet", "daemonsets", true),
];

/// The kinds of users' objects, in the order in which they can go: what makes others first.
pub(crate) static USERS: [Kind; 4] = [
    Kind::new(
        "extensions.agents.x-k8s.io",
        "v1beta1",
        "SandboxClaim",
        "sandboxclaims",
        true,
    ),
    Kind::new(
        "extensions.agents.x-k8s.io",
        "v1beta1",
        "SandboxWarmPool",
        "sandboxwarmpools",
        true,
    ),
    Kind::new("agents.x-k8s.io", "v1beta1", "Sandbox", "sandboxes", true),
    Kind::new(
        "extensions.agents.x-k8s.io",
        "v1beta1",
        "SandboxTemplate",
        "sandboxtemplates",
        true,
    ),
];

/// What agents write: one a node.
pub(crate) static NODES: Kind = Kind::new(
    "node.agents.x-k8s.io",
    "v1alpha1",
    "SandboxNode",
    "sandboxnodes",
    false,
);

/// Kind of Pods, which are only looked at.
pub(crate) static PODS: Kind = Kind::new("", "v1", "Pod", "pods", true);

/// One of [`KINDS`], by its name.
///
/// # Panics
/// For another name.
pub(crate) fn kind(name: &str) -> &'static Kind {
    let found = KINDS.iter().find(|k| k.kind == name);
    found.unwrap_or_else(|| panic!("no kind {name}"))
}

/// An object that `enable` writes.
#[derive(Debug, Clone)]
pub(crate) struct Manifest {
    pub(crate) kind: &'static Kind,
    pub(crate) name: String,
    pub(crate) namespace: Option<String>,
    pub(crate) object: DynamicObject,
}

impl Manifest {
    /// Whether somebody else's object of this name is left alone: it is as good as ours, or, as the
    /// definitions of GKE's Pod snapshots, for another controller.
    pub(crate) fn may_be_anybodys(&self) -> bool {
        matches!(self.kind.kind, "Namespace" | "RuntimeClass")
            || self.is_definition() && self.name.ends_with(".podsnapshot.gke.io")
    }

    fn of(mut object: Value) -> Result<Self> {
        let kind = kind_of(&object)?;
        let labels = &mut object["metadata"]["labels"];
        labels[MANAGED_BY] = json!(MANAGER);
        labels[PART_OF.0] = json!(PART_OF.1);
        labels[VERSION] = json!(env!("CARGO_PKG_VERSION"));
        let object: DynamicObject = serde_json::from_value(object)?;
        Ok(Self {
            kind,
            name: object
                .metadata
                .name
                .clone()
                .context("a manifest without a name")?,
            namespace: object.metadata.namespace.clone(),
            object,
        })
    }

    /// Whether it is a definition.
    pub(crate) fn is_definition(&self) -> bool {
        self.kind.kind == "CustomResourceDefinition"
    }

    /// How people call it.
    pub(crate) fn title(&self) -> String {
        title(self.kind, self.namespace.as_deref(), &self.name)
    }
}

/// How people call an object: `Deployment agent-sandbox-system/agent-sandbox-controller`.
pub(crate) fn title(kind: &Kind, namespace: Option<&str>, name: &str) -> String {
    match namespace {
        Some(namespace) => format!("{} {namespace}/{name}", kind.kind),
        None => format!("{} {name}", kind.kind),
    }
}

fn kind_of(object: &Value) -> Result<&'static Kind> {
    let (version, kind) = (&object["apiVersion"], &object["kind"]);
    let is = |k: &&Kind| *version == k.resource().api_version && *kind == k.kind;
    let known = KINDS.iter().find(is);
    known.with_context(|| format!("{version} {kind} is no kind that this program writes"))
}

/// Everything, in the order in which it is applied.
///
/// # Errors
/// None for the files that this was built with: a test reads them.
pub(crate) fn all() -> Result<Vec<Manifest>> {
    let mut all = Vec::new();
    for file in FILES {
        let documents: Vec<Value> = serde_saphyr::from_multiple(file).context("read a manifest")?;
        for document in documents {
            all.push(Manifest::of(document)?);
        }
    }
    Ok(all)
}

/// Has the workloads' images come from where `images` says.
pub(crate) fn set_images(manifests: &mut [Manifest], images: &Images) {
    for template in manifests.iter_mut().filter_map(pod_spec) {
        for container in template["containers"].as_array_mut().into_iter().flatten() {
            if let Some(image) = container["image"].as_str() {
                container["image"] = json!(images.of(image));
            }
        }
    }
}

/// Has agents run on nodes with these labels only.
pub(crate) fn set_node_selector(manifests: &mut [Manifest], labels: &[(String, String)]) {
    let agents = manifests.iter_mut().filter(|m| m.kind.kind == "DaemonSet");
    for template in agents.filter_map(pod_spec) {
        for (key, value) in labels {
            template["nodeSelector"][key] = json!(value);
        }
    }
}

/// Merges what the documents of `text` say into the objects that they name (RFC 7396).
///
/// # Errors
/// When it is no YAML, or names an object that is none of ours.
pub(crate) fn patch(manifests: &mut [Manifest], text: &str) -> Result<()> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text)?;
    for document in documents {
        let name = document.pointer("/metadata/name").unwrap_or(&Value::Null);
        let is_meant =
            |m: &&mut Manifest| document["kind"] == m.kind.kind && *name == m.name.as_str();
        let manifest = manifests
            .iter_mut()
            .find(is_meant)
            .with_context(|| format!("{} {name} is none of the objects here", document["kind"]))?;
        let mut object = serde_json::to_value(&manifest.object)?;
        json_patch::merge(&mut object, &document);
        manifest.object = serde_json::from_value(object)?;
    }
    Ok(())
}

fn pod_spec(manifest: &mut Manifest) -> Option<&mut Value> {
    manifest.object.data.pointer_mut("/spec/template/spec")
}

impl Images {
    /// The image that stands for `name:tag` of a manifest.
    fn of(&self, image: &str) -> String {
        let (name, tag) = image.rsplit_once(':').unwrap_or((image, "latest"));
        let tag = self.image_tag.as_deref().unwrap_or(tag);
        match &self.image_registry {
            Some(registry) => format!("{}/{name}:{tag}", registry.trim_end_matches('/')),
            None => format!("{name}:{tag}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_read_and_labelled_and_definitions_come_first() {
        let all = all().unwrap();
        let definitions = all.iter().take_while(|m| m.is_definition()).count();
        assert_eq!(definitions, kiln_crds::manifests().len());
        assert!(!all[definitions..].iter().any(Manifest::is_definition));
        for manifest in &all {
            let labels = manifest.object.metadata.labels.as_ref().unwrap();
            assert_eq!(labels[MANAGED_BY], MANAGER, "{}", manifest.title());
            assert_eq!(manifest.namespace.is_some(), manifest.kind.namespaced);
        }
        for name in [CONTROLLER, AGENT] {
            let works = |m: &&Manifest| m.name == name && m.kind.group == "apps";
            let manifest = all.iter().find(works).unwrap();
            let pods = &manifest.object.data["spec"]["template"]["metadata"]["labels"];
            assert_eq!(pods[PART_OF.0], PART_OF.1);
            assert_eq!(manifest.namespace.as_deref(), Some(NAMESPACE));
        }
    }

    #[test]
    fn a_patch_changes_what_it_names() {
        let mut all = all().unwrap();
        let text = "kind: DaemonSet\nmetadata: {name: kiln-node-agent, labels: {a: b}}\n\
            spec: {updateStrategy: null, template: {spec: {hostPID: false}}}\n";
        patch(&mut all, text).unwrap();
        let agent = all.iter().find(|m| m.kind.kind == "DaemonSet").unwrap();
        assert_eq!(agent.object.metadata.labels.as_ref().unwrap()["a"], "b");
        let spec = &agent.object.data["spec"];
        assert_eq!(spec["template"]["spec"]["hostPID"], false);
        assert!(spec["template"]["spec"]["containers"].is_array());
        assert!(spec.get("updateStrategy").is_none());
        let other = patch(&mut all, "kind: Pod\nmetadata: {name: x}\n");
        assert!(
            other
                .unwrap_err()
                .to_string()
                .contains("none of the objects")
        );
    }

    #[test]
    fn images_and_nodes_are_the_users_choice() {
        let mut all = all().unwrap();
        let images = Images {
            image_registry: Some("registry.example:5000/kiln/".to_owned()),
            image_tag: Some("v9".to_owned()),
        };
        set_images(&mut all, &images);
        set_node_selector(&mut all, &[("pool".to_owned(), "sandboxes".to_owned())]);
        let agent = all.iter_mut().find(|m| m.kind.kind == "DaemonSet").unwrap();
        let spec = pod_spec(agent).unwrap();
        let image = "registry.example:5000/kiln/kiln-node-agent:v9";
        assert_eq!(spec["containers"][0]["image"], image);
        assert_eq!(spec["nodeSelector"]["pool"], "sandboxes");
        assert_eq!(spec["nodeSelector"]["kubernetes.io/os"], "linux");
        assert_eq!(Images::default().of("a:dev"), "a:dev");
    }
}
