// SPDX-License-Identifier: Apache-2.0

//! Choices at random that can be made again, for runs that are long.

use std::{env, time::Duration};

/// Numbers that follow from a seed (SplitMix64 of Steele, Lea and Flood, 2014).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// Those of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % end
    }

    /// A time below `end` milliseconds.
    pub fn millis(&mut self, end: u64) -> Duration {
        Duration::from_millis(self.below(end))
    }
}

/// Draws cards at random, each as often as any other.
#[derive(Debug)]
pub struct Deck<T: 'static> {
    cards: &'static [T],
    left: Vec<&'static T>,
}

impl<T> Deck<T> {
    /// All of these cards, again and again.
    #[must_use]
    pub fn new(cards: &'static [T]) -> Self {
        let left = Vec::new();
        Self { cards, left }
    }

    /// The next one.
    pub fn draw(&mut self, dice: &mut Dice) -> &'static T {
        if self.left.is_empty() {
            self.left = self.cards.iter().collect();
        }
        let at = dice.below(self.left.len() as u64) as usize;
        self.left.swap_remove(at)
    }
}

/// How long a run is to be: `$SOAK_SECONDS`.
#[must_use]
pub fn time(default: Duration) -> Duration {
    number("SOAK_SECONDS").map_or(default, Duration::from_secs)
}

/// The seed of a run: `$SOAK_SEED`, else another each second.
#[must_use]
pub fn seed() -> u64 {
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
    number("SOAK_SEED").unwrap_or(now.as_secs())
}

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok()?.parse().ok()
}

/// Tells of a run.
#[allow(clippy::print_stderr)] // the seed and the figures are what one runs it for
pub fn say(words: &str) {
    eprintln!("{words}");
}
