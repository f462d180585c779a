// SPDX-License-Identifier: Apache-2.0

//! Commands for users of sandboxes: run, look, suspend, remove.

mod copy;
mod exec;
mod find;
mod forward;
mod list;
mod logs;
mod mode;
mod ready;
mod remove;
mod run;
mod signals;
mod terminal;

use std::process::ExitCode;

use anyhow::{Error, Result, anyhow};
use k8s_openapi::{NamespaceResourceScope, api::core::v1::Pod};
use kiln_crds::{Sandbox, SandboxClaim};
use kube::{Api, Resource};

use crate::{
    args::{Command, Connection, users::Place},
    cluster::Cluster,
};

/// A namespace of a cluster.
pub(crate) struct Space {
    cluster: Cluster,
    name: String,
}

impl Space {
    async fn open(connection: &Connection, place: &Place) -> Result<Self> {
        let cluster = Cluster::connect_for_streams(connection).await?;
        let name = place.namespace.clone();
        Ok(Self {
            name: name.unwrap_or_else(|| cluster.namespace().to_owned()),
            cluster,
        })
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.cluster.client(), &self.name)
    }

    fn claims(&self) -> Api<SandboxClaim> {
        self.api()
    }

    fn sandboxes(&self) -> Api<Sandbox> {
        self.api()
    }

    fn pods(&self) -> Api<Pod> {
        self.api()
    }

    /// Words an error as kubectl does, if the apiserver has answered.
    fn explain(&self, error: kube::Error) -> Error {
        match error {
            // The apiserver's answer for a path, not for an object.
            kube::Error::Api(status) if status.code == 404 && status.reason != "NotFound" => {
                anyhow!("this cluster has no Agent Sandbox; `kilnctl enable` installs it")
            }
            kube::Error::Api(status) if status.code != 401 => {
                anyhow!("error from server ({}): {}", status.reason, status.message)
            }
            // An exec or a port that the apiserver refuses before it becomes a stream.
            kube::Error::UpgradeConnection(e) => anyhow!(e).context("connect to the sandbox"),
            other => self.cluster.explain(other),
        }
    }
}

/// Runs a command of users, and returns its exit code.
///
/// # Errors
/// Those of the command; and for a command that is not one of users.
pub(crate) async fn run(connection: &Connection, command: &Command) -> Result<ExitCode> {
    let open = async |place| Space::open(connection, place).await;
    match command {
        Command::Run(args) => return run::run(&open(&args.place).await?, args).await,
        Command::Exec(args) => {
            let space = open(&args.place).await?;
            let found = find::find(&space, &args.name).await?;
            let target = found.target(args.process.container.as_deref())?;
            return exec::run(&space, &target, &args.process).await;
        }
        Command::Logs(args) => logs::run(&open(&args.place).await?, args).await?,
        Command::List(args) => list::run(&open(&args.place).await?, args).await?,
        Command::Suspend(args) => mode::suspend(&open(&args.place).await?, args).await?,
        Command::Resume(args) => mode::resume(&open(&args.place).await?, args).await?,
        Command::Rm(args) => remove::run(&open(&args.place).await?, args).await?,
        Command::Cp(args) => copy::run(&open(&args.place).await?, args).await?,
        Command::PortForward(args) => forward::run(&open(&args.place).await?, args).await?,
        _ => anyhow::bail!("this is no command of users"),
    }
    Ok(ExitCode::SUCCESS)
}
