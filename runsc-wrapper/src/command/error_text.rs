// SPDX-License-Identifier: Apache-2.0

//! What runtimes say when something goes wrong: where it is found, how it is made fit to be
//! passed on, and what it means.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::FileExt,
    },
};

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Most bytes read of a runtime's log, from its end.
const LOG_LIMIT: u64 = 64 << 10;

/// Longest message passed on, in bytes.
const MESSAGE_LIMIT: usize = 4096;

/// The log of one runtime command: memory that nobody can find by name. A sandbox keeps the log
/// of its `create` open for life, so that a file in its place would never go away.
#[derive(Debug)]
pub struct Log(File);

impl Log {
    /// Makes an empty log.
    ///
    /// # Errors
    /// When the kernel has no memory file to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self(
            memfd_create(c"runtime-log", MFdFlags::MFD_CLOEXEC)?.into(),
        ))
    }

    /// Its path as the command sees it that is given this log.
    pub fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    /// The messages of level `error`, in order and without repetitions.
    pub(super) fn errors(&self) -> String {
        let text = self.tail().unwrap_or_else(|e| {
            log::warn!("read a runtime's log: {e}");
            Vec::new()
        });
        errors_of(&text)
    }

    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn tail(&self) -> io::Result<Vec<u8>> {
        let len = self.0.metadata()?.len();
        let from = len.saturating_sub(LOG_LIMIT);
        let mut tail = vec![0; usize::try_from(len - from).map_err(io::Error::other)?];
        let read = self.0.read_at(&mut tail, from)?;
        tail.truncate(read);
        Ok(tail)
    }
}

/// One line of a runtime's JSON log (logrus).
#[derive(serde::Deserialize)]
struct LogLine {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

/// Reads the errors of a JSON log. runsc puts no newline between its objects; a log cut at its
/// front may begin in the middle of one.
fn errors_of(mut log: &[u8]) -> String {
    let mut errors: Vec<String> = Vec::new();
    while let Some(start) = log.iter().position(|b| *b == b'{') {
        log = &log[start..];
        let mut lines = serde_json::Deserializer::from_slice(log).into_iter::<LogLine>();
        let line = lines.next();
        let used = lines.byte_offset();
        match line {
            Some(Ok(line)) if line.level == "error" || line.level == "fatal" => {
                let message = clean(&line.msg);
                if !message.is_empty() && !errors.contains(&message) {
                    errors.push(message);
                }
                log = &log[used..];
            }
            Some(Ok(_)) => log = &log[used..],
            _ => log = &log[1..],
        }
    }
    clean(&errors.join("; "))
}

/// Makes foreign text fit for one line of a log: some of it was written by the sandbox.
pub(crate) fn clean(text: &str) -> String {
    let mut clean = String::new();
    for word in text
        .split(|c: char| c.is_whitespace() || c.is_control())
        .filter(|w| !w.is_empty())
    {
        if clean.len() + word.len() > MESSAGE_LIMIT {
            clean.push('…');
            break;
        }
        if !clean.is_empty() {
            clean.push(' ');
        }
        clean.push_str(word);
    }
    clean
}

/// What a runtime's words mean for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The container or process is not there.
    NotFound,
    /// The container is there already.
    AlreadyExists,
    /// Its state does not allow that.
    NotRunning,
    /// The sandbox process is gone, or does not listen any more.
    SandboxGone,
    /// The command does not exist in this version of the runtime.
    Unsupported,
    /// Anything else.
    Other,
}

/// Words and their meaning; the first that fits counts. Sources: gVisor `runsc/cmd`,
/// `runsc/container/container.go`, `runsc/sandbox/sandbox.go`, `runsc/boot/loader.go`,
/// `pkg/urpc/urpc.go`; runc `libcontainer/error.go`, `exec.go`, `start.go`, `kill.go`.
const CAUSES: &[(&[&str], Cause)] = &[
    // container.Load of runsc says os.ErrNotExist.
    (&["loading ", ": file does not exist"], Cause::NotFound),
    (
        &["cannot load sandbox: ", "no such file or directory"],
        Cause::NotFound,
    ),
    (&["container does not exist"], Cause::NotFound),
    (
        &["container with given ID already exists"],
        Cause::AlreadyExists,
    ),
    (&["container already exists"], Cause::AlreadyExists),
    (&["container \"", "\" already exists"], Cause::AlreadyExists),
    (&["connecting to control server at PID"], Cause::SandboxGone),
    (&["no control socket found for sandbox"], Cause::SandboxGone),
    (&["sandbox is not running"], Cause::SandboxGone),
    (&["urpc method ", " failed: EOF"], Cause::SandboxGone),
    (&["container \"", "\" not found"], Cause::NotFound),
    (&["trying to start a deleted container"], Cause::NotFound),
    (&["no such process"], Cause::NotFound),
    (&["process already finished"], Cause::NotFound),
    (&["belongs to a different container"], Cause::NotFound),
    (&["is part of a different container"], Cause::NotFound),
    (&["container \"", "\" not started"], Cause::NotRunning),
    (&["container \"", "\" has stopped"], Cause::NotRunning),
    (&["sandbox is not in ", " state"], Cause::NotRunning),
    (&["cannot ", " container ", " in state "], Cause::NotRunning),
    (
        &["cannot delete container ", "not stopped"],
        Cause::NotRunning,
    ),
    (&["container not running"], Cause::NotRunning),
    (&["container still running"], Cause::NotRunning),
    (&["container not paused"], Cause::NotRunning),
    (&["container paused"], Cause::NotRunning),
    (&["cannot exec in a stopped container"], Cause::NotRunning),
    (&["cannot exec in a paused container"], Cause::NotRunning),
    (
        &["cannot start a container that has stopped"],
        Cause::NotRunning,
    ),
    (
        &["cannot start an already running container"],
        Cause::NotRunning,
    ),
    (
        &["container with id ", " is not running"],
        Cause::NotRunning,
    ),
    (&["container process is already dead"], Cause::NotRunning),
    // Command lines and methods that a version does not have.
    (&["Usage: ", " <flags> <subcommand>"], Cause::Unsupported),
    (&["No help topic for"], Cause::Unsupported),
    (&["unknown method"], Cause::Unsupported),
];

impl Cause {
    /// Reads a runtime's message.
    pub(crate) fn of(message: &str) -> Self {
        let fits = |words: &[&str]| {
            words
                .iter()
                .try_fold(message, |rest, word| Some(rest.split_once(word)?.1))
                .is_some()
        };
        CAUSES
            .iter()
            .find(|(words, _)| fits(words))
            .map_or(Self::Other, |(_, cause)| *cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_log_is_read_and_its_errors_fit_a_line() {
        bolero::check!().for_each(|log: &[u8]| {
            let errors = errors_of(log);
            assert!(errors.len() <= MESSAGE_LIMIT + '…'.len_utf8());
            assert!(!errors.contains(char::is_control));
        });
    }

    #[test]
    fn errors_are_found_in_logs_of_both_runtimes() {
        // runsc: no newlines, the sandbox's own error first.
        let runsc = br#"{"msg":"boot failed","level":"error","time":"t"}{"msg":"creating container: EOF","level":"error"}"#;
        assert_eq!(errors_of(runsc), "boot failed; creating container: EOF");
        // runc: lines of every level.
        let runc = b"{\"level\":\"warning\",\"msg\":\"w\"}\n{\"level\":\"error\",\"msg\":\"container does not exist\"}\n";
        assert_eq!(errors_of(runc), "container does not exist");
        // Cut at the front, garbage between, repeated.
        let cut = b"vel\":\"error\",\"msg\":\"{lost\"}xx{\"level\":\"error\",\"msg\":\"a\\nb\"}{\"level\":\"error\",\"msg\":\"a b\"}";
        assert_eq!(errors_of(cut), "a b");
        assert_eq!(errors_of(b""), "");
        assert_eq!(errors_of(&b"{".repeat(5000)), "");
    }

    #[test]
    fn messages_are_one_short_line() {
        assert_eq!(clean(" a\n\tb\x1b[31m\u{0}c "), "a b [31m c");
        assert!(clean(&"word ".repeat(10_000)).len() <= MESSAGE_LIMIT + 4);
    }

    #[test]
    fn causes_are_read_from_the_runtimes_words() {
        for (message, cause) in [
            ("loading container: file does not exist", Cause::NotFound),
            (
                "loading container \"x\": file does not exist",
                Cause::NotFound,
            ),
            ("loading sandbox: file does not exist", Cause::NotFound),
            (
                "creating container: cannot load sandbox: open /r/x_sandbox:x.state: no such file or directory",
                Cause::NotFound,
            ),
            (
                "creating container: cannot lock container metadata file: container already exists",
                Cause::AlreadyExists,
            ),
            (
                "signaling container \"a\": signaling process in container \"a\" PID 0: no such process",
                Cause::NotFound,
            ),
            (
                "failed to signal pid 9: signaling process in container \"a\" PID 9: no such process with PID 9",
                Cause::NotFound,
            ),
            (
                "starting container: cannot start container \"a\" in state stopped",
                Cause::NotRunning,
            ),
            (
                "cannot signal container \"a\" in state created",
                Cause::NotRunning,
            ),
            (
                "cannot delete container that is not stopped without --force flag",
                Cause::NotRunning,
            ),
            (
                "pause failed: cannot pause container \"a\" in state paused",
                Cause::NotRunning,
            ),
            ("container \"a\" not started", Cause::NotRunning),
            ("container \"a\" not found", Cause::NotFound),
            ("sandbox is not running", Cause::SandboxGone),
            (
                "signaling container \"a\": connecting to control server at PID 7: connection refused",
                Cause::SandboxGone,
            ),
            ("unknown method", Cause::Unsupported),
            ("container does not exist", Cause::NotFound),
            (
                "container with given ID already exists",
                Cause::AlreadyExists,
            ),
            (
                "cannot delete container x that is not stopped: running",
                Cause::NotRunning,
            ),
            ("container not running", Cause::NotRunning),
            ("cannot exec in a stopped container", Cause::NotRunning),
            (
                "unable to signal init: os: process already finished",
                Cause::NotFound,
            ),
            (
                "executing processes for container: executing command \"x\" in sandbox: error finding executable",
                Cause::Other,
            ),
            ("open /x: no such file or directory", Cause::Other),
            ("", Cause::Other),
        ] {
            assert_eq!(Cause::of(message), cause, "{message}");
        }
    }
}
