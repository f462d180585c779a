// SPDX-License-Identifier: Apache-2.0

//! Puts files of the host into the mount namespace of a gofer that runs already.
//!
//! What is to be seen there is copied as a tree of mounts that is attached nowhere (open_tree(2)),
//! gets its flags, and is attached from a thread that has joined the gofer's namespace
//! (move_mount(2)). The host's own mount table never has it, and it goes with the gofer.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns, unshare};

/// A tree of mounts that is attached nowhere.
#[derive(Debug)]
pub(super) struct Tree(OwnedFd);

/// How much of what is mounted below a directory belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    All,
    TopOnly,
}

/// What may be done below a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

impl Tree {
    /// A copy of what is at `path`, where no program and no device node has power, and which
    /// nothing that is mounted in it leaves. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn copy(path: &Path, depth: Depth, access: Access) -> io::Result<Self> {
        let tree = Self::plain_copy(path, depth)?;
        let mut set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        if access == Access::Read {
            set |= libc::MOUNT_ATTR_RDONLY;
        }
        let attr = libc::mount_attr {
            attr_set: set,
            attr_clr: 0,
            propagation: libc::MS_SLAVE,
            userns_fd: 0,
        };
        let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
        // SAFETY: the path is a string, and `attr` of the size that is told.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.0.as_raw_fd(),
                c"".as_ptr(),
                flags,
                &raw const attr,
                size_of_val(&attr),
            )
        };
        checked(done)?;
        Ok(tree)
    }

    /// A copy of what is at `path`, as it is. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn plain_copy(path: &Path, depth: Depth) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let recursive = match depth {
            Depth::All => libc::AT_RECURSIVE.cast_unsigned(),
            Depth::TopOnly => 0,
        };
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive;
        // SAFETY: the path is a string.
        let fd =
            unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let fd = i32::try_from(checked(fd)?).map_err(io::Error::other)?;
        // SAFETY: the kernel has just made it, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// What is at its top.
    pub(super) fn top(&self) -> &OwnedFd {
        &self.0
    }

    fn attach(&self, target: &Path) -> io::Result<()> {
        let target = CString::new(target.as_os_str().as_bytes())?;
        // SAFETY: both paths are strings.
        let done = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        checked(done).map(drop)
    }
}

/// Attaches trees at paths of the mount namespace of `process`, a pidfd. Blocks.
///
/// # Errors
/// What the kernel says; some may be attached then.
pub(super) fn attach_in(process: &OwnedFd, trees: Vec<(Tree, PathBuf)>) -> io::Result<()> {
    // A namespace is a thread's own, and this one's is not to change.
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            // Its root and directory become those of the namespace.
            unshare(CloneFlags::CLONE_FS)?;
            setns(process, CloneFlags::CLONE_NEWNS)?;
            trees
                .iter()
                .try_for_each(|(tree, target)| tree.attach(target))
        });
        let panicked = |_| io::Error::other("the thread in the namespace panicked");
        there.join().map_err(panicked)?
    })
}

fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
