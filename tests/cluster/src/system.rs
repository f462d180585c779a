// SPDX-License-Identifier: Apache-2.0

//! Agent Sandbox on a cluster: the definitions, and the controller and the node's agent with
//! the rights of their ServiceAccounts and no others.
//!
//! Controller and agent run as processes beside the cluster, so that a test can kill them.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use kiln_tests::agent::Agent;
use serde_json::{Value, json};

use crate::{cluster::Private, controller::Controller};

/// Where the controller's objects are.
pub const NAMESPACE: &str = "agent-sandbox-system";

/// ServiceAccounts of controller and agent.
const CONTROLLER: &str = "agent-sandbox-controller";
const AGENT: &str = "kiln-node-agent";

/// What runs of it.
pub struct System {
    /// The controller.
    pub controller: Controller,
    /// The node's agent.
    pub agent: Agent,
}

impl System {
    /// Puts it on `cluster`. `agent` is the configuration of the agent, without paths.
    ///
    /// # Errors
    /// When something cannot be applied or does not become ready.
    pub async fn enable(cluster: &Private, agent: &str) -> Result<Self> {
        let deploy = deploy();
        let crds = deploy.join("crds").display().to_string();
        let [namespace, rbac] =
            ["namespace", "rbac"].map(|file| format!("{}/base/{file}.yaml", deploy.display()));
        // Larger than the annotation of a client-side apply may be.
        apply(cluster, &["--server-side", "-f", &crds]).await?;
        let established = [
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "-f",
            &crds,
        ];
        cluster.kubectl(established)?.run().await?;
        apply(cluster, &["-f", &namespace, "-f", &rbac]).await?;
        let controller = start_controller(cluster).await?;
        let account = kubeconfig_of(cluster, AGENT, &bound_to(cluster)).await?;
        let agent = cluster.run_agent(agent, &account).await?;
        Ok(Self { controller, agent })
    }

    /// Kills the controller, and starts another.
    ///
    /// # Errors
    /// When the other does not become ready.
    pub async fn with_another_controller(self, cluster: &Private) -> Result<Self> {
        self.controller.signal(nix::sys::signal::Signal::SIGKILL)?;
        self.controller.ended().await?;
        Ok(Self {
            controller: start_controller(cluster).await?,
            agent: self.agent,
        })
    }

    /// Ends its processes, and destroys the sandboxes that are no Pods'.
    ///
    /// # Errors
    /// When something does not end.
    pub async fn end(self) -> Result<()> {
        self.controller.signal(nix::sys::signal::Signal::SIGTERM)?;
        self.controller.ended().await?;
        self.agent.drain().await
    }
}

/// Starts the controller as its ServiceAccount.
///
/// # Errors
/// When it does not become ready.
pub async fn start_controller(cluster: &Private) -> Result<Controller> {
    let kubeconfig = kubeconfig_of(cluster, CONTROLLER, &[]).await?;
    let flags = [
        "--leader-elect=true",
        &format!("--leader-election-namespace={NAMESPACE}"),
    ];
    Controller::start_as(&kubeconfig, cluster.place(), &flags).await
}

/// The directory of the manifests.
#[must_use]
pub fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

async fn apply(cluster: &Private, args: &[&str]) -> Result<()> {
    let args = ["apply"].iter().chain(args).copied();
    cluster.kubectl(args)?.run().await?;
    Ok(())
}

/// What makes a token name the node, as that of a Pod on it does.
fn bound_to(cluster: &Private) -> [String; 2] {
    let node = cluster.cluster().node();
    [
        "--bound-object-kind=Node".to_owned(),
        format!("--bound-object-name={node}"),
    ]
}

/// The administrator's kubeconfig with the credentials of a ServiceAccount in it. `more` is said
/// of its token.
async fn kubeconfig_of(cluster: &Private, account: &str, more: &[String]) -> Result<PathBuf> {
    let token = ["-n", NAMESPACE, "create", "token", account, "--duration=2h"];
    let more = more.iter().map(String::as_str);
    let token = cluster
        .kubectl(token.into_iter().chain(more))?
        .run()
        .await?;
    let config = ["config", "view", "--raw", "-ojson"];
    let config = cluster.kubectl(config)?.run().await?;
    let mut config: Value = serde_json::from_str(&config)?;
    let user = config
        .pointer_mut("/users/0/user")
        .context("a kubeconfig without a user")?;
    *user = json!({"token": token.trim()});
    let path = cluster.dir().join(format!("{account}.conf"));
    fs::write(&path, config.to_string())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(path)
}
