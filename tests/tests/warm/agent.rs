// SPDX-License-Identifier: Apache-2.0

//! Agents, shims and sandboxes that die, hang or are flooded: every Pod runs, none twice, and
//! nothing is left.

use std::{
    collections::BTreeSet,
    fs, io,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::future::join_all;
use kiln_agent_api::{AgentError, Shape};
use kiln_tests::{
    mounts,
    node::Node,
    pod::Pod,
    process::{Proc, signal_to},
    wait::{self, SOON},
};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};

use crate::{HANDLER, WARM};

/// The sentries of the agent's sandboxes that are no Pod's.
pub(crate) fn warm_sentries(node: &Node) -> Vec<Proc> {
    let all = node.processes().into_iter();
    all.filter(|p| p.argv.starts_with("runsc-sandbox") && p.argv.contains("warm-"))
        .collect()
}

/// The same when no sandbox is on its way from one state to another.
pub(crate) async fn settled(node: &Node) -> Result<Vec<Proc>> {
    let agent = node.agent()?;
    // Each has a file in one of these (`node-agent/src/warm/store.rs`).
    let is_empty = |place: &str| {
        let files = fs::read_dir(agent.state().join(place));
        files.into_iter().flatten().next().is_none()
    };
    let are_empty = || ["booting", "handed", "doomed"].into_iter().all(is_empty);
    let settled = wait::until_true("sandboxes to settle", SOON, are_empty);
    settled.await.with_context(|| agent.log())?;
    Ok(warm_sentries(node))
}

/// The sandbox of a sentry, the last word of its arguments.
fn sandbox_of(sentry: &Proc) -> Result<&str> {
    sentry.argv.rsplit(' ').next().context("no id")
}

/// A Pod of the suite runs and answers.
async fn works(pod: &Pod<'_>) -> Result<()> {
    let container = pod.script("echo fine; sleep 3600").start().await?;
    container.logged("fine").await?;
    Ok(())
}

/// A shape of which the agent holds something.
async fn shape(node: &Node) -> Result<Shape> {
    let report = node.agent()?.report().await?;
    let class = report.classes.iter().find(|c| c.class == "gvisor");
    Ok(Shape::from_json(&class.context("no class")?.shape)?)
}

/// An agent that comes back takes up what the one before has left: the same sandboxes, none more.
pub(crate) async fn an_agent_that_is_killed_loses_nothing(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        agent.expect_ready(WARM).await?;
        let pod = node.pod(HANDLER).run().await?;
        agent.expect_ready(WARM).await?;
        let before = warm_sentries(node);
        agent.stop(signal).await?;
        works(&pod).await?;
        node.run_agent().await?;
        agent.expect_ready(WARM).await?;
        let mut after = warm_sentries(node);
        after.retain(|p| before.iter().any(|b| b.pid == p.pid));
        ensure!(
            after.len() > WARM as usize,
            "{before:?}\n{after:?}\n{}",
            agent.log()
        );
        works(&pod).await?;
        pod.remove().await?;
        let next = node.pod(HANDLER).run().await?;
        works(&next).await?;
        next.remove().await?;
    }
    Ok(())
}

/// Without an agent Pods start as they always did.
pub(crate) async fn pods_start_without_an_agent(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.stop(Signal::SIGKILL).await?;
    let pod = node.pod(HANDLER).run_cold_or_warm().await?;
    ensure!(pod.sandbox() == pod.id());
    works(&pod).await?;
    pod.remove().await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await
}

/// An agent that does not answer costs a Pod some milliseconds, and nothing else.
pub(crate) async fn an_agent_that_hangs_costs_no_pod(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let pid = agent.pid().await.context("no agent")?;
    signal_to(pid, Signal::SIGSTOP)?;
    let pod = node.pod(HANDLER).run_cold_or_warm().await;
    signal_to(pid, Signal::SIGCONT)?;
    let pod = pod?;
    ensure!(pod.sandbox() == pod.id());
    works(&pod).await?;
    pod.remove().await?;
    // It has answered too late, to nobody: what it handed out must not stay for ever.
    agent.expect_ready(WARM).await
}

/// An agent that is killed when it has answered, and before the Pod has fetched the gofer of what
/// it got, costs the Pod that gofer: it runs in the sandbox, or in its own.
pub(crate) async fn an_agent_that_dies_after_its_answer_costs_no_pod(node: &Node) -> Result<()> {
    const TRIES: usize = 20;
    let agent = node.agent()?;
    let mut without_gofer = 0;
    for _ in 0..TRIES {
        agent.expect_ready(WARM).await?;
        let before = agent.handed_out();
        let pid = agent.pid().await.context("no agent")?;
        let kill = async {
            let start = Instant::now();
            while agent.handed_out() == before {
                ensure!(start.elapsed() < SOON, "nothing is handed out");
                // An adoption takes some tens of milliseconds.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            signal_to(pid, Signal::SIGKILL)
        };
        let run = node.pod(HANDLER).run_cold_or_warm();
        tokio::pin!(run);
        // Nothing is handed out to a Pod for which the agent is late.
        let pod = tokio::select! {
            pod = &mut run => pod?,
            killed = kill => {
                killed?;
                run.await?
            }
        };
        works(&pod).await?;
        let sandbox = pod.sandbox();
        let in_slots = node.log_lines("is made in slots")?;
        let in_slots = in_slots.iter().any(|line| line.contains(pod.id()));
        if sandbox != pod.id() && !in_slots {
            without_gofer += 1;
        }
        agent.stop(Signal::SIGKILL).await?;
        node.run_agent().await?;
        pod.remove().await?;
        node.expect_gone(&sandbox).await?;
        if without_gofer == 2 {
            break;
        }
    }
    ensure!(without_gofer > 0, "no agent was killed in time");
    agent.expect_ready(WARM).await
}

/// Warm sandboxes that are killed are replaced.
pub(crate) async fn a_sandbox_that_dies_is_replaced(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let victims = warm_sentries(node);
    for victim in &victims {
        signal_to(victim.pid, Signal::SIGKILL)?;
    }
    let held = agent.state().join("ready");
    let look = async || {
        let mut ids = victims.iter().filter_map(|v| sandbox_of(v).ok());
        let left = ids.any(|id| held.join(id).exists());
        (!left && agent.ready().await.ok()? >= WARM).then_some(())
    };
    wait::until("other sandboxes", SOON, look).await?;
    let pod = node.pod(HANDLER).run().await?;
    works(&pod).await?;
    pod.remove().await
}

/// A Pod that is given a sandbox whose sentry has just died starts cold.
pub(crate) async fn a_dead_sandbox_that_is_handed_out_costs_no_pod(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let pid = agent.pid().await.context("no agent")?;
    // Stopped, it cannot notice that they die.
    signal_to(pid, Signal::SIGSTOP)?;
    for victim in warm_sentries(node) {
        signal_to(victim.pid, Signal::SIGKILL)?;
    }
    let pods = async {
        let run = || node.pod(HANDLER).run_cold_or_warm();
        let pods = join_all((0..3).map(|_| run())).await;
        signal_to(pid, Signal::SIGCONT)?;
        pods.into_iter().collect::<Result<Vec<_>>>()
    };
    for pod in pods.await? {
        works(&pod).await?;
        pod.remove().await?;
    }
    agent.expect_ready(WARM).await
}

/// Who asks and takes nothing has it destroyed.
pub(crate) async fn what_is_handed_out_and_not_taken_is_destroyed(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let shape = shape(node).await?;
    let start = Instant::now();
    let warm = loop {
        // What there is may go with answers that are too late.
        agent.expect_some().await?;
        match agent.acquire(&shape, "nobody").await {
            Err(AgentError::None(_)) if start.elapsed() < SOON => {}
            answer => break answer?,
        }
    };
    ensure!(fs::exists(&warm.file)?, "{} is not there", warm.file);
    node.expect_gone(&warm.id).await?;
    ensure!(!fs::exists(&warm.file)?);
    agent.expect_ready(WARM).await
}

/// A shim that is killed at any time around the adoption leaves nothing, and the next Pod runs.
pub(crate) async fn a_shim_that_dies_while_it_adopts_leaves_nothing(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    // Not before containerd is connected: until then it has nobody clean up (`binary.Start` in
    // containerd's `core/runtime/v2/binary.go`), and the shim's socket would stay.
    let connected = || Ok::<_, anyhow::Error>(node.log_lines("connecting to shim")?.len());
    for delay in [10, 15, 20, 30, 40, 60, 90, 150] {
        agent.expect_some().await?;
        let shims = || {
            let all = node.processes().into_iter();
            let shims = all.filter(|p| p.program().starts_with("containerd-shim"));
            // Not what containerd runs to have one started or cleaned up after.
            let serves = |p: &Proc| ![" start", " delete"].iter().any(|a| p.argv.ends_with(a));
            shims.filter(serves).map(|p| p.pid)
        };
        let before: Vec<_> = shims().collect();
        let connections = connected()?;
        let run = node.pod(HANDLER).run_cold_or_warm();
        let kill = async {
            let look = async || {
                let is_connected = connected().is_ok_and(|now| now > connections);
                shims().find(|pid| is_connected && !before.contains(pid))
            };
            let shim = wait::until("a shim", SOON, look).await?;
            tokio::time::sleep(Duration::from_millis(delay)).await;
            signal_to(shim, Signal::SIGKILL)
        };
        let (pod, killed) = tokio::join!(run, kill);
        killed?;
        drop(pod);
    }
    // A kubelet tries again too: containerd refuses while it is finding out what has died.
    let removed = async || node.remove_all_pods().await.ok();
    wait::until("removal of the Pods", SOON, removed).await?;
    let pod = node.pod(HANDLER).run_cold_or_warm().await?;
    works(&pod).await?;
    pod.remove().await?;
    agent.expect_ready(WARM).await?;
    let left = settled(node).await?;
    // Those of shapes that other cases have had learned too.
    let report = agent.report().await?;
    let held: u32 = report.classes.iter().map(|c| c.ready).sum();
    ensure!(left.len() as u32 == held, "{held}: {left:?}");
    Ok(())
}

/// A thousand requests at once, with shapes of all kinds, leave an agent that works.
pub(crate) async fn a_flood_of_requests_is_survived(node: &Node) -> Result<()> {
    const REQUESTS: usize = 1000;
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let shape = shape(node).await?;
    let client = agent.client().await?;
    let ask = async |n: usize| {
        let memory = Some((n as u64 + 1) << 20);
        let shape = shape.clone().with_memory(memory);
        client.acquire(&shape, &format!("flood-{n}")).await
    };
    let answers = join_all((0..REQUESTS).map(&ask)).await;
    let strange = answers.iter().find(|a| {
        !matches!(
            a,
            Err(AgentError::None(_) | AgentError::Timeout(_) | AgentError::Refused(_))
        )
    });
    ensure!(
        strange.is_none(),
        "somebody got a sandbox of a shape that nobody holds"
    );
    let report = agent.report().await?;
    ensure!(
        report.classes.len() < 16,
        "{} shapes are remembered",
        report.classes.len()
    );
    let pid = agent.pid().await.context("no agent")?;
    let agent_process = Proc::find(pid).context("no agent")?;
    let rss = agent_process.status("VmRSS").context("no VmRSS")?;
    ensure!(rss < 40 << 10, "{rss} KiB");
    let pod = node.pod(HANDLER).run().await?;
    works(&pod).await?;
    pod.remove().await
}

/// A runtime that is replaced makes other sandboxes: the old ones are drained, Pods run on.
pub(crate) async fn another_runtime_drains_the_pool(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let pod = node.pod(HANDLER).run().await?;
    agent.expect_ready(WARM).await?;
    let old = warm_sentries(node);
    let config = node.dir().join("gvisor-warm.toml");
    let text = fs::read_to_string(&config)?;
    let changed = text.replace(
        "[runsc_config]\n",
        "[runsc_config]\nwatchdog-action = \"panic\"\n",
    );
    ensure!(changed != text);
    fs::write(&config, &changed)?;
    let look = async || {
        let now = warm_sentries(node);
        let left = old
            .iter()
            .filter(|o| now.iter().any(|n| n.pid == o.pid))
            .count();
        // That of the Pod stays.
        (left == 1 && agent.ready().await.ok()? >= WARM).then_some(())
    };
    let drained = wait::until("other sandboxes", SOON, look).await;
    works(&pod).await?;
    let next = node.pod(HANDLER).run().await?;
    works(&next).await?;
    next.remove().await?;
    pod.remove().await?;
    fs::write(&config, &text)?;
    drained.with_context(|| agent.log())?;
    let look = async || {
        let report = agent.report().await.ok()?;
        let class = report.classes.iter().find(|c| c.class == "gvisor")?;
        (class.shape != changed && !class.shape.contains("panic") && class.ready == WARM)
            .then_some(())
    };
    wait::until("the first runtime's sandboxes", SOON, look).await
}

/// What is ready is still there, and counted once, after a time in which the node's configuration
/// made no sense.
pub(crate) async fn a_runtime_that_fails_for_a_while_keeps_the_pool(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let pids = async || -> Result<BTreeSet<_>> {
        Ok(settled(node).await?.iter().map(|p| p.pid).collect())
    };
    let before = pids().await?;
    let config = node.dir().join("gvisor-warm.toml");
    let text = fs::read_to_string(&config)?;
    let has_problem = async |expected: bool| {
        wait::until("the agent's word on it", SOON, async || {
            let problem = agent.report().await.ok()?.problem;
            (problem.is_empty() != expected).then_some(())
        })
        .await
    };
    for _ in 0..2 {
        fs::write(&config, format!("{text}\n[broken"))?;
        let noticed = has_problem(true).await;
        fs::write(&config, &text)?;
        noticed?;
        has_problem(false).await?;
    }
    agent.expect_ready(WARM).await?;
    let after = pids().await?;
    ensure!(after == before, "{after:?} instead of {before:?}");
    for _ in 0..WARM {
        node.pod(HANDLER).run().await?.remove().await?;
        agent.expect_ready(WARM).await?;
    }
    ensure!(settled(node).await?.len() == before.len());
    Ok(())
}

/// Sandboxes that cannot be adopted after all cost some Pods the try, and then no Pod anything: the
/// agent hands out no more.
pub(crate) async fn adoptions_that_fail_are_given_up(node: &Node) -> Result<()> {
    const FAILURES: u64 = 3;
    const PODS: usize = 10;
    let agent = node.agent()?;
    let failed = agent.report().await?.failed;
    let mut unreachable = Vec::new();
    // No try is lost on a Pod for which the agent is late, though a sandbox may be.
    for _ in 0..PODS {
        agent.expect_ready(WARM).await?;
        // Nobody reaches the sentries any more.
        for sentry in settled(node).await? {
            if unreachable.contains(&sentry) {
                continue;
            }
            let id = sandbox_of(&sentry)?;
            let socket = node.runtime_root(HANDLER).join(format!("runsc-{id}.sock"));
            fs::remove_file(&socket).with_context(|| socket.display().to_string())?;
            unreachable.push(sentry);
        }
        let pod = node.pod(HANDLER).run_cold_or_warm().await?;
        ensure!(pod.sandbox() == pod.id(), "adopted without a socket");
        works(&pod).await?;
        pod.remove().await?;
        if agent.report().await?.failed >= failed + FAILURES {
            break;
        }
    }
    ensure!(agent.report().await?.failed == failed + FAILURES);
    // There are others by now, and they are not handed out.
    agent.expect_some().await?;
    let pod = node.pod(HANDLER).run_cold_or_warm().await?;
    ensure!(
        pod.sandbox() == pod.id(),
        "adopted after {FAILURES} failures"
    );
    pod.remove().await?;
    for left in warm_sentries(node) {
        if unreachable.iter().any(|sentry| sentry.pid == left.pid) {
            signal_to(left.pid, Signal::SIGKILL)?;
        }
    }
    for sentry in &unreachable {
        let id = sandbox_of(sentry)?;
        node.expect_gone(id).await?;
    }
    // Another agent begins anew.
    agent.stop(Signal::SIGTERM).await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await?;
    let next = node.pod(HANDLER).run().await?;
    works(&next).await?;
    next.remove().await
}

/// A disk that is full costs what cannot be booted, and nothing else: what is ready stays, Pods
/// run, and the pool is filled when there is room again.
pub(crate) async fn a_disk_that_is_full_is_survived(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.drain().await?;
    let state = agent.state();
    fs::create_dir(state)?;
    mount(
        Some("tmpfs"),
        state,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=16m,mode=0700"),
    )?;
    let survived = on_a_small_disk(node).await;
    let drained = agent.drain().await;
    mounts::unmount_below(state)?;
    fs::remove_dir(state)?;
    node.run_agent().await?;
    survived.with_context(|| agent.log())?;
    drained?;
    agent.expect_ready(WARM).await
}

async fn on_a_small_disk(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await?;
    let pid = agent.pid().await;
    let filler = agent.state().join("filler");
    let full = fs::write(&filler, vec![0; 16 << 20]);
    ensure!(full.is_err_and(|e| e.kind() == io::ErrorKind::StorageFull));
    let sentries = warm_sentries(node);
    let victim = sentries.first().context("no sentry")?;
    victim.kill().await?;
    wait::until("the word that there is no room", SOON, async || {
        agent
            .log()
            .contains("No space left on device")
            .then_some(())
    })
    .await?;
    ensure!(agent.ready().await? == WARM - 1, "{}", agent.log());
    let pod = node.pod(HANDLER).run_cold_or_warm().await?;
    works(&pod).await?;
    pod.remove().await?;
    fs::remove_file(&filler)?;
    agent.expect_ready(WARM).await?;
    ensure!(agent.pid().await == pid, "another agent has taken over");
    Ok(())
}
