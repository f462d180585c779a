// SPDX-License-Identifier: Apache-2.0

//! How often the runtime's program is run for one Pod.
//!
//! Counted on a node whose runsc is a script that writes down its arguments and becomes runsc.
//! What runsc starts of itself, gofers and sentries, does not pass through the script.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::{Node, NodeOpts},
    tools,
};

use crate::{figures, progress, results::Results, rounds, side::Side};

/// Commands of runsc that a shim may use, as they stand in its arguments.
const COMMANDS: [&str; 17] = [
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "kill",
    "list",
    "pause",
    "ps",
    "restore",
    "resume",
    "start",
    "state",
    "update",
    "wait",
    "--version",
];

/// Runs a Pod with one container up and down, and counts.
///
/// # Errors
/// What failed.
pub(crate) async fn count(opts: &NodeOpts, side: Side, results: &mut Results) -> Result<()> {
    let dir = tempfile::Builder::new()
        .prefix("kiln-bench-")
        .tempdir()
        .context("make a directory")?;
    let log = dir.path().join("runs");
    let script = dir.path().join("runsc");
    write_script(&script, &log)?;
    let node = Node::start(NodeOpts {
        runsc: Some(script),
        ..opts.clone()
    })
    .await
    .context("start a node")?;
    // containerd asks every handler for its features when it starts: not a cost of a Pod.
    let before = read(&log)?.lines().count();
    let done = up_and_down(&node, side).await;
    node.stop().await.and(done)?;

    let runs = read(&log)?;
    let commands: Vec<_> = runs.lines().skip(before).map(command).collect();
    ensure!(!commands.is_empty(), "the Pod ran without the runtime");
    progress(&format!("  {}: {}", side.title(), commands.join(", ")));
    results.add(side, &figures::CLI_RUNS, commands.len() as f64);
    Ok(())
}

/// What the script has written down so far.
fn read(log: &Path) -> Result<String> {
    match fs::read_to_string(log) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text.with_context(|| format!("read {}", log.display())),
    }
}

fn write_script(script: &Path, log: &Path) -> Result<()> {
    let runsc = tools::program("runsc")?;
    // One write to a file that is open for appending is not torn by others.
    let text = format!(
        "#!/bin/sh\necho \"$*\" >>'{}'\nexec '{}' \"$@\"\n",
        log.display(),
        runsc.display()
    );
    fs::write(script, text).with_context(|| format!("write {}", script.display()))?;
    fs::set_permissions(script, fs::Permissions::from_mode(0o755))
        .context("make the script executable")
}

async fn up_and_down(node: &Node, side: Side) -> Result<()> {
    let pod = node.pod(side.handler()).run().await?;
    let container = pod.idle().start().await?;
    container.stop(0).await?;
    container.remove().await?;
    pod.stop().await?;
    rounds::remove(&pod).await?;
    node.expect_gone(pod.id()).await
}

/// The command in a line of arguments.
fn command(arguments: &str) -> &str {
    let mut words = arguments.split(' ');
    words
        .find(|word| COMMANDS.contains(word))
        .unwrap_or(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_found_behind_the_flags() {
        assert_eq!(command("--root=/r --log=/l kill --all abc 9"), "kill");
        assert_eq!(command("--version"), "--version");
        assert_eq!(command("--root=/r frobnicate"), "--root=/r frobnicate");
    }
}
