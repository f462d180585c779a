// SPDX-License-Identifier: Apache-2.0

//! `kiln-node-agent`: see the library.

#![forbid(unsafe_code)]

use std::{io::IsTerminal as _, path::PathBuf};

use anyhow::Context as _;
use clap::Parser;
use kiln_agent_api::{Agent, SOCKET, slots_socket};
use kiln_node_agent::{config::Config, http, keeper::Keeper, kube::Reporter, service};
use runsc_wrapper::reap;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Holds sandboxes that are booted before there are Pods for them.
#[derive(Debug, Parser)]
#[command(name = "kiln-node-agent", version)]
struct Args {
    /// Configuration.
    #[arg(long, default_value = "/etc/kiln/agent.toml")]
    config: PathBuf,

    /// Without Kubernetes: hold what the configuration says, and tell nobody.
    #[arg(long)]
    standalone: bool,

    /// Name of this node in the cluster.
    #[arg(long, env = "NODE_NAME", required_unless_present_any = ["standalone", "drain", "report"])]
    node_name: Option<String>,

    /// Log in JSON.
    #[arg(long)]
    log_json: bool,

    /// Destroy the warm sandboxes that an agent has left, and end.
    #[arg(long)]
    drain: bool,

    /// Print what the agent that listens at the socket holds, and end.
    #[arg(long, num_args = 0..=1, default_missing_value = SOCKET, value_name = "SOCKET")]
    report: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(args))
}

async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(socket) = args.report {
        return report(&socket).await;
    }
    start_logging(args.log_json);
    let config = Config::load(&args.config)?;
    let state = config.state.clone();
    let (socket, metrics) = (config.socket.clone(), config.metrics);
    let keeper =
        Keeper::new(config).with_context(|| format!("use the directory {}", state.display()))?;
    if args.drain {
        return keeper.drain().await;
    }
    // Sentries lose their parent when `runsc create` ends. One that has ended and that nobody
    // collects keeps `runsc delete`, and so the end of a Pod, waiting: not every init is quick.
    reap::become_subreaper().context("become the parent of orphans")?;
    let mut server = service::serve(keeper.clone(), &socket)
        .await
        .with_context(|| format!("listen at {}", socket.display()))?;
    let slots = slots_socket(&socket);
    service::serve_slots(keeper.clone(), &slots)
        .with_context(|| format!("listen at {}", slots.display()))?;
    if let Some(address) = metrics {
        http::serve(keeper.clone(), address)
            .await
            .with_context(|| format!("listen at {address}"))?;
    }
    if let Some(node) = args.node_name.filter(|_| !args.standalone) {
        let client = kube::Client::try_default()
            .await
            .context("connect to the apiserver")?;
        tokio::spawn(Reporter::new(client, node, keeper.clone()).run());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = keeper.run() => {}
        _ = terminate.recv() => info!("told to end; warm sandboxes stay for the next agent"),
        _ = interrupt.recv() => info!("told to end; warm sandboxes stay for the next agent"),
    }
    server.shutdown().await.context("stop listening")
}

fn start_logging(as_json: bool) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let format = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if as_json {
        format.json().init();
    } else {
        format.init();
    }
}

/// Prints a table.
#[allow(clippy::print_stdout)] // the answer to whoever asked
async fn report(socket: &std::path::Path) -> anyhow::Result<()> {
    let report = Agent::connect(socket).await?.report().await?;
    println!(
        "{:<34} {:<12} {:>6} {:>5} {:>7} {:>7} {:>6} {:>7}",
        "KEY", "CLASS", "WANTED", "READY", "WARMING", "ADOPTED", "MISSED", "BOOT MS"
    );
    for c in &report.classes {
        let class = if c.class.is_empty() {
            "(learned)"
        } else {
            &c.class
        };
        println!(
            "{:<34} {class:<12} {:>6} {:>5} {:>7} {:>7} {:>6} {:>7}",
            c.key, c.wanted, c.ready, c.warming, c.adopted, c.missed, c.boot_milliseconds
        );
    }
    println!(
        "memory held: {} MiB; adoptions that failed: {}",
        report.held_bytes >> 20,
        report.failed
    );
    println!(
        "packets to link-local addresses: {} dropped; Pods where they are not: {}",
        report.link_local_dropped, report.link_local_unguarded
    );
    if !report.problem.is_empty() {
        println!("no warm sandboxes: {}", report.problem);
    }
    Ok(())
}
