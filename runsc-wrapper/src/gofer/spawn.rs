// SPDX-License-Identifier: Apache-2.0

//! Starts a program in namespaces of its own, as runsc starts a gofer (gVisor
//! `runsc/container/container.go`, `createGoferProcess`): one process, which waits before it does
//! anything until whoever started it has put it into place. Its mount namespace has a file system
//! that no other has.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    ptr,
};

use nix::{
    fcntl::OFlag,
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::{Pid, pipe2},
};

use crate::stdio::null_device;

/// Namespaces that runsc gives a gofer.
const NAMESPACES: libc::c_int = libc::CLONE_NEWIPC
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWUTS;

/// Every id of the host, as itself (user_namespaces(7)).
const ALL_IDS: &str = "0 0 4294967295";

/// Lowest number of the descriptors that are given.
const FIRST_FD: RawFd = 3;

/// Status of a child that could not become the program.
const NO_PROGRAM: libc::c_int = 127;

/// Which users the program sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Users {
    /// The host's.
    Host,
    /// The same in a user namespace of its own.
    Own,
}

/// What is to run.
#[derive(Debug)]
pub(super) struct Program<'a> {
    pub(super) file: &'a Path,
    /// With its name.
    pub(super) args: Vec<String>,
    pub(super) env: &'a [&'a str],
    /// Its descriptors from 3 on.
    pub(super) fds: Vec<OwnedFd>,
    pub(super) users: Users,
    pub(super) places: Places<'a>,
}

/// Empty directories and files in a file system of the program's own, to which nobody can write.
#[derive(Debug)]
pub(super) struct Places<'a> {
    /// Where it is mounted.
    pub(super) at: &'a Path,
    /// Names of the directories.
    pub(super) dirs: Vec<String>,
    /// Names of the files.
    pub(super) files: Vec<String>,
}

/// A child that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) pid: u32,
    /// It goes on when this is closed.
    gate: OwnedFd,
}

impl Waiting {
    pub(super) fn go(self) {
        drop(self.gate);
    }
}

impl Program<'_> {
    /// Starts it as a child that nobody but the caller will wait for. Blocks.
    ///
    /// # Errors
    /// What the kernel says. A program that cannot be executed ends with status 127.
    pub(super) fn start(self) -> io::Result<Waiting> {
        let file = CString::new(self.file.as_os_str().as_bytes())?;
        let args = strings(self.args)?;
        let env = strings(self.env.iter().map(|e| (*e).to_owned()))?;
        let (args, env) = (pointers(&args), pointers(&env));
        let Places { at, dirs, files } = self.places;
        // Its own directory is an inode, too; no file has a page.
        let inodes = 1 + dirs.len() + files.len();
        let limits = CString::new(format!("mode=755,size=4k,nr_inodes={inodes}"))?;
        let inside = |name: String| at.join(name).to_string_lossy().into_owned();
        let (dirs, files) = (
            strings(dirs.into_iter().map(inside))?,
            strings(files.into_iter().map(inside))?,
        );
        let (dirs, files) = (pointers(&dirs), pointers(&files));
        let at = CString::new(at.as_os_str().as_bytes())?;
        let (wait, gate) = pipe2(OFlag::O_CLOEXEC)?;
        let null = null_device()?;
        let count = RawFd::try_from(self.fds.len()).map_err(io::Error::other)?;
        // Above all that they will be copied to, so that no copy covers another's source.
        let above = FIRST_FD + count + 1;
        let sources = [&null, &null, &null].into_iter().chain(&self.fds);
        let sources = sources.chain([&wait]).map(|fd| raise(fd, above));
        let sources: Vec<OwnedFd> = sources.collect::<io::Result<_>>()?;
        let child = Child {
            file: file.as_ptr(),
            args: args.as_ptr(),
            env: env.as_ptr(),
            fds: sources.iter().map(AsRawFd::as_raw_fd).collect(),
            users: self.users,
            at: at.as_ptr(),
            limits: limits.as_ptr(),
            dirs: &dirs,
            files: &files,
        };
        let users = match self.users {
            Users::Host => 0,
            Users::Own => libc::CLONE_NEWUSER,
        };
        let flags = libc::c_long::from(NAMESPACES | users | libc::SIGCHLD);
        // SAFETY: without CLONE_VM and a stack this is fork(2) into other namespaces: the child
        // goes on with a copy of this thread, and does nothing but system calls until it is
        // another program. All that `child` points to is in that copy.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if pid == 0 {
            // SAFETY: this is the child.
            unsafe { child.become_program() }
        }
        if pid < 0 {
            return Err(io::Error::last_os_error());
        }
        let pid = u32::try_from(pid).map_err(io::Error::other)?;
        let map = |name| fs::write(format!("/proc/{pid}/{name}"), ALL_IDS);
        if self.users == Users::Own
            && let Err(e) = map("uid_map").and_then(|()| map("gid_map"))
        {
            end(pid);
            return Err(e);
        }
        Ok(Waiting { pid, gate })
    }
}

/// Kills a child that is of no use, and waits for it. Blocks.
pub(super) fn end(pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed());
    // Both fail only where it is gone already.
    kill(pid, Signal::SIGKILL).ok();
    waitpid(pid, None).ok();
}

/// A copy of `fd` with a number of at least `above`.
fn raise(fd: &OwnedFd, above: RawFd) -> io::Result<OwnedFd> {
    let copy = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(above))?;
    // SAFETY: fcntl has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn strings(list: impl IntoIterator<Item = String>) -> io::Result<Vec<CString>> {
    let made = list.into_iter().map(CString::new);
    Ok(made.collect::<Result<_, _>>()?)
}

/// As execve(2) takes a list.
fn pointers(list: &[CString]) -> Vec<*const libc::c_char> {
    let all = list.iter().map(|s| s.as_ptr());
    all.chain([ptr::null()]).collect()
}

/// What the child needs, made before there is one.
struct Child<'a> {
    file: *const libc::c_char,
    args: *const *const libc::c_char,
    env: *const *const libc::c_char,
    /// What becomes its descriptors from 0 on; the last is what it waits on.
    fds: Vec<RawFd>,
    users: Users,
    /// Of its [`Places`]: the path, the limits of the file system, and paths in lists that end as
    /// that of the arguments.
    at: *const libc::c_char,
    limits: *const libc::c_char,
    dirs: &'a [*const libc::c_char],
    files: &'a [*const libc::c_char],
}

impl Child<'_> {
    /// Waits for the gate, and executes the program.
    ///
    /// # Safety
    /// For the child of a fork: makes system calls only, by their numbers where the library's
    /// functions would look for other threads.
    unsafe fn become_program(&self) -> ! {
        // SAFETY: the pointers are to strings and lists that end as execve(2) wants; the rest
        // are integers.
        unsafe {
            let mut next = 0;
            for source in &self.fds {
                libc::dup2(*source, next);
                next += 1;
            }
            // Nothing else stays: a copy of a gate would keep that from ever closing.
            libc::syscall(libc::SYS_close_range, next, libc::c_uint::MAX, 0);
            let wait = next - 1;
            let mut byte = 0_u8;
            while libc::read(wait, (&raw mut byte).cast(), 1) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
            libc::close(wait);
            if self.users == Users::Own {
                // No groups but root's, which is who it is.
                let groups = libc::syscall(libc::SYS_setgroups, 0, ptr::null::<libc::gid_t>());
                let group = libc::syscall(libc::SYS_setgid, 0);
                if groups < 0 || group < 0 || libc::syscall(libc::SYS_setuid, 0) < 0 {
                    libc::_exit(NO_PROGRAM);
                }
            }
            if !self.make_places() {
                libc::_exit(NO_PROGRAM);
            }
            libc::setsid();
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            libc::execve(self.file, self.args, self.env);
            libc::_exit(NO_PROGRAM)
        }
    }

    /// Mounts the file system of its own, fills it, and makes it read-only. Whether it could.
    ///
    /// # Safety
    /// As [`become_program`](Self::become_program).
    unsafe fn make_places(&self) -> bool {
        let none = ptr::null();
        let own = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        let read_only = own | libc::MS_REMOUNT | libc::MS_RDONLY;
        // SAFETY: all pointers are null or to strings.
        unsafe {
            let mount = |at, kind, flags, data: *const libc::c_char| {
                libc::mount(none, at, kind, flags, data.cast()) == 0
            };
            // So that no other namespace has it.
            mount(c"/".as_ptr(), none, libc::MS_REC | libc::MS_SLAVE, none)
                && mount(self.at, c"tmpfs".as_ptr(), own, self.limits)
                && each(self.dirs, |path| libc::mkdir(path, 0o755))
                && each(self.files, |path| {
                    libc::mknod(path, libc::S_IFREG | 0o644, 0)
                })
                && mount(self.at, none, read_only, none)
        }
    }
}

/// Whether `work` succeeds with every path of a list that ends in a null pointer.
fn each(list: &[*const libc::c_char], work: impl Fn(*const libc::c_char) -> libc::c_int) -> bool {
    let mut paths = list.iter().copied().take_while(|path| !path.is_null());
    paths.all(|path| work(path) == 0)
}
