// SPDX-License-Identifier: Apache-2.0

//! Many Pods at a time on one node, in a test binary of their own: what else ran beside them
//! would be measured, too.

use std::{process::ExitCode, time::Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{
    node::{Node, NodeOpts},
    suite::Cases,
};

const PODS: usize = 50;

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    for handler in ["gvisor", "kiln-runc"] {
        cases.add_alone(
            format!("{handler}::fifty_pods_up_and_down"),
            async move |node: &Node| fifty_pods_up_and_down(node, handler).await,
        );
    }
    cases.run(|| Node::start(NodeOpts::default()))
}

/// All are started at once, answer, and go at once; none may fail and nothing may stay.
async fn fifty_pods_up_and_down(node: &Node, handler: &str) -> Result<()> {
    let start = Instant::now();
    let up = async |n: usize| {
        let pod = node
            .pod(handler)
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
        anyhow::Ok(pod)
    };
    let pods = try_join_all((0..PODS).map(&up)).await?;
    let ready = start.elapsed();

    let shims = pods
        .iter()
        .map(|pod| pod.shim())
        .collect::<Result<Vec<_>>>()?;
    let rss: u64 = shims.iter().filter_map(|shim| shim.status("VmRSS")).sum();
    ensure!(shims.len() == PODS);

    let start = Instant::now();
    try_join_all(pods.into_iter().map(|pod| pod.remove())).await?;
    say(&format!(
        "{handler}: {PODS} Pods up in {:.1} s, down in {:.1} s; {} KiB resident per shim",
        ready.as_secs_f64(),
        start.elapsed().as_secs_f64(),
        rss / PODS as u64
    ));
    Ok(())
}

#[allow(clippy::print_stderr)] // the figures are what one runs it for
fn say(words: &str) {
    eprintln!("{words}");
}
