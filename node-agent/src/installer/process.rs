// SPDX-License-Identifier: Apache-2.0

//! The process that changes the node, `kiln-node-agent install` and `uninstall`: it goes into the
//! namespaces of the node's containerd, from which there is no way back.

use std::{path::Path, process::ExitCode};

use kiln_node_install::{self as install, Done, Error, Outcome, Payload, config::Config};

/// A change of the node.
#[derive(Debug, Clone, Copy)]
pub enum Change {
    /// Puts on it what `[install]` of the configuration says.
    Install,
    /// Takes that away again.
    Uninstall,
}

/// Makes the change that the file `config` describes, and prints the outcome as a line of JSON.
/// Goes into the namespaces of the node's containerd first if `on_node`. This process must not
/// have a second thread.
///
/// # Errors
/// When the outcome is no JSON, which does not happen.
#[allow(clippy::print_stdout)] // the answer to whoever asked
pub fn run(change: Change, config: &Path, on_node: bool) -> anyhow::Result<ExitCode> {
    let outcome = match make(change, config, on_node) {
        Ok(done) => Outcome::Done(done),
        Err((why, is_installed)) => Outcome::Failed {
            why: why.to_string(),
            is_installed,
        },
    };
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(match outcome {
        Outcome::Done(_) => ExitCode::SUCCESS,
        Outcome::Failed { .. } => ExitCode::FAILURE,
    })
}

/// Makes the change. An error comes with whether an earlier installation is there.
fn make(change: Change, config: &Path, on_node: bool) -> Result<Done, (Error, bool)> {
    let new = |e| (e, false);
    let config = Config::load(config).map_err(|e| new(Error::Config(e.to_string())))?;
    let table = install::installation(&config).map_err(new)?;
    // While this process sees what is in its image, and has no second thread.
    let payload = Payload::open(&table.from);
    // What cannot be read is not there for anybody.
    let failed = |e| (e, install::is_installed(&config).unwrap_or(false));
    if on_node {
        install::enter(&table.containerd.socket).map_err(failed)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|e| new(Error::Config(e.to_string())))?;
    let done = match change {
        Change::Install => runtime.block_on(install::install(&config, &payload)),
        Change::Uninstall => runtime.block_on(install::uninstall(&config)),
    };
    done.map_err(failed)
}
