// SPDX-License-Identifier: Apache-2.0

//! How late the timers of a sandbox may be.
//!
//! A sentry of platform systrap of a release before the summer of 2026 wakes up every 400 µs as
//! long as it lives (gVisor `pkg/sentry/platform/systrap/metrics.go`, `controlFastPath`): one that
//! does nothing took 4 % of a CPU where this was measured. With more slack the kernel lets its timers come later and
//! together (prctl(2), `PR_SET_TIMERSLACK`). What comes by a socket is taken at once, as before.

use std::{collections::BTreeSet, fs, io, time::Duration};

/// What the kernel gives a process that asks for nothing else (proc(5), `timerslack_ns`).
pub const DEFAULT: Duration = Duration::from_micros(50);

/// Sets by how much the timers of all threads of a process may be late; threads that come later
/// have it from these. Blocks.
///
/// # Errors
/// When the threads cannot be listed, as when the process has ended, or the kernel refuses.
pub fn set(pid: u32, slack: Duration) -> io::Result<()> {
    let nanos = slack.as_nanos().to_string();
    let mut seen = BTreeSet::new();
    loop {
        let before = seen.len();
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let thread = thread?.file_name();
            if !seen.insert(thread.clone()) {
                continue;
            }
            let file = format!("/proc/{}/timerslack_ns", thread.display());
            match fs::write(file, &nanos) {
                Err(e) if !is_gone(&e) => return Err(e),
                _ => {}
            }
        }
        // Whatever a thread has made before its own was set was there by now.
        if seen.len() == before {
            return Ok(());
        }
    }
}

/// Whether a thread has ended meanwhile.
fn is_gone(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_what_it_was_given_last() {
        // A process of its own: it must not slow the other tests.
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let slack = || fs::read_to_string(format!("/proc/{}/timerslack_ns", child.id())).unwrap();
        for wanted in [Duration::from_millis(100), DEFAULT] {
            set(child.id(), wanted).unwrap();
            assert_eq!(slack().trim(), wanted.as_nanos().to_string());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(set(child.id(), DEFAULT).is_err());
    }
}
