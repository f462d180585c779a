// SPDX-License-Identifier: Apache-2.0

//! Runs one command of a runtime, and reads what it says.
//!
//! Every child of this crate starts here, in the same way: an argument list, an environment
//! made from nothing, no descriptor but those it is given, a process group of its own, a
//! deadline, and output that is read up to a limit. A command whose caller goes away still
//! runs to its end: half a `create` is worse than one that nobody waits for.
//!
//! Runtimes tell errors in words only; the words are read in this module and nowhere else
//! ([`Cause::of`]).

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::FileExt, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio as ChildStdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use nix::{
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, killpg},
    },
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::Child,
    sync::oneshot,
    task::JoinHandle,
};

use crate::{
    Exit, Stdio,
    reap::{self, Owned},
    stdio::null_device,
};

/// What a command may find in its environment, unless told more: runtimes look up helpers
/// (`criu`, `newuidmap`) by name.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Most bytes kept of each captured stream.
const OUTPUT_LIMIT: usize = 8 << 20;

/// Most bytes read of a runtime's log, from its end.
const LOG_LIMIT: u64 = 64 << 10;

/// How long captured streams are read on after the command has ended: something it left behind
/// may still hold them.
const DRAIN: Duration = Duration::from_millis(200);

/// How long a killed command may take to die.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// Longest error message passed on, in bytes.
const MESSAGE_LIMIT: usize = 4096;

static RUNS: AtomicU64 = AtomicU64::new(0);

/// How many commands with a runtime's log ([`Command::log`]) this process has started.
pub fn runs() -> u64 {
    RUNS.load(Ordering::Relaxed)
}

/// Why a command gave no [`Output`].
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It could not be started.
    #[error("run {}: {source}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It was killed at its deadline.
    #[error("killed after {} ms", deadline.as_millis())]
    Timeout {
        /// How long it had.
        deadline: Duration,
    },
    /// It ran, but its end could not be learned.
    #[error("wait for a command: {0}")]
    Wait(#[source] io::Error),
}

/// What a command left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its captured standard output, up to 8 MiB.
    pub stdout: Vec<u8>,
    /// Its captured standard error, up to 8 MiB.
    pub stderr: Vec<u8>,
    log: Option<Log>,
}

impl Output {
    /// The exit as a shell would count it.
    pub fn exit(&self) -> Exit {
        Exit::from_wait_status(self.status.into_raw())
    }

    /// The runtime's own words about what went wrong: the errors of its log, else what it wrote
    /// to its standard error.
    pub fn message(&self) -> String {
        let logged = self.log.as_ref().map(Log::errors).unwrap_or_default();
        if !logged.is_empty() {
            return logged;
        }
        clean(&String::from_utf8_lossy(&self.stderr))
    }
}

/// A command to be run. See the module's words for what all have in common.
#[derive(Debug)]
pub struct Command {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    streams: Streams,
    input: Option<Vec<u8>>,
    log: Option<Log>,
    deadline: Option<Duration>,
    bond: Bond,
    at_deadline: AtDeadline,
}

#[derive(Debug)]
enum Streams {
    /// Standard output and error are read and returned.
    Captured,
    /// The caller's descriptors.
    Given(Stdio),
    /// A terminal's replica end, which becomes the controlling terminal.
    Terminal(OwnedFd),
}

/// What becomes of a command when this process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bond {
    /// It goes on: it changes state, and half a change is a leak.
    Finishes,
    /// It dies too: it only looks, or only serves this process.
    Dies,
}

/// Who dies at the deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AtDeadline {
    /// The command's process group.
    Group,
    /// Also the processes it has made that left the group.
    Tree,
}

impl Command {
    /// A command that captures its output, without deadline.
    pub fn new(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            args: Vec::new(),
            env: vec![("PATH".into(), PATH.into())],
            streams: Streams::Captured,
            input: None,
            log: None,
            deadline: None,
            bond: Bond::Finishes,
            at_deadline: AtDeadline::Group,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds an environment variable; only `PATH` is there otherwise.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// Gives it `stdio` instead of capturing; missing streams are null devices.
    #[must_use]
    pub fn stdio(mut self, stdio: Stdio) -> Self {
        self.streams = Streams::Given(stdio);
        self
    }

    /// Makes `replica` its standard streams and its controlling terminal.
    #[must_use]
    pub fn terminal(mut self, replica: OwnedFd) -> Self {
        self.streams = Streams::Terminal(replica);
        self
    }

    /// Lets it read `input` from its standard input (captured commands only).
    #[must_use]
    pub fn input(mut self, input: Vec<u8>) -> Self {
        self.input = Some(input);
        self
    }

    /// Hands it the log whose path is among its arguments, and counts it in [`runs`].
    #[must_use]
    pub fn log(mut self, log: Log) -> Self {
        self.log = Some(log);
        self
    }

    /// Kills it after `deadline`.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Lets it die with this process.
    #[must_use]
    pub fn dies_with_us(mut self) -> Self {
        self.bond = Bond::Dies;
        self
    }

    /// Kills at the deadline also the processes it has made that have left its group.
    #[must_use]
    pub fn kill_tree(mut self) -> Self {
        self.at_deadline = AtDeadline::Tree;
        self
    }

    /// Runs it to its end. Once polled, the command goes on even if this future is dropped.
    ///
    /// # Errors
    /// A failing command is no error here: see [`Output::status`].
    pub async fn run(self) -> Result<Output, CommandError> {
        self.start()?.output().await
    }

    /// Starts it. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(self) -> Result<Running, CommandError> {
        let program = self.program.clone();
        self.spawn().map_err(|source| CommandError::Spawn { program, source })
    }

    fn spawn(self) -> io::Result<Running> {
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.args).env_clear().envs(self.env).kill_on_drop(false);
        let mut terminal = false;
        match self.streams {
            Streams::Captured => {
                let stdin = match &self.input {
                    Some(input) => memory_file(input)?.into(),
                    None => ChildStdio::null(),
                };
                command.stdin(stdin).stdout(ChildStdio::piped()).stderr(ChildStdio::piped());
            }
            Streams::Given(stdio) => {
                let or_null = |fd: Option<OwnedFd>| match fd {
                    Some(fd) => Ok(ChildStdio::from(fd)),
                    None => null_device().map(ChildStdio::from),
                };
                command.stdin(or_null(stdio.stdin)?);
                command.stdout(or_null(stdio.stdout)?);
                command.stderr(or_null(stdio.stderr)?);
            }
            Streams::Terminal(replica) => {
                terminal = true;
                command.stdin(replica.try_clone()?).stdout(replica.try_clone()?).stderr(replica);
            }
        }
        if !terminal {
            // With a terminal it becomes a session leader instead, and so leads its group too.
            command.process_group(0);
        }
        let setup = ChildSetup {
            keep: self.log.as_ref().map(|log| log.0.as_raw_fd()),
            dies_with: (self.bond == Bond::Dies).then(nix::unistd::getpid),
            terminal,
        };
        // SAFETY: `apply` makes system calls only, and touches no memory but its own copy.
        unsafe { command.pre_exec(move || setup.apply()) };

        log::debug!("run {} {:?}", self.program.display(), self.args);
        let (child, owned) = reap::spawn(&mut command)?;
        if self.log.is_some() {
            RUNS.fetch_add(1, Ordering::Relaxed);
        }
        let pid = child.id().ok_or_else(|| io::Error::other("child has no pid"))?;
        let (stop, stopped) = oneshot::channel();
        let attendant = Attendant {
            pid,
            child,
            _owned: owned,
            deadline: self.deadline,
            at_deadline: self.at_deadline,
            log: self.log,
        };
        Ok(Running { pid, stop: Some(stop), output: tokio::spawn(attendant.attend(stopped)) })
    }
}

/// What a child does between fork and exec, where only system calls are safe.
#[derive(Debug, Clone, Copy)]
struct ChildSetup {
    keep: Option<RawFd>,
    dies_with: Option<Pid>,
    terminal: bool,
}

impl ChildSetup {
    fn apply(self) -> io::Result<()> {
        // Descriptors of libraries that forgot close-on-exec must not reach a sentry. A kernel
        // without the call (before 5.11) is no reason to fail: ours all have the flag.
        // SAFETY: takes integers only.
        unsafe {
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
        }
        if let Some(fd) = self.keep {
            // SAFETY: takes integers only; `fd` was open at the fork.
            check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
        }
        if let Some(parent) = self.dies_with {
            // SAFETY: takes integers only.
            check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
            // It may have died before the request.
            if nix::unistd::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        if self.terminal {
            nix::unistd::setsid()?;
            // SAFETY: takes integers only; 0 is the terminal.
            check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        }
        Ok(())
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    pid: u32,
    /// Dropping it says nothing to the command: only [`Running::kill`] does.
    stop: Option<oneshot::Sender<()>>,
    output: JoinHandle<Result<Output, CommandError>>,
}

impl Running {
    /// Stands for a command that has ended already.
    pub(crate) fn ended(output: Output) -> Self {
        Self { pid: 0, stop: None, output: tokio::spawn(async { Ok(output) }) }
    }

    /// Its pid, as long as it has not ended.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills its process group.
    pub fn kill(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An error means that it has ended.
            let _ = stop.send(());
        }
    }

    /// Waits for its end. Cancel-safe.
    ///
    /// # Errors
    /// As [`Command::run`].
    pub async fn output(&mut self) -> Result<Output, CommandError> {
        (&mut self.output).await.map_err(|e| CommandError::Wait(io::Error::other(e)))?
    }
}

/// The task that waits for a child, so that it is reaped whoever loses interest.
struct Attendant {
    pid: u32,
    child: Child,
    _owned: Owned,
    deadline: Option<Duration>,
    at_deadline: AtDeadline,
    log: Option<Log>,
}

impl Attendant {
    async fn attend(mut self, stopped: oneshot::Receiver<()>) -> Result<Output, CommandError> {
        let (stdout, stderr) = (self.child.stdout.take(), self.child.stderr.take());
        let mut streams =
            tokio::spawn(async move { tokio::join!(read_up_to_limit(stdout), read_up_to_limit(stderr)) });
        let stop = async {
            // A dropped handle is not an order to stop.
            if stopped.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let deadline = async {
            match self.deadline {
                Some(deadline) => {
                    tokio::time::sleep(deadline).await;
                    deadline
                }
                None => std::future::pending().await,
            }
        };
        let status = tokio::select! {
            status = self.child.wait() => status.map_err(CommandError::Wait)?,
            () = stop => {
                self.kill(AtDeadline::Group);
                self.child.wait().await.map_err(CommandError::Wait)?
            }
            deadline = deadline => {
                self.kill(self.at_deadline);
                // Past this grace it hangs in the kernel; tokio reaps it when it can.
                let _ = tokio::time::timeout(KILL_GRACE, self.child.wait()).await;
                streams.abort();
                return Err(CommandError::Timeout { deadline });
            }
        };
        let (stdout, stderr) = match tokio::time::timeout(DRAIN, &mut streams).await {
            Ok(read) => read.map_err(|e| CommandError::Wait(io::Error::other(e)))?,
            Err(_) => {
                streams.abort();
                log::warn!("process {} left its output open to others", self.pid);
                Default::default()
            }
        };
        Ok(Output { status, stdout, stderr, log: self.log })
    }

    fn kill(&self, who: AtDeadline) {
        let tree = match who {
            AtDeadline::Group => Vec::new(),
            AtDeadline::Tree => descendants(self.pid),
        };
        // An error means that there is nobody left.
        let _ = killpg(Pid::from_raw(self.pid.cast_signed()), Signal::SIGKILL);
        for pid in tree {
            log::warn!("kill process {pid}, left by a command that took too long");
            let _ = nix::sys::signal::kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        }
    }
}

async fn read_up_to_limit(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else { return kept };
    if let Err(e) = (&mut stream).take(OUTPUT_LIMIT as u64).read_to_end(&mut kept).await {
        log::warn!("read output of a command: {e}");
    }
    // The rest is read too, so that the command does not block on it, but not kept.
    let mut rest = [0; 4096];
    while kept.len() == OUTPUT_LIMIT && matches!(stream.read(&mut rest).await, Ok(1..)) {}
    kept
}

/// The processes below `root`, by their parents. Reads all of /proc: for emergencies.
fn descendants(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in parentheses may hold anything; the parent is second after it.
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut found = vec![root];
    let mut seen = 0;
    while let Some(&parent) = found.get(seen) {
        found.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        seen += 1;
    }
    found.split_off(1)
}

fn memory_file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"runtime-input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    io::Seek::rewind(&mut file)?;
    Ok(file)
}

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
        Ok(Self(memfd_create(c"runtime-log", MFdFlags::MFD_CLOEXEC)?.into()))
    }

    /// Its path as the command sees it that is given this log.
    pub fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    /// The messages of level `error`, in order and without repetitions.
    fn errors(&self) -> String {
        let text = self.tail().unwrap_or_else(|e| {
            log::warn!("read a runtime's log: {e}");
            Vec::new()
        });
        errors_of(&text)
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
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|w| !w.is_empty()) {
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
    (&["cannot load sandbox: file does not exist"], Cause::NotFound),
    (&["container does not exist"], Cause::NotFound),
    (&["container with given ID already exists"], Cause::AlreadyExists),
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
    (&["cannot delete container ", "not stopped"], Cause::NotRunning),
    (&["container not running"], Cause::NotRunning),
    (&["container still running"], Cause::NotRunning),
    (&["container not paused"], Cause::NotRunning),
    (&["container paused"], Cause::NotRunning),
    (&["cannot exec in a stopped container"], Cause::NotRunning),
    (&["cannot exec in a paused container"], Cause::NotRunning),
    (&["cannot start a container that has stopped"], Cause::NotRunning),
    (&["cannot start an already running container"], Cause::NotRunning),
    (&["container with id ", " is not running"], Cause::NotRunning),
    (&["container process is already dead"], Cause::NotRunning),
    // Command lines and methods that a version does not have.
    (&["Usage: runsc <flags> <subcommand>"], Cause::Unsupported),
    (&["flag provided but not defined"], Cause::Unsupported),
    (&["No help topic for"], Cause::Unsupported),
    (&["unknown method"], Cause::Unsupported),
];

impl Cause {
    /// Reads a runtime's message.
    pub(crate) fn of(message: &str) -> Self {
        let fits = |words: &[&str]| {
            words.iter().try_fold(message, |rest, word| Some(rest.split_once(word)?.1)).is_some()
        };
        CAUSES.iter().find(|(words, _)| fits(words)).map_or(Self::Other, |(_, cause)| *cause)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, time::Instant};

    use super::*;

    fn sh(script: &str) -> Command {
        Command::new(Path::new("/bin/sh")).args(["-c", script]).deadline(Duration::from_secs(20))
    }

    #[tokio::test]
    async fn output_and_status_are_returned() {
        let output = sh("cat; echo err >&2; exit 3").input(b"in".to_vec()).run().await.unwrap();
        assert_eq!(output.stdout, b"in");
        assert_eq!(output.stderr, b"err\n");
        assert_eq!(output.exit().code, 3);
        assert_eq!(output.message(), "err");
    }

    #[tokio::test]
    async fn the_environment_is_made_from_nothing() {
        let output = Command::new(Path::new("/usr/bin/env")).env("A", "b").run().await.unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("A=b\nPATH={PATH}\n"));
    }

    #[tokio::test]
    async fn only_the_log_is_inherited() {
        // A descriptor without close-on-exec, as a careless library would leave it.
        let leak = std::fs::File::open("/etc/passwd").unwrap();
        // SAFETY: takes integers only.
        assert_eq!(unsafe { libc::fcntl(leak.as_raw_fd(), libc::F_SETFD, 0) }, 0);
        let log = Log::new().unwrap();
        let path = log.path();
        let script = format!("ls -l /proc/self/fd >&2; echo '{{\"level\":\"error\",\"msg\":\"no\"}}' >>{path}; exit 1");
        let output = sh(&script).log(log).run().await.unwrap();
        let listed = String::from_utf8(output.stderr.clone()).unwrap();
        assert!(!listed.contains("/etc/passwd"), "{listed}");
        assert!(listed.contains("runtime-log"), "{listed}");
        assert_eq!(output.message(), "no");
    }

    #[tokio::test]
    async fn the_deadline_kills_what_left_the_group_too() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let started = Instant::now();
        let stdio = Stdio { stdout: Some(writer.into()), ..Stdio::default() };
        let error = sh("setsid sleep 100 & sleep 100")
            .stdio(stdio)
            .deadline(Duration::from_millis(300))
            .kill_tree()
            .run()
            .await
            .unwrap_err();
        assert!(matches!(error, CommandError::Timeout { .. }), "{error}");
        // Both held the pipe: its end shows that both are dead.
        tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new())).await.unwrap().unwrap();
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_does_not_stop_it() {
        let dir = tempfile::tempdir().unwrap();
        let done = dir.path().join("done");
        let command = sh(&format!("sleep 0.3; touch {}", done.display()));
        let _ = tokio::time::timeout(Duration::from_millis(50), command.run()).await;
        for _ in 0..100 {
            if done.exists() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the command was stopped");
    }

    #[tokio::test]
    async fn output_beyond_the_limit_is_dropped_and_does_not_block() {
        let output = sh("head -c 20000000 /dev/zero").run().await.unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout.len(), OUTPUT_LIMIT);
    }

    #[tokio::test]
    async fn a_running_command_can_be_killed() {
        let mut running = sh("sleep 100").start().unwrap();
        running.kill();
        assert_eq!(running.output().await.unwrap().exit().code, 137);
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_is_named() {
        let error = Command::new(Path::new("/no/such/runsc")).run().await.unwrap_err();
        assert!(error.to_string().starts_with("run /no/such/runsc: "), "{error}");
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
            ("loading container \"x\": file does not exist", Cause::NotFound),
            ("loading sandbox: file does not exist", Cause::NotFound),
            ("creating container: cannot load sandbox: file does not exist", Cause::NotFound),
            ("creating container: cannot lock container metadata file: container already exists", Cause::AlreadyExists),
            ("signaling container \"a\": signaling process in container \"a\" PID 0: no such process", Cause::NotFound),
            ("failed to signal pid 9: signaling process in container \"a\" PID 9: no such process with PID 9", Cause::NotFound),
            ("starting container: cannot start container \"a\" in state stopped", Cause::NotRunning),
            ("cannot signal container \"a\" in state created", Cause::NotRunning),
            ("cannot delete container that is not stopped without --force flag", Cause::NotRunning),
            ("pause failed: cannot pause container \"a\" in state paused", Cause::NotRunning),
            ("container \"a\" not started", Cause::NotRunning),
            ("container \"a\" not found", Cause::NotFound),
            ("sandbox is not running", Cause::SandboxGone),
            ("signaling container \"a\": connecting to control server at PID 7: connection refused", Cause::SandboxGone),
            ("unknown method", Cause::Unsupported),
            ("container does not exist", Cause::NotFound),
            ("container with given ID already exists", Cause::AlreadyExists),
            ("cannot delete container x that is not stopped: running", Cause::NotRunning),
            ("container not running", Cause::NotRunning),
            ("cannot exec in a stopped container", Cause::NotRunning),
            ("unable to signal init: os: process already finished", Cause::NotFound),
            ("executing processes for container: executing command \"x\" in sandbox: error finding executable", Cause::Other),
            ("open /x: no such file or directory", Cause::Other),
            ("", Cause::Other),
        ] {
            assert_eq!(Cause::of(message), cause, "{message}");
        }
    }
}
