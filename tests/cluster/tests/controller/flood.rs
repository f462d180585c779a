// SPDX-License-Identifier: Apache-2.0

//! A tenant makes hundreds of objects at once: whoever comes after is not looked at after all of them.

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use kiln_crds::{SandboxClaim, SandboxTemplate, SandboxWarmPool, keys};
use kube::ResourceExt;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::env::{Conditions, Env, Kind, Namespace};

/// Objects of the flood, which come while the controller is stopped and all before the other's.
const FLOOD: usize = 400;
/// Requests at the same time.
const CLIENTS: usize = 8;

/// Makes the flood, and then lets `come` come. The controller sees all at once, in this order.
async fn flood<K: Kind>(
    env: &Env,
    ns: &Namespace<'_>,
    spec: Value,
    come: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let held = env.controller.lock().await;
    let controller = held.as_ref().context("no controller")?;
    controller.signal(Signal::SIGSTOP)?;
    let fields = json!({ "spec": spec });
    let all = stream::iter(0..FLOOD).map(async |n| {
        ns.make::<K>(&format!("f{n}"), fields.clone()).await?;
        anyhow::Ok(())
    });
    let made = all.buffer_unordered(CLIENTS).try_collect::<()>().await;
    let came = match made {
        Ok(()) => come().await,
        Err(e) => Err(e),
    };
    controller.signal(Signal::SIGCONT)?;
    came
}

/// Half of a flood at most was looked at.
async fn is_before_most<K: Kind>(ns: &Namespace<'_>, is_seen: impl Fn(&K) -> bool) -> Result<()> {
    let seen = ns.list::<K>().await?.iter().filter(|o| is_seen(o)).count();
    ensure!(seen < FLOOD / 2, "{seen} of {FLOOD} came before");
    Ok(())
}

fn has_status<K: Conditions>(object: &K) -> bool {
    !object.conditions().is_empty()
}

pub(crate) async fn one_tenants_flood_does_not_come_before_all_others(env: &Env) -> Result<()> {
    let (tenant, other) = (env.namespace().await?, env.namespace().await?);
    other.template("t", json!({})).await?;
    other.pool("p", "t", 2).await?;
    let none = json!({"warmPoolRef": {"name": "none"}});
    let claim = async || other.claim("c", "p").await.map(drop);
    flood::<SandboxClaim>(env, &tenant, none, claim).await?;
    other.claimed("c").await?;
    is_before_most::<SandboxClaim>(&tenant, has_status).await?;

    let none = json!({"replicas": 1, "sandboxTemplateRef": {"name": "none"}});
    let pool = json!({"spec": {"replicas": 1, "sandboxTemplateRef": {"name": "t"}}});
    let make = async || other.make::<SandboxWarmPool>("q", pool).await.map(drop);
    flood::<SandboxWarmPool>(env, &tenant, none, make).await?;
    other
        .until("q", "a status", |pool: &SandboxWarmPool| {
            has_status(pool).then_some(())
        })
        .await?;
    is_before_most::<SandboxWarmPool>(&tenant, has_status).await?;

    let spec =
        json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}});
    let is_labelled = |t: &SandboxTemplate| t.labels().contains_key(keys::TEMPLATE_REF_HASH);
    let make = async || other.template("u", json!({})).await.map(drop);
    flood::<SandboxTemplate>(env, &tenant, spec, make).await?;
    other
        .until("u", "a label", |t: &SandboxTemplate| {
            is_labelled(t).then_some(())
        })
        .await?;
    is_before_most::<SandboxTemplate>(&tenant, is_labelled).await
}
