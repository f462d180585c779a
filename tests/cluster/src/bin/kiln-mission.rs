// SPDX-License-Identifier: Apache-2.0

//! `make demo`: Agent Sandbox from nothing to code that runs in a claimed sandbox, on a cluster
//! of its own that is gone afterwards.

#![forbid(unsafe_code)]

use std::{
    io::Write,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use kiln_cluster::{
    cluster::Private,
    mission::{Audience, Mission},
};
use kiln_tests::tools;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            complain(&format!("kiln-mission: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<()> {
    let mut screen = Screen {
        started: Instant::now(),
        chapters: 0,
    };
    screen.chapter("A Kubernetes of one node");
    let start = Instant::now();
    let cluster = Private::start(&tools::ours("kiln-cluster")?).await?;
    let what = "etcd, control plane, containerd with handler gvisor, kubelet";
    screen.holds(what, start.elapsed());
    let done = Mission::new(&cluster, &mut screen).run().await;
    let start = Instant::now();
    let ended = cluster.end().await;
    done?;
    ended.context("end the cluster")?;
    screen.holds(
        "the cluster is gone, and nothing of it is left",
        start.elapsed(),
    );
    say(&format!(
        "\n{:.1} s in all",
        screen.started.elapsed().as_secs_f64()
    ));
    Ok(())
}

/// Standard output.
struct Screen {
    started: Instant,
    chapters: u32,
}

impl Audience for Screen {
    fn chapter(&mut self, title: &str) {
        self.chapters += 1;
        say(&format!("\n{}. {title}\n", self.chapters));
    }

    fn ran(&mut self, command: &str, output: &str) {
        say(&format!("   $ {command}"));
        for line in output.lines() {
            say(&format!("   {line}"));
        }
    }

    fn holds(&mut self, what: &str, took: Duration) {
        let took = match took {
            Duration::ZERO => String::new(),
            took => format!("  ({:.2} s)", took.as_secs_f64()),
        };
        say(&format!("   ok  {what}{took}"));
    }
}

/// Prints a line. Whoever does not listen any more is told nothing.
fn say(line: &str) {
    writeln!(std::io::stdout(), "{line}").ok();
}

#[allow(clippy::print_stderr)] // where an error goes
fn complain(words: &str) {
    eprintln!("{words}");
}
