// SPDX-License-Identifier: Apache-2.0

//! Pods of all kinds, made and removed at random for `$SOAK_SECONDS` (two minutes), while agent,
//! shims, sentries and containerd are killed and come back. No Pod is lost or served what was
//! another's, nothing is left of any, and neither shim nor agent grows.
//!
//! `$SOAK_SEED` repeats the choices of a run; what meets what is up to the machine.

mod life;
mod memory;
mod trouble;

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{
    agent::holding,
    dice::{self, Dice, say},
    node::{Node, NodeOpts},
    pod::Container,
    suite::Cases,
};
use tokio::sync::RwLock;

/// How many sandboxes the agent of the node holds.
const HELD: u32 = 4;

/// Lives of Pods at a time.
const WORKERS: u64 = 3;

/// What CRI says of a container whose end nobody knows (`unknownExitCode` of containerd).
const UNKNOWN: i32 = 255;

/// How long after the end of a run the last Pods may take to go.
const TAIL: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let time = dice::time(Duration::from_secs(120));
    let mut cases = Cases::<Node>::new().limit(time + TAIL);
    cases.add_alone("pods_come_and_go_while_things_break", async move |node| {
        let seed = dice::seed();
        say(&format!("SOAK_SEED={seed} SOAK_SECONDS={}", time.as_secs()));
        let ran = soak(node, time, seed).await;
        ran.with_context(|| format!("with SOAK_SEED={seed}"))
    });
    cases.run(|| {
        Node::start(NodeOpts {
            agent: Some(holding(HELD, 8)),
            ..NodeOpts::default()
        })
    })
}

/// A run, which its tasks share.
struct Run<'n> {
    node: &'n Node,
    begun: Instant,
    time: Duration,
    /// Read by who calls containerd, written by who restarts it: a call that was cut off says
    /// nothing about the Pod.
    containerd: RwLock<()>,
    /// How often containerd has come back.
    restarts: AtomicU32,
    /// Sandboxes that have become a Pod.
    adopted: Mutex<BTreeSet<String>>,
    counts: Mutex<BTreeMap<String, u32>>,
}

impl Run<'_> {
    fn is_over(&self) -> bool {
        self.begun.elapsed() >= self.time
    }

    /// Whether this is the half in which the agent is left alone, so that its growth can be seen.
    fn is_calm(&self) -> bool {
        self.begun.elapsed() >= self.time / 2
    }

    fn count(&self, what: &str) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what.to_owned()).or_default() += 1;
    }

    /// How often containerd has come back so far.
    fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Waits until a container ends with `code`. A containerd that dies when it has deleted the
    /// task, and before it has noted its code, says afterwards that it does not know
    /// (`internal/cri/server/restart.go`): that may be if it has come back since it was `restarts`.
    async fn expect_code(
        &self,
        container: &Container<'_, '_>,
        code: i32,
        restarts: u32,
    ) -> Result<()> {
        let ended = container.exit_code().await?;
        let is_forgotten = ended == UNKNOWN && self.restarts() > restarts;
        ensure!(ended == code || is_forgotten, "{ended} instead of {code}");
        Ok(())
    }

    /// Notes that a Pod runs in a sandbox that was booted ahead.
    fn adopts(&self, sandbox: &str) -> Result<()> {
        let mut all = self.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(
            all.insert(sandbox.to_owned()),
            "{sandbox} serves a second Pod"
        );
        Ok(())
    }
}

async fn soak(node: &Node, time: Duration, seed: u64) -> Result<()> {
    node.agent()?.expect_some().await?;
    let run = Run {
        node,
        begun: Instant::now(),
        time,
        containerd: RwLock::default(),
        restarts: AtomicU32::default(),
        adopted: Mutex::default(),
        counts: Mutex::default(),
    };
    let lives = (0..WORKERS).map(|n| life::pods(&run, Dice::new(seed ^ (n + 1))));
    let (_, (), grown) = tokio::try_join!(
        try_join_all(lives),
        trouble::make(&run, Dice::new(seed)),
        memory::watch(&run),
    )?;
    let counts = run
        .counts
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    for (what, count) in &counts {
        say(&format!("{count:6} {what}"));
    }
    say(&grown);
    for what in life::KINDS.iter().map(|k| format!("{k:?}")) {
        ensure!(counts.contains_key(&what), "no Pod was {what}");
    }
    for what in ["adopted", "cold"].into_iter().chain(trouble::names()) {
        ensure!(counts.contains_key(what), "never {what}");
    }
    Ok(())
}
