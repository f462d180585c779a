// SPDX-License-Identifier: Apache-2.0

//! A tenant makes as many and as large objects as it may: the controller stays within its memory, and
//! serves the others.

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use kiln_cluster::{account::deploy, controller::Controller};
use kiln_crds::{Sandbox, SandboxClaim, SandboxTemplate};
use kube::api::{DeleteParams, ListParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::env::{Env, FLAGS, Namespace};

/// Objects of 1 MiB, of each of two kinds. With all there was of them in the caches, a controller
/// had over 2 MiB for each when it started.
const TEMPLATES: usize = 80;
const SANDBOXES: usize = 40;
/// Requests at the same time.
const CLIENTS: usize = 4;

/// Containers of a Pod that has 1 MiB of text.
fn large() -> Value {
    let env = json!([{"name": "LARGE", "value": "x".repeat(1 << 20)}]);
    json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause", "env": env}]}}})
}

pub(crate) async fn large_objects_are_not_held_and_hold_up_nobody(env: &Env) -> Result<()> {
    let mut held = env.controller.lock().await;
    let limit = limit()?;
    let (tenant, other) = (env.namespace().await?, env.namespace().await?);
    other.template("t", json!({})).await?;
    other.pool("p", "t", 1).await?;
    fill(&tenant).await?;
    let first = held.as_ref().context("no controller")?;
    serves(&tenant, &other, "first").await?;
    let peak = first.peak_memory()?;
    held.take()
        .context("no controller")?
        .signal(Signal::SIGKILL)?;
    let second = Controller::start(&env.plane, &FLAGS).await?;
    serves(&tenant, &other, "second").await?;
    let anew = second.peak_memory()?;
    *held = Some(second);
    drop(held);
    let words = format!(
        "{} MiB while {} objects of 1 MiB came, {} MiB when it started with them, of {} MiB",
        peak >> 20,
        TEMPLATES + SANDBOXES,
        anew >> 20,
        limit >> 20
    );
    kiln_tests::dice::say(&words);
    // What others need as well has to fit.
    ensure!(peak.max(anew) < limit / 2, "{words}");
    empty(&tenant).await
}

/// The limit that the controller's container has.
fn limit() -> Result<u64> {
    let manifest = std::fs::read_to_string(deploy().join("base/controller.yaml"))?;
    let (_, limits) = manifest.split_once("limits:").context("no limits")?;
    let (_, memory) = limits
        .split_once("memory: ")
        .context("no limit of memory")?;
    let mib = memory.lines().next().and_then(|l| l.strip_suffix("Mi"));
    let mib: u64 = mib.context("not in Mi")?.parse()?;
    Ok(mib << 20)
}

async fn fill(ns: &Namespace<'_>) -> Result<()> {
    let templates = stream::iter(0..TEMPLATES).map(async |n| {
        ns.template(&format!("t{n}"), large()).await?;
        anyhow::Ok(())
    });
    templates
        .buffer_unordered(CLIENTS)
        .try_collect::<()>()
        .await?;
    let sandboxes = stream::iter(0..SANDBOXES).map(async |n| {
        let mut spec = large();
        spec["operatingMode"] = json!("Suspended");
        ns.sandbox(&format!("s{n}"), spec).await?;
        anyhow::Ok(())
    });
    sandboxes.buffer_unordered(CLIENTS).try_collect().await
}

/// Another's claim is served, and so is the tenant itself in time.
async fn serves(tenant: &Namespace<'_>, other: &Namespace<'_>, name: &str) -> Result<()> {
    other.claim(name, "p").await?;
    other.claimed(name).await?;
    tenant.sandbox(name, large()).await?;
    tenant
        .until_condition::<Sandbox>(name, "Ready", "True")
        .await?;
    let claim = format!("{name}-claim");
    let from = json!({"sandboxTemplateRef": {"name": "t0"}});
    tenant.claim_with(&claim, from).await?;
    tenant.claimed(&claim).await?;
    Ok(())
}

async fn empty(ns: &Namespace<'_>) -> Result<()> {
    let (params, all) = (DeleteParams::default(), ListParams::default());
    ns.api::<SandboxClaim>()
        .delete_collection(&params, &all)
        .await?;
    ns.api::<Sandbox>().delete_collection(&params, &all).await?;
    ns.api::<SandboxTemplate>()
        .delete_collection(&params, &all)
        .await?;
    Ok(())
}
