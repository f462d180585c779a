// SPDX-License-Identifier: Apache-2.0

//! `kiln-bench`: our shim, gVisor's Go shim and runc side by side on one containerd.
//!
//! All sides run the same Pods on the same containerd, and both gVisor sides on the same runsc.
//! Within every round the sides take turns, and the order rotates from round to round, so that
//! what else the machine does meets all of them alike. What is reported is medians and minima.
//!
//! - [`figures`] are what is measured, and what we promise of it;
//! - [`rounds`] are how it is measured;
//! - [`cpu`] and [`memory`] are where CPU time and memory are read;
//! - [`cli_runs`] counts how often the runtime is run, on a node of its own;
//! - [`results`] keeps the samples, [`report`] shows what they come to.

mod cli_runs;
mod cpu;
mod figures;
mod memory;
mod report;
mod results;
mod rounds;
mod side;

use std::{
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiln_tests::{bench, node::NodeOpts, tools};

use crate::{results::Results, rounds::Bench, side::Side};

/// Rounds of `--quick`.
const QUICK: usize = 3;

/// One in so many rounds is long: it runs what takes long and varies little. No multiple of the
/// number of sides, so that long rounds do not all begin with the same one.
const LONG_EVERY: usize = 5;

/// Runs Pods of our shim ($KILN_SHIM, else the one that `make build` makes), of gVisor's Go shim
/// and of runc in turns, and compares them.
#[derive(Debug, Parser)]
struct Args {
    /// How often everything is measured.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Three rounds: shows that it works, not how fast.
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// The file for the figures [default: bench/node.json in cargo's target directory]
    #[arg(long)]
    out: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let done = tokio::select! {
        done = run(Args::parse()) => done,
        // Dropped, the node takes everything of itself away.
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            progress(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<()> {
    let out = args.out.map_or_else(|| bench::file("node"), Ok)?;
    let rounds = if args.quick {
        QUICK
    } else {
        args.rounds.into()
    };
    let opts = NodeOpts {
        shim: Some(tools::installed_shim()?),
        ..NodeOpts::default()
    };

    let start = Instant::now();
    let mut results = Results::default();
    progress("starting containerd");
    let pods = Bench::start(opts.clone()).await?;
    let measured = measure(&pods, rounds, &mut results).await;
    pods.stop().await.and(measured)?;
    progress("counting runs of runsc");
    for side in [Side::Ours, Side::GoShim] {
        let counted = cli_runs::count(&opts, side, &mut results).await;
        results.note(side, "counting runs of runsc", counted);
    }

    bench::save(&out, &report::json(&results))?;
    let mut stdout = io::stdout().lock();
    report::print(&mut stdout, &results).context("print the figures")?;
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    writeln!(
        stdout,
        "\n{rounds} rounds in {minutes:.1} min; {}",
        out.display()
    )
    .context("print")?;
    let failed = results.failures(Side::Ours);
    ensure!(failed == 0, "{failed} failures of our shim, see above");
    Ok(())
}

/// Runs all rounds. What fails is noted and cleaned up, and the rest goes on: a benchmark of half
/// an hour must not be lost to one failed exec of one side.
async fn measure(bench: &Bench, rounds: usize, results: &mut Results) -> Result<()> {
    for side in Side::ALL {
        // Not kept: the first Pod of a handler finds its programs not in memory.
        let done = bench.lifecycle(side, &mut Results::default()).await;
        bench.settle(side, "first Pod", done, results).await?;
    }
    for round in 0..rounds {
        progress(&format!("round {}/{rounds}", round + 1));
        for side in Side::rotated(round) {
            let done = bench.lifecycle(side, results).await;
            bench.settle(side, "one Pod", done, results).await?;
        }
        if round % LONG_EVERY != 0 {
            continue;
        }
        for side in Side::rotated(round) {
            progress(&format!(
                "  {}: 50 MB of log, 4 containers, 20 Pods",
                side.title()
            ));
            let done = bench.log(side, results).await;
            bench.settle(side, "log", done, results).await?;
            let done = bench.containers(side, results).await;
            bench.settle(side, "4 containers", done, results).await?;
            let done = bench.parallel(side, results).await;
            bench.settle(side, "20 Pods", done, results).await?;
        }
    }
    Ok(())
}

fn progress(words: &str) {
    bench::progress(&format!("kiln-bench: {words}"));
}
