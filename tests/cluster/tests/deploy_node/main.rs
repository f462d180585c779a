// SPDX-License-Identifier: Apache-2.0

//! From a node that has nothing to sandboxes and back: `kilnctl enable` on a whole cluster, whose
//! node installs itself from the image of its agent; the documentation's manifests; an upgrade
//! below running Pods; `kilnctl disable`.
//!
//! Needs the programs that `make test-deploy-node` builds.

mod env;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    suite::{CASE, Cases},
    wait,
};

use env::{Env, LABEL};

/// How long a step of a node may take.
const PATIENCE: Duration = Duration::from_secs(180);

/// How often it is tried to enable what cannot work, until that is said.
const TRIES: u32 = 4;

fn main() -> ExitCode {
    // Each enables and disables several times.
    let mut cases = Cases::<Env>::new().limit(CASE * 4);
    cases.add_alone("a_node_that_cannot_run_sandboxes_says_why", broken);
    cases.add_alone("from_nothing_to_sandboxes_and_back", whole);
    cases.add_alone("a_node_that_somebody_changes_is_repaired", repaired);
    cases.run(Env::start)
}

async fn broken(env: &Env) -> Result<()> {
    let before = env.listing().await?;
    env.import("broken").await?;
    let enable = format!("enable {} --image-tag broken --timeout 60s", env.patched());
    let mut said = String::new();
    for _ in 0..TRIES {
        said = env.kilnctl_fails(&enable).await?;
        // Half of that time is waited for this runsc: the rest may not do for all else.
        if said.contains("install runsc of 2024") {
            break;
        }
    }
    ensure!(
        said.contains("install runsc of 2024") && said.contains("put back as it was"),
        "{said}"
    );
    ensure!(env.label().await?.is_empty(), "the node is labelled");
    let status = env.kilnctl("status").await?;
    ensure!(
        status.text().contains("install runsc of 2024"),
        "{}",
        status.text()
    );
    env.does("disable --purge --yes").await?;
    env.until_listing(&before).await
}

async fn whole(env: &Env) -> Result<()> {
    let before = env.listing().await?;
    for tag in ["dev", "v2"] {
        env.import(tag).await?;
    }
    env.does(&format!("enable {}", env.patched())).await?;
    until_labelled(env).await?;
    ensure!(
        env.does("status --format value").await? == "True\n",
        "not enabled"
    );

    env.until_warm().await?;
    // The agent has tried it out in a network of its own.
    env.kubectl("wait --for=condition=LinkLocalDropped --timeout=60s sandboxnode --all")
        .await?;
    for file in [
        "sandbox-template",
        "sandbox-warmpool",
        "sandbox-claim",
        "sandbox",
    ] {
        env.kubectl(&format!("apply -f {}", env.example(file)))
            .await?;
    }
    for object in ["sandboxclaim/sandbox-claim", "sandbox/sandbox-example-2"] {
        env.kubectl(&format!(
            "wait --for=condition=Ready --timeout=180s {object}"
        ))
        .await?;
    }
    let pods = wait::until("Pods", PATIENCE, async || {
        let pods = env.pods().await.ok()?;
        (pods.len() == 4 && pods.iter().all(|p| p.is_ready)).then_some(pods)
    })
    .await?;
    for pod in &pods {
        env.expect_gvisor(&pod.name).await?;
    }

    env.until_adopted().await?;

    let installed = env.installed()?;
    env.does(&format!("enable {} --image-tag v2", env.patched()))
        .await?;
    wait::until("the second build", PATIENCE, async || {
        (env.installed().ok()? != installed).then_some(())
    })
    .await?;
    ensure!(env.label().await? == "ready", "{LABEL} is gone");
    expect_same(env, &pods).await.context("after the upgrade")?;

    let why = env.kilnctl_fails("disable").await?;
    ensure!(why.contains("still on these nodes"), "{why}");
    expect_same(env, &pods).await.context("after disable")?;
    ensure!(env.label().await?.is_empty(), "{LABEL} is still there");
    env.refuses_new_pods().await?;

    // Wanted again before the last of the Pods has ended.
    env.does(&format!("enable {} --image-tag v2", env.patched()))
        .await?;
    until_labelled(env).await?;
    expect_same(env, &pods).await.context("enabled again")?;

    env.does("disable --purge --yes").await?;
    env.until_listing(&before).await
}

/// Config management writes containerd's own file anew, and starts containerd.
async fn repaired(env: &Env) -> Result<()> {
    let before = env.listing().await?;
    env.import("dev").await?;
    env.does(&format!("enable {}", env.patched())).await?;
    until_labelled(env).await?;
    env.expect_condition("HandlerServed", "True").await?;

    env.rewrite_containerd_config().await?;
    wait::until("a node without its label", PATIENCE, async || {
        env.label().await.ok()?.is_empty().then_some(())
    })
    .await?;
    env.until_event("SandboxesCannotStart", "does not import")
        .await?;
    until_labelled(env).await?;
    env.until_event("SandboxesInstalled", "sandboxes run")
        .await?;
    env.until_event("SandboxesCanStart", "again").await?;
    env.expect_condition("HandlerServed", "True").await?;
    env.expect_condition("Installed", "True").await?;

    env.does("disable --purge --yes").await?;
    env.until_listing(&before).await
}

async fn until_labelled(env: &Env) -> Result<()> {
    wait::until("the node's label", PATIENCE, async || {
        (env.label().await.ok()? == "ready").then_some(())
    })
    .await
}

/// Every Pod is the one that it was, and its sandbox does what it is told.
async fn expect_same(env: &Env, pods: &[env::Pod]) -> Result<()> {
    let now = env.pods().await?;
    ensure!(now == pods, "{now:?}, not {pods:?}");
    for pod in pods {
        env.expect_gvisor(&pod.name).await?;
    }
    Ok(())
}
