// SPDX-License-Identifier: Apache-2.0

//! `kilnctl`, also as `kubectl kiln`: runs commands in sandboxes; puts Agent Sandbox on a cluster,
//! says what is there, and takes it away again; and does the same for the handler on single nodes,
//! without a cluster.
//!
//! What is put on a cluster is in the program: the files of `deploy/crds` and `deploy/base`. They
//! are applied by server-side apply as field manager `kilnctl` and labelled, and only what has
//! that label is ever taken away.

#![forbid(unsafe_code)]

mod args;
mod cluster;
mod disable;
mod enable;
mod manifests;
mod node;
mod nodes;
mod output;
mod owner;
mod proxy;
mod rollout;
mod sandbox;
mod status;

use std::process::ExitCode;

use anyhow::Context as _;
use args::{Args, Command, NodeCommand};
use cluster::Cluster;

fn main() -> ExitCode {
    let args = Args::of_process();
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .and_then(|runtime| {
            let done = runtime.block_on(run(args));
            // A read of a terminal does not end by itself.
            runtime.shutdown_background();
            done
        });
    match done {
        Ok(code) => code,
        Err(e) => {
            output::complain(&format!("{e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let cluster = async || Cluster::connect(&args.connection).await;
    match &args.command {
        Command::Enable(args) => enable::run(&cluster().await?, args).await?,
        Command::Status { output } => return status::run(&cluster().await?, *output).await,
        Command::Disable(args) => disable::run(&cluster().await?, args).await?,
        Command::Node(NodeCommand::Status { socket, output }) => {
            node::status::run(socket, *output).await?;
        }
        Command::Node(NodeCommand::Preflight(args)) => return node::preflight::run(args).await,
        Command::Node(NodeCommand::Enable(args)) => node::install::enable(args).await?,
        Command::Node(NodeCommand::Disable(args)) => node::install::disable(args).await?,
        Command::Version => output::say(concat!("kilnctl ", env!("CARGO_PKG_VERSION"))),
        Command::Completion { shell } => output::write(&args::completion(*shell)),
        users => return sandbox::run(&args.connection, users).await,
    }
    Ok(ExitCode::SUCCESS)
}
