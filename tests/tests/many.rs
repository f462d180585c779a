// SPDX-License-Identifier: Apache-2.0

//! Many Pods at a time on one node, in a test binary of their own: what else ran beside them
//! would be measured, too.

use std::{collections::BTreeSet, process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{
    agent::holding,
    node::{Node, NodeOpts},
    process::Proc,
    suite::Cases,
};

/// Sandboxes that are booted before any Pod comes.
const WARM: u32 = 10;

/// By how many microseconds timers in a sandbox may be late: a hundred idle sentries would else
/// want more than two CPUs.
const SLACK: u64 = 20_000;

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    cases.add_alone("gvisor::fifty_pods_up_and_down", async |node: &Node| {
        up_and_down(node, "gvisor", 50).await.map(|_| ())
    });
    cases.add_alone(
        "a_hundred_pods_where_ten_sandboxes_are_warm",
        a_hundred_pods_where_ten_sandboxes_are_warm,
    );
    let opts = || NodeOpts {
        agent: Some(holding(WARM, WARM)),
        kiln: format!("timer_slack_us = {SLACK}"),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}

/// Whoever comes too late for one that is warm boots its own; none fails or shares.
async fn a_hundred_pods_where_ten_sandboxes_are_warm(node: &Node) -> Result<()> {
    node.agent()?.expect_ready(WARM).await?;
    let adopted = up_and_down(node, "gvisor-warm", 100).await?;
    ensure!(adopted >= WARM as usize, "{adopted} have adopted");
    Ok(())
}

/// All are started at once, answer, and go at once; none may fail and nothing may stay. Returns
/// how many have adopted a sandbox.
async fn up_and_down(node: &Node, handler: &str, count: usize) -> Result<usize> {
    let start = Instant::now();
    let up = async |n: usize| {
        let pod = node
            .pod(handler)
            .run_cold_or_warm()
            .await
            .with_context(|| format!("Pod {n}"))?;
        let container = pod
            .script(&format!("echo Pod {n}; sleep 3600"))
            .start()
            .await
            .with_context(|| format!("Pod {n}"))?;
        container.logged(&format!("Pod {n}\n")).await?;
        drop(container);
        anyhow::Ok((pod, start.elapsed()))
    };
    let pods = try_join_all((0..count).map(&up)).await?;
    let ready = start.elapsed();
    let (pods, mut times): (Vec<_>, Vec<_>) = pods.into_iter().unzip();
    times.sort_unstable();

    let sandboxes: BTreeSet<_> = pods.iter().map(|pod| pod.sandbox()).collect();
    ensure!(sandboxes.len() == count, "two Pods are in one sandbox");
    let adopted = pods.iter().filter(|pod| pod.sandbox() != pod.id()).count();
    // Once for all of them: there are thousands.
    let processes = node.processes();
    let is_shim = |p: &&Proc| p.argv.contains("containerd-shim");
    let shims = processes.iter().filter(is_shim).count();
    ensure!(shims == count, "{shims} shims");
    let mut rss = 0;
    for pod in &pods {
        let slacks = pod.sentry_among(&processes)?.timer_slacks()?;
        ensure!(slacks == [SLACK * 1000].into(), "{slacks:?}");
        let shim = pod.shim_among(&processes)?;
        rss += shim.status("VmRSS").unwrap_or_default();
    }

    let start = Instant::now();
    try_join_all(pods.iter().map(|pod| node.remove_pod(pod.id()))).await?;
    let gone = start.elapsed();
    for pod in &pods {
        node.expect_gone(pod.id()).await?;
    }
    say(&format!(
        "{handler}: {count} Pods up in {:.1} s (half in {:.1} s), {adopted} adopted, down in {:.1} s; {} KiB resident per shim",
        ready.as_secs_f64(),
        times[count / 2].as_secs_f64(),
        gone.as_secs_f64(),
        rss / count as u64
    ));
    Ok(adopted)
}

#[allow(clippy::print_stderr)] // the figures are what one runs it for
fn say(words: &str) {
    eprintln!("{words}");
}
