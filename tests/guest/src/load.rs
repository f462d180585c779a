// SPDX-License-Identifier: Apache-2.0
//! `spam`, `burn` and `eat`: output, CPU time and memory in measured amounts.

use std::hint::black_box;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::Failure;
use crate::print;
use crate::signals::{Blocked, TERMINATION};

/// Length of a line of `spam`, its newline included.
const LINE: usize = 105;

/// Digits of the line number that starts each line.
const DIGITS: usize = 10;

/// Lines in one write: 64 KiB, what a pipe holds by default.
const BATCH: usize = 64 * 1024 / LINE;

/// Distance between two touched bytes; the page size of every platform we run on, or less.
const PAGE: usize = 4096;

/// Exit code of a `burn` that was cut short, as shells report TERM.
const TERMINATED: u8 = 128 + Signal::SIGTERM as u8;

/// `spam BYTES`.
pub(crate) fn spam(args: &[String]) -> Result<u8, Failure> {
    let bytes = amount(args).ok_or(Failure::Usage("spam BYTES[K|M|G]"))?;
    write_lines(&mut io::stdout().lock(), bytes).map_err(Failure::io("write to stdout"))?;
    Ok(0)
}

/// Writes `bytes` bytes of numbered lines; the last is cut where the amount ends.
fn write_lines(out: &mut impl Write, mut bytes: u64) -> io::Result<()> {
    let mut line = [b'.'; LINE];
    line[LINE - 1] = b'\n';
    let mut batch = [0; BATCH * LINE];
    let mut number = 0u64;
    while bytes > 0 {
        for slot in batch.chunks_exact_mut(LINE) {
            let mut rest = number;
            for digit in line[..DIGITS].iter_mut().rev() {
                *digit = b'0' + (rest % 10) as u8;
                rest /= 10;
            }
            slot.copy_from_slice(&line);
            number += 1;
        }
        let part = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .min(batch.len());
        out.write_all(&batch[..part])?;
        bytes -= part as u64;
    }
    out.flush()
}

/// `burn SECONDS`: of wall time, however much CPU time it gets in them.
pub(crate) fn burn(args: &[String]) -> Result<u8, Failure> {
    let seconds = args
        .first()
        .and_then(|s| s.parse().ok())
        .ok_or(Failure::Usage("burn SECONDS"))?;
    let termination = Blocked::new(TERMINATION)?.watch()?;
    let start = Instant::now();
    let mut work = 1u64;
    while start.elapsed() < Duration::from_secs(seconds) {
        if termination.has_one()? {
            return Ok(TERMINATED);
        }
        // About a millisecond without a system call, so that the time is spent in user mode.
        for _ in 0..1_000_000 {
            work = black_box(work.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
    }
    Ok(0)
}

/// `eat BYTES`: prints `ate N bytes` when it has them.
pub(crate) fn eat(args: &[String]) -> Result<u8, Failure> {
    const USAGE: Failure = Failure::Usage("eat BYTES[K|M|G]");
    let bytes = amount(args)
        .and_then(|b| usize::try_from(b).ok())
        .ok_or(USAGE)?;
    let signals = Blocked::new(TERMINATION)?;
    let mut memory: Vec<u8> = Vec::new();
    memory
        .try_reserve_exact(bytes)
        .map_err(|e| io::Error::new(io::ErrorKind::OutOfMemory, e))
        .map_err(Failure::io("allocate"))?;
    memory.resize(bytes, 0);
    for byte in memory.iter_mut().step_by(PAGE) {
        *byte = 1;
    }
    black_box(&memory);
    print(&format!("ate {bytes} bytes\n"))?;
    signals.next()?;
    black_box(&memory);
    Ok(0)
}

/// The first argument as a number of bytes; K, M and G are powers of 1024.
fn amount(args: &[String]) -> Option<u64> {
    let text = args.first()?;
    let (digits, unit) = match text.char_indices().last()? {
        (end, 'K') => (&text[..end], 1 << 10),
        (end, 'M') => (&text[..end], 1 << 20),
        (end, 'G') => (&text[..end], 1 << 30),
        _ => (text.as_str(), 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        let of = |s: &str| amount(&[s.to_owned()]);
        assert_eq!(of("105"), Some(105));
        assert_eq!(of("50M"), Some(50 << 20));
        assert_eq!(of("1G"), Some(1 << 30));
        assert_eq!(of("99999999999G"), None);
        assert_eq!(of("-1"), None);
        assert_eq!(of("µ"), None);
        assert_eq!(of(""), None);
        assert_eq!(amount(&[]), None);
    }

    #[test]
    fn spam_writes_exactly_the_amount_in_numbered_lines() {
        let bytes = 105 * 2000 + 17;
        let mut out = Vec::new();
        write_lines(&mut out, bytes).unwrap();
        assert_eq!(out.len() as u64, bytes);
        let text = String::from_utf8(out).unwrap();
        for (number, line) in text.lines().take(2000).enumerate() {
            assert_eq!(line.len(), 104);
            assert!(line.starts_with(&format!("{number:010}.")));
        }
    }
}
