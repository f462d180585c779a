// SPDX-License-Identifier: Apache-2.0

//! The memory that processes hold.

use std::fs;

use anyhow::{Result, ensure};

use crate::process::Proc;

/// Bytes of a MB.
const MB: f64 = 1e6;

/// Memory of processes, in MB.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Memory {
    /// Pages in RAM.
    pub rss: f64,
    /// The same, where pages that processes share are divided by their number.
    pub pss: f64,
    /// Pages of no file.
    pub anonymous: f64,
}

impl Memory {
    /// What processes hold together. One that ends meanwhile holds nothing.
    pub fn of<'a>(processes: impl IntoIterator<Item = &'a Proc>) -> Self {
        let rollups = processes
            .into_iter()
            .filter_map(|p| fs::read_to_string(format!("/proc/{}/smaps_rollup", p.pid)).ok());
        rollups
            .map(|text| parse(&text))
            .fold(Self::default(), |sum, one| Self {
                rss: sum.rss + one.rss,
                pss: sum.pss + one.pss,
                anonymous: sum.anonymous + one.anonymous,
            })
    }
}

/// Samples of each of the two series that are compared, at least.
const ENOUGH: usize = 8;

/// What a process had when it was warm, after a quarter of the samples, and at the end: the medians
/// of the first and the last third of the rest.
///
/// # Errors
/// When there are too few samples.
pub fn warm_and_last(samples: &[u64]) -> Result<(u64, u64)> {
    let warm = &samples[samples.len() / 4..];
    let third = warm.len() / 3;
    ensure!(third >= ENOUGH, "{} samples are too few", samples.len());
    Ok((median(&warm[..third]), median(&warm[warm.len() - third..])))
}

fn median(samples: &[u64]) -> u64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

/// Lines are `NAME: NUMBER kB` (Documentation/filesystems/proc.rst of Linux).
fn parse(rollup: &str) -> Memory {
    let field = |name: &str| {
        let line = rollup
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        number.unwrap_or_default() * 1024.0 / MB
    };
    Memory {
        rss: field("Rss"),
        pss: field("Pss"),
        anonymous: field("Anonymous"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_told_from_those_whose_names_begin_alike() {
        let memory = parse(
            "00-7f ---p 0 00:00 0 [rollup]\nRss: 1000 kB\nPss: 500 kB\nPss_Anon: 7 kB\nAnonymous: 250 kB\n",
        );
        assert_eq!(
            memory,
            Memory {
                rss: 1.024,
                pss: 0.512,
                anonymous: 0.256
            }
        );
    }
}
