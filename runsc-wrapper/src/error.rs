// SPDX-License-Identifier: Apache-2.0

//! Why a runtime could not do what it was asked.

use std::{io, path::PathBuf, time::Duration};

/// Result of a runtime operation.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// Why a runtime operation failed. `op` is the operation as the command line calls it
/// (`create`, `start`, …), `id` the container it was for.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The container or process is not there.
    #[error("{op} {id}: not found: {message}")]
    NotFound {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
        /// The runtime's own words.
        message: String,
    },
    /// The container is there already.
    #[error("{op} {id}: already exists: {message}")]
    AlreadyExists {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
        /// The runtime's own words.
        message: String,
    },
    /// The container is in a state that does not allow it.
    #[error("{op} {id}: not running: {message}")]
    NotRunning {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
        /// The runtime's own words.
        message: String,
    },
    /// The operation took longer than its deadline; what it started was killed.
    #[error("{op} {id}: no answer within {} ms", deadline.as_millis())]
    Timeout {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// The runtime said no.
    #[error("{op} {id}: {message} (exit status {status})")]
    Failed {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
        /// Exit status of the command; 255 for a call over the control socket.
        status: i32,
        /// The runtime's own words.
        message: String,
    },
    /// This runtime cannot do that.
    #[error("{op} {id}: not supported by this runtime")]
    Unsupported {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
    },
    /// The runtime's program could not be run.
    #[error("run {}: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The runtime answered with something that is not an answer.
    #[error("{op} {id}: bad answer: {message}")]
    BadAnswer {
        /// What was asked.
        op: &'static str,
        /// For which container.
        id: String,
        /// What is wrong with it.
        message: String,
    },
    /// A file or socket of ours failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done to which file.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}
