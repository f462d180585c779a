// SPDX-License-Identifier: Apache-2.0

//! What an agent makes good by itself: what another one has left, and what was taken from it.

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::Node,
    pod::Pod,
    wait::{self, SOON},
};
use nix::sys::signal::Signal;

use crate::{HANDLER, WARM, agent::warm_sentries};

/// Waits until the first container of a Pod runs, and for the word that it was made in slots.
async fn is_made_in_slots(node: &Node, pod: &Pod<'_>) -> Result<()> {
    let container = pod.script("echo fine; sleep 3600").start().await?;
    container.logged("fine").await?;
    let is_said = || {
        let lines = node.log_lines("is made in slots").unwrap_or_default();
        lines.iter().any(|line| line.contains(pod.id()))
    };
    let said = wait::until_true("a container in slots", SOON, is_said);
    said.await.with_context(|| node.log())
}

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
    is_made_in_slots(node, &pod).await?;
    pod.remove().await
}
