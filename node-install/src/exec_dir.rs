// SPDX-License-Identifier: Apache-2.0

//! The directory of what sandboxes execute: their root file system, as a directory and as an
//! image, and what prestarted gofers are made from.
//!
//! It is below the agent's state, in `/run`, which Debian and Ubuntu mount `noexec`. gVisor cannot
//! use files from there: a sentry maps the image's program executable, and a gofer remounts the
//! root file system in a user namespace without `noexec`, which the kernel refuses
//! (mount_namespaces(7), "locked" flags). So where the directory is `noexec`, a tmpfs of the
//! agent's own is mounted on it.
//!
//! Without a cluster that mount is the host's, and the next agent finds it. In a container it is
//! the container's, and ends with it; the next agent mounts its own. Sandboxes need neither: a
//! sentry has the image open, and a gofer has the files in its own mount namespace. Nor do shims,
//! which are in the host's mount namespace: the commands that start and delete the root container
//! of a sandbox do not open its root file system.

use std::{
    fs, io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::{FsFlags, statvfs},
};
use tracing::info;

/// Options of the tmpfs. It holds two copies of a static program of about a megabyte, and
/// those of earlier agents for as long as a sandbox runs that was booted with one. Memory is taken
/// by what is in it only.
const OPTIONS: &str = "mode=0700,size=64m";

/// What its mount is called in the list of mounts.
const SOURCE: &str = "kiln-node-agent";

/// Why there is no directory from which sandboxes can execute.
#[derive(Debug, thiserror::Error)]
pub enum ExecDirError {
    /// It cannot be made or looked at.
    #[error("make {}: {source}", dir.display())]
    Make {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is `noexec`, and nothing can be mounted on it.
    #[error(
        "{} is on a file system that is mounted noexec, and no tmpfs can be mounted there: \
         {source}; run the agent with CAP_SYS_ADMIN (in a Pod: privileged), or mount a file system \
         without noexec there",
        dir.display()
    )]
    Mount {
        /// The directory.
        dir: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The directory below `state`.
pub fn of(state: &Path) -> PathBuf {
    state.join("exec")
}

/// Makes the directory below `state`, from which programs can be executed then. A tmpfs of an
/// earlier agent is used as it is. Blocks.
///
/// # Errors
/// [`ExecDirError`], with the directory.
pub fn prepare(state: &Path) -> Result<(), ExecDirError> {
    let dir = of(state);
    let make = |source| ExecDirError::Make {
        dir: dir.clone(),
        source,
    };
    let mut private = fs::DirBuilder::new();
    private.mode(0o700).recursive(true);
    private.create(&dir).map_err(make)?;
    if !is_noexec(&dir).map_err(make)? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mounted = mount(Some(SOURCE), &dir, Some("tmpfs"), flags, Some(OPTIONS));
    mounted.map_err(|e| ExecDirError::Mount {
        dir: dir.clone(),
        source: e.into(),
    })?;
    info!(
        "{} is noexec: what sandboxes execute is in a tmpfs at {}",
        state.display(),
        dir.display()
    );
    Ok(())
}

fn is_noexec(dir: &Path) -> io::Result<bool> {
    Ok(statvfs(dir)?.flags().contains(FsFlags::ST_NOEXEC))
}

/// Unmounts what is mounted on the directory below `state`, if anything is. Sandboxes that run
/// keep what they have of it. Blocks.
///
/// # Errors
/// The kernel's.
pub fn unmount(state: &Path) -> io::Result<()> {
    let dir = of(state);
    while is_mounted(&dir, state)? {
        // Not later: the sentry of a Pod may have a file of it open for days.
        umount2(&dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    Ok(())
}

/// Whether `dir` is on another file system than `state`, in which it is.
fn is_mounted(dir: &Path, state: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(dir) {
        Ok(found) => Ok(found.dev() != fs::metadata(state)?.dev()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{process::Command, thread};

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs `test` with a directory that it may make on a tmpfs with these flags, in a mount
    /// namespace of its own.
    #[track_caller]
    pub(crate) fn on_a_tmpfs(flags: MsFlags, test: impl FnOnce(&Path) + Send + 'static) {
        let inside = move || {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).unwrap();
            let dir = tempfile::tempdir().unwrap();
            mount(Some("test"), dir.path(), Some("tmpfs"), flags, none).unwrap();
            test(&dir.path().join("state"));
            umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
        };
        // A namespace is a thread's own, and this one is not to come back.
        thread::spawn(inside).join().unwrap();
    }

    fn executes(dir: &Path) -> bool {
        let program = dir.join("program");
        fs::copy("/bin/true", &program).unwrap();
        Command::new(program).status().is_ok_and(|s| s.success())
    }

    fn mounts_at(dir: &Path) -> usize {
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let at = |line: &&str| line.split(' ').nth(4) == dir.to_str();
        table.lines().filter(at).count()
    }

    #[test]
    #[ignore = "needs root"]
    fn a_noexec_state_gets_one_tmpfs_that_goes_again() {
        on_a_tmpfs(MsFlags::MS_NOEXEC, |state| {
            let dir = of(state);
            prepare(state).unwrap();
            assert!(!executes(state));
            assert!(executes(&dir));
            assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o7777, 0o700);
            prepare(state).unwrap();
            assert_eq!(mounts_at(&dir), 1);
            assert!(dir.join("program").exists());
            // As the sentry of a Pod has.
            let _open = fs::File::open(dir.join("program")).unwrap();
            unmount(state).unwrap();
            unmount(state).unwrap();
            assert_eq!(mounts_at(&dir), 0);
            fs::remove_dir_all(state).unwrap();
            unmount(state).unwrap();
        });
    }

    #[test]
    #[ignore = "needs root"]
    fn a_state_from_which_programs_run_gets_no_mount() {
        on_a_tmpfs(MsFlags::MS_NOSUID, |state| {
            prepare(state).unwrap();
            assert!(executes(&of(state)));
            assert_eq!(mounts_at(&of(state)), 0);
            unmount(state).unwrap();
            assert!(of(state).join("program").exists());
        });
    }
}
