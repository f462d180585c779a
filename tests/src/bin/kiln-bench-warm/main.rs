// SPDX-License-Identifier: Apache-2.0

//! `make bench-warm`: Pods that adopt a sandbox of the node's agent, Pods that boot their own, and
//! Pods of gVisor's Go shim, in turns on one node; then what warm sandboxes cost that node
//! ([`cost`]). Writes `target/bench/warm.json`.

#![forbid(unsafe_code)]

mod cost;

use std::{
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Result, ensure};
use kiln_tests::{
    bench::{self, Samples, file, ms, print, progress, save},
    node::{Node, NodeOpts},
    pod::Container,
    spans::{self, Span},
    tools,
};
use serde_json::Value;
use tokio::time::sleep;

/// Rounds, of which medians are taken. The first of each side warms caches and does not count.
const ROUNDS: usize = 15;

/// How many sandboxes the agent holds.
const WARM: u32 = 10;

/// Who is compared, each with its handler.
const SIDES: [(&str, &str); 3] = [
    ("warm", "gvisor-warm"),
    ("cold", "gvisor"),
    ("go_shim", "runsc-go"),
];

/// Longest wait for an output.
const OUTPUT: Duration = Duration::from_secs(60);

/// What RunPodSandbox is made of.
const OF_RUNP: [&str; 5] = [
    "task_create_start_ms",
    "runp_cni_ms",
    "runp_container_ms",
    "runp_shim_process_ms",
    "runp_rest_ms",
];

#[tokio::main]
async fn main() -> ExitCode {
    bench::end("kiln-bench-warm", run().await)
}

async fn run() -> Result<()> {
    let node = Node::start(NodeOpts {
        agent: Some(format!(
            "[limits]\npause_ms = 0\n[[class]]\nname = \"gvisor\"\nwarm = {WARM}\n"
        )),
        shim: Some(tools::installed_shim()?),
        spans: true,
        ..NodeOpts::default()
    })
    .await?;
    let samples = rounds(&node).await?;
    let mut figures: Vec<Value> = ["runp_ms"]
        .iter()
        .chain(&OF_RUNP)
        .chain(&[
            "container_prepare_ms",
            "container_create_start_ms",
            "runp_first_output_ms",
        ])
        .map(|figure| samples.row(figure))
        .collect();
    figures.extend(cost::measure(&node).await?);
    print(&figures);
    save(&file("warm")?, &figures)?;
    let clean = node.check_for_leaks().await;
    node.stop().await.and(clean)
}

async fn rounds(node: &Node) -> Result<Samples> {
    let mut samples = Samples::default();
    for round in 0..=ROUNDS {
        for (side, handler) in SIDES {
            // All of them, so that no boot runs beside what is measured.
            node.agent()?.expect_ready(WARM).await?;
            let begun = SystemTime::now();
            let times = pod(node, handler).await?;
            sleep(spans::DELAY).await;
            let [(_, runp), ..] = times;
            let until = begun + Duration::from_secs_f64(runp / 1000.0);
            let parts = of_runp(runp, &node.spans()?.between(begun, until));
            for (figure, time) in times.into_iter().chain(OF_RUNP.into_iter().zip(parts)) {
                if round > 0 {
                    samples.add(figure, side, time);
                }
            }
        }
        progress(&format!("round {round} of {ROUNDS}"));
    }
    Ok(samples)
}

/// The milliseconds of [`OF_RUNP`], by containerd's own account (`internal/cri/server/sandbox_run.go`
/// and the files of `client/` in which the spans below begin).
fn of_runp(runp: f64, spans: &[Span]) -> [f64; 5] {
    let sum = |name: &str| -> f64 {
        let named = spans.iter().filter(|span| span.name.ends_with(name));
        named.map(|span| ms(span.took)).sum()
    };
    let (create, start) = (sum("Task/Create"), sum("Task/Start"));
    let cni = sum("cni.setup_pod_network");
    // Its snapshot among it.
    let container = sum("client.NewContainer");
    // The shim is started and asked to create.
    let process = sum("container.NewTask") - create;
    let rest = runp - create - start - cni - container - process;
    [create + start, cni, container, process, rest]
}

/// The times of one Pod, up to the first output of its container.
async fn pod(node: &Node, handler: &str) -> Result<[(&'static str, f64); 4]> {
    let start = Instant::now();
    let pod = node.pod(handler).run().await?;
    let sandbox = start.elapsed();
    // CRI prepares the container's files when it creates it; the two calls to the shim that are
    // to be compared, Create and Start of its task, are all but nothing else of its start
    // (containerd `internal/cri/server/container_start.go`).
    let container = pod
        .script("echo ready; exec sleep 1000000")
        .create()
        .await?;
    let prepared = start.elapsed();
    container.start().await?;
    let started = start.elapsed();
    first_output(&container).await?;
    let output = start.elapsed();
    pod.remove().await?;
    Ok([
        ("runp_ms", ms(sandbox)),
        ("container_prepare_ms", ms(prepared - sandbox)),
        ("container_create_start_ms", ms(started - prepared)),
        ("runp_first_output_ms", ms(output)),
    ])
}

async fn first_output(container: &Container<'_, '_>) -> Result<()> {
    let start = Instant::now();
    while !container.log().contains("ready") {
        ensure!(start.elapsed() < OUTPUT, "no output");
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
