// SPDX-License-Identifier: Apache-2.0

//! A control plane with our definitions, classes and policies, and the controller.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kiln_cluster::{
    account::deploy, control_plane::ControlPlane, controller::Controller, standin::Standin,
};
use kiln_tests::{suite::Fixture, wait};
use kube::{Api, api::PostParams};
use serde_json::{Value, json};

/// Files of `deploy/` that are applied.
const FILES: [&str; 5] = [
    "base/namespace.yaml",
    "base/rbac.yaml",
    "base/runtimeclass.yaml",
    "base/admission.yaml",
    "kata/runtimeclass.yaml",
];

/// Classes beside ours: two of handlers that are known, one that is no sandbox, one that allows more,
/// one that opted out.
const CLASSES: [(&str, &str, &str); 5] = [
    ("runsc", "runsc", "{}"),
    ("kata-qemu", "kata-qemu", "{}"),
    ("trusted", "runc", "{}"),
    (
        "generous",
        "other",
        r#"{"labels": {"kiln.dev/sandbox-class": "true"}, "annotations": {
            "kiln.dev/allowed-capabilities": "NET_ADMIN,SYS_PTRACE",
            "kiln.dev/allowed-sysctls": "net.core.somaxconn",
            "kiln.dev/allowed-volumes": "hostPath,nfs"}}"#,
    ),
    (
        "out",
        "gvisor",
        r#"{"labels": {"kiln.dev/sandbox-class": "false"}}"#,
    ),
];

pub(crate) struct Env {
    pub(crate) plane: ControlPlane,
    controller: Controller,
    standin: Standin,
    /// A namespace like any other.
    pub(crate) plain: String,
    /// One that wants more of its Pods.
    pub(crate) restricted: String,
}

impl Env {
    pub(crate) async fn start() -> Result<Self> {
        let plane = ControlPlane::start().await?;
        for file in FILES {
            let path = deploy().join(file).display().to_string();
            plane
                .kubectl(&["apply", "--server-side", "-f", &path])
                .await?;
        }
        for (name, handler, metadata) in CLASSES {
            let mut metadata: Value = serde_json::from_str(metadata)?;
            metadata["name"] = json!(name);
            let class = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
                "metadata": metadata, "handler": handler});
            let class = class.to_string();
            plane.kubectl_with(&["create", "-f", "-"], &class).await?;
        }
        let plain = plane.namespace("plain").await?;
        let restricted = plane.namespace("restricted").await?;
        let label = "kiln.dev/sandbox-policy=restricted";
        plane
            .kubectl(&["label", "namespace", &restricted, label])
            .await?;
        let env = Self {
            standin: Standin::start(plane.client()),
            controller: Controller::start(&plane, &[]).await?,
            plane,
            plain,
            restricted,
        };
        env.policies_work().await?;
        Ok(env)
    }

    /// Waits until all policies have come to the apiserver's admission.
    async fn policies_work(&self) -> Result<()> {
        let host = json!({"hostNetwork": true});
        let root = json!({});
        let classless = json!({"runtimeClassName": null});
        for (namespace, spec, word) in [
            (&self.plain, host, "hostNetwork"),
            (&self.restricted, root, "runAsNonRoot"),
            (&self.restricted, classless, "a runtimeClassName here"),
        ] {
            wait::until("the policies", wait::SOON, async || {
                let refused = self.refusal(namespace, &pod(&spec)).await.ok()??;
                refused.contains(word).then_some(())
            })
            .await
            .context(word)?;
        }
        Ok(())
    }

    /// Makes an object.
    pub(crate) async fn make(&self, object: &Value) -> Result<()> {
        let text = object.to_string();
        self.plane
            .kubectl_with(&["create", "-f", "-"], &text)
            .await?;
        Ok(())
    }

    /// Waits until an object is Ready.
    pub(crate) async fn ready(&self, namespace: &str, object: &str) -> Result<()> {
        let wait = [
            "wait",
            "-n",
            namespace,
            "--for=condition=Ready",
            "--timeout=60s",
            object,
        ];
        self.plane.kubectl(&wait).await?;
        Ok(())
    }

    /// Why the apiserver would not make such a Pod; `None` where it would.
    pub(crate) async fn refusal(&self, namespace: &str, pod: &Value) -> Result<Option<String>> {
        let pods: Api<Pod> = Api::namespaced(self.plane.client(), namespace);
        let pod: Pod = serde_json::from_value(pod.clone())?;
        let look = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        match pods.create(&look, &pod).await {
            Ok(_) => Ok(None),
            Err(kube::Error::Api(status)) => Ok(Some(status.message)),
            Err(e) => Err(e.into()),
        }
    }

    /// Fails unless such a Pod is refused, by a policy of ours and with these words.
    pub(crate) async fn refuses(&self, namespace: &str, pod: &Value, words: &str) -> Result<()> {
        let refused = self.refusal(namespace, pod).await?;
        let refused = refused.with_context(|| format!("allowed, but {words}: {pod}"))?;
        ensure!(
            refused.contains("ValidatingAdmissionPolicy 'kiln-sandbox-") && refused.contains(words),
            "{refused}, not {words}: {pod}"
        );
        Ok(())
    }

    /// Fails unless such a Pod is allowed.
    pub(crate) async fn allows(&self, namespace: &str, pod: &Value) -> Result<()> {
        let refused = self.refusal(namespace, pod).await?;
        ensure!(refused.is_none(), "{}: {pod}", refused.unwrap_or_default());
        Ok(())
    }
}

impl Fixture for Env {
    async fn finish(self) -> Result<()> {
        drop(self.standin);
        drop(self.controller);
        self.plane.stop()
    }

    fn log(&self) -> String {
        format!("--- the controller's log\n{}", self.controller.log())
    }
}

/// A Pod of class gvisor as the mission has it, with these fields of its spec. Those of
/// `container` are its container's.
pub(crate) fn pod(spec: &Value) -> Value {
    let mut pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "labels": {"agents.x-k8s.io/sandbox-name-hash": "01234567"}},
        "spec": {"runtimeClassName": "gvisor", "containers": [{"name": "c", "image": "busybox"}]},
    });
    merge(&mut pod["spec"], spec);
    pod
}

/// Puts `fields` into an object; `container` into its first container, and `null` takes out.
pub(crate) fn merge(spec: &mut Value, fields: &Value) {
    for (key, value) in fields.as_object().into_iter().flatten() {
        match (key.as_str(), value) {
            ("container", fields) => merge(&mut spec["containers"][0], fields),
            (key, Value::Null) => drop(spec.as_object_mut().and_then(|s| s.remove(key))),
            (key, Value::Object(_)) if spec[key].is_object() => merge(&mut spec[key], value),
            (key, value) => spec[key] = value.clone(),
        }
    }
}
