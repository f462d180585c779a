// SPDX-License-Identifier: Apache-2.0

//! The figures as tables for people, and as JSON for programs.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use crate::{
    figures::{self, Bound, Figure},
    results::{Results, Summary},
    side::Side,
};

/// One object per figure: `figure`, `unit`, for each side its median (`ours`, `go_shim`, `runc`),
/// its minimum (`ours_min`, …) and number of samples (`ours_samples`, …), and `ratio`, our median
/// as a part of the Go shim's. What was not measured is null.
pub(crate) fn json(results: &Results) -> Value {
    figures::ALL
        .iter()
        .map(|figure| Value::Object(row(results, figure)))
        .collect()
}

fn row(results: &Results, figure: &Figure) -> Map<String, Value> {
    let mut row = Map::new();
    row.insert("figure".to_owned(), figure.name.into());
    row.insert("unit".to_owned(), figure.unit.into());
    for side in Side::ALL {
        let summary = results.summary(side, figure);
        let key = side.key();
        row.insert(key.to_owned(), json!(summary.map(|s| rounded(s.median))));
        row.insert(format!("{key}_min"), json!(summary.map(|s| rounded(s.min))));
        row.insert(
            format!("{key}_samples"),
            json!(summary.map_or(0, |s| s.count)),
        );
    }
    row.insert(
        "ratio".to_owned(),
        json!(results.ratio(figure).map(rounded)),
    );
    row
}

/// Digits beyond these are noise.
fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// Prints both tables.
///
/// # Errors
/// Those of `out`.
pub(crate) fn print(out: &mut impl Write, results: &Results) -> io::Result<()> {
    writeln!(
        out,
        "median (minimum); ratio: ours as a part of the Go shim's\n"
    )?;
    writeln!(
        out,
        "{:<20} {:>18} {:>18} {:>18} {:>6}  {:<9} what",
        "figure",
        Side::Ours.title(),
        Side::GoShim.title(),
        Side::Runc.title(),
        "ratio",
        "unit",
    )?;
    for figure in figures::ALL {
        let [ours, go_shim, runc] = Side::ALL.map(|side| cell(results.summary(side, figure)));
        let ratio = results
            .ratio(figure)
            .map_or_else(|| "-".to_owned(), |r| format!("{r:.2}"));
        let Figure {
            name, unit, about, ..
        } = figure;
        writeln!(
            out,
            "{name:<20} {ours:>18} {go_shim:>18} {runc:>18} {ratio:>6}  {unit:<9} {about}"
        )?;
    }

    writeln!(out, "\n{:<20} {:<24} {:>8}", "bound", "at most", "is")?;
    for figure in figures::ALL {
        let at_most = match figure.bound {
            None => continue,
            Some(Bound::Ours(most)) => format!("{most} {}", figure.unit),
            Some(Bound::Ratio(most)) => format!("{most} of the Go shim's"),
        };
        let (is, word) = match results.verdict(figure) {
            None => ("-".to_owned(), "not measured"),
            Some(verdict) => (
                format!("{:.2}", verdict.measured),
                if verdict.met { "met" } else { "MISSED" },
            ),
        };
        writeln!(out, "{:<20} {at_most:<24} {is:>8}  {word}", figure.name)?;
    }

    for side in Side::ALL {
        let failures = results.failures(side);
        if failures > 0 {
            writeln!(
                out,
                "\n{}: {failures} failures, whose figures are missing above",
                side.title()
            )?;
        }
    }
    Ok(())
}

fn cell(summary: Option<Summary>) -> String {
    let Some(Summary { median, min, .. }) = summary else {
        return "-".to_owned();
    };
    format!("{} ({})", short(median), short(min))
}

/// Three digits, or as many as the number has before its point.
fn short(number: f64) -> String {
    let decimals = match number.abs() {
        n if n >= 100.0 => 0,
        n if n >= 10.0 => 1,
        _ => 2,
    };
    format!("{number:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::{CLI_RUNS, EXEC};

    #[test]
    fn a_row_has_medians_minima_and_the_ratio() {
        let mut results = Results::default();
        for (ours, theirs) in [(10.0, 50.0), (12.0, 60.0), (20.0, 70.0)] {
            results.add(Side::Ours, &EXEC, ours);
            results.add(Side::GoShim, &EXEC, theirs);
        }
        let row = Value::Object(row(&results, &EXEC));
        assert_eq!(
            row,
            json!({
                "figure": "exec_ms", "unit": "ms",
                "ours": 12.0, "ours_min": 10.0, "ours_samples": 3,
                "go_shim": 60.0, "go_shim_min": 50.0, "go_shim_samples": 3,
                "runc": null, "runc_min": null, "runc_samples": 0,
                "ratio": 0.2,
            })
        );
    }

    #[test]
    fn the_tables_name_what_was_missed_and_what_was_not_measured() {
        let mut results = Results::default();
        results.add(Side::Ours, &CLI_RUNS, 7.0);
        let mut text = Vec::new();
        print(&mut text, &results).unwrap();
        let text = String::from_utf8(text).unwrap();
        let line = |name: &str, at: usize| {
            text.lines()
                .filter(|l| l.starts_with(name))
                .nth(at)
                .unwrap()
                .to_owned()
        };
        assert!(line("cli_runs", 1).ends_with("7.00  MISSED"), "{text}");
        assert!(line("exec_ms", 1).ends_with("-  not measured"), "{text}");
    }

    #[test]
    fn every_figure_has_its_own_name() {
        let names: std::collections::BTreeSet<_> = figures::ALL.iter().map(|f| f.name).collect();
        assert_eq!(names.len(), figures::ALL.len());
    }
}
