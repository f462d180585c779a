// SPDX-License-Identifier: Apache-2.0

//! `kiln-node-agent`: see the library.

#![forbid(unsafe_code)]

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use kiln_agent_api::{SOCKET, gofer_socket};
use kiln_host::reap;
use kiln_node_agent::{
    cluster::{Outcomes, Reporter, SnapshotReporter},
    installer::{
        Installer,
        process::{self, Change},
    },
    report,
    serve::{self, http},
    snapshots::Snapshots,
    warm::WarmManager,
};
use kiln_node_install::config::Config;
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
        start_logging(args.log_json);
        let (change, place) = match verb {
            Verb::Install(place) => (Change::Install, place),
            Verb::Uninstall(place) => (Change::Uninstall, place),
        };
        return process::run(change, &args.config, place.on_node);
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(socket) = args.report {
        return report::print(&socket).await;
    }
    start_logging(args.log_json);
    let config = Config::load(&args.config)?;
    let state = config.state.clone();
    let (socket, metrics) = (config.socket.clone(), config.metrics);
    let installs = config.install.is_some();
    let snapshots = config.snapshots.clone();
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
    let installer = Installer::new(args.config, installs);
    let snapshots = match snapshots {
        Some(config) => {
            let dir = config.dir.clone();
            let opened = Snapshots::open(config);
            let opened = opened.with_context(|| format!("use the directory {}", dir.display()))?;
            Some(Arc::new(opened))
        }
        None => None,
    };
    let (outcomes, told) = Outcomes::channel();
    let shims = serve::Shims {
        manager: manager.clone(),
        snapshots: snapshots.clone(),
        outcomes,
    };
    let mut server = serve::serve(shims, &installer, &socket)
        .await
        .with_context(|| format!("listen at {}", socket.display()))?;
    let gofers = gofer_socket(&socket);
    serve::serve_gofers(manager.clone(), &gofers)
        .with_context(|| format!("listen at {}", gofers.display()))?;
    if let Some(address) = metrics {
        http::serve(manager.clone(), snapshots.clone(), address)
            .with_context(|| format!("listen at {address}"))?;
    }
    if let Some(node) = node {
        let client = kube::Client::try_default()
            .await
            .context("connect to the apiserver")?;
        if let Some(snapshots) = snapshots {
            let reporter = SnapshotReporter::new(client.clone(), node.clone(), snapshots);
            tokio::spawn(reporter.run(told));
        }
        let reporter = Reporter::new(client, node, manager.clone(), installer.clone());
        tokio::spawn(reporter.run());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        () = installer.run(&manager) => {}
        _ = terminate.recv() => info!("ending; warm sandboxes stay for the next agent"),
        _ = interrupt.recv() => info!("ending; warm sandboxes stay for the next agent"),
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
