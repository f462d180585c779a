// SPDX-License-Identifier: Apache-2.0

//! The controller and the apiserver die and come back.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kiln_cluster::{account, controller::Controller};
use kiln_crds::{Sandbox, SandboxClaim};
use kube::{
    Api, ResourceExt,
    api::{ObjectMeta, PostParams},
};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::env::{Env, FLAGS, Namespace, controller_of, same};

/// Claims that come while things fail.
const CLAIMS: usize = 30;

/// How long upstream's controller leads that has gone without giving its Lease up.
const UPSTREAM_LEADS: Duration = Duration::from_secs(3);

/// Each claim has a Sandbox, no two the same one, and no Sandbox is without its claim or pool.
async fn all_is_well(ns: &Namespace<'_>, replicas: usize) -> Result<()> {
    let names: Vec<String> = (0..CLAIMS).map(|n| format!("c{n}")).collect();
    let sandboxes = ns.all_claimed(&names).await?;
    let distinct: BTreeSet<_> = sandboxes.iter().filter_map(ResourceExt::uid).collect();
    same("Sandboxes of claims", &distinct.len(), &CLAIMS)?;
    ns.until_ready("p", i32::try_from(replicas)?).await?;
    let all = ns.list::<Sandbox>().await?;
    let alive = all
        .iter()
        .filter(|s| s.metadata.deletion_timestamp.is_none());
    let (claimed, pooled): (Vec<_>, Vec<_>) =
        alive.partition(|s| controller_of(*s).is_some_and(|(_, kind, _)| kind == "SandboxClaim"));
    same("claimed", &claimed.len(), &CLAIMS)?;
    same("in the pool", &pooled.len(), &replicas)
}

async fn make_claims(ns: &Namespace<'_>) -> Result<()> {
    for n in 0..CLAIMS {
        let spec = json!({"spec": {"warmPoolRef": {"name": "p"}}});
        let made = kiln_tests::wait::until("a claim", kiln_tests::wait::SOON, async || {
            match ns
                .try_make::<SandboxClaim>(&format!("c{n}"), spec.clone())
                .await
            {
                Ok(_) => Some(()),
                // It was made, and the answer was lost.
                Err(kube::Error::Api(status)) if status.code == 409 => Some(()),
                Err(_) => None,
            }
        });
        made.await?;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    Ok(())
}

pub(crate) async fn a_controller_that_is_killed_loses_and_doubles_nothing(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 10).await?;
    let mut held = env.controller.lock().await;
    let kill = async {
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let old = held.take().context("no controller")?;
            old.signal(Signal::SIGKILL)?;
            old.ended().await?;
            *held = Some(Controller::start(&env.plane, &FLAGS).await?);
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::try_join!(make_claims(&ns), kill)?;
    all_is_well(&ns, 10).await
}

pub(crate) async fn an_apiserver_that_restarts_is_waited_for(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 10).await?;
    let restart = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        env.plane.restart_apiserver().await
    };
    tokio::try_join!(make_claims(&ns), restart)?;
    all_is_well(&ns, 10).await
}

/// Has upstream's controller lead for a while, as it writes that (client-go
/// `tools/leaderelection/resourcelock/leaselock.go`). Returns since when.
async fn lease_of_upstream(env: &Env) -> Result<Instant> {
    let now = MicroTime(Timestamp::now());
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some("a3317529.agent-sandbox.x-k8s.io".to_owned()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some("agent-sandbox-controller-0_upstream".to_owned()),
            lease_duration_seconds: Some(i32::try_from(UPSTREAM_LEADS.as_secs())?),
            acquire_time: Some(now.clone()),
            renew_time: Some(now),
            lease_transitions: Some(1),
            ..LeaseSpec::default()
        }),
    };
    let since = Instant::now();
    let leases: Api<Lease> = Api::namespaced(env.plane.client(), account::NAMESPACE);
    leases.create(&PostParams::default(), &lease).await?;
    Ok(since)
}

pub(crate) async fn two_controllers_take_turns(env: &Env) -> Result<()> {
    let mut held = env.controller.lock().await;
    let alone = held.take().context("no controller")?;
    alone.signal(Signal::SIGTERM)?;
    ensure!(
        alone.ended().await?.success(),
        "a controller that is told to end ends well"
    );
    let elect = [
        "--leader-elect=true",
        "--leader-election-namespace=agent-sandbox-system",
    ];
    let upstream = lease_of_upstream(env).await?;
    let first = Controller::start(&env.plane, &elect).await?;
    let ns = env.namespace().await?;
    ns.sandbox("one", json!({})).await?;
    ns.until_condition::<Sandbox>("one", "Ready", "True")
        .await?;
    let waited = upstream.elapsed();
    ensure!(
        waited > UPSTREAM_LEADS,
        "led beside upstream's, after {waited:?}"
    );
    let second = Controller::start(&env.plane, &elect).await?;
    ns.sandbox("two", json!({})).await?;
    ns.until_condition::<Sandbox>("two", "Ready", "True")
        .await?;
    ensure!(!second.log().contains("leading"), "both lead");
    first.signal(Signal::SIGTERM)?;
    ensure!(first.ended().await?.success());
    ns.sandbox("three", json!({})).await?;
    ns.until_condition::<Sandbox>("three", "Ready", "True")
        .await?;
    ensure!(second.log().contains("leading"));
    drop(second);
    *held = Some(Controller::start(&env.plane, &FLAGS).await?);
    Ok(())
}
