// SPDX-License-Identifier: Apache-2.0

//! `make bench-files`: what files cost a Pod whose sentry opens them itself (`directfs`, runsc's
//! default) and one whose gofers do, in turns. Writes `target/bench/files.json`.

#![forbid(unsafe_code)]

use std::{collections::BTreeMap, fs, process::ExitCode, time::Instant};

use anyhow::{Result, ensure};
use kiln_tests::{
    bench::{self, file, median, ms, progress, save},
    node::{Node, NodeOpts},
    tools,
};
use serde_json::json;

/// Rounds, of which medians are taken. The first of each side warms caches and does not count.
const ROUNDS: usize = 9;

const PYTHON: &str = "docker.io/library/python:latest";

/// Bytes of the file that is read.
const LARGE: usize = 256 << 20;

/// Values of the flag.
const SIDES: [&str; 2] = ["true", "false"];

/// What is timed, in a container that is new: by name, in which image, and how.
const WORKLOADS: [(&str, bool, &str); 4] = [
    (
        "small_files_written",
        false,
        "mkdir /volume/d; i=0; while [ $i -lt 1000 ]; do echo x > /volume/d/$i; i=$((i+1)); done",
    ),
    (
        "small_files_read",
        false,
        "cat /volume/d/* > /dev/null; rm -r /volume/d",
    ),
    ("large_read", false, "cat /volume/large > /dev/null"),
    (
        "python_import",
        true,
        "python3 -c 'import asyncio, ctypes, email.mime.text, http.server, json, logging.config, \
         multiprocessing, sqlite3, unittest.mock, urllib.request, xml.dom.minidom'",
    ),
];

#[tokio::main]
async fn main() -> ExitCode {
    bench::end("kiln-bench-files", run().await)
}

async fn run() -> Result<()> {
    let mut nodes = Vec::new();
    for side in SIDES {
        let node = Node::start(NodeOpts {
            runsc_flags: vec![("directfs".to_owned(), side.to_owned())],
            shim: Some(tools::installed_shim()?),
            ..NodeOpts::default()
        })
        .await?;
        node.pull(PYTHON).await?;
        nodes.push((side, node));
    }
    let mut samples = BTreeMap::<_, Vec<f64>>::new();
    for n in 0..ROUNDS {
        for (side, node) in &nodes {
            for (workload, ms) in round(node).await? {
                if n > 0 {
                    samples.entry((workload, *side)).or_default().push(ms);
                }
            }
        }
    }
    report(samples)?;
    for (_, node) in nodes {
        node.check_for_leaks().await?;
        node.stop().await?;
    }
    Ok(())
}

/// The milliseconds that each workload takes in a new Pod.
async fn round(node: &Node) -> Result<Vec<(&'static str, f64)>> {
    let volume = node.volume()?;
    fs::write(volume.join("large"), vec![0x5a; LARGE])?;
    let pod = node.pod("gvisor").run().await?;
    let plain = pod.idle().mount(&volume, "/volume").start().await?;
    let python = pod.idle().image(PYTHON).start().await?;
    let mut took = Vec::new();
    for (name, in_python, script) in WORKLOADS {
        let container = if in_python { &python } else { &plain };
        let begun = Instant::now();
        let ran = container.exec(["sh", "-c", script]).await?;
        took.push((name, ms(begun.elapsed())));
        ensure!(ran.code == 0, "{name}: {ran:?}");
    }
    pod.remove().await?;
    fs::remove_dir_all(volume)?;
    Ok(took)
}

fn report(samples: BTreeMap<(&str, &str), Vec<f64>>) -> Result<()> {
    let mut figures = serde_json::Map::new();
    for ((workload, side), values) in samples {
        let median = median(&values).unwrap_or(f64::NAN);
        progress(&format!("{workload:20} directfs={side:5} {median:8.1} ms"));
        figures.insert(
            format!("{workload} directfs={side}"),
            json!({"median_ms": median, "all_ms": values}),
        );
    }
    save(&file("files")?, &figures)
}
