// SPDX-License-Identifier: Apache-2.0

//! The first process of a warm sandbox, as the pause image is that of a cold one: it takes the
//! processes that lose their parent, and ends when it is told to.
//!
//! `kiln-pause hostname NAME` instead gives the sandbox its name, and ends.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt as _, process::ExitCode};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::sethostname,
};

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let done = match args.as_slice() {
        [verb, name] if verb == OsStr::from_bytes(b"hostname") => sethostname(name),
        _ => pause(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(errno) => ExitCode::from(u8::try_from(errno as i32).unwrap_or(u8::MAX)),
    }
}

/// Reaps children until TERM or INT.
fn pause() -> nix::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]);
    signals.thread_block()?;
    loop {
        // Before the first wait too: a child may have ended before the signal was blocked.
        reap()?;
        if signals.wait()? != Signal::SIGCHLD {
            return Ok(());
        }
    }
}

/// Takes every child that has ended; one signal may stand for many.
fn reap() -> nix::Result<()> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
