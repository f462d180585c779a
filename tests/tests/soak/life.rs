// SPDX-License-Identifier: Apache-2.0

//! Lives of Pods.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    dice::{Deck, Dice},
    pod::{Container, GUEST, Pod},
    wait,
};

use crate::Run;

/// How long a Pod may take to go: containerd refuses while it finds out what has died.
const REMOVAL: Duration = Duration::from_secs(60);

/// Bytes of a container's memory limit, and more than that.
const LIMIT: i64 = 96 << 20;
const TOO_MUCH: &str = "400000000";

/// What a Pod does, or what is done to it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Idles,
    RunsCommands,
    HasContainers,
    IsBusy,
    IsProbed,
    EatsMemory,
    LosesItsShim,
    LosesItsSentry,
}

pub(crate) const KINDS: [Kind; 8] = [
    Kind::Idles,
    Kind::RunsCommands,
    Kind::HasContainers,
    Kind::IsBusy,
    Kind::IsProbed,
    Kind::EatsMemory,
    Kind::LosesItsShim,
    Kind::LosesItsSentry,
];

/// One Pod after the other until the run is over.
pub(crate) async fn pods(run: &Run<'_>, mut dice: Dice) -> Result<()> {
    let mut kinds = Deck::new(&KINDS);
    let mut handlers = Deck::new(&["gvisor", "gvisor-warm", "gvisor-warm"]);
    while !run.is_over() {
        let (kind, handler) = (*kinds.draw(&mut dice), *handlers.draw(&mut dice));
        let lived = pod(run, &mut dice, kind, handler).await;
        lived.with_context(|| format!("a Pod of {handler} that {kind:?}"))?;
        run.count(&format!("{kind:?}"));
    }
    Ok(())
}

async fn pod(run: &Run<'_>, dice: &mut Dice, kind: Kind, handler: &str) -> Result<()> {
    let turn = run.containerd.read().await;
    let pod = run.node.pod(handler).run_cold_or_warm().await?;
    let sandbox = pod.sandbox();
    if sandbox == *pod.id() {
        run.count("cold");
    } else {
        run.adopts(&sandbox)?;
        run.count("adopted");
    }
    let container = pod.idle().start().await?;
    // What a Pod before has left would be here, were a sandbox used again.
    let found = container
        .sh("cat /tmp/token /dev/shm/token 2>/dev/null; true")
        .await?;
    ensure!(found.is_empty(), "somebody has left {found:?}");
    container
        .sh(&format!(
            "for d in /tmp /dev/shm; do echo {} > $d/token; done",
            pod.id()
        ))
        .await?;
    drop(turn);
    let survives = act(run, dice, kind, &pod, &container).await?;
    if survives {
        let _turn = run.containerd.read().await;
        let mine = container.sh("cat /tmp/token /dev/shm/token").await?;
        ensure!(mine == format!("{0}\n{0}\n", pod.id()), "it has {mine:?}");
    }
    remove(run, &pod).await?;
    run.node.expect_gone(pod.id()).await?;
    run.node.expect_gone(&sandbox).await
}

/// Does what a Pod of this kind does, and returns whether it still runs.
async fn act(
    run: &Run<'_>,
    dice: &mut Dice,
    kind: Kind,
    pod: &Pod<'_>,
    container: &Container<'_, '_>,
) -> Result<bool> {
    match kind {
        Kind::Idles => tokio::time::sleep(dice.millis(3000)).await,
        Kind::RunsCommands => run_commands(run, dice, container).await?,
        Kind::HasContainers => have_containers(run, dice, pod).await?,
        Kind::IsBusy => {
            let turn = run.containerd.read().await;
            let busy = pod.container(["burn", "2"]).image(GUEST).cpu(500);
            let busy = busy.start().await?;
            let restarts = run.restarts();
            drop(turn);
            run.expect_code(&busy, 0, restarts).await?;
        }
        Kind::IsProbed => {
            for _ in 0..1 + dice.below(10) {
                let turn = run.containerd.read().await;
                container.sh("true").await?;
                container.stats().await?;
                drop(turn);
                tokio::time::sleep(dice.millis(300)).await;
            }
        }
        Kind::EatsMemory => return eat(run, pod, container).await.map(|()| false),
        Kind::LosesItsShim | Kind::LosesItsSentry => {
            tokio::time::sleep(dice.millis(500)).await;
            let victim = match kind {
                Kind::LosesItsShim => Some(pod.shim()?),
                _ => pod.runtime_processes("runsc-sandbox").pop(),
            };
            victim.context("nobody to kill")?.kill().await?;
            let ended = container.ended().await?;
            ensure!(ended.exit_code != 0, "{ended:?}");
            return Ok(false);
        }
    }
    Ok(true)
}

async fn run_commands(run: &Run<'_>, dice: &mut Dice, container: &Container<'_, '_>) -> Result<()> {
    for n in 0..1 + dice.below(12) {
        let code = i32::try_from(dice.below(100))?;
        let script = format!("echo {n}; exit {code}");
        let _turn = run.containerd.read().await;
        let ran = container.exec(["sh", "-c", &script]).await?;
        ensure!(
            ran.code == code && ran.stdout == format!("{n}\n"),
            "{script}: {ran:?}"
        );
    }
    Ok(())
}

/// Containers that come, some that end by themselves, and some that are stopped.
async fn have_containers(run: &Run<'_>, dice: &mut Dice, pod: &Pod<'_>) -> Result<()> {
    for n in 0..1 + dice.below(4) {
        let code = i32::try_from(1 + dice.below(100))?;
        let turn = run.containerd.read().await;
        let ends = pod
            .script(&format!("echo {n}; exit {code}"))
            .start()
            .await?;
        let stays = pod.idle().start().await?;
        let restarts = run.restarts();
        drop(turn);
        run.expect_code(&ends, code, restarts).await?;
        ends.logged(&format!("{n}\n")).await?;
        let _turn = run.containerd.read().await;
        stays.stop(0).await?;
        ensure!(stays.exit_code().await? == 137);
        if dice.below(2) == 0 {
            stays.remove().await?;
        }
    }
    Ok(())
}

/// Its own limit ends the whole Pod.
async fn eat(run: &Run<'_>, pod: &Pod<'_>, unlimited: &Container<'_, '_>) -> Result<()> {
    let turn = run.containerd.read().await;
    // It has no limit, and a Pod has one where all of its containers have.
    unlimited.stop(0).await?;
    unlimited.remove().await?;
    let eater = pod.container(["eat", TOO_MUCH]).image(GUEST).memory(LIMIT);
    let eater = eater.create().await?;
    let started = eater.start().await;
    let restarts = run.restarts();
    drop(turn);
    match started {
        Ok(()) => run.expect_code(&eater, 137, restarts).await,
        // It may be killed before the runtime has said that it runs.
        Err(_) if pod.runtime_processes("runsc-sandbox").is_empty() => Ok(()),
        Err(e) => Err(e),
    }
}

async fn remove(run: &Run<'_>, pod: &Pod<'_>) -> Result<()> {
    let mut last = None;
    let removed = wait::until("removal of the Pod", REMOVAL, async || {
        let _turn = run.containerd.read().await;
        last = run.node.remove_pod(pod.id()).await.err();
        last.is_none().then_some(())
    });
    removed.await.with_context(|| format!("{last:?}"))
}
