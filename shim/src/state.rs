// SPDX-License-Identifier: Apache-2.0

//! The life of one process, init or exec:
//!
//! ```text
//! Created ── Started ──► Running ◄─ Resumed/Paused ─► Paused
//!    │                      │                            │
//!    └────── Exited ────────┴────────── Exited ──────────┴──► Stopped
//! ```
//!
//! Nothing leads out of `Stopped`; what else does not fit is refused.

use runsc_wrapper::Exit;

/// What a process is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Made, not started.
    Created,
    /// Running.
    Running,
    /// Its sandbox is paused.
    Paused,
    /// Ended.
    Stopped(Exit),
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The runtime started it.
    Started,
    /// Its sandbox was paused.
    Paused,
    /// Its sandbox goes on.
    Resumed,
    /// It ended, or was discarded before it started.
    Exited(Exit),
}

impl State {
    /// The state after `event`, or `None` where the event cannot happen.
    pub fn next(self, event: Event) -> Option<Self> {
        match (self, event) {
            (Self::Created, Event::Started) | (Self::Paused, Event::Resumed) => Some(Self::Running),
            (Self::Running, Event::Paused) => Some(Self::Paused),
            (Self::Created | Self::Running | Self::Paused, Event::Exited(exit)) => {
                Some(Self::Stopped(exit))
            }
            _ => None,
        }
    }

    /// How the process ended, if it has.
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// The state as containerd's users know it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_event_is_decided() {
        let first = Exit::now(1);
        let second = Exit::now(2);
        let states = [
            State::Created,
            State::Running,
            State::Paused,
            State::Stopped(first),
        ];
        let events = [
            Event::Started,
            Event::Paused,
            Event::Resumed,
            Event::Exited(second),
        ];
        let stopped = Some(State::Stopped(second));
        let table = [
            [Some(State::Running), None, None, stopped],
            [None, Some(State::Paused), None, stopped],
            [None, None, Some(State::Running), stopped],
            [None, None, None, None],
        ];
        for (state, row) in states.into_iter().zip(table) {
            for (event, expected) in events.into_iter().zip(row) {
                assert_eq!(state.next(event), expected, "{state:?} {event:?}");
            }
        }
    }
}
