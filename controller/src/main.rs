// SPDX-License-Identifier: Apache-2.0

//! The controller of Agent Sandbox.
//!
//! Watches fill caches and put objects into one queue; a few tasks at a time take one out, decide
//! from the caches what it should be, and write what differs. Only the leader writes.

#![forbid(unsafe_code)]

mod args;
mod blocked;
mod cache;
mod claim;
mod client;
mod condition;
mod context;
mod controller;
mod enqueue;
mod error;
mod event;
mod http;
mod index;
mod kind;
mod known;
mod lease;
mod lock;
mod marks;
mod memory;
mod metrics;
mod node;
mod observed;
mod options;
mod owner;
mod patch;
mod pool;
mod quantity;
mod queue;
mod request;
mod sandbox;
mod shape;
mod snapshot;
mod store;
mod template;
mod watch;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use kube::{Client, Config};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    args::Args,
    context::Context,
    controller::Controller,
    error::Error,
    http::Probes,
    lease::Candidate,
    metrics::Metrics,
    queue::{Lane, Outcome, Work},
    watch::Synced,
};

/// After this time without a word an apiserver has gone; longer than any watch ([`watch`]).
const SILENCE: Duration = Duration::from_secs(90);
/// How long work that has begun may go on after the process was told to end.
const FAREWELL: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    let (args, unknown) = Args::of_process();
    start_logging(args.log_json);
    for argument in unknown {
        warn!("{argument} is upstream's, or wrong, and means nothing here");
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(args.threads.max(1))
        .enable_all()
        .build()
        .context("start the runtime")?
        .block_on(run(&args))
}

fn start_logging(as_json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| "info,kube=warn,kube_lease_manager=warn".into());
    let format = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    if as_json {
        format.json().init();
    } else {
        format.init();
    }
}

async fn run(args: &Args) -> anyhow::Result<()> {
    let client = client().await.context("find the apiserver")?;
    let options = args.options().context("flags")?;
    let snapshots = args.extensions && snapshot::are_ours(&client).await;
    let context = Arc::new(Context::new(
        client.clone(),
        options,
        snapshots,
        args.limits(),
        Metrics::new(),
    ));
    let controller = Arc::new(Controller::new(Arc::clone(&context)));
    let synced = Arc::new(Synced::default());
    let probes = Probes {
        context,
        synced: Arc::clone(&synced),
    };
    let mut addresses = vec![args.metrics_bind_address, args.health_probe_bind_address];
    addresses.dedup();
    for address in addresses.into_iter().flatten() {
        let serving = probes.clone().serve(address);
        serving.with_context(|| format!("listen on {address}"))?;
    }
    let stop = stop_on_signal()?;
    controller.watch(&synced, args.extensions);
    tokio::select! {
        () = synced.complete() => info!("caches are filled"),
        () = stop.cancelled() => return Ok(()),
    }
    lead(args, client, &controller, &stop).await?;
    info!("ended");
    Ok(())
}

/// A client of the apiserver.
async fn client() -> anyhow::Result<Client> {
    let mut config = Config::infer().await?;
    config.read_timeout = Some(SILENCE);
    // An idle connection is silent as well: it counts from the request that uses it.
    config.reset_reader_on_write = true;
    // The queue tries again, with pauses of its own, and sees what an apiserver is too busy for.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

/// Cancelled by SIGTERM and SIGINT.
fn stop_on_signal() -> anyhow::Result<CancellationToken> {
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

/// Works for as long as this is the leader.
async fn lead(
    args: &Args,
    client: Client,
    controller: &Arc<Controller>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    if !args.leader_elect {
        return dispatch(controller, stop.cancelled()).await;
    }
    let mut candidate = Candidate::new(client, &args.leader_election_namespace)
        .await
        .context("set up the Lease")?;
    tokio::select! {
        won = candidate.won() => won.context("wait for the Lease")?,
        () = stop.cancelled() => return Ok(()),
    }
    info!("leading");
    let over = async {
        tokio::select! {
            () = candidate.lost() => {}
            () = stop.cancelled() => {}
        }
    };
    dispatch(controller, over).await?;
    anyhow::ensure!(stop.is_cancelled(), "another controller may lead now");
    // What was begun has ended: the next one need not wait for the Lease's end.
    tokio::time::timeout(FAREWELL, candidate.leave()).await.ok();
    Ok(())
}

/// Has the queue worked on until `stop`, and waits for what has begun.
async fn dispatch(
    controller: &Arc<Controller>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let tasks = TaskTracker::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            (work, lane) = controller.context.queue.next() => {
                tasks.spawn(process(Arc::clone(controller), work, lane));
            }
            () = &mut stop => break,
        }
    }
    tasks.close();
    tokio::time::timeout(FAREWELL, tasks.wait())
        .await
        .context("end what has begun")?;
    Ok(())
}

async fn process(controller: Arc<Controller>, work: Work, lane: Lane) {
    let context = &controller.context;
    let mut running = Running {
        context: Arc::clone(context),
        work,
        outcome: Outcome::Failed,
    };
    let work = &running.work;
    let start = Instant::now();
    let result = controller.reconcile(work, lane).await;
    let outcome = result.unwrap_or_else(|e| {
        if matches!(e, Error::Heavy) {
            return Outcome::Heavy;
        }
        warn!("{:?} {}: {e}", work.kind, work.key);
        Outcome::Failed
    });
    if outcome != Outcome::Heavy {
        let took = start.elapsed();
        context.metrics.reconciled(work.kind, outcome, took);
    }
    running.outcome = outcome;
}

/// Work that is under way; the queue learns of its end also when it panics.
struct Running {
    context: Arc<Context>,
    work: Work,
    outcome: Outcome,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.context.queue.done(&self.work, self.outcome);
    }
}
