// SPDX-License-Identifier: Apache-2.0

//! `kiln-router`: see the library.

#![forbid(unsafe_code)]

use std::{env, net::SocketAddr, sync::Arc};

use anyhow::{Context, Result};
use caps::CapSet;
use clap::Parser;
use kiln_http::{Listener, bind, serve, serve_probes};
use kiln_router::{Args, CONNECTION_BYTES, Metrics, Probes, Router};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

fn main() -> Result<()> {
    let args = Args::parse();
    start_logging(args.log_json);
    // It needs none, whoever it was started as. Before there are threads: each has its own.
    for set in [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable] {
        caps::clear(None, set).context("give up capabilities")?;
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(args.threads.max(1))
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(&args))
}

fn start_logging(as_json: bool) {
    let filter =
        tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    let format = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if as_json {
        format.json().init();
    } else {
        format.init();
    }
}

async fn run(args: &Args) -> Result<()> {
    // The router is not ready from the one on, and takes no connection from the other on.
    let (leaving, stop) = (stop_on_signal()?, CancellationToken::new());
    let metrics = Arc::new(Metrics::default());
    let tunnels = TaskTracker::new();
    let router = Arc::new(Router {
        auth: args.auth(env::var("ROUTER_AUTH_TOKEN").ok().as_deref())?,
        networks: args.networks()?,
        domain: args.cluster_domain.trim_matches('.').to_owned(),
        limits: args.limits(),
        metrics: Arc::clone(&metrics),
        stop: stop.clone(),
        tunnels: tunnels.clone(),
    });
    if matches!(router.auth, kiln_router::Auth::Open) {
        warn!("everybody who reaches this router may use it");
    }
    let listeners = listeners(args, &stop)?;
    let counts = metrics.connections();
    let probes = Probes {
        metrics,
        stop: leaving.clone(),
    };
    // These answer until the process ends, so that its end can be seen.
    let mut addresses = vec![args.health_probe_bind_address, args.metrics_bind_address];
    addresses.dedup();
    for address in addresses {
        let probes = probes.clone();
        let serving = serve_probes(address, move |path| probes.answer(path));
        let address = serving.with_context(|| format!("listen on {address}"))?;
        info!("listens on {address}");
    }
    let networks = router.networks.pods();
    info!("sandboxes are in {networks:?}");
    if args.guesses() {
        warn!("that is a guess: whatever else is in these networks can be reached, too");
    }
    let bounds = args.bounds();
    info!(
        "up to {} connections take {} MiB at most",
        bounds.connections,
        bounds.connections.saturating_mul(CONNECTION_BYTES) >> 20
    );
    let answer = move |request, client| {
        let router = Arc::clone(&router);
        async move { router.answer(request, client).await }
    };
    let serving = serve(listeners, bounds, counts, stop.clone(), answer);
    leaving.cancelled().await;
    info!("ends");
    sleep(args.shutdown_delay).await;
    stop.cancel();
    tunnels.close();
    if !serving.ended(args.shutdown_timeout).await {
        warn!("some requests had no answer in time");
    }
    tunnels.wait().await;
    Ok(())
}

/// The addresses for clients.
fn listeners(args: &Args, stop: &CancellationToken) -> Result<Vec<Listener>> {
    let mut listeners = vec![Listener {
        socket: listen(args.http_bind_address)?,
        tls: None,
    }];
    if let (Some(address), Some(tls)) = (args.https_bind_address, args.tls()?) {
        tokio::spawn(Arc::clone(&tls).reload(stop.clone()));
        listeners.push(Listener {
            socket: listen(address)?,
            tls: Some(tls),
        });
    }
    Ok(listeners)
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listener = bind(address).with_context(|| format!("listen on {address}"))?;
    info!("listens on {}", listener.local_addr()?);
    Ok(listener)
}

/// Cancelled by SIGTERM and SIGINT.
fn stop_on_signal() -> Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate()).context("wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("wait for SIGINT")?;
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopped.cancel();
    });
    Ok(stop)
}
