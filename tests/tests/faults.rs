// SPDX-License-Identifier: Apache-2.0

//! Processes that are killed at every step of a Pod's life: the shim, the sentry, a gofer, and
//! containerd itself. Whatever is killed, containerd can take the Pod away, nothing is left of
//! it, and the next Pod runs; and a containerd that comes back finds its Pods as they were.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{
    agent::holding,
    cri::v1,
    node::{Node, NodeOpts, WARM},
    pod::{Container, Pod},
    process::{Proc, signal_to},
    suite::Cases,
    wait,
};
use nix::sys::signal::Signal;
use tokio::sync::Barrier;

/// How long a Pod may take to go whose processes were killed.
const REMOVAL: Duration = Duration::from_secs(60);

const HANDLERS: [&str; 3] = ["gvisor", "gvisor-cli", WARM];

/// What is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Shim,
    Sentry,
    /// The gofer of the Pod's own root file system.
    PodGofer,
    /// The gofer of a container.
    Gofer,
}

/// When it is killed.
#[derive(Debug, Clone, Copy)]
enum Step {
    PodRuns,
    ContainerCreated,
    ContainerRuns,
    ExecRuns,
    ContainerStops,
    PodStops,
}

const STEPS: [Step; 6] = [
    Step::PodRuns,
    Step::ContainerCreated,
    Step::ContainerRuns,
    Step::ExecRuns,
    Step::ContainerStops,
    Step::PodStops,
];

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new().at_a_time(4);
    let all = [
        Victim::Shim,
        Victim::Sentry,
        Victim::PodGofer,
        Victim::Gofer,
    ];
    for handler in HANDLERS {
        for victim in all {
            for step in STEPS {
                if matches!(
                    (victim, step),
                    (Victim::Gofer, Step::PodRuns | Step::ContainerCreated)
                ) {
                    continue; // it is made by the start
                }
                let name = format!("{handler}::{victim:?}_is_killed_when_{step:?}");
                cases.add(name, async move |node: &Node| {
                    kill(node, handler, victim, step).await
                });
            }
        }
    }
    cases.add_alone(
        "pods_outlive_containerd_that_is_told_to_end",
        async |node| {
            // Long enough that a reader who came back late would have missed ticks.
            let outage = Outage::new(Signal::SIGTERM, Duration::from_secs(3));
            outage.during(node, pod_outlives_containerd).await
        },
    );
    cases.add_alone("pods_outlive_containerd_that_is_killed", async |node| {
        let outage = Outage::new(Signal::SIGKILL, Duration::from_secs(3));
        outage.during(node, pod_outlives_containerd).await
    });
    cases.add_alone("exits_without_containerd_are_known_later", async |node| {
        let outage = Outage::new(Signal::SIGKILL, Duration::from_secs(4));
        outage.during(node, exit_is_known_later).await
    });
    cases.add_alone("shims_that_die_without_containerd", async |node| {
        let outage = Outage::new(Signal::SIGKILL, Duration::from_millis(500));
        outage.during(node, shim_dies).await
    });
    cases.add_alone(
        "a_shim_that_is_too_slow_for_containerd_ends",
        a_shim_that_is_too_slow_for_containerd_ends,
    );
    let opts = || NodeOpts {
        agent: Some(holding(6, 16)),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}

/// The process to be killed. A Pod that has adopted has no gofer of its own where the agent was
/// late with it; then it is that of its `first` container.
fn find(
    pod: &Pod<'_>,
    first: &Container<'_, '_>,
    container: Option<&Container<'_, '_>>,
    victim: Victim,
) -> Result<Proc> {
    let gofer_of = |id: &str| {
        let mut all = pod.node().processes().into_iter();
        all.rfind(|p| p.argv.starts_with("runsc-gofer") && p.argv.contains(id))
    };
    let found = match (victim, container) {
        (Victim::Shim, _) => Some(pod.shim()?),
        (Victim::Sentry, _) => Some(pod.sentry()?),
        (Victim::PodGofer, _) => gofer_of(&pod.sandbox()).or_else(|| gofer_of(first.id())),
        (Victim::Gofer, Some(container)) => gofer_of(container.id()),
        (Victim::Gofer, None) => None,
    };
    found.with_context(|| format!("there is no {victim:?}"))
}

async fn kill(node: &Node, handler: &str, victim: Victim, step: Step) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    // Another container, so that there is more than one to be cleaned up.
    let other = pod.idle().start().await?;
    if matches!(step, Step::PodRuns) {
        find(&pod, &other, None, victim)?.kill().await?;
        return removed(node, handler, pod).await;
    }
    let container = pod
        .script("echo ready; trap '' TERM; while :; do sleep 1; done")
        .create()
        .await?;
    if matches!(step, Step::ContainerCreated) {
        find(&pod, &other, Some(&container), victim)?.kill().await?;
        return removed(node, handler, pod).await;
    }
    container.start().await?;
    container.logged("ready").await?;
    let target = find(&pod, &other, Some(&container), victim)?;
    match step {
        Step::PodRuns | Step::ContainerCreated => {}
        Step::ContainerRuns => target.kill().await?,
        Step::ExecRuns => {
            let exec = container.exec(["sleep", "600"]);
            let (exec, killed) = tokio::join!(exec, async {
                tokio::time::sleep(Duration::from_millis(500)).await;
                target.kill().await
            });
            killed?;
            // It ends, one way or the other, and does not hang until its own deadline.
            ensure!(exec.as_ref().map_or(true, |ran| ran.code != 0), "{exec:?}");
        }
        Step::ContainerStops => {
            let (_, killed) = tokio::join!(container.stop(5), async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                target.kill().await
            });
            killed?;
        }
        Step::PodStops => {
            let (_, killed) = tokio::join!(pod.stop(), async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                target.kill().await
            });
            killed?;
        }
    }
    if !matches!(victim, Victim::Gofer | Victim::PodGofer) {
        let status = container.ended().await?;
        ensure!(status.exit_code != 0, "{status:?}");
        let status = other.ended().await?;
        ensure!(status.exit_code != 0, "{status:?}");
    }
    removed(node, handler, pod).await
}

/// The Pod can be removed in time without a trace, and the next one runs.
async fn removed(node: &Node, handler: &str, pod: Pod<'_>) -> Result<()> {
    let sandbox = pod.sandbox();
    let mut last = None;
    // A kubelet tries again too: containerd refuses while it is finding out what has died.
    let removed = wait::until("removal of the Pod", REMOVAL, async || {
        last = node.remove_pod(pod.id()).await.err();
        last.is_none().then_some(())
    });
    removed.await.with_context(|| format!("{last:?}"))?;
    node.expect_gone(pod.id()).await?;
    node.expect_gone(&sandbox).await?;
    let next = node.pod(handler).run().await.context("the next Pod")?;
    let container = next
        .script("echo fine")
        .start()
        .await
        .context("the next Pod's container")?;
    ensure!(container.exit_code().await? == 0);
    container.logged("fine").await?;
    next.remove().await
}

/// A time without containerd, which Pods of all handlers live through at once.
struct Outage {
    signal: Signal,
    time: Duration,
    /// Pods and outage wait for each other: all are up, containerd is gone, it is back.
    barrier: Barrier,
}

impl Outage {
    /// `signal` ends containerd, which comes back after `time`.
    fn new(signal: Signal, time: Duration) -> Self {
        Self {
            signal,
            time,
            barrier: Barrier::new(HANDLERS.len() + 1),
        }
    }

    async fn during<'n, F>(
        &'n self,
        node: &'n Node,
        life: impl Fn(&'n Node, &'n str, &'n Self) -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>> + 'n,
    {
        let lives = HANDLERS.map(|handler| {
            let life = life(node, handler, self);
            async move { life.await.with_context(|| handler.to_owned()) }
        });
        let outage = async {
            self.barrier.wait().await;
            node.stop_containerd(self.signal).await?;
            self.barrier.wait().await;
            tokio::time::sleep(self.time).await;
            node.start_containerd().await?;
            self.barrier.wait().await;
            Ok(())
        };
        tokio::try_join!(try_join_all(lives), outage).map(drop)
    }

    /// Waits until containerd is gone.
    async fn begins(&self) {
        self.barrier.wait().await;
        self.barrier.wait().await;
    }

    /// Waits until it is back.
    async fn ends(&self) {
        self.barrier.wait().await;
    }
}

async fn pod_outlives_containerd(node: &Node, handler: &str, outage: &Outage) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.2; done")
        .start()
        .await?;
    container.logged("tick 3\n").await?;
    let shim = pod.shim()?;
    let stats = container.stats().await?;
    outage.begins().await;
    outage.ends().await;
    ensure!(pod.shim()? == shim, "another shim serves the Pod");
    ensure!(container.is_running().await?);
    let ticks = container.log().lines().count();
    wait::until_true("more ticks", wait::SOON, || {
        container.log().lines().count() > ticks + 5
    })
    .await?;
    // What was written meanwhile waited in the FIFO.
    let log = container.log();
    let numbers: Vec<u64> = log
        .lines()
        .filter_map(|l| l.strip_prefix("tick ")?.parse().ok())
        .collect();
    ensure!(
        numbers.windows(2).all(|w| w[1] == w[0] + 1),
        "a gap in {numbers:?}"
    );
    ensure!(container.sh("echo still here").await? == "still here\n");
    let cpu = |s: v1::ContainerStats| {
        s.cpu
            .and_then(|c| c.usage_core_nano_seconds)
            .map(|n| n.value)
    };
    ensure!(cpu(container.stats().await?) >= cpu(stats));
    let second = pod.script("echo second").start().await?;
    ensure!(second.exit_code().await? == 0);
    container.stop(0).await?;
    ensure!(container.exit_code().await? == 137);
    pod.remove().await
}

async fn exit_is_known_later(node: &Node, handler: &str, outage: &Outage) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("sleep 3; echo last words; exit 9")
        .start()
        .await?;
    outage.begins().await;
    outage.ends().await;
    let status = container.ended().await?;
    ensure!(status.exit_code == 9, "{status:?}");
    container.logged("last words").await?;
    pod.remove().await
}

async fn shim_dies(node: &Node, handler: &str, outage: &Outage) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let shim = pod.shim()?;
    outage.begins().await;
    signal_to(shim.pid, Signal::SIGKILL)?;
    outage.ends().await;
    let status = container.ended().await?;
    ensure!(status.exit_code != 0, "{status:?}");
    removed(node, handler, pod).await
}

/// containerd waits five seconds for a shim when it comes back, and then has it for dead.
async fn a_shim_that_is_too_slow_for_containerd_ends(node: &Node) -> Result<()> {
    let pod = node.pod(WARM).run().await?;
    let container = pod.idle().start().await?;
    let shim = pod.shim()?;
    signal_to(shim.pid, Signal::SIGSTOP)?;
    node.restart_containerd(Signal::SIGKILL).await?;
    signal_to(shim.pid, Signal::SIGCONT)?;
    let status = container.ended().await?;
    ensure!(status.exit_code != 0, "{status:?}");
    removed(node, WARM, pod).await
}
