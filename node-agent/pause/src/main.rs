// SPDX-License-Identifier: Apache-2.0

//! The first process of a warm sandbox, as the pause image is that of a cold one: it takes the
//! processes that lose their parent, and ends when it is told to.
//!
//! `kiln-pause hostname NAME` instead gives the sandbox its name, and ends. Releases of runsc before the
//! summer of 2026 make a Pod's host name its domain name, too (gVisor `runsc/boot/loader.go`), and so
//! does this where the two were the same before. `kiln-pause kernel` prints what the
//! kernel says of itself.

use std::{ffi::OsStr, fs::File, io, os::unix::ffi::OsStrExt as _, process::ExitCode};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
};
use rustix::system::{setdomainname, sethostname, uname};

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let done = match args.as_slice() {
        [verb, name] if verb == OsStr::from_bytes(b"hostname") => set_names(name.as_bytes()),
        [verb] if verb == OsStr::from_bytes(b"kernel") => print_kernel(),
        _ => pause(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(errno) => ExitCode::from(u8::try_from(errno as i32).unwrap_or(u8::MAX)),
    }
}

/// Longest name of a host or domain, in bytes (`UTSLen` in gVisor `pkg/abi/linux/utsname.go`).
const LONGEST: usize = 64;

fn set_names(name: &[u8]) -> nix::Result<()> {
    let errno = |e: rustix::io::Errno| Errno::from_raw(e.raw_os_error());
    let before = uname();
    sethostname(name).map_err(errno)?;
    // gVisor's setdomainname looks for a zero byte within the length that it is given, where Linux
    // takes the length (gVisor `pkg/sentry/syscalls/linux/sys_utsname.go`). A name that leaves no
    // room for one is no domain's, rather than a reason to start cold.
    if before.domainname() != before.nodename() || name.len() == LONGEST {
        return Ok(());
    }
    setdomainname(&[name, b"\0"].concat()).map_err(errno)
}

/// Copies proc_version(5) to the standard output.
fn print_kernel() -> nix::Result<()> {
    let copied = File::open("/proc/version").and_then(|mut f| io::copy(&mut f, &mut io::stdout()));
    let errno = |e: io::Error| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    copied.map(drop).map_err(errno)
}

/// Reaps children until TERM or INT.
fn pause() -> nix::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]);
    signals.thread_block()?;
    loop {
        // Before the first wait too: a child may have ended before the signal was blocked.
        reap()?;
        if signals.wait()? != Signal::SIGCHLD {
            return Ok(());
        }
    }
}

/// Takes every child that has ended; one signal may stand for many.
fn reap() -> nix::Result<()> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}
