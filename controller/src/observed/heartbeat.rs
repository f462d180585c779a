// SPDX-License-Identifier: Apache-2.0

//! Which nodes report. That a heartbeat is new is seen by its change and by our own clock: the
//! node's may be wrong, or jump.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;

/// Heartbeats, by node.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats(HashMap<String, Heartbeat>);

#[derive(Debug)]
struct Heartbeat {
    beat: Timestamp,
    /// When it came; none if it was old already.
    came: Option<Instant>,
}

impl Heartbeats {
    /// Notes the heartbeat of a node at `now`, which is `clock` by our clock. Only the first one
    /// that is seen of a node is told by its time to be new: a controller that has just begun
    /// knows no other.
    pub(super) fn note(&mut self, node: &str, beat: Timestamp, now: Instant, clock: Timestamp) {
        let came = match self.0.get(node) {
            Some(known) if known.beat == beat => return,
            Some(_) => Some(now),
            None => match Duration::try_from(clock.duration_since(beat)) {
                Ok(age) => now.checked_sub(age),
                Err(_) => Some(now),
            },
        };
        self.0.insert(node.to_owned(), Heartbeat { beat, came });
    }

    pub(super) fn forget(&mut self, node: &str) {
        self.0.remove(node);
    }

    /// Whether the last heartbeat of a node came within `timeout` before `now`.
    pub(super) fn is_alive(&self, node: &str, now: Instant, timeout: Duration) -> bool {
        let came = self.0.get(node).and_then(|heartbeat| heartbeat.came);
        came.is_some_and(|came| now.duration_since(came) <= timeout)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(60);

    /// What is thought of a node `after` seconds after heartbeats at `(second, time)`: when they
    /// came, and what time it was on the node. Our clock is right.
    fn beats(seen: &[(u64, i64)], after: u64) -> bool {
        let (start, noon) = (Instant::now() + 10 * TIMEOUT, Timestamp::UNIX_EPOCH);
        let at = |second: u64| start + Duration::from_secs(second);
        let time = |second: i64| noon + jiff::SignedDuration::from_secs(second);
        let mut heartbeats = Heartbeats::default();
        for (second, beat) in seen {
            let clock = time(i64::try_from(*second).unwrap());
            heartbeats.note("n", time(*beat), at(*second), clock);
        }
        assert!(!heartbeats.is_alive("other", at(after), TIMEOUT));
        heartbeats.is_alive("n", at(after), TIMEOUT)
    }

    #[test]
    fn the_first_heartbeat_is_as_old_as_it_says() {
        for (beat, after, expected) in [(0, 60, true), (0, 61, false), (-50, 10, true)] {
            assert_eq!(beats(&[(0, beat)], after), expected, "{beat} {after}");
        }
        assert!(!beats(&[(0, -61)], 0));
    }

    #[test]
    fn a_clock_that_is_wrong_or_jumps_makes_no_difference() {
        // An hour behind, and an hour ahead.
        for hour in [-3600, 3600] {
            assert!(beats(&[(0, hour), (10, hour + 10)], 70));
            assert!(!beats(&[(0, hour), (10, hour + 10)], 71));
        }
        // Back by an hour, and on from there; the node dies.
        assert!(beats(&[(0, 0), (10, 10), (20, -3580)], 80));
        assert!(!beats(&[(0, 0), (10, 10), (20, -3580)], 81));
        // What comes again is no heartbeat.
        assert!(!beats(&[(0, 3600), (50, 3600)], 61));
    }

    #[test]
    fn a_node_that_is_gone_is_forgotten() {
        let (now, clock) = (Instant::now(), Timestamp::UNIX_EPOCH);
        let mut heartbeats = Heartbeats::default();
        heartbeats.note("n", clock, now, clock);
        heartbeats.forget("n");
        assert!(!heartbeats.is_alive("n", now, TIMEOUT));
    }
}
