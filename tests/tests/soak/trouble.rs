// SPDX-License-Identifier: Apache-2.0

//! What goes wrong on the node while Pods come and go.

use std::{sync::atomic::Ordering, time::Duration};

use anyhow::{Context, Result};
use kiln_tests::dice::{Deck, Dice};
use nix::sys::signal::Signal;

use crate::Run;

/// Who ends, and how.
enum Trouble {
    Agent(&'static str, Signal),
    Containerd(&'static str, Signal),
}

const TROUBLES: [Trouble; 4] = [
    Trouble::Agent("agent killed", Signal::SIGKILL),
    Trouble::Agent("agent restarted", Signal::SIGTERM),
    Trouble::Containerd("containerd killed", Signal::SIGKILL),
    Trouble::Containerd("containerd restarted", Signal::SIGTERM),
];

/// The troubles by the names under which they are counted.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    TROUBLES.iter().map(|t| match t {
        Trouble::Agent(name, _) | Trouble::Containerd(name, _) => *name,
    })
}

/// Makes trouble from time to time until the run is over.
pub(crate) async fn make(run: &Run<'_>, mut dice: Dice) -> Result<()> {
    let mut deck = Deck::new(&TROUBLES);
    loop {
        tokio::time::sleep(Duration::from_secs(4) + dice.millis(8000)).await;
        if run.is_over() {
            return Ok(());
        }
        match deck.draw(&mut dice) {
            Trouble::Agent(..) if run.is_calm() => {}
            Trouble::Agent(name, signal) => {
                let agent = run.node.agent()?;
                agent.stop(*signal).await.context(*name)?;
                tokio::time::sleep(dice.millis(2000)).await;
                run.node.run_agent().await.context(*name)?;
                run.count(name);
            }
            Trouble::Containerd(name, signal) => {
                let _nobody_calls = run.containerd.write().await;
                run.restarts.fetch_add(1, Ordering::Relaxed);
                run.node.restart_containerd(*signal).await.context(*name)?;
                run.count(name);
            }
        }
    }
}
