// SPDX-License-Identifier: Apache-2.0

//! From a `Sandbox` manifest to the configuration files of `crictl`: what a controller and a
//! kubelet do of it on a cluster, as far as the demo needs it.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use kiln_tests::node::Node;
use serde::Deserialize;
use serde_json::{Value, json};

/// A `Sandbox` (agents.x-k8s.io), as far as the demo reads it.
#[derive(Debug, Deserialize)]
pub(crate) struct Sandbox {
    pub(crate) metadata: Metadata,
    spec: SandboxSpec,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SandboxSpec {
    pod_template: PodTemplate,
}

#[derive(Debug, Deserialize)]
struct PodTemplate {
    spec: PodSpec,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    runtime_class_name: String,
    containers: Vec<Container>,
}

/// A container of a Pod.
#[derive(Debug, Deserialize)]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) image: String,
    #[serde(default)]
    pub(crate) command: Vec<String>,
    #[serde(default)]
    pub(crate) args: Vec<String>,
}

impl Sandbox {
    /// Reads a manifest.
    ///
    /// # Errors
    /// When it cannot be read or is no `Sandbox` with a RuntimeClass.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        serde_saphyr::from_str(&text).with_context(|| format!("parse {}", path.display()))
    }

    /// The RuntimeClass of its Pod, which has the same name as its handler
    /// (`deploy/base/runtimeclass.yaml`).
    pub(crate) fn runtime_class(&self) -> &str {
        &self.spec.pod_template.spec.runtime_class_name
    }

    /// Its first container.
    ///
    /// # Errors
    /// When it has none.
    pub(crate) fn container(&self) -> Result<&Container> {
        self.spec
            .pod_template
            .spec
            .containers
            .first()
            .context("a Sandbox without containers")
    }
}

/// Namespace of the demo's Pods.
const NAMESPACE: &str = "default";

/// CRI's `PodSandboxConfig`.
pub(crate) fn pod(node: &Node, name: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "attempt": 0},
        "labels": labels(name),
        "hostname": name,
        "log_directory": node.dir().join("logs").join(name),
        "linux": {"cgroup_parent": node.cgroup().parent()},
    })
}

/// CRI's `ContainerConfig` of a container of Pod `pod`.
pub(crate) fn container(pod: &str, container: &Container) -> Value {
    let Container {
        name,
        image,
        command,
        args,
    } = container;
    json!({
        "metadata": {"name": name},
        "image": {"image": image},
        "command": command,
        "args": args,
        "labels": labels(pod),
        "log_path": format!("{name}.log"),
    })
}

/// The labels by which `crictl` knows a Pod's name, as a kubelet sets them.
fn labels(pod: &str) -> Value {
    json!({"io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": NAMESPACE})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_has_what_the_demo_needs() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/sandbox.yaml");
        let sandbox = Sandbox::read(&path).unwrap();
        assert_eq!(sandbox.runtime_class(), "gvisor");
        let container = container(&sandbox.metadata.name, sandbox.container().unwrap());
        assert_eq!(container["command"], json!(["/bin/sh", "-c"]));
        assert_eq!(
            container["args"],
            json!(["sleep 3600000; echo 'Container finished successfully'; exit 0"])
        );
    }
}
