// SPDX-License-Identifier: Apache-2.0

//! Runs one command of a runtime, and reads what it says.
//!
//! Every child of this crate starts here, in the same way: an argument list, an environment
//! made from nothing, no descriptor but those it is given, a process group of its own, a
//! deadline, and output that is read up to a limit. A command whose caller goes away still
//! runs to its end: half a `create` is worse than one that nobody waits for.
//!
//! Runtimes tell errors in words only; the words are read in `error_text.rs` and nowhere else.

mod error_text;
mod netns_overlay;

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, Write},
    os::{
        fd::{OwnedFd, RawFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio as ChildStdio},
    time::Duration,
};

use kiln_host::reap::{self, Owned, kill_found};
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

use crate::{Exit, Stdio, stdio::null_device};

pub use error_text::Log;
pub(crate) use error_text::{Cause, clean};
pub(crate) use netns_overlay::NetnsOverlay;

/// What a command may find in its environment, unless told more: runtimes look up other
/// programs (`criu`, `newuidmap`) by name.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Most bytes kept of each captured stream.
const OUTPUT_LIMIT: usize = 8 << 20;

/// How long captured streams are read on after the command has ended: something it left behind
/// may still hold them.
const DRAIN: Duration = Duration::from_millis(200);

/// How long a killed command may take to die.
const KILL_GRACE: Duration = Duration::from_secs(5);

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

    /// The first line of its standard error.
    pub(crate) fn first_complaint(&self) -> String {
        let text = String::from_utf8_lossy(&self.stderr);
        clean(text.lines().next().unwrap_or_default())
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
    cover: Option<NetnsOverlay>,
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
            cover: None,
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
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
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

    /// Hands it the log whose path is among its arguments.
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

    /// Shows it another network namespace of a process than that process has.
    #[must_use]
    pub(crate) fn cover(mut self, cover: NetnsOverlay) -> Self {
        self.cover = Some(cover);
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
        self.spawn()
            .map_err(|source| CommandError::Spawn { program, source })
    }

    fn spawn(self) -> io::Result<Running> {
        let mut command = tokio::process::Command::new(&self.program);
        command
            .args(&self.args)
            .env_clear()
            .envs(self.env)
            .kill_on_drop(false);
        let mut terminal = false;
        match self.streams {
            Streams::Captured => {
                let stdin = match &self.input {
                    Some(input) => memory_file(input)?.into(),
                    None => ChildStdio::null(),
                };
                command
                    .stdin(stdin)
                    .stdout(ChildStdio::piped())
                    .stderr(ChildStdio::piped());
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
                command
                    .stdin(replica.try_clone()?)
                    .stdout(replica.try_clone()?)
                    .stderr(replica);
            }
        }
        if !terminal {
            // With a terminal it becomes a session leader instead, and so leads its group too.
            command.process_group(0);
        }
        let setup = ChildSetup {
            keep: self.log.as_ref().map(|log| log.as_raw_fd()),
            dies_with: (self.bond == Bond::Dies).then(nix::unistd::getpid),
            terminal,
        };
        // SAFETY: `apply` makes system calls only, and touches no memory but its own copy.
        unsafe { command.pre_exec(move || setup.apply()) };
        if let Some(cover) = self.cover {
            // SAFETY: as above.
            unsafe { command.pre_exec(move || cover.apply()) };
        }

        log::debug!("run {} {:?}", self.program.display(), self.args);
        let (child, owned) = reap::spawn(&mut command)?;
        let pid = child
            .id()
            .ok_or_else(|| io::Error::other("child has no pid"))?;
        let (stop, stopped) = oneshot::channel();
        let attendant = Attendant {
            pid,
            child,
            _owned: owned,
            deadline: self.deadline,
            at_deadline: self.at_deadline,
            log: self.log,
        };
        Ok(Running {
            pid,
            stop: Some(stop),
            output: tokio::spawn(attendant.attend(stopped)),
        })
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
            libc::syscall(
                libc::SYS_close_range,
                3,
                libc::c_uint::MAX,
                libc::CLOSE_RANGE_CLOEXEC,
            );
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
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
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
        Self {
            pid: 0,
            stop: None,
            output: tokio::spawn(async { Ok(output) }),
        }
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
        (&mut self.output)
            .await
            .map_err(|e| CommandError::Wait(io::Error::other(e)))?
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
        let mut streams = tokio::spawn(async move {
            tokio::join!(read_up_to_limit(stdout), read_up_to_limit(stderr))
        });
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
        Ok(Output {
            status,
            stdout,
            stderr,
            log: self.log,
        })
    }

    fn kill(&self, who: AtDeadline) {
        let group = Pid::from_raw(self.pid.cast_signed());
        let tree = match who {
            AtDeadline::Group => BTreeMap::new(),
            AtDeadline::Tree => {
                // Stopped, it makes no process that the list would lack.
                let _ = killpg(group, Signal::SIGSTOP);
                descendants(self.pid)
            }
        };
        // An error means that there is nobody left.
        let _ = killpg(group, Signal::SIGKILL);
        for pid in tree.keys() {
            log::warn!("kill process {pid}, left by a command that took too long");
        }
        kill_found(tree.keys().copied(), |pid| tree[&pid].is_there());
    }
}

async fn read_up_to_limit(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else {
        return kept;
    };
    if let Err(e) = (&mut stream)
        .take(OUTPUT_LIMIT as u64)
        .read_to_end(&mut kept)
        .await
    {
        log::warn!("read output of a command: {e}");
    }
    // The rest is read too, so that the command does not block on it, but not kept.
    let mut rest = [0; 4096];
    while kept.len() == OUTPUT_LIMIT && matches!(stream.read(&mut rest).await, Ok(1..)) {}
    kept
}

/// A process at one moment (proc_pid_stat(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    pid: u32,
    parent: u32,
    /// In clock ticks after the boot: another process of this number has another.
    started: u64,
}

impl Seen {
    fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything. The state is the first after it.
        let mut rest = stat.rsplit_once(')')?.1.split_whitespace();
        Some(Self {
            pid,
            parent: rest.nth(1)?.parse().ok()?,
            started: rest.nth(17)?.parse().ok()?,
        })
    }

    /// Whether it is still the same, whatever its parent is.
    fn is_there(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.started == self.started)
    }
}

/// The processes below `root`, by their parents. Reads all of /proc: for emergencies.
fn descendants(root: u32) -> BTreeMap<u32, Seen> {
    let all: Vec<Seen> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| Seen::of(entry.ok()?.file_name().to_str()?.parse().ok()?))
        .collect();
    let mut found = BTreeMap::new();
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        for child in all.iter().filter(|seen| seen.parent == parent) {
            found.insert(child.pid, *child);
            parents.push(child.pid);
        }
    }
    found
}

fn memory_file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"runtime-input", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(content)?;
    io::Seek::rewind(&mut file)?;
    Ok(file)
}

#[cfg(test)]
mod tests;
