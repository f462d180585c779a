// SPDX-License-Identifier: Apache-2.0

//! What the benchmarks have in common: medians, a word on the way, where figures are kept, and the
//! table of those that compare warm Pods with cold ones.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::tools;

/// The value in the middle, or between the two in the middle; none of no samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    Some(f64::midpoint(sorted[last / 2], sorted[last.div_ceil(2)]))
}

/// A span of time in milliseconds.
#[must_use]
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Says how far a benchmark is, or why it goes no further.
#[allow(clippy::print_stderr)] // standard output has the tables only
pub fn progress(words: &str) {
    eprintln!("{words}");
}

/// Ends the benchmark `name`, and says why it failed.
pub fn end(name: &str, done: Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            progress(&format!("{name}: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

/// The file of the figures `name`, such as `target/bench/node.json`.
///
/// # Errors
/// When there is no directory to build in.
pub fn file(name: &str) -> Result<PathBuf> {
    Ok(tools::target_dir()?.join(format!("bench/{name}.json")))
}

/// Writes figures to `file`.
///
/// # Errors
/// When they cannot be written.
pub fn save(file: &Path, figures: &impl Serialize) -> Result<()> {
    let dir = file.parent().context("a file without a directory")?;
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    let text = serde_json::to_string_pretty(figures).context("write JSON")?;
    fs::write(file, text + "\n").with_context(|| format!("write {}", file.display()))
}

/// What was measured, by figure and side: `warm`, Pods that adopt, `cold`, Pods that boot their own
/// sandbox, and `go_shim`, those of gVisor's Go shim.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<(&'static str, &'static str), Vec<f64>>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, figure: &'static str, side: &'static str, value: f64) {
        self.0.entry((figure, side)).or_default().push(value);
    }

    /// The row of a figure in milliseconds: the medians of all sides, and ours as a part of the
    /// Go shim's.
    #[must_use]
    pub fn row(&self, figure: &str) -> Value {
        let of = |side: &str| {
            let mut all = self.0.iter();
            let all = all.find(|((f, s), _)| *f == figure && *s == side);
            all.and_then(|(_, samples)| median(samples))
        };
        let (warm, go) = (of("warm"), of("go_shim"));
        json!({
            "figure": figure, "unit": "ms",
            "ours": warm, "cold": of("cold"), "go_shim": go,
            "ratio": warm.zip(go).map(|(warm, go)| warm / go),
        })
    }
}

/// A row about warm sandboxes alone.
#[must_use]
pub fn ours(figure: &str, unit: &str, value: Option<f64>) -> Value {
    json!({"figure": figure, "unit": unit, "ours": value})
}

/// Prints rows as a table.
#[allow(clippy::print_stdout)] // it is what one runs a benchmark for
pub fn print(rows: &[Value]) {
    println!(
        "{:<28} {:>9} {:>9} {:>9} {:>7}",
        "", "warm", "cold", "Go shim", "ratio"
    );
    for row in rows {
        let number = |key: &str| match row[key].as_f64() {
            Some(n) if key == "ratio" || row["unit"] == "" => format!("{n:.2}"),
            Some(n) => format!("{n:.1}"),
            None => String::new(),
        };
        println!(
            "{:<28} {:>9} {:>9} {:>9} {:>7}",
            row["figure"].as_str().unwrap_or_default(),
            number("ours"),
            number("cold"),
            number("go_shim"),
            number("ratio"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 9.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn a_row_lacks_what_was_not_measured() {
        let mut samples = Samples::default();
        samples.add("a_ms", "warm", 2.0);
        assert_eq!(samples.row("a_ms")["ours"], 2.0);
        assert_eq!(samples.row("a_ms")["ratio"], Value::Null);
        samples.add("a_ms", "go_shim", 8.0);
        assert_eq!(samples.row("a_ms")["ratio"], 0.25);
    }
}
