// SPDX-License-Identifier: Apache-2.0

//! The terminal that this program runs on.

use std::io::{IsTerminal as _, stdin, stdout};

use anyhow::{Context as _, Result};
use kube::api::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// A terminal that passes every key to the program, until this is dropped.
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// Has standard input pass every key.
    ///
    /// # Errors
    /// When standard input is not a terminal.
    pub(crate) fn enter() -> Result<Self> {
        let before = tcgetattr(stdin()).context("read the terminal's modes")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("set the terminal's modes")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no modes.
        tcsetattr(stdin(), OptionalActions::Now, &self.before).ok();
    }
}

/// Whether standard input is a terminal.
pub(crate) fn is_one() -> bool {
    stdin().is_terminal()
}

/// Size of the terminal; `None` if there is none, or if it does not know.
pub(crate) fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(stdout())
        .or_else(|_| tcgetwinsize(stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some(TerminalSize {
        width: size.ws_col,
        height: size.ws_row,
    })
}
