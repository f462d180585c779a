// SPDX-License-Identifier: Apache-2.0

//! Shows a command the network of one namespace where it looks for that of a process.
//!
//! `runsc start` opens `/proc/<sentry>/ns/net`, reads links, addresses and routes there, and hands
//! packet sockets made there to the sentry (gVisor `runsc/sandbox/network.go`). In a mount
//! namespace of its own, with that directory covered, it finds another network than the one the
//! sentry was booted in.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::statfs::fstatfs;

use super::check;

/// `NSFS_MAGIC` of linux/magic.h: the file system of namespaces.
const NSFS: i64 = 0x6e73_6673;

/// What a command sees of the namespaces of a process.
#[derive(Debug)]
pub(crate) struct NetnsOverlay {
    /// What `source` names.
    _netns: OwnedFd,
    source: CString,
    directory: CString,
    file: CString,
}

impl NetnsOverlay {
    /// Shows `netns` as the network namespace of process `pid`, and no other namespace of it.
    ///
    /// # Errors
    /// When `netns` is no namespace, or this process has no descriptors left.
    pub(crate) fn new(pid: u32, netns: BorrowedFd<'_>) -> io::Result<Self> {
        let kind = fstatfs(netns)?.filesystem_type();
        if kind.0 as i64 != NSFS {
            return Err(io::Error::other("not a network namespace"));
        }
        let netns = netns.try_clone_to_owned()?;
        let directory = format!("/proc/{pid}/ns");
        Ok(Self {
            source: CString::new(format!("/proc/self/fd/{}", netns.as_raw_fd()))?,
            file: CString::new(format!("{directory}/net"))?,
            directory: CString::new(directory)?,
            _netns: netns,
        })
    }

    /// Makes the mounts, in a mount namespace that only the calling process and its children
    /// have. Runs between fork and exec, where only system calls are safe.
    pub(super) fn apply(&self) -> io::Result<()> {
        let (null, root) = (std::ptr::null(), c"/".as_ptr());
        let (tmpfs, private) = (c"tmpfs".as_ptr(), libc::MS_REC | libc::MS_PRIVATE);
        let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        // SAFETY: every pointer is to a string of this object, to a literal, or null where
        // mount(2) takes that.
        unsafe {
            check(libc::unshare(libc::CLONE_NEWNS))?;
            check(libc::mount(null, root, null, private, null.cast()))?;
            check(libc::mount(
                tmpfs,
                self.directory.as_ptr(),
                tmpfs,
                flags,
                null.cast(),
            ))?;
            let file = libc::open(self.file.as_ptr(), libc::O_CREAT, libc::S_IRUSR);
            check(file)?;
            check(libc::close(file))?;
            check(libc::mount(
                self.source.as_ptr(),
                self.file.as_ptr(),
                null,
                libc::MS_BIND,
                null.cast(),
            ))
        }
    }
}
