// SPDX-License-Identifier: Apache-2.0

//! Claims, Sandboxes and pools that come and go at random for `$SOAK_SECONDS` (one minute), while
//! controllers are killed: nobody gets what is another's, nothing is left, and the controller does
//! not grow.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use k8s_openapi::api::core::v1::{Pod, Service};
use kiln_cluster::controller::Controller;
use kiln_crds::{Sandbox, SandboxClaim, SandboxTemplate, SandboxWarmPool, keys};
use kiln_tests::{
    dice::{self, Deck, Dice, say},
    memory::warm_and_last,
    wait,
};
use kube::ResourceExt;
use nix::sys::signal::Signal;
use serde_json::json;
use tokio::{sync::Mutex, time::sleep};

use crate::env::{Env, FLAGS, Kind, Namespace};

/// Lives of objects at a time.
const WORKERS: u64 = 3;

/// Bytes by which the controller may be larger at the end than when it was warm, however long the
/// run.
const GROWTH: u64 = 4 << 20;

/// Pause between two looks at its memory.
const LOOK: Duration = Duration::from_millis(500);

/// Looks that it takes at least to see growth: a run in which controllers took long to start is
/// longer.
const LOOKS: usize = 40;

/// Time of a run.
pub(crate) fn time() -> Duration {
    dice::time(Duration::from_secs(60))
}

/// What comes and goes.
#[derive(Debug, Clone, Copy)]
enum Life {
    Claim,
    ClaimThatLosesItsPod,
    ClaimWithEnv,
    Sandbox,
    SuspendedSandbox,
    ScaledPool,
}

const LIVES: [Life; 6] = [
    Life::Claim,
    Life::ClaimThatLosesItsPod,
    Life::ClaimWithEnv,
    Life::Sandbox,
    Life::SuspendedSandbox,
    Life::ScaledPool,
];

/// A run, which its tasks share.
struct Run<'e> {
    ns: Namespace<'e>,
    begun: Instant,
    time: Duration,
    /// Whether the controller's memory was looked at often enough.
    is_seen: AtomicBool,
    /// Sandboxes that claims have had.
    claimed: Mutex<BTreeSet<String>>,
}

impl Run<'_> {
    fn is_over(&self) -> bool {
        self.begun.elapsed() >= self.time && self.is_seen.load(Ordering::Relaxed)
    }

    /// Whether this is the half in which the controller is left alone, so that its growth can be
    /// seen.
    fn is_calm(&self) -> bool {
        self.begun.elapsed() >= self.time / 2
    }
}

pub(crate) async fn claims_come_and_go_while_controllers_are_killed(env: &Env) -> Result<()> {
    let seed = dice::seed();
    let words = format!("SOAK_SEED={seed} SOAK_SECONDS={}", time().as_secs());
    say(&words);
    soak(env, seed).await.context(words)
}

async fn soak(env: &Env, seed: u64) -> Result<()> {
    let run = Run {
        ns: env.namespace().await?,
        begun: Instant::now(),
        time: time(),
        is_seen: AtomicBool::new(false),
        claimed: Mutex::default(),
    };
    run.ns
        .template("t", json!({"envVarsInjectionPolicy": "Allowed"}))
        .await?;
    run.ns.pool("p", "t", 6).await?;
    run.ns.pool("other", "t", 1).await?;
    let lives = (0..WORKERS).map(|n| lives(&run, n, Dice::new(seed ^ (n + 1))));
    let (counts, grown) = tokio::try_join!(try_join_all(lives), trouble(&run, Dice::new(seed)))?;
    say(&format!(
        "{} objects came and went, {} Sandboxes were claimed\n{grown}",
        counts.iter().sum::<u64>(),
        run.claimed.lock().await.len(),
    ));
    for pool in ["p", "other"] {
        run.ns.delete::<SandboxWarmPool>(pool).await?;
    }
    run.ns.delete::<SandboxTemplate>("t").await?;
    expect_none::<Sandbox>(&run.ns).await?;
    expect_none::<SandboxClaim>(&run.ns).await?;
    expect_none::<Pod>(&run.ns).await?;
    expect_none::<Service>(&run.ns).await
}

async fn expect_none<K: Kind>(ns: &Namespace<'_>) -> Result<()> {
    let what = format!("the end of every {}", K::kind(&()));
    let mut left = Vec::new();
    let gone = wait::until(&what, wait::SOON, async || {
        left = ns.list::<K>().await.ok()?;
        left.is_empty().then_some(())
    });
    gone.await.with_context(|| format!("{left:#?}"))
}

/// One object after the other until the run is over; how many they were.
async fn lives(run: &Run<'_>, worker: u64, mut dice: Dice) -> Result<u64> {
    let mut deck = Deck::new(&LIVES);
    let mut n = 0;
    while !run.is_over() {
        let life = *deck.draw(&mut dice);
        let name = format!("w{worker}-{n}");
        let lived = match life {
            Life::ScaledPool => scale(run, &mut dice).await,
            Life::Sandbox | Life::SuspendedSandbox => sandbox(run, life, &name).await,
            _ => claim(run, life, &name).await,
        };
        lived.with_context(|| format!("{name}, a {life:?}"))?;
        sleep(dice.millis(300)).await;
        n += 1;
    }
    Ok(n)
}

async fn claim(run: &Run<'_>, life: Life, name: &str) -> Result<()> {
    let ns = &run.ns;
    let mut spec = json!({"warmPoolRef": {"name": "p"}});
    if matches!(life, Life::ClaimWithEnv) {
        spec["env"] = json!([{"name": "WHO", "value": name}]);
    }
    ns.claim_with(name, spec).await?;
    let mine = ns.claimed(name).await?;
    let uid = mine.uid().context("a Sandbox without a uid")?;
    ensure!(
        run.claimed.lock().await.insert(uid.clone()),
        "{} was another's",
        mine.name_any()
    );
    if matches!(life, Life::ClaimThatLosesItsPod) {
        let pod = mine.annotations().get(keys::POD_NAME);
        let pod = pod.cloned().unwrap_or_else(|| mine.name_any());
        let old: Pod = ns.get(&pod).await?;
        ns.delete::<Pod>(&pod).await?;
        ns.until(&pod, "another Pod", |now: &Pod| {
            (now.uid() != old.uid()).then_some(())
        })
        .await?;
        let still = ns.claimed(name).await?;
        ensure!(still.uid() == Some(uid), "the claim has another Sandbox");
    }
    ns.delete::<SandboxClaim>(name).await?;
    ns.until_gone::<SandboxClaim>(name).await?;
    ns.until_gone::<Sandbox>(&mine.name_any()).await
}

async fn sandbox(run: &Run<'_>, life: Life, name: &str) -> Result<()> {
    let ns = &run.ns;
    ns.sandbox(name, json!({"service": true})).await?;
    ns.until_condition::<Sandbox>(name, "Ready", "True").await?;
    if matches!(life, Life::SuspendedSandbox) {
        for (replicas, ready) in [(0, "False"), (1, "True")] {
            ns.patch::<Sandbox>(name, json!({"spec": {"replicas": replicas}}))
                .await?;
            ns.until_condition::<Sandbox>(name, "Ready", ready).await?;
        }
    }
    ns.delete::<Sandbox>(name).await?;
    ns.until_gone::<Sandbox>(name).await?;
    ns.until_gone::<Pod>(name).await
}

async fn scale(run: &Run<'_>, dice: &mut Dice) -> Result<()> {
    let replicas = dice.below(5);
    let spec = json!({"spec": {"replicas": replicas}});
    run.ns.patch::<SandboxWarmPool>("other", spec).await?;
    Ok(())
}

/// Ends controllers while the run is not calm, then watches the last one's memory.
async fn trouble(run: &Run<'_>, mut dice: Dice) -> Result<String> {
    let mut held = run.ns.env.controller.lock().await;
    let mut ends = Deck::new(&[Signal::SIGKILL, Signal::SIGTERM]);
    while !run.is_calm() {
        sleep(Duration::from_secs(2) + dice.millis(4000)).await;
        let old = held.take().context("no controller")?;
        old.signal(*ends.draw(&mut dice))?;
        old.ended().await?;
        *held = Some(Controller::start(&run.ns.env.plane, &FLAGS).await?);
    }
    let controller = held.as_ref().context("no controller")?;
    let mut samples = Vec::new();
    while !run.is_over() {
        samples.push(controller.memory()?);
        run.is_seen.store(samples.len() >= LOOKS, Ordering::Relaxed);
        sleep(LOOK).await;
    }
    steady(&samples)
}

/// Compares what it had when it was warm with the end.
fn steady(samples: &[u64]) -> Result<String> {
    let (warm, last) = warm_and_last(samples)?;
    let words = format!(
        "controller: {} KiB when warm, {} at the end, {} samples",
        warm >> 10,
        last >> 10,
        samples.len()
    );
    ensure!(last <= warm + GROWTH, "{words}");
    Ok(words)
}
