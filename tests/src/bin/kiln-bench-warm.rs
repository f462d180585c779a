// SPDX-License-Identifier: Apache-2.0

//! `make bench-warm`: Pods that adopt a sandbox of the node's agent, Pods that boot their own, and
//! Pods of gVisor's Go shim, in turns on one node. Writes `target/bench/warm.json`.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs,
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::{Node, NodeOpts},
    pod::Container,
    spans::{self, Span},
    tools,
};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Rounds, of which medians are taken. The first of each side warms caches and does not count.
const ROUNDS: usize = 15;

/// How many sandboxes the agent holds.
const WARM: u32 = 4;

/// Handlers: adopted, cold, and the peer.
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

type Samples = BTreeMap<(&'static str, &'static str), Vec<f64>>;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("kiln-bench-warm: {e:#}"));
            ExitCode::FAILURE
        }
    }
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
        .map(|figure| compared(figure, "ms", &samples))
        .collect();
    figures.extend(of_the_agent(&node).await?);
    figures.extend(steps(&node.log_lines("adopted warm-")?));
    print(&figures);
    let dir = tools::target_dir()?.join("bench");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("warm.json"), serde_json::to_vec_pretty(&figures)?)?;
    let clean = node.check_for_leaks().await;
    node.stop().await.and(clean)
}

async fn rounds(node: &Node) -> Result<Samples> {
    let mut samples = Samples::new();
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
                    samples.entry((figure, side)).or_default().push(time);
                }
            }
        }
        complain(&format!("round {round} of {ROUNDS}"));
    }
    Ok(samples)
}

/// The milliseconds of [`OF_RUNP`], by containerd's own account (`internal/cri/server/sandbox_run.go`
/// and the files of `client/` in which the spans below begin).
fn of_runp(runp: f64, spans: &[Span]) -> [f64; 5] {
    let sum = |name: &str| -> f64 {
        let named = spans.iter().filter(|span| span.name.ends_with(name));
        named.map(|span| span.took.as_secs_f64() * 1000.0).sum()
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
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
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

/// What the agent says of its sandboxes: time of an adoption, of a boot, and memory of one.
async fn of_the_agent(node: &Node) -> Result<Vec<Value>> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    // The memory is looked at when there is something to do, or every five seconds.
    sleep(Duration::from_secs(6)).await;
    let report = agent.report().await?;
    let class = report.classes.iter().find(|c| c.class == "gvisor");
    let class = class.context("no class")?;
    let own = |figure: &str, unit: &str, value: f64| json!({"figure": figure, "unit": unit, "ours": value});
    let adoptions = agent.adoption_times();
    Ok(vec![
        own("adopt_ms", "ms", median(&adoptions)),
        own("replenish_ms", "ms", class.boot_milliseconds as f64),
        own(
            "warm_pss_mb",
            "MB",
            report.held_bytes as f64 / f64::from(class.ready.max(1)) / 1e6,
        ),
    ])
}

/// What the shims say of the steps of adoptions.
fn steps(lines: &[String]) -> Vec<Value> {
    let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for word in lines.iter().flat_map(|line| line.split([' ', '"'])) {
        if let Some((step, micros)) = word.split_once('=')
            && let Ok(micros) = micros.parse::<f64>()
        {
            all.entry(step.to_owned()).or_default().push(micros / 1e3);
        }
    }
    let figure = |(step, samples): (&String, &Vec<f64>)| json!({"figure": format!("- {step}"), "unit": "ms", "ours": median(samples)});
    all.iter().map(figure).collect()
}

fn compared(figure: &str, unit: &str, samples: &Samples) -> Value {
    let of = |side: &str| {
        let all = samples
            .iter()
            .find(|((f, s), _)| *f == figure && *s == side);
        all.map_or(0.0, |(_, samples)| median(samples))
    };
    let (warm, go) = (of("warm"), of("go_shim"));
    json!({
        "figure": figure, "unit": unit,
        "ours": warm, "cold": of("cold"), "go_shim": go, "ratio": warm / go,
    })
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

#[allow(clippy::print_stdout)] // the table is what one runs it for
fn print(figures: &[Value]) {
    println!(
        "{:<28} {:>9} {:>9} {:>9} {:>7}",
        "", "warm", "cold", "Go shim", "ratio"
    );
    for figure in figures {
        let number = |key: &str| match figure[key].as_f64() {
            Some(n) if key == "ratio" => format!("{n:.2}"),
            Some(n) => format!("{n:.1}"),
            None => String::new(),
        };
        println!(
            "{:<28} {:>9} {:>9} {:>9} {:>7}",
            figure["figure"].as_str().unwrap_or_default(),
            number("ours"),
            number("cold"),
            number("go_shim"),
            number("ratio"),
        );
    }
}

#[allow(clippy::print_stderr)] // progress, and where an error goes
fn complain(words: &str) {
    eprintln!("{words}");
}
