// SPDX-License-Identifier: Apache-2.0

//! What `kilnctl` does not do, what it says instead, and that it has changed nothing.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kiln_cluster::{account::deploy, control_plane::free_ports};
use serde_json::{Value, json};

use crate::env::{Env, fails};

/// One definition, as somebody else would apply it.
async fn apply_theirs(env: &Env) -> Result<()> {
    let file = deploy().join("crds/agents.x-k8s.io_sandboxes.yaml");
    let file = file.display().to_string();
    let apply = [
        "apply",
        "--server-side",
        "--field-manager=somebody",
        "-f",
        &file,
    ];
    env.plane.kubectl(&apply).await?;
    Ok(())
}

pub(crate) async fn somebody_elses_definitions_are_left_alone_unless_taken_over(
    env: &Env,
) -> Result<()> {
    apply_theirs(env).await?;
    let before = env.everything().await?;
    env.refuses(
        "enable",
        &[
            "nothing was changed",
            "CustomResourceDefinition sandboxes.agents.x-k8s.io of somebody (field manager)",
            "--no-enable-agent-sandbox",
            "--take-over",
        ],
    )
    .await?;
    env.until_only(&before).await?;
    let told: Value = serde_json::from_str(&env.kilnctl("status -o json").await?.text())?;
    ensure!(
        told["definitions"][0]["owner"] == "somebody (field manager)",
        "{told}"
    );
    env.does("enable --take-over").await?;
    env.does("status --format value").await?;
    // Now they are ours, for good.
    let said = env.does("enable").await?;
    ensure!(said.contains("nothing had to be changed"), "{said}");
    env.purge().await
}

pub(crate) async fn a_changed_definition_is_not_overruled(env: &Env) -> Result<()> {
    env.does("enable --wait=false").await?;
    let name = "sandboxnodes.node.agents.x-k8s.io";
    let theirs = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": name},
        "spec": {"names": {"plural": "sandboxnodes", "kind": "SandboxNode", "shortNames": ["node2"]}},
    });
    let apply = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager=addon-manager",
        "-f",
        "-",
    ];
    env.plane.kubectl_with(&apply, &theirs.to_string()).await?;
    env.refuses(
        "enable --wait=false",
        &[name, "addon-manager", "--take-over"],
    )
    .await?;
    env.does("enable --wait=false --take-over").await?;
    env.purge().await
}

pub(crate) async fn another_controller_is_in_the_way(env: &Env) -> Result<()> {
    let labels = json!({"app": "theirs"});
    let image = "registry.example/agent-sandbox/agent-sandbox-controller:v1";
    env.make(&[json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "theirs", "namespace": "default"},
        "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "c", "image": image}]},
        }},
    })])
    .await?;
    let before = env.everything().await?;
    for words in ["enable", "enable --take-over"] {
        env.refuses(words, &["nothing was changed", "Deployment default/theirs"])
            .await?;
    }
    env.until_only(&before).await?;
    env.plane
        .kubectl(&["delete", "deployment", "theirs"])
        .await?;
    Ok(())
}

pub(crate) async fn a_class_of_somebodys_is_left_to_them(env: &Env) -> Result<()> {
    env.make(&[
        json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass",
        "metadata": {"name": "gvisor"}, "handler": "theirs"}),
    ])
    .await?;
    let said = env.does("enable --wait=false").await?;
    ensure!(said.contains("RuntimeClass gvisor: left as "), "{said}");
    env.purge().await?;
    ensure!(env.get("runtimeclass gvisor").await?["handler"] == "theirs");
    env.plane
        .kubectl(&["delete", "runtimeclass", "gvisor"])
        .await?;
    Ok(())
}

/// A kubeconfig of a ServiceAccount without rights.
async fn nobody(env: &Env) -> Result<PathBuf> {
    let make = ["-n", "default", "create", "serviceaccount", "nobody"];
    env.plane.kubectl(&make).await?;
    let token = [
        "-n",
        "default",
        "create",
        "token",
        "nobody",
        "--duration=1h",
    ];
    let token = env.plane.kubectl(&token).await?;
    let mut config: Value = serde_json::from_slice(&fs::read(env.plane.kubeconfig())?)?;
    let user = config.pointer_mut("/users/0/user").context("no user")?;
    *user = json!({"token": token.trim()});
    let path = env.plane.dir().join("nobody.conf");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

pub(crate) async fn missing_rights_are_named(env: &Env) -> Result<()> {
    let kubeconfig = nobody(env).await?;
    let output = env.kilnctl_as(&kubeconfig, "enable").await?;
    fails(
        &output,
        &[
            "nothing was changed",
            "patch customresourcedefinitions.apiextensions.k8s.io",
            "create daemonsets.apps in namespace agent-sandbox-system",
            "cluster-admin",
        ],
    )?;
    let output = env.kilnctl_as(&kubeconfig, "disable --purge --yes").await?;
    fails(
        &output,
        &[
            "nothing was changed",
            "delete sandboxclaims.extensions.agents.x-k8s.io",
        ],
    )?;
    let output = env.kilnctl_as(&kubeconfig, "status").await?;
    fails(
        &output,
        &[
            "cannot get resource \"customresourcedefinitions\"",
            "Ask for this right",
        ],
    )?;
    env.plane
        .kubectl(&["delete", "serviceaccount", "nobody"])
        .await?;
    Ok(())
}

/// In kubectl's words, where it has some.
pub(crate) async fn users_are_told_what_is_missing(env: &Env) -> Result<()> {
    let missing = ["no Agent Sandbox", "kilnctl enable"];
    for words in ["list", "run --pool p -- true", "exec s -- true", "rm s"] {
        env.refuses(words, &missing).await?;
    }
    env.does("enable --wait=false").await?;
    let none = ["no claim or sandbox \"s\" in namespace \"default\""];
    for words in ["exec s -- true", "logs s", "suspend s", "resume s", "rm s"] {
        env.refuses(words, &none).await?;
    }
    ensure!(env.does("list").await?.is_empty());
    let kubeconfig = nobody(env).await?;
    let output = env.kilnctl_as(&kubeconfig, "list -n kube-system").await?;
    let forbidden =
        "error from server (Forbidden): sandboxclaims.extensions.agents.x-k8s.io is forbidden";
    fails(&output, &[forbidden])?;
    env.plane
        .kubectl(&["delete", "serviceaccount", "nobody"])
        .await?;
    env.purge().await
}

pub(crate) async fn an_apiserver_that_is_away_is_named(env: &Env) -> Result<()> {
    let [port] = free_ports()?;
    let mut config: Value = serde_json::from_slice(&fs::read(env.plane.kubeconfig())?)?;
    let server = config
        .pointer_mut("/clusters/0/cluster/server")
        .context("no server")?;
    *server = json!(format!("https://127.0.0.1:{port}"));
    let path = env.plane.dir().join("away.conf");
    fs::write(&path, config.to_string())?;
    let start = Instant::now();
    for words in ["enable", "disable", "status", "status --format value"] {
        let output = env.kilnctl_as(&path, words).await?;
        let address = format!("127.0.0.1:{port}");
        fails(&output, &[&address, "does not answer", "--kubeconfig"]).context(words)?;
        // Nobody knows.
        ensure!(output.text().is_empty(), "{}", output.text());
    }
    ensure!(
        start.elapsed() < Duration::from_secs(60),
        "{:?}",
        start.elapsed()
    );
    let nowhere = env.plane.dir().join("not-there.conf");
    let output = env.kilnctl_as(&nowhere, "status").await?;
    fails(&output, &["KUBECONFIG"])
}
