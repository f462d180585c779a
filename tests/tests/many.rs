// SPDX-License-Identifier: Apache-2.0

//! Many Pods at a time on one node, in a test binary of their own: what else ran beside them
//! would be measured, too.

use std::{collections::BTreeSet, process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{
    node::{Node, NodeOpts},
    suite::Cases,
};

/// Sandboxes that are booted before any Pod comes.
const WARM: u32 = 10;

/// By how many microseconds timers in a sandbox may be late: a hundred idle sentries would else
/// want more than two CPUs.
const SLACK: u64 = 20_000;

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    for handler in ["gvisor", "kiln-runc"] {
        cases.add_alone(
            format!("{handler}::fifty_pods_up_and_down"),
            async move |node: &Node| up_and_down(node, handler, 50).await.map(|_| ()),
        );
    }
    cases.add_alone(
        "a_hundred_pods_where_ten_sandboxes_are_warm",
        a_hundred_pods_where_ten_sandboxes_are_warm,
    );
    let opts = || NodeOpts {
        agent: Some(format!(
            "[limits]\ntotal = {WARM}\nboots = 2\npause_ms = 0\n[[class]]\nname = \"gvisor\"\nwarm = {WARM}\n"
        )),
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
            .cold_or_warm()
            .run()
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
    let rss = shims_and_sentries(node, handler, &sandboxes)?;

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
        rss,
    ));
    Ok(adopted)
}

/// Looks at each process of the node once, because there are thousands: that there is a shim for
/// each Pod, and a sentry for each of `sandboxes` if they have one. Returns the KiB of memory that
/// a shim has on average.
fn shims_and_sentries(node: &Node, handler: &str, sandboxes: &BTreeSet<String>) -> Result<u64> {
    let (mut shims, mut sentries, mut rss) = (0, 0, 0);
    for process in node.processes() {
        let argv = &process.argv;
        if argv.contains("containerd-shim") {
            shims += 1;
            rss += process.status("VmRSS").unwrap_or_default();
        } else if argv.starts_with("runsc-sandbox") && sandboxes.iter().any(|id| argv.contains(id))
        {
            sentries += 1;
            let slacks = process.timer_slacks()?;
            ensure!(slacks == [SLACK * 1000].into(), "{slacks:?}");
        }
    }
    let count = sandboxes.len();
    let expected = if handler == "kiln-runc" { 0 } else { count };
    ensure!(shims == count, "{shims} shims");
    ensure!(sentries == expected, "{sentries} sentries");
    Ok(rss / count as u64)
}

#[allow(clippy::print_stderr)] // the figures are what one runs it for
fn say(words: &str) {
    eprintln!("{words}");
}
