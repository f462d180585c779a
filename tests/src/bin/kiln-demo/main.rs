// SPDX-License-Identifier: Apache-2.0

//! `kiln-demo`: Pods in gVisor, shown to a person at a terminal.
//!
//! It starts a containerd of its own with our handler, goes through the life of three Pods with
//! the commands that a user would type, checks what it claims, and takes everything away again.
//! It needs root, and no network.
//!
//! - [`tour`] has the chapters;
//! - [`session`] runs commands and shows what they do;
//! - [`screen`] is how that looks;
//! - [`manifest`] goes from a `Sandbox` to what `crictl` wants;
//! - [`posture`] is a sentry as the host sees it;
//! - [`http`] is one GET.

mod http;
mod manifest;
mod posture;
mod screen;
mod session;
mod tour;

use std::{path::Path, process::ExitCode};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::{Node, NodeOpts},
    tools,
};
use nix::unistd::Uid;

use crate::{manifest::Sandbox, screen::Screen, session::Session};

/// Lines of containerd's log that are shown of a failure.
const LOG_LINES: usize = 12;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut screen = Screen::new();
    let done = tokio::select! {
        done = run(&mut screen) => done,
        // Dropped, the node takes everything of itself away.
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; everything is taken away")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            screen::complain(&format!("\nkiln-demo: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(screen: &mut Screen) -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "needs root: it starts a containerd"
    );
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("find the workspace")?;
    let sandbox = Sandbox::read(&root.join("deploy/examples/sandbox.yaml"))?;
    let shim = tools::installed_shim()?;

    screen.title("Kiln: Pods in gVisor, on a containerd of this demo's own")?;
    tour::versions(screen, &shim).await?;
    screen.chapter("Start containerd", tour::START)?;
    let opts = NodeOpts {
        shim: Some(shim),
        ..NodeOpts::default()
    };
    let (node, took) = screen
        .waiting("making images, starting containerd", Node::start(opts))
        .await;
    let node = node.context("start containerd")?;

    let mut session = Session::new(screen, &node)?;
    session.time("containerd and images", took)?;
    if let Err(e) = tour::pods(&mut session, &sandbox).await {
        complaints(&node.log());
        return Err(e);
    }
    let timings = session.end();

    let dir = node.dir().to_owned();
    node.stop().await.context("stop containerd")?;
    ensure!(!dir.exists(), "{} is left", dir.display());
    screen.check("containerd has ended, and its directory and cgroup are gone")?;
    screen.timings(&timings)
}

/// Shows what containerd and the shims have complained of lately.
fn complaints(log: &str) {
    let is_complaint =
        |line: &&str| !line.contains(" level=info ") && !line.contains(" level=debug ");
    let lines: Vec<_> = log
        .lines()
        .rev()
        .filter(is_complaint)
        .take(LOG_LINES)
        .collect();
    screen::complain("\nwarnings and errors in containerd's log:");
    for line in lines.into_iter().rev() {
        screen::complain(line);
    }
}
