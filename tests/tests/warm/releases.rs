// SPDX-License-Identifier: Apache-2.0

//! Releases of runsc: what is known of one, and what becomes of one of which nothing is known.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::api::RuntimeReport;
use kiln_tests::{
    agent::holding,
    node::{Node, NodeOpts},
    tools,
};

use crate::HANDLER;

/// The release that was the newest one before.
const EARLIER: &str = "runsc-2026-02";

/// A release that nobody knows.
const UNKNOWN: &str = "release-20991231.0";

/// A node with `runsc`, on which one Pod adopts, and what its agent says of that runtime.
async fn node_with(runsc: PathBuf) -> Result<RuntimeReport> {
    let opts = NodeOpts {
        agent: Some(holding(1, 2)),
        runsc: Some(runsc),
        ..NodeOpts::default()
    };
    let node = Node::start(opts).await?;
    let said = adopt(&node).await;
    let clean = node.check_for_leaks().await;
    let stopped = node.stop().await;
    let runtime = said?;
    clean.and(stopped)?;
    Ok(runtime)
}

async fn adopt(node: &Node) -> Result<RuntimeReport> {
    let agent = node.agent()?;
    agent.expect_ready(1).await?;
    let runtime = agent.report().await?.runtime.into_option();
    let runtime = runtime.context("no runtime")?;
    let pod = node.pod(HANDLER).run().await?;
    let container = pod.script("ip -o addr; sleep 3600").start().await?;
    ensure!(container.sh("echo fine").await? == "fine\n");
    let links = container.sh("ip -o addr show eth0").await?;
    ensure!(links.contains("inet "), "{links:?}");
    ensure!(
        agent.adopted().await? == 1,
        "it started cold\n{}",
        agent.log()
    );
    pod.remove().await?;
    Ok(runtime)
}

/// Another release than the pinned one starts sandboxes over its control socket by calls of its
/// own, and has gofers that are made ahead.
pub(crate) async fn an_earlier_release_has_all_that_costs_less(_: &Node) -> Result<()> {
    let runtime = node_with(tools::program(EARLIER)?).await?;
    ensure!(has_all(&runtime) && runtime.known, "{runtime:?}");
    Ok(())
}

/// One that is newer than all that are known is tried with what the newest of these has.
pub(crate) async fn a_newer_release_is_tried_with_what_the_newest_has(node: &Node) -> Result<()> {
    let runsc = named_anew(node, &tools::runsc()?)?;
    let runtime = node_with(runsc).await?;
    ensure!(has_all(&runtime) && !runtime.known, "{runtime:?}");
    ensure!(runtime.version == UNKNOWN, "{runtime:?}");
    Ok(())
}

/// One that refuses the calls of the newest is driven by commands, and its sandboxes are adopted.
pub(crate) async fn a_release_that_refuses_these_is_driven_by_commands(node: &Node) -> Result<()> {
    let runsc = named_anew(node, &tools::program(EARLIER)?)?;
    let runtime = node_with(runsc).await?;
    ensure!(runtime.start == "Command" && runtime.image, "{runtime:?}");
    ensure!(!runtime.gofers && !runtime.known, "{runtime:?}");
    Ok(())
}

fn has_all(runtime: &RuntimeReport) -> bool {
    runtime.start == "ControlSocket" && runtime.image && runtime.gofers
}

/// A program that is `runsc` but for the release that it says it is.
fn named_anew(node: &Node, runsc: &Path) -> Result<PathBuf> {
    let path = node.dir().join(node.unique("runsc-"));
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in\n*--version*) echo 'runsc version {UNKNOWN}'; echo 'spec: 1.2.1' ;;\n\
         *) exec {} \"$@\" ;;\nesac\n",
        runsc.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
