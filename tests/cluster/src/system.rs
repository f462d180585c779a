// SPDX-License-Identifier: Apache-2.0

//! Agent Sandbox on a cluster: the definitions, and the controller and the node's agent with
//! the rights of their ServiceAccounts and no others.
//!
//! Controller and agent run as processes beside the cluster, so that a test can kill them.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use kiln_tests::{agent::Agent, wait};

use crate::{
    account::{self, AGENT, CONTROLLER, NAMESPACE, deploy},
    cluster::Private,
    controller::Controller,
};

/// Pause between two tries to start a controller.
const PAUSE: Duration = Duration::from_millis(200);

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
        let crds = deploy().join("crds").display().to_string();
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
        let rights = account::rights();
        apply(cluster, &rights.each_ref().map(String::as_str)).await?;
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
        let start = Instant::now();
        let controller = loop {
            match start_controller(cluster).await {
                Ok(controller) => break controller,
                Err(e) if start.elapsed() > wait::SOON => return Err(e),
                // An apiserver that has just come back may not answer everything yet.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        };
        Ok(Self {
            controller,
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

async fn kubeconfig_of(cluster: &Private, account: &str, more: &[String]) -> Result<PathBuf> {
    let kubectl = async |args: &[&str]| cluster.kubectl(args.iter().copied())?.run().await;
    account::kubeconfig(kubectl, cluster.dir(), account, more).await
}
