// SPDX-License-Identifier: Apache-2.0

//! What the program says: the only place that prints.

use std::{fmt::Write as _, io::Write as _};

/// Prints a line for whoever called.
pub(crate) fn say(line: &str) {
    write(&format!("{line}\n"));
}

/// Prints text as it is.
pub(crate) fn write(text: &str) {
    // Whoever reads no more wants no more.
    std::io::stdout().write_all(text.as_bytes()).ok();
}

/// Prints bytes as they are.
///
/// # Errors
/// When whoever called reads no more.
pub(crate) fn write_bytes(bytes: &[u8]) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(bytes)?;
    stdout.flush()
}

/// Tells a person how far something is, beside what is printed.
pub(crate) fn tell(line: &str) {
    // There is nobody left to tell that nobody listens.
    writeln!(std::io::stderr(), "{line}").ok();
}

/// Prints why something did not work.
pub(crate) fn complain(line: &str) {
    // There is nobody left to tell that nobody listens.
    writeln!(std::io::stderr(), "kilnctl: {line}").ok();
}

/// Lays out rows of the same length in columns; the first row is the head.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Writing into a string cannot fail.
            write!(line, "{cell:<width$}   ").ok();
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["A", "B"], ["longer", ""], ["x", "y"]].map(|r| r.map(str::to_owned));
        assert_eq!(table(&rows), "A        B\nlonger\nx        y\n");
    }
}
