// SPDX-License-Identifier: Apache-2.0

//! What runsc writes about a container: `<root>/<container>_sandbox:<sandbox>.state`
//! (gVisor `runsc/container/state_file.go`).
//!
//! These files are read, never written. Names are matched in full: the command line takes a
//! unique prefix of an id for the id, so that `delete abc` could remove container `abcdef`;
//! whoever looks here first is safe from that.
//!
//! The directory is a tmpfs of root's (`/run`), so reading it does not block.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;

use crate::ContainerId;

/// Largest state file read, in bytes; it holds the container's whole specification.
const SIZE_LIMIT: u64 = 16 << 20;

/// Pause between two looks at a lock that another command holds.
const LOCK_POLL: Duration = Duration::from_millis(20);

/// What is used of a container's state.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct State {
    /// `created`, `running`, `paused` or `stopped`, as of the last command that wrote it.
    pub(crate) status: String,
    /// The sandbox it is in; none once it was destroyed.
    pub(crate) sandbox: Option<SandboxState>,
    #[serde(default)]
    spec: Spec,
}

/// What is used of a sandbox's state.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct SandboxState {
    /// The id of its root container.
    pub(crate) id: String,
    /// The sentry's pid on the host.
    pub(crate) pid: u32,
    /// The user that the sentry runs as, on the host.
    pub(crate) uid: u32,
    /// The group that the sentry runs as, on the host.
    pub(crate) gid: u32,
    /// Where its control socket is; versions before May 2023 have none with a path.
    #[serde(rename = "controlSocketPath", default)]
    pub(crate) control_socket: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Spec {
    #[serde(default)]
    process: Process,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Process {
    capabilities: Option<serde_json::Value>,
}

impl State {
    /// Reads the state of container `id`; `None` when runsc does not know it.
    ///
    /// # Errors
    /// When there is a file that cannot be read or makes no sense.
    pub(crate) fn load(root: &Path, id: &ContainerId) -> io::Result<Option<Self>> {
        let Some(path) = find(root, id, ".state")? else {
            return Ok(None);
        };
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = match file {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let mut text = Vec::new();
        file.take(SIZE_LIMIT).read_to_end(&mut text)?;
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| io::Error::other(format!("{}: {e}", path.display())))
    }

    /// The capabilities of the container's own process, which its execs get by default.
    pub(crate) fn capabilities(&self) -> Option<&serde_json::Value> {
        self.spec.process.capabilities.as_ref()
    }
}

/// Whether runsc knows container `id`.
pub(crate) fn exists(root: &Path, id: &ContainerId) -> io::Result<bool> {
    Ok(find(root, id, ".state")?.is_some())
}

/// Waits until no command makes container `id` any more: a `create` holds the lock file from
/// before there is a state file. Returns whether that came to pass within `deadline`.
///
/// # Errors
/// When the lock cannot be tried.
pub(crate) async fn settled(root: &Path, id: &ContainerId, deadline: Duration) -> io::Result<bool> {
    let until = tokio::time::Instant::now() + deadline;
    while is_locked(root, id)? {
        if tokio::time::Instant::now() > until {
            return Ok(false);
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
    Ok(true)
}

/// Removes what a `create` that was killed has left of container `id`: its lock and, for the
/// root of a sandbox, its control socket. Containers that have a state file are not touched.
///
/// # Errors
/// The first file that cannot be removed.
pub(crate) fn remove_remains(root: &Path, id: &ContainerId) -> io::Result<()> {
    if exists(root, id)? {
        return Ok(());
    }
    let lock = find(root, id, ".lock")?;
    let root_container = format!("{id}_sandbox:{id}.lock");
    let is_root = lock.as_ref().is_some_and(|lock| lock.ends_with(&root_container));
    let socket = is_root.then(|| root.join(format!("runsc-{id}.sock")));
    for path in lock.into_iter().chain(socket) {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

fn is_locked(root: &Path, id: &ContainerId) -> io::Result<bool> {
    let Some(path) = find(root, id, ".lock")? else {
        return Ok(false);
    };
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    match Flock::lock(file, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(false),
        Err((_, nix::Error::EWOULDBLOCK)) => Ok(true),
        Err((_, e)) => Err(e.into()),
    }
}

/// The file of container `id` with the given ending, in whichever sandbox it is.
fn find(root: &Path, id: &ContainerId, ending: &str) -> io::Result<Option<PathBuf>> {
    let start = format!("{id}_sandbox:");
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    for entry in entries {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(&start) && name.ends_with(ending) {
            return Ok(Some(root.join(&*name)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: &str) -> ContainerId {
        id.parse().unwrap()
    }

    #[test]
    fn states_are_found_by_their_full_id_only() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"id":"abcdef","spec":{"process":{"capabilities":{"bounding":["CAP_KILL"]},"x":1}},
            "bundleDir":"/b","status":"running","goferPid":3,"sandbox":{"id":"s","pid":7,"uid":65534,"gid":65534,
            "controlSocketPath":"/run/x.sock","mountHints":{}}}"#;
        fs::write(dir.path().join("abcdef_sandbox:s.state"), text).unwrap();
        assert!(State::load(dir.path(), &id("abc")).unwrap().is_none());
        assert!(!exists(dir.path(), &id("bcdef")).unwrap());
        let state = State::load(dir.path(), &id("abcdef")).unwrap().unwrap();
        assert_eq!(state.status, "running");
        assert_eq!(state.capabilities().unwrap()["bounding"][0], "CAP_KILL");
        let sandbox = state.sandbox.unwrap();
        assert_eq!((sandbox.id.as_str(), sandbox.pid, sandbox.uid), ("s", 7, 65534));
        assert_eq!(sandbox.control_socket, Path::new("/run/x.sock"));
    }

    #[test]
    fn a_root_that_is_not_there_knows_nobody() {
        assert!(State::load(Path::new("/no/such/root"), &id("a")).unwrap().is_none());
    }

    #[test]
    fn garbage_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a_sandbox:a.state"), "{").unwrap();
        let error = State::load(dir.path(), &id("a")).unwrap_err().to_string();
        assert!(error.contains("a_sandbox:a.state"), "{error}");
    }

    #[tokio::test]
    async fn a_create_under_way_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("a_sandbox:a.lock");
        let held = Flock::lock(File::create(&lock).unwrap(), FlockArg::LockExclusive).unwrap();
        let soon = Duration::from_millis(100);
        assert!(!settled(dir.path(), &id("a"), soon).await.unwrap());
        assert!(settled(dir.path(), &id("b"), soon).await.unwrap());
        drop(held);
        assert!(settled(dir.path(), &id("a"), soon).await.unwrap());
    }

    #[test]
    fn remains_of_a_killed_create_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["a_sandbox:a.lock", "runsc-a.sock", "b_sandbox:a.lock", "c_sandbox:c.state", "c_sandbox:c.lock", "runsc-c.sock"];
        for name in names {
            fs::write(dir.path().join(name), "").unwrap();
        }
        for container in ["a", "c", "d"] {
            remove_remains(dir.path(), &id(container)).unwrap();
        }
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["b_sandbox:a.lock", "c_sandbox:c.lock", "c_sandbox:c.state", "runsc-c.sock"]);
    }
}
