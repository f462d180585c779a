// SPDX-License-Identifier: Apache-2.0

//! From a container to the node: a process of this program goes into containerd's namespaces, and
//! tells the one that started it what came of it.

use std::{path::Path, process::Stdio};

use kiln_host::reap;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::{Done, Error, containerd::listening_process};

/// The namespaces that programs of the node, such as `systemctl`, expect to be in.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWUTS
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWNET)
    .union(CloneFlags::CLONE_NEWCGROUP)
    .union(CloneFlags::CLONE_NEWNS);

/// Goes where the containerd that listens at `socket` is. This process must have one thread.
///
/// # Errors
/// When there is none, or this process may not.
pub fn enter(socket: &Path) -> Result<(), Error> {
    let process = listening_process(socket)?;
    setns(process, NAMESPACES).map_err(|e| Error::Lacks {
        what: format!("enter the namespaces of containerd: {e}"),
        advice: "run this privileged (securityContext.privileged)".to_owned(),
    })
}

/// What a process on the node tells the one that started it, on its standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It is done.
    Done(Done),
    /// It is not.
    Failed {
        /// Why.
        why: String,
        /// Whether something was installed before, and still is.
        is_installed: bool,
    },
}

/// Runs `install` or `uninstall`, given by `verb`, of this program on the node.
pub async fn run_on_node(verb: &str, config: &Path) -> Outcome {
    let failed = |why: String| Outcome::Failed {
        why,
        is_installed: false,
    };
    let mut command = Command::new("/proc/self/exe");
    command
        .arg("--config")
        .arg(config)
        .args([verb, "--on-node"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    // The agent reaps whatever else ends.
    let done = match reap::spawn(&mut command) {
        // Not killed when this one is told to end: it is to finish what it has begun.
        Ok((child, _owned)) => child.wait_with_output().await,
        Err(e) => Err(e),
    };
    match done {
        Ok(done) => serde_json::from_slice(&done.stdout)
            .unwrap_or_else(|_| failed(format!("the installer has ended by {}", done.status))),
        Err(e) => failed(format!("run the installer: {e}")),
    }
}
