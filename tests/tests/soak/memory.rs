// SPDX-License-Identifier: Apache-2.0

//! The memory of a shim that serves call after call, and of the agent that hands out sandbox after
//! sandbox.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiln_tests::{memory::warm_and_last, process::Proc};

use crate::Run;

/// Pause between the calls, with each of which memory is looked at.
const PAUSE: Duration = Duration::from_millis(500);

/// KiB of anonymous memory by which a process may be larger at the end than when it was warm,
/// however long the run.
const GROWTH: u64 = 1024;

/// Descriptors by which it may have more: a shim's are those of its Pod; an agent has 16 for each
/// sandbox that it holds at that time.
const FILES: (u64, u64) = (8, 4 * 16);

/// What a process had at one time.
#[derive(Clone, Copy)]
struct Sample {
    pid: u32,
    memory: u64,
    files: u64,
}

impl Sample {
    fn take(process: &Proc) -> Option<Self> {
        Some(Self {
            pid: process.pid,
            memory: process.status("RssAnon")?,
            files: process.files().ok()?.len() as u64,
        })
    }
}

/// Runs a Pod through the whole run, and returns what shim and agent had first and last.
///
/// # Errors
/// When the Pod does not survive, or a process grows.
pub(crate) async fn watch(run: &Run<'_>) -> Result<String> {
    let pod = {
        let _turn = run.containerd.read().await;
        run.node.pod("gvisor-warm").run_cold_or_warm().await?
    };
    if pod.sandbox() != pod.id() {
        run.adopts(&pod.sandbox())?;
    }
    let turn = run.containerd.read().await;
    let container = pod.idle().start().await?;
    drop(turn);
    let shim = pod.shim()?;
    let (mut of_shim, mut of_agent) = (Vec::new(), Vec::new());
    for n in 0.. {
        if run.is_over() {
            break;
        }
        let turn = run.containerd.read().await;
        let said = container
            .sh(&format!("echo {n}"))
            .await
            .context("the Pod that stays")?;
        ensure!(said == format!("{n}\n"), "the Pod that stays says {said:?}");
        container.stats().await?;
        if n % 16 == 0 {
            let other = pod.script("exit 3").start().await?;
            ensure!(other.exit_code().await? == 3);
            other.remove().await?;
        }
        drop(turn);
        of_shim.push(Sample::take(&shim).context("the shim of the Pod that stays is gone")?);
        let agent = run.node.agent()?.pid().await.and_then(Proc::find);
        if run.is_calm() {
            of_agent.extend(agent.and_then(|p| Sample::take(&p)));
        }
        tokio::time::sleep(PAUSE).await;
    }
    let _turn = run.containerd.read().await;
    pod.remove().await?;
    let grown = [
        steady("shim", &of_shim, FILES.0)?,
        steady("agent", &of_agent, FILES.1)?,
    ];
    Ok(grown.join("\n"))
}

/// Compares what a process had when it was warm with the end.
fn steady(name: &str, samples: &[Sample], more_files: u64) -> Result<String> {
    let last = samples
        .last()
        .with_context(|| format!("no samples of the {name}"))?;
    ensure!(
        samples.iter().all(|s| s.pid == last.pid),
        "another {name} has taken over"
    );
    let compare = |of: fn(&Sample) -> u64| {
        let all: Vec<u64> = samples.iter().map(of).collect();
        warm_and_last(&all).with_context(|| name.to_owned())
    };
    let (memory, files) = (compare(|s| s.memory)?, compare(|s| s.files)?);
    let words = format!(
        "{name}: {} KiB and {} descriptors when warm, {} and {} at the end, {} samples",
        memory.0,
        files.0,
        memory.1,
        files.1,
        samples.len()
    );
    let holds = memory.1 <= memory.0 + GROWTH && files.1 <= files.0 + more_files;
    ensure!(holds, "{words}");
    Ok(words)
}
