// SPDX-License-Identifier: Apache-2.0

//! A sandbox serves one Pod and is never used again; and it knows nothing of who has made it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use kiln_agent_api::{Agent, AgentError, Shape};
use kiln_tests::node::Node;

use crate::{HANDLER, WARM};

/// Pods one after the other, each of which leaves a token where it can: in files, shared memory
/// and the sandbox's name; none finds one, and no sandbox is seen twice.
pub(crate) async fn no_sandbox_serves_twice(node: &Node) -> Result<()> {
    const PODS: usize = 12;
    let mut seen = BTreeSet::new();
    for n in 0..PODS {
        let pod = node.pod(HANDLER).run().await?;
        ensure!(seen.insert(pod.sandbox()), "{} again", pod.sandbox());
        let container = pod.idle().start().await?;
        let look =
            "ls -A /tmp /dev/shm /root; cat /tmp/token /dev/shm/token 2>/dev/null; hostname; true";
        let found = container.sh(look).await?;
        ensure!(!found.contains("token-of"), "Pod {n} sees {found}");
        let leave = format!(
            "for f in /tmp/token /dev/shm/token; do echo token-of-{n} > $f; done; hostname token-of-{n} 2>/dev/null; true"
        );
        container.sh(&leave).await?;
        pod.remove().await?;
    }
    // Nor by asking faster than Pods come: every answer names another one.
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let report = agent.report().await?;
    let wanted = report
        .classes
        .iter()
        .find(|c| c.ready > 0)
        .context("none is ready")?;
    let shape = Shape::from_json(&wanted.shape)?;
    let ask = async |n: usize| -> Result<Option<String>> {
        let client: Agent = agent.client().await?;
        match client.acquire(&shape, &format!("asker-{n}")).await {
            Ok(warm) => Ok(Some(warm.id)),
            Err(AgentError::None(_) | AgentError::Timeout(_)) => Ok(None),
            Err(e) => Err(e.into()),
        }
    };
    let answers = futures_util::future::try_join_all((0..40).map(&ask)).await?;
    for id in answers.into_iter().flatten() {
        ensure!(seen.insert(id.clone()), "{id} was handed out twice");
    }
    Ok(())
}

/// The agent's environment, arguments and files are not to be found in a sandbox.
pub(crate) async fn nothing_of_the_agent_is_inside(node: &Node) -> Result<()> {
    let pod = node.pod(HANDLER).run().await?;
    let container = pod.idle().start().await?;
    let state = node.agent()?.state().display().to_string();
    let inside = container
        .sh("env; cat /proc/*/environ /proc/*/cmdline /proc/mounts 2>/dev/null; ls /; true")
        .await?;
    for word in [&*state, "kiln", "agent", "KILN_"] {
        ensure!(!inside.contains(word), "{word} is in {inside}");
    }
    let sentry = pod.sentry()?;
    let environ = std::fs::read(format!("/proc/{}/environ", sentry.pid))?;
    let environ = String::from_utf8_lossy(&environ);
    ensure!(
        !environ.contains("KILN_") && !environ.contains("HOME="),
        "{environ:?}"
    );
    pod.remove().await
}
