// SPDX-License-Identifier: Apache-2.0

//! What warm sandboxes cost their node: memory, time, and what a Pod that computes loses while
//! others are booted.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::{AgentError, Shape};
use kiln_tests::{
    bench::{median, ours},
    memory::Memory,
    node::Node,
    pod::Container,
};
use serde_json::Value;
use tokio::time::sleep;

use crate::WARM;

/// How often the work of a Pod is looked at, without boots beside it and with them.
const LOOKS: usize = 5;

/// How long a sandbox that is handed out and not taken is kept, and destroyed after.
const UNTAKEN: Duration = Duration::from_secs(12);

/// A process for each CPU that counts, and writes a line now and then.
const WORK: &str = "for cpu in $(seq $(nproc)); do (while :; do i=0; \
    while [ $i -lt 2000 ]; do i=$((i+1)); done; echo done; done) & done; wait";

/// All rows of it.
pub(crate) async fn measure(node: &Node) -> Result<Vec<Value>> {
    let mut rows = adoption(node)?;
    rows.extend(memory(node).await?);
    rows.extend(boots(node).await?);
    Ok(rows)
}

/// The time of an adoption, by the agent's account, and of its steps, by the shims'.
fn adoption(node: &Node) -> Result<Vec<Value>> {
    let mut steps: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for line in node.log_lines("adopted warm-")? {
        for (step, time) in line
            .split([' ', '"'])
            .filter_map(|word| word.split_once('='))
        {
            if let Ok(micros) = time.parse::<f64>() {
                steps
                    .entry(format!("- {step}"))
                    .or_default()
                    .push(micros / 1e3);
            }
        }
    }
    let whole = ours("adopt_ms", "ms", median(&node.agent()?.adoption_times()));
    let steps = steps
        .iter()
        .map(|(step, times)| ours(step, "ms", median(times)));
    Ok([whole].into_iter().chain(steps).collect())
}

/// What all of them hold: by pages, where those that processes share are divided by their number
/// (PSS), and by what the kernel has charged their cgroup, its own memory for them among it.
async fn memory(node: &Node) -> Result<[Value; 3]> {
    node.agent()?.expect_ready(WARM).await?;
    let processes = node.processes();
    let pss = Memory::of(processes.iter().filter(|p| p.argv.contains("warm-"))).pss;
    let charged =
        node.cgroup()
            .read("warm", "memory", "memory.usage_in_bytes", "memory.current")?;
    let charged = charged.parse::<f64>().context("read the warm cgroup")? / 1e6;
    Ok([
        ours("warm_pss_mb", "MB", Some(pss / f64::from(WARM))),
        ours("ten_warm_pss_mb", "MB", Some(pss)),
        ours("ten_warm_cgroup_mb", "MB", Some(charged)),
    ])
}

/// How fast sandboxes are booted beside a Pod that takes all CPU time it can get, and what of its
/// work that Pod does meanwhile.
async fn boots(node: &Node) -> Result<[Value; 4]> {
    let boot = node.agent()?.report().await?.classes;
    let boot = boot.iter().map(|c| c.boot_milliseconds).max();
    let alone = refill(node).await?;
    let pod = node.pod("gvisor").run().await?;
    let worker = pod.script(WORK).start().await?;
    let (mut quiet, mut busy, mut refills) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..LOOKS {
        sleep(UNTAKEN).await;
        let before = Work::of(&worker);
        sleep(alone).await;
        quiet.push(before.rate(&worker));
        let before = Work::of(&worker);
        refills.push(refill(node).await?.as_secs_f64());
        busy.push(before.rate(&worker));
    }
    pod.remove().await?;
    let rate = |time: f64| f64::from(WARM) / time;
    let share = median(&busy).zip(median(&quiet)).map(|(b, q)| b / q);
    Ok([
        ours("replenish_ms", "ms", boot.map(|ms| ms as f64)),
        ours("replenish_per_s", "1/s", Some(rate(alone.as_secs_f64()))),
        ours("replenish_busy_per_s", "1/s", median(&refills).map(rate)),
        ours("pod_work_while_warming", "", share),
    ])
}

/// Has the agent replace all of its sandboxes; returns how long that takes.
async fn refill(node: &Node) -> Result<Duration> {
    let agent = node.agent()?;
    let client = agent.client().await?;
    let report = agent.report().await?;
    let class = report.classes.iter().find(|c| c.ready > 0);
    let shape = Shape::from_json(&class.context("none is ready")?.shape)?;
    let begun = Instant::now();
    for _ in 0..WARM {
        match client.acquire(&shape, "bench").await {
            // One whose answer was late beside the busy Pod is replaced too.
            Ok(_) | Err(AgentError::Timeout(_)) => {}
            Err(e) => return Err(e.into()),
        }
    }
    agent.expect_ready(WARM).await?;
    ensure!(
        begun.elapsed() > Duration::from_millis(100),
        "none was replaced"
    );
    Ok(begun.elapsed())
}

/// What a Pod had done at one time.
struct Work {
    lines: usize,
    at: Instant,
}

impl Work {
    fn of(worker: &Container<'_, '_>) -> Self {
        let lines = worker.log().matches("done").count();
        let at = Instant::now();
        Self { lines, at }
    }

    /// What it has done in each second since.
    fn rate(&self, worker: &Container<'_, '_>) -> f64 {
        let now = Self::of(worker);
        (now.lines - self.lines) as f64 / (now.at - self.at).as_secs_f64()
    }
}
