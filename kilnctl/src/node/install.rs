// SPDX-License-Identifier: Apache-2.0

//! Puts on this node what Pods of the class need, and takes it away again, as the node's agent
//! does in a cluster.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use kiln_node_install::{Done, Payload, SHIM, config::Config, install, uninstall};

use crate::{
    args::{NodeDisable, NodeEnable},
    output::say,
};

/// Puts it there.
///
/// # Errors
/// What the node lacks; then it is as it was.
pub(crate) async fn enable(args: &NodeEnable) -> Result<()> {
    expect_root()?;
    let mut config = configuration(args.config.as_deref())?;
    let table = config.install.get_or_insert_default();
    if let Some(from) = args.from.clone().or_else(beside_this) {
        table.from = from;
    }
    if let Some(runsc) = &args.runsc {
        table.runsc = Some(runsc.clone());
    }
    let payload = Payload::open(&table.from);
    tell(&install(&config, &payload).await?);
    Ok(())
}

/// Takes it away.
///
/// # Errors
/// What cannot be taken away.
pub(crate) async fn disable(args: &NodeDisable) -> Result<()> {
    expect_root()?;
    let mut config = configuration(args.config.as_deref())?;
    config.install.get_or_insert_default();
    let done = uninstall(&config).await?;
    ensure!(
        done.in_use == 0,
        "nothing was changed: {}. End them, and run this again.",
        done.words
    );
    tell(&done);
    Ok(())
}

fn expect_root() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run this as root: it changes the node"
    );
    Ok(())
}

fn configuration(file: Option<&Path>) -> Result<Config> {
    match file {
        Some(file) => Config::load(file).context("read the configuration"),
        None => Ok(Config::default()),
    }
}

/// The directory of this program, where the others lie beside it.
fn beside_this() -> Option<std::path::PathBuf> {
    let dir = std::env::current_exe().ok()?.parent()?.to_owned();
    dir.join(SHIM).exists().then_some(dir)
}

fn tell(done: &Done) {
    let how = match (done.changed, done.restarted) {
        (false, false) => "nothing had to be changed: ",
        (true, false) => "changed, without starting containerd anew: ",
        (_, true) => "containerd was started anew: ",
    };
    say(&format!("{how}{}", done.words));
}
