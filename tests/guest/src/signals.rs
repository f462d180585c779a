// SPDX-License-Identifier: Apache-2.0
//! Waiting for signals without handlers: they are blocked and taken one by one.
//!
//! A blocked signal also reaches the first process of a PID namespace, which otherwise never
//! gets one that it has no handler for.

use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::Failure;

/// What asks a program to end.
pub(crate) const TERMINATION: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT];

/// A set of signals that stays blocked.
pub(crate) struct Blocked(SigSet);

impl Blocked {
    /// Blocks `signals`.
    pub(crate) fn new(signals: impl IntoIterator<Item = Signal>) -> Result<Self, Failure> {
        let set: SigSet = signals.into_iter().collect();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)
            .map_err(Failure::io("block signals"))?;
        Ok(Self(set))
    }

    /// Waits for the next of them.
    pub(crate) fn next(&self) -> Result<Signal, Failure> {
        self.0.wait().map_err(Failure::io("wait for a signal"))
    }

    /// The same signals as a file, for programs that have other things to do.
    pub(crate) fn watch(&self) -> Result<Watch, Failure> {
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        SignalFd::with_flags(&self.0, flags)
            .map(Watch)
            .map_err(Failure::io("watch for signals"))
    }
}

/// Readable once a signal of its set has come.
pub(crate) struct Watch(SignalFd);

impl Watch {
    /// Whether one has come; takes it.
    pub(crate) fn has_one(&self) -> Result<bool, Failure> {
        match self.0.read_signal() {
            Ok(signal) => Ok(signal.is_some()),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(Failure::io("look for signals")(errno)),
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
