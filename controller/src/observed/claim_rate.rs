// SPDX-License-Identifier: Apache-2.0

//! Rate of the claims on each template.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use crate::cache::Key;

/// Claims that come within so many seconds are a burst: a node makes a few sandboxes a second, so
/// that they have to be there before.
const BURST: u64 = 10;
/// For so many seconds claims are remembered.
const MEMORY: u64 = 600;

/// Claims of late, by template and second.
#[derive(Debug, Default)]
pub(super) struct ClaimRate(BTreeMap<Key, VecDeque<(u64, usize)>>);

impl ClaimRate {
    /// Notes a claim on a template. `now` is the time since the controller started.
    pub(super) fn note(&mut self, template: Key, now: Duration) {
        let now = now.as_secs();
        let seconds = self.0.entry(template).or_default();
        let last = seconds.back().map(|(second, _)| *second);
        match seconds.back_mut() {
            // Whoever has looked at the clock first may come later.
            Some((second, count)) if *second >= now => *count += 1,
            _ => seconds.push_back((now, 1)),
        }
        // Where there are no nodes nobody asks for bursts.
        if last.is_none_or(|last| last / BURST < now / BURST) {
            self.forget(now);
        }
    }

    /// The most claims of a burst, by template; what is too long ago is forgotten.
    pub(super) fn bursts(&mut self, now: Duration) -> BTreeMap<Key, usize> {
        self.forget(now.as_secs());
        self.0
            .iter()
            .map(|(template, seconds)| (template.clone(), largest(seconds)))
            .collect()
    }

    /// Forgets what was too long before the second `now`.
    fn forget(&mut self, now: u64) {
        self.0.retain(|_, seconds| {
            while seconds.front().is_some_and(|(s, _)| s + MEMORY <= now) {
                seconds.pop_front();
            }
            !seconds.is_empty()
        });
    }
}

/// The most claims within any [`BURST`] seconds on end: a burst may begin in each of them.
fn largest(seconds: &VecDeque<(u64, usize)>) -> usize {
    let (mut first, mut count, mut most): (usize, usize, usize) = (0, 0, 0);
    for (second, claims) in seconds {
        count += claims;
        while seconds[first].0 + BURST <= *second {
            count -= seconds[first].1;
            first += 1;
        }
        most = most.max(count);
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Claims on one template, so many at each of these seconds.
    fn rate(claims: &[(u64, usize)]) -> (Key, ClaimRate) {
        let (key, mut rate) = (Key::new("ns", "t"), ClaimRate::default());
        for (second, count) in claims {
            for _ in 0..*count {
                rate.note(key.clone(), Duration::from_secs(*second));
            }
        }
        (key, rate)
    }

    #[test]
    fn a_burst_is_remembered_for_a_while_and_the_largest_counts() {
        let (key, mut rate) = rate(&[(0, 2), (14, 5), (25, 3)]);
        let mut burst = |second| {
            let bursts = rate.bursts(Duration::from_secs(second));
            bursts.get(&key).copied()
        };
        assert_eq!(burst(30), Some(5));
        assert_eq!(burst(613), Some(5));
        assert_eq!(burst(614), Some(3));
        assert_eq!(burst(624), Some(3));
        assert_eq!(burst(625), None);
    }

    #[test]
    fn a_burst_begins_at_any_second() {
        for begin in 0..20 {
            let (key, mut rate) = rate(&[(begin, 2), (begin + 1, 1), (begin + 9, 3)]);
            let bursts = rate.bursts(Duration::from_secs(begin + 10));
            assert_eq!(bursts[&key], 6, "from second {begin}");
        }
        // The first and the last are no longer together, and one that comes out of turn counts.
        let (key, mut rate) = rate(&[(5, 2), (14, 1), (13, 1), (15, 3)]);
        assert_eq!(rate.bursts(Duration::from_secs(15))[&key], 5);
    }

    #[test]
    fn claims_of_long_ago_are_forgotten_where_nobody_asks_for_bursts() {
        let mut rate = ClaimRate::default();
        for second in 0..2000 {
            let now = Duration::from_secs(second);
            rate.note(Key::new("ns", "always"), now);
            rate.note(Key::new("ns", &second.to_string()), now);
        }
        assert_eq!(rate.0[&Key::new("ns", "always")].len(), 600);
        assert_eq!(rate.0.len(), 600 + 1);
    }
}
