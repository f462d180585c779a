// SPDX-License-Identifier: Apache-2.0

//! `kiln-node-agent`: see the library.

#![forbid(unsafe_code)]

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use kiln_agent_api::{Agent, SOCKET, slots_socket};
use kiln_host::reap;
use kiln_node_agent::{
    cluster::Reporter,
    config::Config,
    install::{self, Outcome, Payload},
    presence::Presence,
    serve::{self, http},
    warm::WarmManager,
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;

/// Holds sandboxes that are booted before there are Pods for them.
#[derive(Debug, Parser)]
#[command(name = "kiln-node-agent", version)]
struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,

    /// Configuration.
    #[arg(long, global = true, default_value = "/etc/kiln/agent.toml")]
    config: PathBuf,

    /// Without Kubernetes: hold what the configuration says, and tell nobody.
    #[arg(long)]
    standalone: bool,

    /// Name of this node in the cluster.
    #[arg(long, env = "NODE_NAME")]
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

/// Instead of holding sandboxes.
#[derive(Debug, Clone, Copy, Subcommand)]
enum Verb {
    /// Put on this node what `[install]` of the configuration says, and end.
    Install(Where),
    /// Take it away again, and end.
    Uninstall(Where),
}

#[derive(Debug, Clone, Copy, clap::Args)]
struct Where {
    /// This is a container on the node: go into the namespaces of the node's containerd first.
    #[arg(long)]
    on_node: bool,
}

fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    if let Some(verb) = args.verb {
        return change_node(verb, &args);
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(args))?;
    Ok(ExitCode::SUCCESS)
}

/// Installs or uninstalls, and prints what came of it.
fn change_node(verb: Verb, args: &Args) -> anyhow::Result<ExitCode> {
    start_logging(args.log_json);
    let outcome = match change(verb, args) {
        Ok(done) => Outcome::Done(done),
        Err((why, is_installed)) => Outcome::Failed {
            why: why.to_string(),
            is_installed,
        },
    };
    say(&serde_json::to_string(&outcome)?);
    Ok(match outcome {
        Outcome::Done(_) => ExitCode::SUCCESS,
        Outcome::Failed { .. } => ExitCode::FAILURE,
    })
}

fn change(verb: Verb, args: &Args) -> Result<install::Done, (install::Error, bool)> {
    let new = |e| (e, false);
    let config = Config::load(&args.config);
    let config = config.map_err(|e| new(install::Error::Config(e.to_string())))?;
    let table = install::installation(&config).map_err(new)?;
    // While this process sees what is in its image, and has no second thread.
    let payload = Payload::open(&table.from);
    let (Verb::Install(place) | Verb::Uninstall(place)) = verb;
    // What cannot be read is not there for anybody.
    let failed = |e| (e, install::is_installed(&config).unwrap_or(false));
    if place.on_node {
        install::enter(&table.containerd.socket).map_err(failed)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|e| new(install::Error::Config(e.to_string())))?;
    let done = match verb {
        Verb::Install(_) => runtime.block_on(install::install(&config, &payload)),
        Verb::Uninstall(_) => runtime.block_on(install::uninstall(&config)),
    };
    done.map_err(failed)
}

async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(socket) = args.report {
        return report(&socket).await;
    }
    start_logging(args.log_json);
    let config = Config::load(&args.config)?;
    let state = config.state.clone();
    let (socket, metrics) = (config.socket.clone(), config.metrics);
    let installs = config.install.is_some();
    let manager = WarmManager::new(config)
        .with_context(|| format!("use the directory {}", state.display()))?;
    if args.drain {
        return manager.drain().await;
    }
    let node = args.node_name.filter(|_| !args.standalone);
    anyhow::ensure!(
        args.standalone || node.is_some(),
        "--node-name (or NODE_NAME) is missing; --standalone needs none"
    );
    // Sentries lose their parent when `runsc create` ends. One that has ended and that nobody
    // collects keeps `runsc delete`, and so the end of a Pod, waiting: not every init is quick.
    reap::become_subreaper().context("become the parent of orphans")?;
    manager.outlive_container();
    let presence = Presence::new(args.config, installs);
    let mut server = serve::serve(manager.clone(), &presence, &socket)
        .await
        .with_context(|| format!("listen at {}", socket.display()))?;
    let slots = slots_socket(&socket);
    serve::serve_gofers(manager.clone(), &slots)
        .with_context(|| format!("listen at {}", slots.display()))?;
    if let Some(address) = metrics {
        http::serve(manager.clone(), address).with_context(|| format!("listen at {address}"))?;
    }
    if let Some(node) = node {
        let client = kube::Client::try_default()
            .await
            .context("connect to the apiserver")?;
        let reporter = Reporter::new(client, node, manager.clone(), presence.clone());
        tokio::spawn(reporter.run());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = presence.run(&manager) => {}
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

#[allow(clippy::print_stdout)] // the answer to whoever asked
fn say(line: &str) {
    println!("{line}");
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
        "memory held: {} MiB; an adoption takes {} ms; adoptions that failed: {}",
        report.held_bytes >> 20,
        report.adoption_milliseconds,
        report.failed
    );
    println!("Pods that got none: {}", report.misses());
    println!(
        "packets to link-local addresses: {} dropped; Pods where they are not: {}",
        report.link_local_dropped, report.link_local_unguarded
    );
    if !report.handler_problem.is_empty() {
        println!("Pods cannot start: {}", report.handler_problem);
    }
    if !report.problem.is_empty() {
        println!("no warm sandboxes: {}", report.problem);
    }
    Ok(())
}
