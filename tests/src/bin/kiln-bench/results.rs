// SPDX-License-Identifier: Apache-2.0

//! Samples by figure and side, and what went wrong on the way.

use std::collections::BTreeMap;

use anyhow::Result;
use kiln_tests::bench::median;

use crate::{
    figures::{Bound, Figure},
    progress,
    side::Side,
};

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Results {
    samples: BTreeMap<(&'static str, Side), Vec<f64>>,
    failures: BTreeMap<Side, usize>,
}

/// What the samples of one figure of one side come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) count: usize,
}

/// A bound, and what it is held against.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) measured: f64,
    pub(crate) bound: f64,
    pub(crate) met: bool,
}

impl Results {
    /// Adds a sample.
    pub(crate) fn add(&mut self, side: Side, figure: &Figure, sample: f64) {
        self.samples
            .entry((figure.name, side))
            .or_default()
            .push(sample);
    }

    /// Tells of a failure, and counts it.
    pub(crate) fn note(&mut self, side: Side, what: &str, done: Result<()>) {
        if let Err(e) = done {
            progress(&format!("{}: {what}: {e:#}", side.title()));
            *self.failures.entry(side).or_default() += 1;
        }
    }

    /// How often a side has failed.
    pub(crate) fn failures(&self, side: Side) -> usize {
        self.failures.get(&side).copied().unwrap_or_default()
    }

    /// The summary of a figure, unless there is no sample of it.
    pub(crate) fn summary(&self, side: Side, figure: &Figure) -> Option<Summary> {
        summary(self.samples.get(&(figure.name, side))?)
    }

    /// Our median as a part of the Go shim's, where the latter is not zero.
    pub(crate) fn ratio(&self, figure: &Figure) -> Option<f64> {
        let ours = self.summary(Side::Ours, figure)?.median;
        let theirs = self.summary(Side::GoShim, figure)?.median;
        (theirs > 0.0).then(|| ours / theirs)
    }

    /// Whether a figure keeps its bound, unless it has none or was not measured.
    pub(crate) fn verdict(&self, figure: &Figure) -> Option<Verdict> {
        let (measured, bound) = match figure.bound? {
            Bound::Ours(most) => (self.summary(Side::Ours, figure)?.median, most),
            Bound::Ratio(most) => (self.ratio(figure)?, most),
        };
        Some(Verdict {
            measured,
            bound,
            met: measured <= bound,
        })
    }
}

fn summary(samples: &[f64]) -> Option<Summary> {
    Some(Summary {
        median: median(samples)?,
        min: samples.iter().copied().min_by(f64::total_cmp)?,
        count: samples.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{EXEC, SATELLITES};

    #[test]
    fn a_summary_has_the_median_and_the_least() {
        assert_eq!(summary(&[]), None);
        assert_eq!(
            summary(&[3.0, 1.0, 9.0]),
            Some(Summary {
                median: 3.0,
                min: 1.0,
                count: 3
            })
        );
        assert_eq!(
            summary(&[4.0, 1.0, 2.0, 9.0]),
            Some(Summary {
                median: 3.0,
                min: 1.0,
                count: 4
            })
        );
    }

    #[test]
    fn a_ratio_needs_both_sides_and_something_to_divide_by() {
        let mut results = Results::default();
        results.add(Side::Ours, &EXEC, 10.0);
        assert_eq!(results.ratio(&EXEC), None);
        results.add(Side::GoShim, &EXEC, 0.0);
        assert_eq!(results.ratio(&EXEC), None);
        results.add(Side::GoShim, &EXEC, 100.0);
        assert_eq!(results.ratio(&EXEC), Some(0.2));
    }

    #[test]
    fn a_bound_may_be_reached_but_not_exceeded() {
        let mut results = Results::default();
        assert_eq!(results.verdict(&SATELLITES), None);
        results.add(Side::Ours, &SATELLITES, 0.0);
        assert!(results.verdict(&SATELLITES).unwrap().met);
        results.add(Side::Ours, &SATELLITES, 2.0);
        assert!(!results.verdict(&SATELLITES).unwrap().met);
    }
}
