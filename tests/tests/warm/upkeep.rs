// SPDX-License-Identifier: Apache-2.0

//! What an agent makes good by itself: what another one has left, and what was taken from it.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::gofer_socket;
use kiln_tests::{
    agent::socket,
    node::Node,
    wait::{self, SOON},
};
use nix::sys::signal::Signal;

use crate::{HANDLER, WARM, agent::warm_sentries};

/// How long an agent may take to try its runtime out.
const TRIAL: Duration = Duration::from_secs(60);

/// A sandbox that another agent has left has a gofer again, which ended with that agent.
pub(crate) async fn the_gofers_come_back_with_the_agent(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let kept = warm_sentries(node);
    agent.stop(Signal::SIGKILL).await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await?;
    let pod = node.pod(HANDLER).run().await?;
    let sentry = pod.sentry()?;
    ensure!(
        kept.iter().any(|p| p.pid == sentry.pid),
        "{sentry:?} is not of {kept:?}\n{}",
        agent.log()
    );
    pod.start_with_gofer().await?;
    pod.remove().await
}

/// Where less memory is available than is to stay so, nothing is booted, and Pods start cold.
pub(crate) async fn nothing_is_booted_below_the_memory_floor(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    let config = node.dir().join("agent.toml");
    let text = fs::read_to_string(&config)?;
    let limits = format!("[limits]\nmemory_floor = {}\n", i64::MAX);
    let changed = text.replace("[limits]\n", &limits);
    ensure!(changed != text);
    // Another agent keeps what is ready.
    agent.drain().await?;
    fs::write(&config, &changed)?;
    node.run_agent().await?;
    let held = holds_nothing(node).await;
    agent.stop(Signal::SIGTERM).await?;
    fs::write(&config, &text)?;
    node.run_agent().await?;
    held.with_context(|| agent.log())?;
    agent.expect_ready(WARM).await
}

async fn holds_nothing(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    let look = async || {
        let report = agent.report().await.ok()?;
        report.problem.is_empty().then_some(())
    };
    wait::until("the runtime to be tried out", TRIAL, look).await?;
    let pod = node.pod(HANDLER).run_cold_or_warm().await?;
    let why = node.why_cold(pod.id()).await?;
    ensure!(why == "no warm sandbox: empty", "{why}");
    pod.remove().await?;
    let classes = agent.report().await?.classes;
    ensure!(
        classes.iter().any(|c| c.missed > 0),
        "nobody has asked: {classes:?}"
    );
    let held: u32 = classes.iter().map(|c| c.ready + c.warming).sum();
    ensure!(held == 0, "{classes:?}");
    Ok(())
}

/// An agent whose sockets are removed listens anew, and Pods come to its sandboxes and gofers.
pub(crate) async fn sockets_that_are_removed_are_made_anew(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let pid = agent.pid().await;
    let socket = socket(node.name());
    let sockets = [gofer_socket(&socket), socket];
    for socket in &sockets {
        fs::remove_file(socket).with_context(|| socket.display().to_string())?;
    }
    let are_there = || sockets.iter().all(|socket| socket.exists());
    let made = wait::until_true("other sockets", SOON, are_there);
    made.await.with_context(|| agent.log())?;
    let pod = node.pod(HANDLER).run().await?;
    pod.start_with_gofer().await?;
    ensure!(agent.pid().await == pid, "another agent has taken over");
    pod.remove().await
}
