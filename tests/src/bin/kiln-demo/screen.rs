// SPDX-License-Identifier: Apache-2.0

//! What the demo looks like: chapters, commands, outputs, times. Colour and moving progress are
//! for terminals only.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use tokio::time::{MissedTickBehavior, interval};

/// Columns of running text.
const WIDTH: usize = 88;

/// Longest wait without a sign of life.
const QUIET: Duration = Duration::from_millis(500);

/// How often progress is told where it cannot move: not on a terminal.
const SIGN: Duration = Duration::from_secs(10);

/// Lines of an output that are shown.
const OUTPUT_LINES: usize = 16;

/// SGR parameters of ECMA-48.
#[derive(Debug, Clone, Copy)]
enum Style {
    Bold,
    Dim,
    Green,
    Cyan,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Self::Bold => "1",
            Self::Dim => "2",
            Self::Green => "32",
            Self::Cyan => "36",
        }
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct Screen {
    out: io::Stdout,
    is_terminal: bool,
    has_colour: bool,
    chapters: usize,
    started: Instant,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let out = io::stdout();
        let is_terminal = out.is_terminal();
        // https://no-color.org: any value but the empty one turns colour off.
        let has_colour = is_terminal && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        Self {
            out,
            is_terminal,
            has_colour,
            chapters: 0,
            started: Instant::now(),
        }
    }

    fn styled(&self, style: Style, words: &str) -> String {
        if self.has_colour {
            format!("\x1b[{}m{words}\x1b[0m", style.code())
        } else {
            words.to_owned()
        }
    }

    /// A line.
    pub(crate) fn line(&mut self, words: &str) -> Result<()> {
        writeln!(self.out, "{words}").context("write to standard output")
    }

    /// The demo's own heading.
    pub(crate) fn title(&mut self, words: &str) -> Result<()> {
        self.line(&self.styled(Style::Bold, words))
    }

    /// A new chapter with what it is about.
    pub(crate) fn chapter(&mut self, title: &str, about: &str) -> Result<()> {
        self.chapters += 1;
        let title = self.styled(Style::Bold, &format!("\n{}. {title}", self.chapters));
        self.line(&title)?;
        self.text(about)
    }

    /// Running text.
    pub(crate) fn text(&mut self, words: &str) -> Result<()> {
        for line in wrapped(words, WIDTH) {
            self.line(&format!("   {line}"))?;
        }
        Ok(())
    }

    /// A command, before it is run.
    pub(crate) fn command(&mut self, words: &str) -> Result<()> {
        let words = self.styled(Style::Cyan, words);
        self.line(&format!("\n   $ {words}"))
    }

    /// What a command printed, without what would move the cursor or clear the screen.
    pub(crate) fn output(&mut self, text: &str) -> Result<()> {
        let text = plain(text);
        let lines: Vec<_> = text.trim_end().lines().collect();
        for line in lines.iter().take(OUTPUT_LINES) {
            self.line(&format!("   {}", line.trim_end()))?;
        }
        if lines.len() > OUTPUT_LINES {
            let more = self.styled(
                Style::Dim,
                &format!("… {} more lines", lines.len() - OUTPUT_LINES),
            );
            self.line(&format!("   {more}"))?;
        }
        Ok(())
    }

    /// How long something took.
    pub(crate) fn took(&mut self, took: Duration) -> Result<()> {
        let words = self.styled(Style::Dim, &format!("({})", seconds(took)));
        self.line(&format!("   {words}"))
    }

    /// Something that was checked and holds.
    pub(crate) fn check(&mut self, words: &str) -> Result<()> {
        let ok = self.styled(Style::Green, "ok");
        self.line(&format!("   {ok}  {words}"))
    }

    /// The last chapter: how long everything took.
    pub(crate) fn timings(&mut self, timings: &[(String, Duration)]) -> Result<()> {
        let about = "As seen by whoever types: the start of crictl itself is in them.";
        self.chapter("How long it took", about)?;
        for (what, took) in timings {
            self.line(&format!("   {what:<44} {:>8}", seconds(*took)))?;
        }
        let all = seconds(self.started.elapsed());
        let line = self.styled(Style::Bold, &format!("{:<44} {all:>8}", "the whole demo"));
        self.line(&format!("   {line}"))
    }

    /// Waits for `work` and shows that it goes on. Returns how long it took, too.
    pub(crate) async fn waiting<T>(
        &mut self,
        what: &str,
        work: impl Future<Output = T>,
    ) -> (T, Duration) {
        let start = Instant::now();
        let mut ticks = interval(if self.is_terminal { QUIET } else { SIGN });
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks.tick().await; // the first is at once
        tokio::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => {
                    if self.is_terminal && start.elapsed() >= QUIET {
                        self.show("\r\x1b[K");
                    }
                    return (done, start.elapsed());
                }
                _ = ticks.tick() => {
                    let words = format!("… {what}, {:.1} s", start.elapsed().as_secs_f64());
                    let words = self.styled(Style::Dim, &words);
                    self.show(&if self.is_terminal { format!("\r\x1b[K   {words}") } else { format!("   {words}\n") });
                }
            }
        }
    }

    /// Progress is worth no error: whoever cannot be told it will not be told the result either.
    fn show(&mut self, words: &str) {
        let _ = self
            .out
            .write_all(words.as_bytes())
            .and_then(|()| self.out.flush());
    }
}

/// Tells of a failure.
#[allow(clippy::print_stderr)] // what this is for
pub(crate) fn complain(words: &str) {
    eprintln!("{words}");
}

/// A time for people.
pub(crate) fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(10) {
        format!("{:.2} s", time.as_secs_f64())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

/// Breaks text at spaces into lines of at most `width` characters, where words allow it.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::<String>::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Text without control sequences and control characters (ECMA-48), but for tabs and newlines:
/// what a container prints must not play with the terminal.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\x1b' && chars.next_if_eq(&'[').is_some() {
            // Parameters, up to the letter that ends the sequence.
            while chars
                .next()
                .is_some_and(|c| !('\x40'..='\x7e').contains(&c))
            {}
        } else if !c.is_control() || c == '\n' || c == '\t' {
            plain.push(c);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_at_spaces() {
        assert_eq!(
            wrapped("one two  three\nfour", 9),
            ["one two", "three", "four"]
        );
        assert_eq!(wrapped("unbreakable", 3), ["unbreakable"]);
    }

    #[test]
    fn control_sequences_are_left_out() {
        assert_eq!(
            plain("\x1b[2J\x1b[HNAME\tCPU\r\n\x1b[1;31mred\x1b[0m\x07 end\x1b"),
            "NAME\tCPU\nred end"
        );
    }
}
