// SPDX-License-Identifier: Apache-2.0

//! What is mounted below a directory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

/// The mount points at and below `dir`, in the order in which they were made.
///
/// # Errors
/// When the table cannot be read.
pub fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("read mountinfo")?;
    let points = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}

/// Spaces and the like are octal in the table (proc_pid_mountinfo(5)).
fn unescape(field: &str) -> PathBuf {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (code, part.get(3..)) {
            (Some(code), Some(rest)) => {
                text.push(char::from(code));
                text.push_str(rest);
            }
            _ => text.push_str(part),
        }
    }
    text.into()
}

/// Unmounts everything at and below `dir`.
///
/// # Errors
/// The first mount that cannot be taken away; the others are tried all the same.
pub fn unmount_below(dir: &Path) -> Result<()> {
    let mut result = Ok(());
    for point in below(dir)?.into_iter().rev() {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // It went by itself, or with one that it was on.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(e) => {
                result = result.and(Err(e).with_context(|| format!("unmount {}", point.display())));
            }
        }
    }
    result
}

/// Makes `dir` a mount point of its own that hands mounts on, as volumes with mount propagation
/// need it and the root of the machine may not be.
///
/// # Errors
/// The kernel's.
pub fn make_shared(dir: &Path) -> Result<()> {
    let none = None::<&Path>;
    mount(Some(dir), dir, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("bind {}", dir.display()))?;
    mount(none, dir, none, MsFlags::MS_SHARED, none)
        .with_context(|| format!("share {}", dir.display()))
}

/// Goes into a mount namespace of this process's own, in which `dir` is mounted as Debian and
/// Ubuntu mount `/run`: no program can be executed from there. Threads that are there already stay
/// where they are.
///
/// # Errors
/// The kernel's.
pub fn enter_with_noexec(dir: &Path) -> Result<()> {
    let none = None::<&Path>;
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(none, "/", none, slave, none).context("keep mounts from the machine")?;
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(dir), dir, none, bind, none).with_context(|| format!("bind {}", dir.display()))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
    mount(none, dir, none, remount, none).with_context(|| format!("remount {}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_codes_are_decoded() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape("/plain"), Path::new("/plain"));
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(below(Path::new("/")).unwrap().contains(&PathBuf::from("/")));
    }
}
