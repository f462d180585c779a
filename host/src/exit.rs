// SPDX-License-Identifier: Apache-2.0

//! The end of a process.

use std::{os::unix::process::ExitStatusExt, process::ExitStatus, time::SystemTime};

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal number.
    pub code: u32,
    /// When it was noticed.
    pub at: SystemTime,
}

impl Exit {
    /// Code that stands for a process killed by `SIGKILL`.
    pub const KILLED: u32 = 128 + 9;

    /// An exit with `code`, noticed now.
    pub fn now(code: u32) -> Self {
        Self {
            code,
            at: SystemTime::now(),
        }
    }

    /// Decodes a wait status as `waitpid(2)` returns it, noticed now.
    pub fn from_wait_status(status: i32) -> Self {
        let status = ExitStatus::from_raw(status);
        let code = match (status.code(), status.signal()) {
            (Some(code), _) => code.cast_unsigned(),
            (None, Some(signal)) => 128 + signal.cast_unsigned(),
            (None, None) => Self::KILLED,
        };
        Self::now(code)
    }
}
