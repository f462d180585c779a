// SPDX-License-Identifier: Apache-2.0
//! Attempts on processes: those of others, and what this one is.

use std::{fs, fs::File, thread, time::Duration};

use nix::{
    errno::Errno,
    sched::CloneFlags,
    sys::{signal::Signal, wait::waitpid},
    unistd::{ForkResult, Pid, Uid},
};

use crate::{Failure, Tried};

/// How long the children of `fork` stay, so that all are there at once.
const STAY: Duration = Duration::from_secs(2);

/// `kill PID`: whether there is somebody to be killed; nobody is harmed.
pub(crate) fn kill(pid: i32) -> Tried {
    nix::sys::signal::kill(Pid::from_raw(pid), None)?;
    Ok(String::new())
}

/// `ptrace PID`.
pub(crate) fn ptrace(pid: i32) -> Tried {
    let pid = Pid::from_raw(pid);
    nix::sys::ptrace::attach(pid)?;
    // It stops for that, and must go on.
    waitpid(pid, None)?;
    nix::sys::ptrace::detach(pid, None::<Signal>)?;
    Ok(String::new())
}

/// `setns PATH`.
pub(crate) fn setns(path: &str) -> Tried {
    nix::sched::setns(File::open(path)?, CloneFlags::empty())?;
    Ok(String::new())
}

/// `identity`: `ruid euid capabilities no_new_privs seccomp`.
pub(crate) fn identity() -> Tried {
    let status = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.unwrap_or("none").trim().to_owned()
    };
    Ok(format!(
        "{} {} {} {} {}",
        nix::unistd::getuid(),
        nix::unistd::geteuid(),
        field("CapEff:"),
        field("NoNewPrivs:"),
        field("Seccomp:")
    ))
}

/// `setuid`: becomes root.
pub(crate) fn setuid() -> Tried {
    nix::unistd::setuid(Uid::from_raw(0))?;
    identity()
}

/// `raise`: gives itself every capability that there is (capset(2)).
pub(crate) fn raise() -> Tried {
    /// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
    const VERSION: u32 = 0x2008_0522;
    let header = [VERSION, 0];
    // Effective, permitted and inheritable, for the lower and the upper 32.
    let all = [u32::MAX, u32::MAX, 0, 0x1ff, 0x1ff, 0];
    // SAFETY: both arguments have the layout that the call reads, and live until it returns.
    let done = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), all.as_ptr()) };
    Errno::result(done)?;
    identity()
}

/// `unshare KIND`.
pub(crate) fn unshare(kind: &str) -> Tried {
    let flag = match kind {
        "user" => CloneFlags::CLONE_NEWUSER,
        "mount" => CloneFlags::CLONE_NEWNS,
        "pid" => CloneFlags::CLONE_NEWPID,
        "net" => CloneFlags::CLONE_NEWNET,
        _ => return Err(Failure::Usage),
    };
    nix::sched::unshare(flag)?;
    identity()
}

/// `fork COUNT`.
pub(crate) fn fork(count: usize) -> Tried {
    let mut children = Vec::new();
    let mut refused = None;
    while children.len() < count && refused.is_none() {
        // SAFETY: this program has one thread, so that the child may do anything.
        match unsafe { nix::unistd::fork() } {
            Ok(ForkResult::Child) => stay(),
            Ok(ForkResult::Parent { child }) => children.push(child),
            Err(errno) => refused = Some(errno),
        }
    }
    let ran = children.len().to_string();
    for child in children {
        waitpid(child, None)?;
    }
    match refused {
        None => Ok(ran),
        Some(errno) => Err(Failure::Refused(errno, ran)),
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no event loop here")]
fn stay() -> ! {
    thread::sleep(STAY);
    std::process::exit(0)
}
