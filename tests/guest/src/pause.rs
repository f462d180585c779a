// SPDX-License-Identifier: Apache-2.0
//! `pause`: the first process of a Pod. Does nothing but adopt and reap.

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use crate::Failure;
use crate::signals::Blocked;

/// Reaps children until TERM or INT.
pub(crate) fn run(_: &[String]) -> Result<u8, Failure> {
    let signals = Blocked::new([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD])?;
    loop {
        // Before the first wait too: a child may have ended before the signal was blocked.
        reap()?;
        if signals.next()? != Signal::SIGCHLD {
            return Ok(0);
        }
    }
}

/// Takes every child that has ended; one signal may stand for many.
fn reap() -> Result<(), Failure> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::io("wait for children")(errno)),
        }
    }
}
