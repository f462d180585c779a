// SPDX-License-Identifier: Apache-2.0

//! One Pod after the other.

use anyhow::{Result, ensure};
use kiln_tests::node::Node;

/// How many sandboxes the agent of the suite holds.
const WARM: u32 = 3;

/// A Pod gets a sandbox that was there before it, and has name, network and output of its own.
pub(crate) async fn a_pod_adopts(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let before = agent.adopted().await?;
    let pod = node.pod("gvisor").run().await?;
    let container = pod
        .script("hostname; ip -o -4 addr show eth0; sleep 3600")
        .start()
        .await?;
    container.logged("eth0").await?;
    ensure!(
        agent.adopted().await? == before + 1,
        "{}\n{}",
        agent.log(),
        node.log()
    );
    Ok(())
}
