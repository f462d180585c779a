// SPDX-License-Identifier: Apache-2.0

//! Classes: one without sandboxes that are booted ahead, and what all parts have to know of one.

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::{
    api::{core::v1::Pod, node::v1::RuntimeClass},
    apimachinery::pkg::api::resource::Quantity,
};
use kiln_cluster::account::deploy;
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::env::Env;

const EXTENSIONS: &str = "extensions.agents.x-k8s.io/v1beta1";
const NODES: &str = "node.agents.x-k8s.io/v1alpha1";
/// A node of this case whose agent boots gVisor's sandboxes.
const NODE: &str = "kata-and-gvisor";

/// A live agent that holds sandboxes of gVisor's, and none of Kata's.
async fn report(env: &Env) -> Result<()> {
    let node =
        json!({"apiVersion": NODES, "kind": "SandboxNode", "metadata": {"name": NODE}, "spec": {}});
    env.make(&node).await?;
    let now = Timestamp::now();
    let status = json!({"status": {
        "heartbeat": format!("{now:.0}"), "runtimeVersions": {"gvisor": "release-1"},
        "classes": [{"class": "gvisor", "memoryBytes": 128 << 20, "ready": 4, "room": 4}],
    }});
    let nodes: Api<kiln_crds::SandboxNode> = Api::all(env.plane.client());
    nodes
        .patch_status(NODE, &PatchParams::default(), &Patch::Merge(&status))
        .await?;
    Ok(())
}

/// Pools and claims of a class that nobody boots ahead: warm Pods, and nodes are asked for nothing.
pub(crate) async fn a_pool_of_kata_holds_warm_pods(env: &Env) -> Result<()> {
    let namespace = env.plane.namespace("kata").await?;
    report(env).await?;
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": EXTENSIONS, "kind": kind,
            "metadata": {"name": name, "namespace": namespace}, "spec": spec})
    };
    let container = json!({"name": "c", "image": "busybox",
        "resources": {"limits": {"memory": "128Mi"}}});
    let pod = json!({"runtimeClassName": "kata", "containers": [container]});
    let template = json!({"podTemplate": {"spec": pod}});
    env.make(&object("SandboxTemplate", "t", template)).await?;
    let pool = json!({"replicas": 2, "sandboxTemplateRef": {"name": "t"}});
    env.make(&object("SandboxWarmPool", "p", pool)).await?;
    env.ready(&namespace, "sandboxwarmpool/p").await?;
    let claim = json!({"warmPoolRef": {"name": "p"}});
    env.make(&object("SandboxClaim", "c", claim)).await?;
    env.ready(&namespace, "sandboxclaim/c").await?;

    let sandboxes = ["get", "sandbox", "-n", &namespace, "-ojson"];
    let sandboxes: Value = serde_json::from_str(&env.plane.kubectl(&sandboxes).await?)?;
    let of_claim = |o: &&Value| o["metadata"]["ownerReferences"][0]["kind"] == "SandboxClaim";
    let items = sandboxes["items"].as_array().context("no items")?;
    let claimed = items.iter().find(of_claim).context("nothing was claimed")?;
    let launch = &claimed["metadata"]["labels"]["agents.x-k8s.io/launch-type"];
    ensure!(launch == "warm", "{claimed}");

    let pods: Api<Pod> = Api::namespaced(env.plane.client(), &namespace);
    let pods = pods.list(&ListParams::default()).await?.items;
    ensure!(pods.len() >= 2, "{pods:#?}");
    for pod in pods {
        let spec = pod.spec.clone().context("no spec")?;
        ensure!(
            spec.runtime_class_name.as_deref() == Some("kata"),
            "{pod:#?}"
        );
        // Of its RuntimeClass.
        ensure!(spec.overhead.is_some_and(|o| o.contains_key("memory")));
        // It prefers no node: none has anything for it.
        ensure!(spec.affinity.is_none(), "{:?}", spec.affinity);
    }
    let nodes: Api<kiln_crds::SandboxNode> = Api::all(env.plane.client());
    let wishes = nodes.get(NODE).await?.spec.classes;
    ensure!(wishes.iter().all(|w| w.class != "kata"), "{wishes:?}");
    Ok(())
}

/// What a kubelet adds to limits is what agents boot sandboxes for.
pub(crate) async fn agents_know_the_overhead_of_the_class(env: &Env) -> Result<()> {
    for overlay in ["base", "overlays/kind-like"] {
        let dir = deploy().join(overlay).display().to_string();
        let objects = env.plane.kubectl(&["kustomize", &dir]).await?;
        let objects: Vec<Value> = serde_saphyr::from_multiple(&objects)?;
        let find = |kind: &str, name: &str| {
            let is = |o: &&Value| o["kind"] == kind && o["metadata"]["name"] == name;
            objects.iter().find(is).cloned()
        };
        let class = find("RuntimeClass", "gvisor").context("no class")?;
        let class: RuntimeClass = serde_json::from_value(class)?;
        let fixed = class.overhead.and_then(|o| o.pod_fixed).unwrap_or_default();
        let memory = fixed.get("memory").context("no overhead")?;
        let config = find("ConfigMap", "kiln-node-agent").context("no configuration")?;
        let config = config["data"]["agent.toml"].as_str().unwrap_or_default();
        let line = format!("\noverhead = {}\n", bytes(memory)?);
        ensure!(
            config.contains(&line),
            "{overlay}: {memory:?}, but {config}"
        );
    }
    Ok(())
}

fn bytes(quantity: &Quantity) -> Result<u64> {
    let number = quantity.0.strip_suffix("Mi").context("not in Mi")?;
    Ok(number.parse::<u64>()? << 20)
}
