// SPDX-License-Identifier: Apache-2.0

//! Exits of processes that no `tokio::process` handle of ours stands for.
//!
//! `runsc create` leaves a sentry and a gofer behind, `runc create` a container's first process.
//! When this process is a child subreaper they become its children, and somebody must collect
//! them: a zombie sentry makes `runsc delete` wait for ever longer, and its wait status is the
//! one place where the exit code of a sandbox that ended at once can be found.
//!
//! Two kinds of children live side by side. Those of [`spawn`] are *owned*: tokio waits for
//! them. All others are orphans: a task woken by `SIGCHLD` peeks at the first zombie, leaves it
//! alone when it is owned, else reaps it and keeps its status for [`watch`]. Where this process
//! is no subreaper, a [`Watch`] still sees the end by pidfd, only not the code.

use std::{
    collections::{HashSet, VecDeque},
    future::Future,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    process::{Child, Command},
    signal::unix::{Signal, SignalKind, signal},
    sync::SetOnce,
    task::AbortHandle,
};

use crate::Exit;

/// How many exits nobody has asked for yet are kept, the oldest going first.
const KEPT: usize = 256;

/// Pause before looking again when the first zombie is one that tokio is about to reap:
/// `SIGCHLD` does not come twice for those queued behind it.
const OWNED_RETRY: Duration = Duration::from_millis(20);

/// Guards the order of fork, registration and reaping; never held over an await.
static CHILDREN: Mutex<Children> = Mutex::new(Children {
    owned: None,
    exits: VecDeque::new(),
});

#[derive(Debug)]
struct Children {
    /// Pids that tokio waits for. `None` is empty: a `HashSet` cannot be made in a constant.
    owned: Option<HashSet<u32>>,
    /// Exits of reaped orphans that no watch has taken.
    exits: VecDeque<(u32, Exit)>,
}

impl Children {
    fn lock() -> MutexGuard<'static, Self> {
        CHILDREN.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_owned(&self, pid: u32) -> bool {
        self.owned
            .as_ref()
            .is_some_and(|owned| owned.contains(&pid))
    }

    fn keep(&mut self, pid: u32, exit: Exit) {
        if self.exits.len() == KEPT {
            self.exits.pop_front();
        }
        self.exits.push_back((pid, exit));
    }

    fn take(&mut self, pid: u32) -> Option<Exit> {
        let at = self.exits.iter().rposition(|(kept, _)| *kept == pid)?;
        self.exits.remove(at).map(|(_, exit)| exit)
    }
}

/// Makes this process the parent of its orphaned descendants and starts the task that reaps
/// them. Must be called in a tokio runtime; the task lives as long as that runtime.
///
/// # Errors
/// When the kernel refuses, or no signal handler can be installed.
pub fn become_subreaper() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)?;
    let sigchld = signal(SignalKind::child())?;
    tokio::spawn(reap_for_ever(sigchld));
    Ok(())
}

async fn reap_for_ever(mut sigchld: Signal) {
    loop {
        let blocked = reap_orphans();
        if blocked {
            // Both arms lead to another look; the timer is for tokio's sake, see `OWNED_RETRY`.
            let _ = tokio::time::timeout(OWNED_RETRY, sigchld.recv()).await;
        } else if sigchld.recv().await.is_none() {
            return;
        }
    }
}

/// Reaps orphans until none is left. Returns whether an owned zombie stood in the way.
fn reap_orphans() -> bool {
    loop {
        let mut children = Children::lock();
        let Ok(Some((pid, _))) = wait(libc::P_ALL, 0, libc::WNOWAIT) else {
            return false;
        };
        if children.is_owned(pid) {
            return true;
        }
        match wait(libc::P_PID, pid, 0) {
            Ok(Some((_, exit))) => {
                log::debug!("reaped orphan {pid}: {}", exit.code);
                children.keep(pid, exit);
            }
            Ok(None) => return false,
            Err(e) => {
                log::warn!("wait for orphan {pid}: {e}");
                return false;
            }
        }
    }
}

/// `waitid(2)` for ended children, without blocking.
fn wait(id_type: libc::idtype_t, id: u32, flags: libc::c_int) -> io::Result<Option<(u32, Exit)>> {
    // SAFETY: siginfo_t is plain data for which all-zeroes is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | flags;
    // SAFETY: `info` outlives the call, which writes nothing else.
    if unsafe { libc::waitid(id_type, id, &raw mut info, flags) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid filled the SIGCHLD fields, or left the zeroes when there is nothing.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let code = status.cast_unsigned();
    let code = if info.si_code == libc::CLD_EXITED {
        code
    } else {
        128 + code
    };
    Ok(Some((pid.cast_unsigned(), Exit::now(code))))
}

/// A child that tokio waits for; see [`spawn`].
#[derive(Debug)]
pub struct Owned(u32);

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(owned) = &mut Children::lock().owned {
            owned.remove(&self.0);
        }
    }
}

/// Starts `command` as a child that the orphan task leaves alone as long as the [`Owned`] lives.
/// Drop that only after the child has been waited for. Children made in any other way lose
/// their exit status to the task.
///
/// # Errors
/// When the program cannot be started.
pub fn spawn(command: &mut Command) -> io::Result<(Child, Owned)> {
    // Locked over the fork: else the child could end, and be reaped, before it is registered.
    let mut children = Children::lock();
    let child = command.spawn()?;
    let pid = child
        .id()
        .ok_or_else(|| io::Error::other("child has no pid"))?;
    children.owned.get_or_insert_default().insert(pid);
    Ok((child, Owned(pid)))
}

/// How a watched process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was ours to reap.
    Reaped(Exit),
    /// It is gone, and its status went to another parent.
    Gone,
}

impl End {
    /// The exit, [`Exit::KILLED`] where it is not known.
    pub fn exit(self) -> Exit {
        match self {
            Self::Reaped(exit) => exit,
            Self::Gone => Exit::now(Exit::KILLED),
        }
    }
}

/// A hold on one process by pidfd: what is watched stays that process even if its pid is
/// used again.
#[derive(Debug)]
pub struct Watch {
    pid: u32,
    state: WatchState,
}

#[derive(Debug)]
enum WatchState {
    Open(AsyncFd<OwnedFd>),
    Over(End),
}

/// Watches the process `pid` of the host, child or not. Must be called in a tokio runtime.
///
/// # Errors
/// When no pidfd can be had for another reason than that the process is gone already.
pub fn watch(pid: u32) -> io::Result<Watch> {
    // Locked, so that a process reaped meanwhile is found in `exits`.
    let mut children = Children::lock();
    let state = match pidfd_open(pid) {
        Ok(fd) => {
            // It is not reaped yet, so an exit kept under its pid is that of an earlier process.
            children.take(pid);
            // SAFETY: an OwnedFd is open, and always the same, until the AsyncFd drops it.
            let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
            WatchState::Open(fd.map_err(|e| io::Error::other(e.to_string()))?)
        }
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
            WatchState::Over(children.take(pid).map_or(End::Gone, End::Reaped))
        }
        Err(e) => return Err(e),
    };
    Ok(Watch { pid, state })
}

impl Watch {
    /// The watched pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Resolves when the process has ended. Cancel-safe until it has resolved once; the exit
    /// itself is handed out once.
    ///
    /// # Errors
    /// When the pidfd cannot be waited for.
    pub async fn end(&self) -> io::Result<End> {
        let fd = match &self.state {
            WatchState::Over(end) => return Ok(*end),
            WatchState::Open(fd) => fd,
        };
        loop {
            let mut ready = fd.readable().await?;
            let mut children = Children::lock();
            if let Some(exit) = children.take(self.pid) {
                return Ok(End::Reaped(exit));
            }
            if children.is_owned(self.pid) {
                return Ok(End::Gone);
            }
            match wait(libc::P_PIDFD, fd.as_raw_fd().cast_unsigned(), 0) {
                Ok(Some((_, exit))) => return Ok(End::Reaped(exit)),
                Ok(None) => ready.clear_ready(),
                // Not our child, or reaped by somebody else.
                Err(_) => return Ok(End::Gone),
            }
        }
    }

    /// Sends `signal` to the process; one that is gone is an error (`ESRCH`).
    ///
    /// # Errors
    /// As `pidfd_send_signal(2)` says.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let WatchState::Open(fd) = &self.state else {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        };
        pidfd_send_signal(fd.as_raw_fd(), signal)
    }
}

/// A watched process whose end many may ask for, as often as they like.
#[derive(Debug)]
pub struct Tracked {
    watch: Arc<Watch>,
    end: Arc<SetOnce<End>>,
    task: AbortHandle,
}

impl Tracked {
    /// Watches the process `pid` of the host. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// As [`watch`].
    pub fn new(pid: u32) -> io::Result<Self> {
        let watch = Arc::new(watch(pid)?);
        let end = Arc::new(SetOnce::new());
        let (watched, to_set) = (watch.clone(), end.clone());
        let task = tokio::spawn(async move {
            let end = end_or_gone(&watched).await;
            log::debug!("process {} ended: {end:?}", watched.pid());
            // Nobody else sets it.
            let _ = to_set.set(end);
        });
        Ok(Self {
            watch,
            end,
            task: task.abort_handle(),
        })
    }

    /// Stands for a process that was `pid` and is gone.
    pub fn gone(pid: u32) -> Self {
        let watch = Arc::new(Watch {
            pid,
            state: WatchState::Over(End::Gone),
        });
        Self {
            watch,
            end: Arc::new(SetOnce::new_with(Some(End::Gone))),
            task: tokio::spawn(async {}).abort_handle(),
        }
    }

    /// The tracked pid.
    pub fn pid(&self) -> u32 {
        self.watch.pid()
    }

    /// Resolves when the process has ended.
    pub async fn ended(&self) -> End {
        *self.end.wait().await
    }

    /// Whether it has ended, or does so within `grace`.
    pub async fn ends_within(&self, grace: Duration) -> bool {
        tokio::time::timeout(grace, self.end.wait()).await.is_ok()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.end.initialized()
    }

    /// Sends `signal` to it; one that is gone is an error (`ESRCH`).
    ///
    /// # Errors
    /// As `pidfd_send_signal(2)` says.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        self.watch.signal(signal)
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn end_or_gone(watch: &Watch) -> End {
    watch.end().await.unwrap_or_else(|e| {
        log::warn!("watch process {}: {e}", watch.pid());
        End::Gone
    })
}

/// Resolves to the exit of process `pid`, which is held from this call on: 137 where the status
/// cannot be known.
pub fn exit_of(pid: u32) -> impl Future<Output = Exit> + Send {
    let watch = watch(pid);
    async move {
        let end = match watch {
            Ok(watch) => end_or_gone(&watch).await,
            Err(e) => {
                log::warn!("watch process {pid}: {e}");
                End::Gone
            }
        };
        end.exit()
    }
}

/// Kills processes that were found by their numbers. A number may be another's by now, so each
/// process is held first, and killed if `is_meant` says so then. Blocks.
pub fn kill_found(pids: impl IntoIterator<Item = u32>, is_meant: impl Fn(u32) -> bool) {
    for pid in pids {
        // An error means that it has ended by itself.
        if let Ok(held) = pidfd_open(pid)
            && is_meant(pid)
        {
            pidfd_send_signal(held.as_raw_fd(), libc::SIGKILL).ok();
        }
    }
}

/// Holds process `pid`: what is done by the descriptor is done to no other that gets its number.
///
/// # Errors
/// As `pidfd_open(2)` says, `ESRCH` where there is none.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers, returns a new descriptor (close-on-exec) or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.cast_signed(), 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn pidfd_send_signal(fd: RawFd, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo asks for that of kill(2); nothing is written.
    let done = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    /// Whether a process ends within `timeout`. Others may collect it first.
    fn ends(process: &OwnedFd, timeout: PollTimeout) -> bool {
        let mut polled = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, timeout).unwrap() == 1
    }

    #[test]
    fn only_who_is_meant_is_killed() {
        let sleeper = || {
            let mut command = std::process::Command::new("/bin/sleep");
            command.arg("3600").spawn().unwrap()
        };
        let mut both = [sleeper(), sleeper()];
        let [other, meant] = both.each_ref().map(std::process::Child::id);
        let held = [other, meant].map(|pid| pidfd_open(pid).unwrap());
        kill_found([other, meant], |pid| pid == meant);
        assert!(ends(&held[1], PollTimeout::NONE));
        assert!(!ends(&held[0], PollTimeout::ZERO));
        both[0].kill().unwrap();
        assert!(ends(&held[0], PollTimeout::NONE));
        for child in &mut both {
            // A test beside this one may have collected it.
            child.wait().ok();
        }
    }

    /// A child made behind tokio's back, as an orphan would be.
    fn orphan(script: &str) -> u32 {
        std::process::Command::new("/bin/sh")
            .args(["-c", script])
            .spawn()
            .unwrap()
            .id()
    }

    #[tokio::test]
    async fn an_orphan_that_ended_before_it_was_asked_for_keeps_its_code() {
        become_subreaper().unwrap();
        let pid = orphan("exit 7");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(exit_of(pid).await.code, 7);
    }

    #[tokio::test]
    async fn a_watched_orphan_keeps_its_code_and_signal() {
        become_subreaper().unwrap();
        let slow = watch(orphan("sleep 0.2; exit 3")).unwrap();
        assert_eq!(slow.end().await.unwrap().exit().code, 3);
        let killed = watch(orphan("sleep 60")).unwrap();
        killed.signal(libc::SIGKILL).unwrap();
        assert_eq!(killed.end().await.unwrap().exit().code, 137);
        assert_eq!(
            killed.signal(0).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }

    #[tokio::test]
    async fn without_the_task_a_watch_reaps_its_own() {
        let end = watch(orphan("exit 5")).unwrap().end().await.unwrap();
        assert!(matches!(end, End::Reaped(Exit { code: 5, .. })), "{end:?}");
    }

    #[tokio::test]
    async fn owned_children_are_left_to_tokio() {
        become_subreaper().unwrap();
        for code in 0..20 {
            let mut command = Command::new("/bin/sh");
            let (mut child, _owned) = spawn(command.args(["-c", &format!("exit {code}")])).unwrap();
            // Time for the orphan task to make a mistake.
            tokio::time::sleep(Duration::from_millis(30)).await;
            assert_eq!(child.wait().await.unwrap().code(), Some(code));
        }
    }

    #[tokio::test]
    async fn a_process_of_nobody_is_gone() {
        // Above pid_max.
        assert_eq!(exit_of(0x7fff_0000).await.code, Exit::KILLED);
    }

    #[test]
    fn kept_exits_are_bounded() {
        let mut children = Children {
            owned: None,
            exits: VecDeque::new(),
        };
        for pid in 0..1000 {
            children.keep(pid, Exit::now(pid));
        }
        assert_eq!(children.exits.len(), KEPT);
        assert_eq!(children.take(1), None);
        assert_eq!(children.take(999).unwrap().code, 999);
        assert_eq!(children.take(999), None);
    }
}
