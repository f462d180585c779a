// SPDX-License-Identifier: Apache-2.0

//! Why a call failed, and the one place that turns it into a ttrpc status.

use std::{io, path::Path};

use containerd_shim_protos::ttrpc::{self, Code};
use kiln_agent_api::NodeConfigError;
use kiln_host::cgroup::CgroupError;
use runsc_wrapper::{InvalidId, RuntimeError};

/// Result of a shim operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the shim could not do what containerd asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request or the bundle is not acceptable, whatever the state.
    #[error("{0}")]
    InvalidArgument(String),
    /// Node configuration does not allow it.
    #[error("{0}")]
    Denied(String),
    /// There is no such container or process.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// `container` or `exec`.
        kind: &'static str,
        /// Its id.
        id: String,
    },
    /// There is such a container or process already.
    #[error("{kind} {id:?} already exists")]
    AlreadyExists {
        /// `container` or `exec`.
        kind: &'static str,
        /// Its id.
        id: String,
    },
    /// The container or process is not in a state that allows it.
    #[error("cannot {op} {id:?}: it is {state}")]
    WrongState {
        /// What was asked.
        op: &'static str,
        /// Of which container or process.
        id: String,
        /// What it is doing.
        state: &'static str,
    },
    /// This shim does not do that.
    #[error("{0} is not implemented")]
    Unimplemented(&'static str),
    /// The OCI runtime failed.
    #[error("{0}")]
    Runtime(#[from] RuntimeError),
    /// The cgroup of a sandbox failed.
    #[error("{0}")]
    Cgroup(#[from] CgroupError),
    /// A file, mount or socket failed.
    #[error("{what}: {source}")]
    Io {
        /// What was done to which file.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A mount of the container's root file system failed.
    #[error("mount rootfs: {0}")]
    Mount(String),
}

impl Error {
    /// Wraps the error of `what` being done to `path`.
    pub(crate) fn io(what: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let what = format!("{what} {}", path.display());
        move |source| Self::Io { what, source }
    }

    fn code(&self) -> Code {
        match self {
            Self::InvalidArgument(_) | Self::Cgroup(CgroupError::Path(_)) => Code::INVALID_ARGUMENT,
            Self::Denied(_) => Code::PERMISSION_DENIED,
            Self::NotFound { .. } | Self::Runtime(RuntimeError::NotFound { .. }) => Code::NOT_FOUND,
            Self::AlreadyExists { .. } | Self::Runtime(RuntimeError::AlreadyExists { .. }) => {
                Code::ALREADY_EXISTS
            }
            Self::WrongState { .. } | Self::Runtime(RuntimeError::NotRunning { .. }) => {
                Code::FAILED_PRECONDITION
            }
            Self::Unimplemented(_) | Self::Runtime(RuntimeError::Unsupported { .. }) => {
                Code::UNIMPLEMENTED
            }
            Self::Runtime(RuntimeError::Timeout { .. }) => Code::DEADLINE_EXCEEDED,
            Self::Runtime(RuntimeError::Failed { .. }) => Code::UNKNOWN,
            Self::Runtime(
                RuntimeError::Spawn { .. }
                | RuntimeError::BadAnswer { .. }
                | RuntimeError::Io { .. },
            )
            | Self::Io { .. }
            | Self::Cgroup(CgroupError::Io { .. })
            | Self::Mount(_) => Code::INTERNAL,
        }
    }
}

impl From<NodeConfigError> for Error {
    fn from(e: NodeConfigError) -> Self {
        Self::InvalidArgument(e.to_string())
    }
}

impl From<InvalidId> for Error {
    fn from(e: InvalidId) -> Self {
        Self::InvalidArgument(e.to_string())
    }
}

impl From<Error> for ttrpc::Error {
    fn from(e: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(e.code(), e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[track_caller]
    fn check(e: Error, code: Code) {
        match ttrpc::Error::from(e) {
            ttrpc::Error::RpcStatus(status) => assert_eq!(status.code(), code),
            other => panic!("no status: {other}"),
        }
    }

    #[test]
    fn containerd_sees_the_code_that_it_acts_on() {
        let id = || "c1".to_owned();
        let words = || "runsc said so".to_owned();
        check(Error::InvalidArgument(words()), Code::INVALID_ARGUMENT);
        check(Error::Denied(words()), Code::PERMISSION_DENIED);
        check(
            Error::NotFound {
                kind: "exec",
                id: id(),
            },
            Code::NOT_FOUND,
        );
        check(
            Error::AlreadyExists {
                kind: "exec",
                id: id(),
            },
            Code::ALREADY_EXISTS,
        );
        check(
            Error::WrongState {
                op: "exec",
                id: id(),
                state: "stopped",
            },
            Code::FAILED_PRECONDITION,
        );
        check(Error::Unimplemented("x"), Code::UNIMPLEMENTED);
        let (op, message) = ("kill", words);
        check(
            RuntimeError::NotFound {
                op,
                id: id(),
                message: message(),
            }
            .into(),
            Code::NOT_FOUND,
        );
        check(
            RuntimeError::NotRunning {
                op,
                id: id(),
                message: message(),
            }
            .into(),
            Code::FAILED_PRECONDITION,
        );
        check(
            RuntimeError::Failed {
                op,
                id: id(),
                status: 1,
                message: message(),
            }
            .into(),
            Code::UNKNOWN,
        );
        let deadline = Duration::from_secs(1);
        check(
            RuntimeError::Timeout {
                op,
                id: id(),
                deadline,
            }
            .into(),
            Code::DEADLINE_EXCEEDED,
        );
    }
}
