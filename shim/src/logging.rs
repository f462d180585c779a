// SPDX-License-Identifier: Apache-2.0

//! The shim's log: lines in logrus' text form into the FIFO `log` that containerd reads in the
//! bundle (containerd `core/runtime/v2/README.md`, "Logging").
//!
//! A reader that stalls must not stall the Pod: the FIFO is non-blocking, a full one loses
//! lines, and the next line that fits says how many.

use std::{
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use log::{LevelFilter, Log, Metadata, Record};

struct FifoLog {
    fifo: File,
    id: String,
    lost: AtomicU64,
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let line = line(SystemTime::now(), &self.id, record, lost);
        // A write up to PIPE_BUF is whole or not at all, so lines are never torn.
        if (&self.fifo).write_all(line.as_bytes()).is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// Longest line in bytes: PIPE_BUF (`pipe(7)`), up to which a FIFO write is atomic.
const MAX_LINE: usize = 4096;

fn line(now: SystemTime, id: &str, record: &Record<'_>, lost: u64) -> String {
    let level = match record.level() {
        log::Level::Error => "error",
        log::Level::Warn => "warning",
        log::Level::Info => "info",
        log::Level::Debug => "debug",
        log::Level::Trace => "trace",
    };
    let mut message = record.args().to_string();
    let room = MAX_LINE - 256 - id.len();
    if message.len() > room {
        let cut = message.floor_char_boundary(room / 2);
        message.truncate(cut);
        message.push('…');
    }
    let mut line = format!(
        "time=\"{}\" level={level} msg={message:?} id={id}",
        rfc3339(now)
    );
    if lost > 0 {
        // Writing to a String cannot fail.
        let _ = write!(line, " lost_lines={lost}");
    }
    // Escapes can still double a message: better a cut line than a torn one.
    let cut = line.floor_char_boundary(MAX_LINE - 1);
    line.truncate(cut);
    line.push('\n');
    line
}

/// UTC in RFC 3339 with milliseconds, from days to civil date as Howard Hinnant describes
/// (<https://howardhinnant.github.io/date_algorithms.html#civil_from_days>).
fn rfc3339(t: SystemTime) -> String {
    let since = t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, rest) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60,
        since.subsec_millis()
    )
}

/// Logs to the FIFO at `path` from now on. Without one (a shim started by hand) nothing is
/// logged.
pub(crate) fn init(path: &Path, id: &str, debug: bool) {
    let fifo = OpenOptions::new()
        .read(true) // the shim's own reader keeps writes from failing while containerd restarts
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path);
    let Ok(fifo) = fifo else { return };
    let logger = FifoLog {
        fifo,
        id: id.to_owned(),
        lost: AtomicU64::new(0),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(if debug {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_utc() {
        let t = |s| rfc3339(SystemTime::UNIX_EPOCH + Duration::from_millis(s));
        assert_eq!(t(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(t(951_782_400_123), "2000-02-29T00:00:00.123Z");
        assert_eq!(t(1_798_761_599_000), "2026-12-31T23:59:59.000Z");
    }

    #[test]
    fn a_line_is_one_line_and_fits_an_atomic_write() {
        for message in [
            "plain",
            "two\nlines \"quoted\"",
            &"ü".repeat(10_000),
            &"\n".repeat(9_000),
        ] {
            let level = log::Level::Warn;
            let line = line(
                SystemTime::UNIX_EPOCH,
                "c1",
                &Record::builder()
                    .level(level)
                    .args(format_args!("{message}"))
                    .build(),
                3,
            );
            assert!(line.len() <= MAX_LINE);
            assert_eq!(line.matches('\n').count(), 1);
            assert!(line.starts_with("time=\"1970-01-01T00:00:00.000Z\" level=warning msg="));
        }
    }
}
