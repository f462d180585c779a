// SPDX-License-Identifier: Apache-2.0

//! A directory of one sandbox for what calls in flight need on disk, and for the file that stands
//! for an adopted sandbox.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::fcntl::{Flock, FlockArg};
use runsc_wrapper::ContainerId;

use crate::{
    error::{Error, Result},
    host_dirs::HostDirs,
};

/// How many characters of its socket's name are in the name of a sandbox's directory: all that fit
/// beside the longest id.
const MARK: usize = 8;

/// The directory of a sandbox whose shim is this process.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: PathBuf,
    next: AtomicU64,
}

impl Scratch {
    /// Makes the directory of the sandbox `id`, empty and only root's. Its shim serves `socket`.
    /// Blocks.
    pub(crate) fn new(host: &HostDirs, id: &ContainerId, socket: &Path) -> Result<Self> {
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        match private.create(&host.run) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make", &host.run)(e));
            }
            _ => {}
        }
        let dir = Self::place(host, id, socket);
        Self::remove_dir(&dir)?;
        private.create(&dir).map_err(Error::io("make", &dir))?;
        Ok(Self {
            dir,
            next: AtomicU64::new(0),
        })
    }

    /// Names the directory of the sandbox `id` whose shim serves `socket`. An id is one of
    /// containerd's namespace, and of one containerd. The socket's name tells those apart: it is a
    /// digest of containerd's address, the namespace and the id. No id has an `@`.
    pub(crate) fn place(host: &HostDirs, id: &ContainerId, socket: &Path) -> PathBuf {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        let mark: String = name.chars().take(MARK).collect();
        host.run.join(format!("{id}@{mark}"))
    }

    /// Finds the directory of a sandbox whose shim is gone, which may have been one of a release
    /// that named directories by their id alone.
    pub(crate) fn left_by(host: &HostDirs, id: &ContainerId, socket: &Path) -> PathBuf {
        let dir = Self::place(host, id, socket);
        if dir.exists() {
            dir
        } else {
            host.run.join(id.as_str())
        }
    }

    /// Waits until no other `delete` works on the sandbox with this directory, and keeps others
    /// waiting while the result lives. `None` when the directory is gone, and with it what others
    /// could work on. Blocks.
    pub(crate) fn lock(dir: &Path) -> Option<Flock<fs::File>> {
        let dir = fs::File::open(dir).ok()?;
        Flock::lock(dir, FlockArg::LockExclusive).ok()
    }

    /// The directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Removes the directory.
    pub(crate) fn remove(&self) -> Result<()> {
        Self::remove_dir(&self.dir)
    }

    /// Makes a directory that no other call uses, with a short name.
    pub(crate) fn subdir(&self) -> Result<PathBuf> {
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let dir = self.dir.join(name);
        fs::create_dir(&dir).map_err(Error::io("make", &dir))?;
        Ok(dir)
    }

    /// The place for the file that stands for an adopted sandbox.
    pub(crate) fn adopted(&self) -> PathBuf {
        self.dir.join("adopted")
    }

    /// Removes a sandbox's directory, or one that [`subdir`](Self::subdir) made. A directory that
    /// is not there is success.
    pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
        match fs::remove_dir_all(dir) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", dir)(e)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/containerd/s/0123456789abcdef";

    fn pod1() -> ContainerId {
        "pod1".parse().unwrap()
    }

    fn host(root: &tempfile::TempDir) -> HostDirs {
        HostDirs {
            run: root.path().to_owned(),
            ..HostDirs::default()
        }
    }

    #[test]
    fn scratch_is_private_and_goes_with_its_sandbox() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let stale = root.path().join("pod1@01234567/old");
        fs::create_dir_all(&stale).unwrap();
        let scratch = Scratch::new(&host(&root), &pod1(), Path::new(SOCKET)).unwrap();
        assert!(!stale.exists());
        assert_eq!(
            fs::metadata(&scratch.dir).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert_ne!(scratch.subdir().unwrap(), scratch.subdir().unwrap());
        let dir = scratch.dir.clone();
        scratch.remove().unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn sandboxes_of_one_id_have_directories_of_their_own() {
        let root = tempfile::tempdir().unwrap();
        let other_socket = Path::new("/run/containerd/s/9876543210");
        let new = |socket| Scratch::new(&host(&root), &pod1(), socket).unwrap();
        let one = new(Path::new(SOCKET));
        let other = new(other_socket);
        let kept = one.subdir().unwrap();
        new(other_socket);
        other.remove().unwrap();
        assert!(kept.exists());
    }

    #[test]
    fn the_directory_of_an_older_shim_is_found_where_it_was() {
        let root = tempfile::tempdir().unwrap();
        let left = || Scratch::left_by(&host(&root), &pod1(), Path::new(SOCKET));
        let old = root.path().join("pod1");
        fs::create_dir(&old).unwrap();
        assert_eq!(left(), old);
        let new = Scratch::new(&host(&root), &pod1(), Path::new(SOCKET)).unwrap();
        assert_eq!(left(), new.dir);
    }

    #[test]
    fn the_socket_of_a_terminal_has_room_beside_the_longest_id() {
        const SOCKET_PATH: usize = 107;
        let id: ContainerId = "x".repeat(76).parse().unwrap();
        let dir = Scratch::place(&HostDirs::default(), &id, Path::new(&"a".repeat(64)));
        let socket = dir.join("1000000").join("tty");
        assert!(socket.as_os_str().len() <= SOCKET_PATH, "{socket:?}");
    }
}
