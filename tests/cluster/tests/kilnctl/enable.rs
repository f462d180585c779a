// SPDX-License-Identifier: Apache-2.0

//! What `enable` puts there, and what `status` says of it.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::env::{Env, NAMESPACE, fails, title};

/// Label of everything that `kilnctl` makes.
const OURS: &str = "app.kubernetes.io/managed-by=kilnctl";

pub(crate) async fn what_is_enabled_is_seen_and_a_second_time_changes_nothing(
    env: &Env,
) -> Result<()> {
    let before = env.kilnctl("status --format value").await?;
    ensure!(
        (before.text().as_str(), before.code()) == ("False\n", 1),
        "{before:?}"
    );
    let said = env.does("enable").await?;
    for line in [
        "CustomResourceDefinition sandboxes.agents.x-k8s.io: created",
        "CustomResourceDefinition sandboxes.agents.x-k8s.io: established",
        "Deployment agent-sandbox-system/agent-sandbox-controller: 1 of 1 ready",
        "Deployment agent-sandbox-system/sandbox-router-deployment: 2 of 2 ready",
        "DaemonSet agent-sandbox-system/kiln-node-agent: 1 of 1 ready",
    ] {
        ensure!(said.contains(line), "no {line:?} in {said}");
    }
    let after = env.kilnctl("status --format value").await?;
    ensure!(
        (after.text().as_str(), after.code()) == ("True\n", 0),
        "{after:?}"
    );
    let table = env.does("status").await?;
    for words in [
        "Agent Sandbox is enabled.",
        "kiln-controller:dev",
        "kiln-router:dev",
        "sandboxclaims.ext",
    ] {
        ensure!(table.contains(words), "no {words:?} in {table}");
    }
    let versions = versions(env).await?;
    let said = env.does("enable").await?;
    ensure!(said.contains("nothing had to be changed"), "{said}");
    ensure!(
        !said.contains("created") && !said.contains(": changed"),
        "{said}"
    );
    let now = self::versions(env).await?;
    ensure!(now == versions, "{now:?}, not {versions:?}");
    // Without a controller it is not enabled, whatever else is there.
    let scale = [
        "-n",
        NAMESPACE,
        "scale",
        "deployment/agent-sandbox-controller",
        "--replicas=0",
    ];
    env.plane.kubectl(&scale).await?;
    kiln_tests::wait::until("no controller", kiln_tests::wait::SOON, async || {
        let status = env.kilnctl("status --format value").await.ok()?;
        (status.text() == "False\n" && status.code() == 1).then_some(())
    })
    .await?;
    // Enabling puts that right.
    env.does("enable").await?;
    env.does("status --format value").await?;
    env.purge().await
}

/// Versions of the objects that are ours, but for those that others give a status.
async fn versions(env: &Env) -> Result<BTreeMap<String, Option<String>>> {
    let ours = env.objects(OURS).await?;
    let generation = |o: &kube::api::DynamicObject| {
        o.metadata
            .generation
            .map(|g| g.to_string())
            .or(o.resource_version())
    };
    Ok(ours.iter().map(|o| (title(o), generation(o))).collect())
}

pub(crate) async fn nodes_and_pools_are_shown(env: &Env) -> Result<()> {
    env.does("enable").await?;
    let now = jiff::Timestamp::now();
    let status = json!({"status": {
        "heartbeat": format!("{now:.0}"), "runtimeVersions": {"gvisor": "release-20260803.0"},
        "classes": [{"class": "gvisor", "memoryBytes": 1 << 30, "ready": 2, "warming": 1,
            "adopted": 7, "missed": 3}],
        "conditions": [{"type": "Ready", "status": "True", "reason": "SandboxesCanBeAdopted",
            "message": "", "lastTransitionTime": format!("{now:.0}")}],
    }});
    env.make(&[
        json!({"apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "node-0"}, "spec": {}}),
        json!({"apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": "p", "namespace": "default"},
            "spec": {"replicas": 4, "sandboxTemplateRef": {"name": "t"}}}),
    ])
    .await?;
    let status = status.to_string();
    let patch = [
        "patch",
        "sandboxnode",
        "node-0",
        "--subresource=status",
        "--type=merge",
        "-p",
        &status,
    ];
    env.plane.kubectl(&patch).await?;
    let table = env.does("status").await?;
    let line = |begins: &str| {
        let mut lines = table.lines();
        let line = lines.find(|l| l.starts_with(begins));
        let words = line.map(|l| l.split_whitespace().collect::<Vec<_>>().join(" "));
        words.with_context(|| format!("no {begins} in {table}"))
    };
    let node = line("node-0")?;
    ensure!(
        node.starts_with("node-0 gvisor 2 1 7 3 release-20260803.0 "),
        "{node}"
    );
    ensure!(line("default/p")?.starts_with("default/p 0/4 t"), "{table}");
    let told: Value = serde_json::from_str(&env.does("status -o json").await?)?;
    ensure!(
        told["enabled"] == true && told["nodes"][0]["adopted"] == 7,
        "{told}"
    );
    ensure!(
        told["agents"]["wanted"] == 1 && told["pools"][0]["wanted"] == 4,
        "{told}"
    );
    env.purge().await
}

pub(crate) async fn images_and_nodes_are_chosen(env: &Env) -> Result<()> {
    env.does(
        "enable --wait=false --image-registry registry.example/kiln --image-tag v1 \
         --node-selector sandbox.gke.io/runtime=gvisor",
    )
    .await?;
    let workloads = env
        .get(&format!("-n {NAMESPACE} deployments,daemonsets"))
        .await?;
    let spec = |n: usize| &workloads["items"][n]["spec"]["template"]["spec"];
    let names = ["kiln-controller", "kiln-router", "kiln-node-agent"];
    for (n, name) in names.into_iter().enumerate() {
        let image = format!("registry.example/kiln/{name}:v1");
        ensure!(spec(n)["containers"][0]["image"] == image, "{workloads}");
    }
    ensure!(
        spec(2)["nodeSelector"]["sandbox.gke.io/runtime"] == "gvisor",
        "{workloads}"
    );
    // None of the nodes has the label, and waiting for none is no failure.
    let said = env.does("enable --timeout 60s").await?;
    ensure!(said.contains("kiln-node-agent: changed"), "{said}");
    env.purge().await
}

pub(crate) async fn what_an_older_version_had_is_removed(env: &Env) -> Result<()> {
    env.does("enable --wait=false").await?;
    let labels = |owner: &str| json!({"app.kubernetes.io/managed-by": owner});
    let map = |name: &str, owner: &str| {
        json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels(owner)}})
    };
    env.make(&[map("old", "kilnctl"), map("theirs", "somebody")])
        .await?;
    let said = env.does("enable --wait=false").await?;
    ensure!(
        said.contains("ConfigMap agent-sandbox-system/old: removed"),
        "{said}"
    );
    ensure!(
        env.is_there(&format!("-n {NAMESPACE} configmap theirs"))
            .await?
    );
    env.purge().await
}

pub(crate) async fn what_does_not_start_is_explained(env: &Env) -> Result<()> {
    // Somebody's namespace, whose rules the controller keeps to and the agents cannot.
    let restricted = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    env.make(&[json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": restricted}})])
        .await?;
    let output = env.kilnctl("enable --timeout 15s").await?;
    fails(
        &output,
        &[
            "DaemonSet",
            "0 of 1 ready",
            "violates PodSecurity",
            "describe pods",
        ],
    )?;
    let said = output.text();
    ensure!(
        said.contains("Namespace agent-sandbox-system: left as "),
        "{said}"
    );
    ensure!(
        said.contains("agent-sandbox-controller: 1 of 1 ready"),
        "{said}"
    );
    env.purge().await?;
    env.plane
        .kubectl(&["delete", "namespace", NAMESPACE])
        .await?;
    Ok(())
}
