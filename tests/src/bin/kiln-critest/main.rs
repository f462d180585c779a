// SPDX-License-Identifier: Apache-2.0

//! `kiln-critest`: runs critest, the conformance suite of CRI, against a node of its own.
//!
//! The node lets Pods be privileged, use the host's network and run setuid programs, because
//! specs ask for that; everything else is as installed. The verdict is by a list of the specs that
//! are known to fail: one that fails and is not on it fails the run.
//!
//! With handler `gvisor-warm` the node's agent holds sandboxes of every shape that specs ask for,
//! and a Pod that could have adopted one and has not fails the run, too, unless the agent was late.
//!
//! In `target/critest/HANDLER` it leaves `report.json` (Ginkgo's), `failed.txt`, critest's output
//! and containerd's log.

mod adoptions;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiln_tests::{
    node::{Node, NodeOpts},
    tools,
};
use serde_json::Value;
use tokio::io::AsyncReadExt;

use self::adoptions::Adoptions;

/// How long critest may take; gVisor on two busy cores takes seven minutes.
const LIMIT: Duration = Duration::from_secs(50 * 60);

/// Runs critest against a containerd of its own.
#[derive(Debug, Parser)]
struct Options {
    /// The handler to test: gvisor, gvisor-cli, gvisor-warm, runsc-go or runc
    #[arg(long, default_value = "gvisor")]
    handler: String,
    /// The list of specs that are known to fail [default: tests/critest-expected.txt for gvisor,
    /// gvisor-cli and gvisor-warm, none for others]
    #[arg(long)]
    expected: Option<PathBuf>,
    /// Rewrite the list instead of comparing with it
    #[arg(long)]
    update: bool,
    /// Only specs whose names match this regular expression; nothing is compared
    #[arg(long)]
    focus: Option<String>,
    /// One more flag of runsc, as NAME=VALUE
    #[arg(long = "flag")]
    flags: Vec<String>,
}

#[tokio::main]
#[allow(clippy::print_stderr)] // a program speaks here
async fn main() -> ExitCode {
    match run(Options::parse()).await {
        Ok(Verdict::AsExpected) => ExitCode::SUCCESS,
        Ok(Verdict::Worse) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("kiln-critest: {e:#}");
            ExitCode::FAILURE
        }
    }
}

enum Verdict {
    AsExpected,
    Worse,
}

async fn run(options: Options) -> Result<Verdict> {
    let out = tools::target_dir()?.join("critest").join(&options.handler);
    fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
    let mut flags = vec![("allow-suid".to_owned(), "true".to_owned())];
    for flag in &options.flags {
        let (name, value) = flag
            .split_once('=')
            .with_context(|| format!("flag {flag:?} is not NAME=VALUE"))?;
        flags.push((name.to_owned(), value.to_owned()));
    }
    let is_warm = options.handler == adoptions::HANDLER;
    let node = Node::start(NodeOpts {
        kiln: "allow_privileged = true\nallow_host_network = true\n".to_owned(),
        agent: is_warm.then(adoptions::agent),
        runsc_flags: flags,
        ..NodeOpts::default()
    })
    .await?;
    if is_warm {
        node.agent()?.expect_ready(adoptions::HELD).await?;
    }
    let start = Instant::now();
    let report = critest(&node, &options, &out).await;
    let seconds = start.elapsed().as_secs();
    let adoptions = if is_warm {
        Some(Adoptions::of(&node).await?)
    } else {
        None
    };
    let leaks = node.check_for_leaks().await;
    fs::copy(
        node.dir().join("containerd.log"),
        out.join("containerd.log"),
    )
    .context("keep containerd's log")?;
    node.stop().await?;

    let report = report?;
    fs::write(out.join("failed.txt"), lines(&report.failed))
        .context("write the list of failures")?;
    say(&format!(
        "{}: {} passed, {} failed, {} skipped in {seconds} s",
        options.handler,
        report.passed,
        report.failed.len(),
        report.skipped
    ))?;
    let verdict = if options.focus.is_some() {
        Verdict::AsExpected
    } else {
        compare(&options, &report.failed)?
    };
    if let Some(adoptions) = adoptions {
        say(&adoptions.to_string())?;
        adoptions.check()?;
    }
    leaks.context("after critest")?;
    Ok(verdict)
}

/// What a run came to.
struct Report {
    passed: usize,
    skipped: usize,
    failed: BTreeSet<String>,
}

impl Report {
    /// Reads Ginkgo's report (onsi/ginkgo `types.Report`).
    fn read(file: &Path) -> Result<Self> {
        let text = fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let suites: Value = serde_json::from_slice(&text).context("parse the report")?;
        let mut report = Self {
            passed: 0,
            skipped: 0,
            failed: BTreeSet::new(),
        };
        let suites = suites.as_array().context("the report is no list")?;
        let specs = suites
            .iter()
            .filter_map(|s| s["SpecReports"].as_array())
            .flatten();
        for spec in specs {
            match spec["State"].as_str() {
                _ if spec["LeafNodeType"] != "It" => {
                    let state = spec["State"].as_str().unwrap_or_default();
                    ensure!(
                        matches!(state, "passed" | "skipped"),
                        "critest itself failed, in {}",
                        spec["LeafNodeType"]
                    );
                }
                Some("passed") => report.passed += 1,
                Some("skipped" | "pending") => report.skipped += 1,
                _ => drop(report.failed.insert(name(spec))),
            }
        }
        Ok(report)
    }
}

/// A spec's name: that of its containers, then its own.
fn name(spec: &Value) -> String {
    let containers = spec["ContainerHierarchyTexts"]
        .as_array()
        .into_iter()
        .flatten();
    let words = containers
        .chain([&spec["LeafNodeText"]])
        .filter_map(Value::as_str);
    words
        .collect::<Vec<_>>()
        .join(" ")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs critest with its output on ours and in a file.
async fn critest(node: &Node, options: &Options, out: &Path) -> Result<Report> {
    let endpoint = format!("unix://{}", node.socket().display());
    let config = node.dir().join("crictl.yaml");
    fs::write(
        &config,
        format!("runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 60\n"),
    )?;
    let report = out.join("report.json");
    // What an earlier run has left would be taken for this one's.
    if report.exists() {
        fs::remove_file(&report).context("remove the old report")?;
    }
    let mut command = node
        .command(&tools::program("critest")?)
        .dir(out)
        .args([
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
            "--runtime-handler",
            &options.handler,
        ])
        .args(["--config".as_ref(), config.as_os_str()])
        .args([
            "--ginkgo.no-color",
            "--ginkgo.timeout=50m",
            "--ginkgo.poll-progress-after=180s",
        ])
        .args([format!("--ginkgo.json-report={}", report.display())]);
    if let Some(focus) = &options.focus {
        command = command.args([format!("--ginkgo.focus={focus}")]);
    }
    let mut child = command.child(Stdio::null(), Stdio::piped(), Stdio::inherit())?;
    let mut output = child.stdout.take().context("critest has no output")?;
    let mut log = fs::File::create(out.join("critest.log"))?;
    let follow = async {
        let mut buffer = [0; 4096];
        loop {
            let n = output.read(&mut buffer).await?;
            if n == 0 {
                return child.wait().await;
            }
            log.write_all(&buffer[..n])?;
            io::stdout().write_all(&buffer[..n])?;
            io::stdout().flush()?;
        }
    };
    let status = tokio::time::timeout(LIMIT, follow).await;
    let status =
        status.with_context(|| format!("critest goes on after {} s", LIMIT.as_secs()))??;
    ensure!(status.code().is_some(), "critest: {status}");
    Report::read(&report)
}

fn compare(options: &Options, failed: &BTreeSet<String>) -> Result<Verdict> {
    let file = match &options.expected {
        Some(file) => Some(file.clone()),
        None if options.handler.starts_with("gvisor") => {
            Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("critest-expected.txt"))
        }
        None => None,
    };
    if options.update {
        let file = file.context("--update needs --expected for this handler")?;
        fs::write(&file, lines(failed)).with_context(|| format!("write {}", file.display()))?;
        say(&format!("written: {}", file.display()))?;
        return Ok(Verdict::AsExpected);
    }
    let expected: BTreeSet<String> = match &file {
        Some(file) => {
            let text =
                fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
            text.lines()
                .map(str::trim)
                .filter(|l| !l.is_empty() && !l.starts_with('#'))
                .map(str::to_owned)
                .collect()
        }
        None => BTreeSet::new(),
    };
    for spec in expected.difference(failed) {
        say(&format!("no longer fails: {spec}"))?;
    }
    let new: Vec<_> = failed.difference(&expected).collect();
    for spec in &new {
        say(&format!("FAILED: {spec}"))?;
    }
    Ok(if new.is_empty() {
        Verdict::AsExpected
    } else {
        Verdict::Worse
    })
}

fn lines(specs: &BTreeSet<String>) -> String {
    specs.iter().map(|spec| format!("{spec}\n")).collect()
}

fn say(words: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{words}")
}
