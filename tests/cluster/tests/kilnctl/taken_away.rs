// SPDX-License-Identifier: Apache-2.0

//! What `disable` takes away, and what stays.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::env::{Env, NAMESPACE, fails};

const API: &str = "agents.x-k8s.io/v1beta1";
const EXTENSIONS: &str = "extensions.agents.x-k8s.io/v1beta1";

/// One of each kind of users', and the Pod of a Sandbox.
async fn make_all(env: &Env) -> Result<()> {
    let container = json!({"name": "c", "image": "pause"});
    let template = json!({"podTemplate": {"spec": {"containers": [container]}}});
    let object = |api: &str, kind: &str, spec: Value| {
        json!({"apiVersion": api, "kind": kind,
            "metadata": {"name": "mine", "namespace": "default"}, "spec": spec})
    };
    env.make(&[
        object(EXTENSIONS, "SandboxTemplate", template.clone()),
        object(
            EXTENSIONS,
            "SandboxWarmPool",
            json!({"replicas": 1, "sandboxTemplateRef": {"name": "mine"}}),
        ),
        object(
            EXTENSIONS,
            "SandboxClaim",
            json!({"warmPoolRef": {"name": "mine"}}),
        ),
        object(API, "Sandbox", template),
        json!({"apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "node-0"}, "spec": {}}),
    ])
    .await?;
    // As the controller would have made it.
    let sandbox = env.get("sandbox mine").await?;
    env.make(&[json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": "mine", "namespace": "default",
            "labels": {"agents.x-k8s.io/sandbox-name-hash": "01234567"},
            "ownerReferences": [{"apiVersion": API, "kind": "Sandbox", "name": "mine",
                "uid": sandbox["metadata"]["uid"], "controller": true, "blockOwnerDeletion": true}],
        },
        "spec": {"containers": [container]},
    })])
    .await
}

const MINE: &str = "sandboxtemplate,sandboxwarmpool,sandboxclaim,sandbox,pod";

async fn uids(env: &Env) -> Result<Vec<Value>> {
    let mine = env.get(MINE).await?;
    let items = mine["items"].as_array().cloned().unwrap_or_default();
    Ok(items.iter().map(|o| o["metadata"]["uid"].clone()).collect())
}

pub(crate) async fn a_node_whose_agent_is_silent_is_named(env: &Env) -> Result<()> {
    env.does("enable").await?;
    env.make(&[
        json!({"apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "node-0"}, "spec": {}}),
    ])
    .await?;
    // By its own clock it has just reported.
    report(
        env,
        "Installed",
        "sandboxes run",
        &format!("{:.0}", jiff::Timestamp::now()),
    )
    .await?;
    let long_ago = "2026-01-01T00:00:00Z";
    let reported = json!({"metadata": {"managedFields": [{
        "manager": "kiln-node-agent", "operation": "Apply", "subresource": "status",
        "apiVersion": "node.agents.x-k8s.io/v1alpha1", "time": long_ago,
        "fieldsType": "FieldsV1", "fieldsV1": {"f:status": {"f:heartbeat": {}}},
    }]}});
    let reported = reported.to_string();
    env.plane
        .kubectl(&[
            "patch",
            "sandboxnode",
            "node-0",
            "--type=merge",
            "-p",
            &reported,
        ])
        .await?;
    // Nobody would take away what it was told to, so that is not waited for, but it is no success.
    let output = env.kilnctl("disable").await?;
    let said = output.text();
    ensure!(said.contains("Agent Sandbox is disabled"), "{said}");
    fails(
        &output,
        &[
            "still on these nodes",
            "node-0: its agent is silent; run `kilnctl node disable` there",
        ],
    )?;
    env.purge().await
}

/// Writes what an agent says of what it has installed, with a heartbeat.
async fn report(env: &Env, reason: &str, message: &str, heartbeat: &str) -> Result<()> {
    let status = json!({
        "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
        "metadata": {"name": "node-0"},
        "status": {"heartbeat": heartbeat, "conditions": [{
            "type": "Installed", "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]},
    });
    let apply = [
        "apply",
        "--server-side",
        "--subresource=status",
        "--field-manager=kiln-node-agent",
        "-f",
        "-",
    ];
    env.plane.kubectl_with(&apply, &status.to_string()).await?;
    Ok(())
}

pub(crate) async fn a_live_agent_is_asked_whatever_its_clock_says(env: &Env) -> Result<()> {
    env.does("enable").await?;
    env.make(&[
        json!({"apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "node-0"}, "spec": {}}),
    ])
    .await?;
    let late = jiff::Timestamp::now() - jiff::SignedDuration::from_mins(10);
    let late = format!("{late:.0}");
    report(env, "Installed", "sandboxes run", &late).await?;
    let told: Value = serde_json::from_str(&env.kilnctl("status -o json").await?.text())?;
    let node = &told["nodes"][0];
    ensure!(node["problem"].is_null(), "{node}");
    let age = node["heartbeatAgeSeconds"].as_i64();
    ensure!(age.is_some_and(|age| age < 30), "{node}");
    // The agent's answers.
    for (reason, message) in [("InUse", "2 Pods run by it"), ("Removed", "it is gone")] {
        let answer = async {
            let asked = || env.get("sandboxnode node-0");
            kiln_tests::wait::until(
                "the agent to be asked",
                kiln_tests::wait::SOON,
                async || {
                    let node = asked().await.ok()?;
                    let is_asked = node["metadata"]["annotations"]["kiln.dev/remove"] == "true";
                    is_asked.then_some(())
                },
            )
            .await?;
            report(env, reason, message, &late).await
        };
        let (answered, output) = tokio::join!(answer, env.kilnctl("disable --timeout 60s"));
        answered?;
        let output = output?;
        let said = output.text();
        if reason == "Removed" {
            ensure!(
                output.status.success() && said.contains("Agent Sandbox is disabled"),
                "{said}"
            );
            continue;
        }
        ensure!(said.contains("Agents stay on nodes"), "{said}");
        fails(
            &output,
            &["still on these nodes", "node-0: 2 Pods run by it"],
        )?;
        env.does("enable").await?;
        report(env, "Installed", "sandboxes run", &late).await?;
    }
    env.purge().await
}

pub(crate) async fn what_users_made_stays(env: &Env) -> Result<()> {
    env.does("enable").await?;
    make_all(env).await?;
    let before = uids(env).await?;
    ensure!(before.len() == 5, "{before:?}");
    let said = env.does("disable").await?;
    ensure!(said.contains("Agent Sandbox is disabled"), "{said}");
    ensure!(
        uids(env).await? == before,
        "something of users' has changed"
    );
    for gone in [
        "deployments,daemonsets,pods,configmaps,services,roles,rolebindings -l app.kubernetes.io/part-of=kiln -n",
        "serviceaccounts -l app.kubernetes.io/part-of=kiln -n",
    ] {
        ensure!(
            !env.is_there(&format!("{gone} {NAMESPACE}")).await?,
            "{gone}"
        );
    }
    for gone in [
        "runtimeclass gvisor",
        "clusterrole kiln-node-agent",
        "clusterrolebinding agent-sandbox-controller",
        "sandboxnode node-0",
    ] {
        ensure!(!env.is_there(gone).await?, "{gone}");
    }
    let status = env.kilnctl("status --format value").await?;
    ensure!(
        (status.text().as_str(), status.code()) == ("False\n", 1),
        "{status:?}"
    );
    let said = env.does("disable").await?;
    ensure!(said.contains("nothing was there"), "{said}");
    // And back, with what was kept.
    env.does("enable").await?;
    ensure!(
        uids(env).await? == before,
        "something of users' has changed"
    );
    env.purge().await
}

pub(crate) async fn purged_is_everything(env: &Env) -> Result<()> {
    let before = env.everything().await?;
    env.does("enable").await?;
    make_all(env).await?;
    // Somebody has made something in our namespace.
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "theirs", "namespace": NAMESPACE}});
    env.make(&[map]).await?;
    // Without a terminal, nobody can be asked.
    let asks = ["nothing was changed", "sandboxclaims", "Add --yes"];
    env.refuses("disable --purge", &asks).await?;
    let said = env.does("disable --purge --yes").await?;
    ensure!(said.contains("Agent Sandbox is gone"), "{said}");
    env.until_only(&before).await?;
    let said = env.does("disable --purge --yes").await?;
    ensure!(said.contains("nothing was there"), "{said}");
    // A finalizer that nobody takes away is waited for, and named.
    env.does("enable --wait=false").await?;
    make_all(env).await?;
    let hold = r#"{"metadata":{"finalizers":["somebody.example/holds"]}}"#;
    env.plane
        .kubectl(&["patch", "sandboxclaim", "mine", "--type=merge", "-p", hold])
        .await?;
    env.refuses(
        "disable --purge --yes --timeout 3s",
        &[
            "SandboxClaim default/mine",
            "held by somebody.example/holds",
        ],
    )
    .await?;
    let free = r#"{"metadata":{"finalizers":null}}"#;
    env.plane
        .kubectl(&["patch", "sandboxclaim", "mine", "--type=merge", "-p", free])
        .await?;
    env.purge().await?;
    env.until_only(&before).await
}

pub(crate) async fn somebody_elses_objects_are_not_purged(env: &Env) -> Result<()> {
    env.does("enable --wait=false").await?;
    make_all(env).await?;
    let label = "app.kubernetes.io/managed-by";
    let definition = "sandboxes.agents.x-k8s.io";
    env.plane
        .kubectl(&["label", "crd", definition, &format!("{label}-")])
        .await?;
    let before = uids(env).await?;
    env.refuses(
        "disable --purge --yes",
        &["nothing was changed", definition],
    )
    .await?;
    ensure!(uids(env).await? == before, "something is gone");
    env.plane
        .kubectl(&["label", "crd", definition, &format!("{label}=kilnctl")])
        .await?;
    env.purge().await
}

pub(crate) async fn somebody_elses_agents_are_in_the_way(env: &Env) -> Result<()> {
    env.does("enable --wait=false").await?;
    let label = "app.kubernetes.io/managed-by";
    let agents = "daemonset/kiln-node-agent";
    env.plane
        .kubectl(&["label", "-n", NAMESPACE, agents, &format!("{label}-")])
        .await?;
    for words in ["disable", "disable --purge --yes"] {
        env.refuses(
            words,
            &[
                "nothing was changed",
                "DaemonSet agent-sandbox-system/kiln-node-agent",
                "kiln.dev/remove=true",
            ],
        )
        .await?;
    }
    ensure!(env.is_there("runtimeclass gvisor").await?, "it is gone");
    let ours = format!("{label}=kilnctl");
    env.plane
        .kubectl(&["label", "-n", NAMESPACE, agents, &ours])
        .await?;
    env.purge().await
}
