// SPDX-License-Identifier: Apache-2.0
//! `trap`: shows which signals arrive.

use nix::sys::signal::Signal;

use crate::Failure;
use crate::print;
use crate::signals::Blocked;

/// Exit code after TERM: tells an orderly end from a kill.
const TERMINATED: u8 = 3;

/// Prints `ready`, then the name of each signal; TERM ends it.
pub(crate) fn run(_: &[String]) -> Result<u8, Failure> {
    // KILL and STOP cannot be blocked.
    let catchable = Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP));
    let signals = Blocked::new(catchable)?;
    print("ready\n")?;
    loop {
        let signal = signals.next()?;
        print(&format!("{signal}\n"))?;
        if signal == Signal::SIGTERM {
            return Ok(TERMINATED);
        }
    }
}
