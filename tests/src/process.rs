// SPDX-License-Identifier: Apache-2.0

//! Processes: commands with a deadline, daemons with a log file, and what runs on the machine.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::AsyncWriteExt,
    process::{Child, Command},
};

use crate::{cgroup::Cgroup, netns::Netns, wait};

/// How long a command may run when it says nothing else.
const DEADLINE: Duration = Duration::from_secs(60);

/// Bytes of a log that are shown of a failure.
const TAIL: usize = 16 << 10;

/// What a command left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code as a shell would count it.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }
}

/// A command to be run to its end. Its environment is the caller's.
#[derive(Debug)]
pub struct Cmd {
    program: PathBuf,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    input: Vec<u8>,
    netns: Option<Netns>,
    cgroup: Option<Cgroup>,
    deadline: Duration,
}

impl Cmd {
    /// A command without arguments or input.
    pub fn new(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            args: Vec::new(),
            envs: Vec::new(),
            dir: None,
            input: Vec::new(),
            netns: None,
            cgroup: None,
            deadline: DEADLINE,
        }
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((key.into(), value.as_ref().to_owned()));
        self
    }

    /// Sets its working directory.
    pub fn dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    /// Sets what it reads.
    pub fn input(mut self, input: &[u8]) -> Self {
        self.input = input.to_owned();
        self
    }

    /// Runs it in a network namespace.
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.clone());
        self
    }

    /// Runs it in the part for daemons of a cgroup.
    pub fn cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.cgroup = Some(cgroup.clone());
        self
    }

    /// Sets how long it may run; then it is killed.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts it in the background, with both of its streams in the file `log`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn background(self, log: &Path) -> Result<Background> {
        let file = File::create(log).with_context(|| format!("make {}", log.display()))?;
        let child = self.child(Stdio::null(), file.try_clone()?.into(), file.into())?;
        Ok(Background {
            child,
            log: log.to_owned(),
        })
    }

    /// Starts it in the background in a session of its own, where it outlives its caller, with
    /// both of its streams appended to the file `log`. Returns its pid.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn detached(self, log: &Path) -> Result<u32> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        let mut command = self.prepared()?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        // SAFETY: between fork and exec the child only calls setsid(2), a bare system call.
        unsafe {
            command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(io::Error::from));
        }
        let child = command
            .spawn()
            .with_context(|| format!("run {}", self.words()))?;
        child.id().context("a child without a pid")
    }

    /// Runs it, and returns what it left, however it ended.
    ///
    /// # Errors
    /// When it cannot be run or reaches its deadline.
    pub async fn output(self) -> Result<Output> {
        let words = self.words();
        let (input, deadline) = (self.input.clone(), self.deadline);
        let mut child = self.child(Stdio::piped(), Stdio::piped(), Stdio::piped())?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(&input).await {
                // It may end without reading.
                Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
                    return Err(e).context("write to a command");
                }
                _ => {}
            }
        }
        let done = tokio::time::timeout(deadline, child.wait_with_output()).await;
        let Ok(done) = done else {
            bail!("{words}: killed after {} s", deadline.as_secs())
        };
        let done = done.with_context(|| format!("wait for {words}"))?;
        Ok(Output {
            status: done.status,
            stdout: done.stdout,
            stderr: done.stderr,
        })
    }

    /// Runs it, and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be run or ends with anything but 0.
    pub async fn run(self) -> Result<String> {
        let words = self.words();
        let output = self.output().await?;
        if !output.status.success() {
            bail!(
                "{words}: {}: {}{}",
                output.status,
                output.errors(),
                output.text()
            );
        }
        Ok(output.text())
    }

    /// Starts it with these streams; dropping the child kills it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn child(self, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Child> {
        let mut command = self.prepared()?;
        command
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .kill_on_drop(true);
        command
            .spawn()
            .with_context(|| format!("run {}", self.words()))
    }

    /// Everything but its streams.
    pub(crate) fn prepared(&self) -> Result<Command> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.envs.clone());
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        if let Some(netns) = &self.netns {
            enter(&mut command, netns);
        }
        if let Some(cgroup) = &self.cgroup {
            join(&mut command, cgroup)?;
        }
        Ok(command)
    }

    pub(crate) fn words(&self) -> String {
        let words = [self.program.as_os_str()]
            .into_iter()
            .chain(self.args.iter().map(OsString::as_os_str));
        words
            .map(OsStr::to_string_lossy)
            .collect::<Vec<_>>()
            .join(" ")
    }
}

fn enter(command: &mut Command, netns: &Netns) {
    let netns = netns.clone();
    // SAFETY: between fork and exec the child only calls setns(2), which is a bare system call.
    unsafe {
        command.pre_exec(move || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io::Error::from)
        });
    }
}

fn join(command: &mut Command, cgroup: &Cgroup) -> Result<()> {
    let procs = cgroup.procs_file()?;
    // SAFETY: between fork and exec the child only calls write(2) on an open descriptor.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::write(&procs, b"0")
                .map(drop)
                .map_err(io::Error::from)
        });
    }
    Ok(())
}

/// A command that runs in the background; dropping it kills it.
#[derive(Debug)]
pub struct Background {
    child: Child,
    log: PathBuf,
}

impl Background {
    /// Its process id, unless it has ended and was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// What it has written so far.
    pub fn text(&self) -> String {
        fs::read(&self.log)
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .unwrap_or_default()
    }

    /// Waits until it has written `text`, and returns all that it has written.
    ///
    /// # Errors
    /// When it does not come; with what did.
    pub async fn expect(&self, text: &str) -> Result<String> {
        let found = wait::until(&format!("{text:?} of a command"), wait::SOON, async || {
            let all = self.text();
            all.contains(text).then_some(all)
        });
        found
            .await
            .with_context(|| format!("it has written: {}", self.text()))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn ended(&mut self) -> Result<ExitStatus> {
        let ended = tokio::time::timeout(DEADLINE, self.child.wait()).await;
        Ok(ended.with_context(|| format!("still running, and has written: {}", self.text()))??)
    }
}

/// A process that runs in the background with its output in a file.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `program` in `netns` (the test's own without) and in `cgroup`, with its output
    /// appended to `log`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn start(
        program: &Path,
        args: &[&OsStr],
        envs: &[(&str, &OsStr)],
        netns: Option<&Netns>,
        cgroup: &Cgroup,
        log: &Path,
    ) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("open {}", log.display()))?;
        let mut command = Command::new(program);
        command.args(args).envs(envs.iter().copied());
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        if let Some(netns) = netns {
            enter(&mut command, netns);
        }
        join(&mut command, cgroup)?;
        let child = command
            .spawn()
            .with_context(|| format!("run {}", program.display()))?;
        Ok(Self {
            child,
            log: log.to_owned(),
        })
    }

    /// Its pid, while it has not been waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends a signal and waits for the end.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub async fn stop(&mut self, signal: Signal, limit: Duration) -> Result<()> {
        if let Some(pid) = self.pid() {
            signal_to(pid, signal)?;
        }
        let ended = tokio::time::timeout(limit, self.child.wait()).await;
        ended.with_context(|| format!("still running {} s after {signal}", limit.as_secs()))??;
        Ok(())
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When it cannot be asked.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// The end of its log.
    pub fn tail(&self) -> String {
        tail(&self.log)
    }
}

/// The end of a log file, from the start of a line; the reason where it cannot be read.
pub fn tail(log: &Path) -> String {
    let text = match fs::read(log) {
        Ok(text) => text,
        Err(e) => return format!("({}: {e})", log.display()),
    };
    let text = String::from_utf8_lossy(&text);
    let from = text.floor_char_boundary(text.len().saturating_sub(TAIL));
    let end = &text[from..];
    let line = if from == 0 {
        0
    } else {
        end.find('\n').map_or(0, |at| at + 1)
    };
    end[line..].to_owned()
}

/// Sends a signal; to one that is gone is success.
///
/// # Errors
/// The kernel's.
pub fn signal_to(pid: u32, signal: Signal) -> Result<()> {
    let target = Pid::from_raw(i32::try_from(pid).context("pid")?);
    match kill(target, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("send {signal} to {pid}")),
    }
}

/// A process of the machine.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Proc {
    /// Its pid.
    pub pid: u32,
    /// Its parent's pid.
    pub parent: u32,
    /// Its arguments, joined by spaces.
    pub argv: String,
}

impl Proc {
    /// The process with `pid`, unless it is gone or a zombie.
    pub fn find(pid: u32) -> Option<Self> {
        let dir = Path::new("/proc").join(pid.to_string());
        let argv = fs::read(dir.join("cmdline")).ok()?;
        let argv: Vec<_> = argv
            .split(|b| *b == 0)
            .filter(|w| !w.is_empty())
            .map(String::from_utf8_lossy)
            .collect();
        if argv.is_empty() {
            return None; // a zombie, or a thread of the kernel
        }
        let stat = fs::read_to_string(dir.join("stat")).ok()?;
        // The name in parentheses may hold anything (proc_pid_stat(5)).
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let (state, parent) = (fields.next()?, fields.next()?.parse().ok()?);
        (state != "Z").then(|| Self {
            pid,
            parent,
            argv: argv.join(" "),
        })
    }

    /// When it was started, in ticks since the machine was: with its pid, this is one process for
    /// good.
    pub fn started(&self) -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        // Field 22 of proc_pid_stat(5); the first after the name is field 3.
        let fields = stat.rsplit_once(')')?.1;
        fields.split_whitespace().nth(19)?.parse().ok()
    }

    /// All processes of the machine that have arguments.
    pub fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        let pids = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.parse().ok());
        pids.filter_map(Self::find).collect()
    }

    /// All processes whose arguments hold `text`.
    pub fn with(text: &str) -> Vec<Self> {
        Self::all()
            .into_iter()
            .filter(|p| p.argv.contains(text))
            .collect()
    }

    /// The program that runs, by the name of its file.
    pub fn program(&self) -> String {
        let exe = fs::read_link(format!("/proc/{}/exe", self.pid)).unwrap_or_default();
        exe.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// A number of `/proc/PID/status`, such as `VmRSS` (KiB) or `Threads`.
    pub fn status(&self, field: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse().ok()
    }

    /// What its descriptors lead to.
    ///
    /// # Errors
    /// When it has ended.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let dir = fs::read_dir(format!("/proc/{}/fd", self.pid)).context("list descriptors")?;
        Ok(dir
            .flatten()
            .filter_map(|e| fs::read_link(e.path()).ok())
            .collect())
    }

    /// By how many nanoseconds timers may be late in any of its threads.
    ///
    /// # Errors
    /// When it has ended.
    pub fn timer_slacks(&self) -> Result<BTreeSet<u64>> {
        let mut all = BTreeSet::new();
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let thread = thread?.file_name();
            let file = format!("/proc/{}/timerslack_ns", thread.display());
            // Threads come and go.
            if let Ok(text) = fs::read_to_string(file) {
                all.insert(text.trim().parse()?);
            }
        }
        Ok(all)
    }

    /// Kills it and waits until it is gone.
    ///
    /// # Errors
    /// When it is still there after a while.
    pub async fn kill(&self) -> Result<()> {
        signal_to(self.pid, Signal::SIGKILL)?;
        wait::until_true(&format!("end of {}", self.argv), wait::SOON, || {
            Self::find(self.pid).is_none()
        })
        .await
    }
}
