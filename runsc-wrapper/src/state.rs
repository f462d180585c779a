// SPDX-License-Identifier: Apache-2.0

//! What runsc writes about a container: `<root>/<container>_sandbox:<sandbox>.state`
//! (gVisor `runsc/container/state_file.go`).
//!
//! These files are read, and written for what no command has made or started only
//! ([`set_cgroup`], [`set_running`], [`members`]). Names are matched in full: the command line takes
//! a unique prefix of an id for the id, so that `delete abc` could remove container `abcdef`;
//! whoever looks here first is safe from that.
//!
//! The directory is a tmpfs of root's (`/run`), so reading it does not block.

pub(crate) mod members;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use kiln_host::fs::remove_file_if_there;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use serde::Deserialize;

use crate::ContainerId;

/// Largest state file read, in bytes; it holds the container's whole specification.
const SIZE_LIMIT: u64 = 16 << 20;

/// Pause between two looks at a lock that another command holds.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// How long another command, such as a `list` that looks at every container, may hold it.
const LOCK_TIME: Duration = Duration::from_secs(2);

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

/// What is used of an OCI specification.
#[derive(Debug, Clone, Default, Deserialize)]
struct Spec {
    #[serde(default)]
    process: Process,
    #[serde(default)]
    root: Root,
    mounts: Option<Vec<Mount>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Root {
    #[serde(default)]
    path: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
struct Mount {
    #[serde(default)]
    source: PathBuf,
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
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path);
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

    /// Where its root filesystem is.
    pub(crate) fn rootfs(&self) -> &Path {
        &self.spec.root.path
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

/// Writes that the processes of sandbox `id` are in the cgroup `path`, and that it is not
/// runsc's to remove. A sandbox without a cgroup stays without.
///
/// # Errors
/// See [`edit`].
pub(crate) fn set_cgroup(root: &Path, id: &ContainerId, path: &str) -> io::Result<()> {
    edit(root, id, |state| {
        let cgroup = state.pointer_mut("/sandbox/cgroup");
        let cgroup = cgroup.ok_or_else(|| io::Error::other("it has no sandbox"))?;
        if let Some(v1) = cgroup.get_mut("cgroupv1") {
            v1["name"] = path.into();
            v1["own"] = serde_json::json!({});
        } else if let Some(v2) = cgroup.get_mut("cgroupv2") {
            v2["path"] = path.into();
            v2["own"] = serde_json::Value::Null;
        }
        Ok(())
    })
}

/// Writes that the container `id` runs. Returns the `oomScoreAdj` of its specification, which
/// runsc gives a sandbox's processes at that time (gVisor `runsc/container/container.go`).
///
/// # Errors
/// See [`edit`].
pub(crate) fn set_running(root: &Path, id: &ContainerId) -> io::Result<Option<i64>> {
    edit(root, id, |state| {
        state["status"] = "running".into();
        let score = state.pointer("/spec/process/oomScoreAdj");
        Ok(score.and_then(serde_json::Value::as_i64))
    })
}

/// Changes what is written of container `id`.
///
/// # Errors
/// When there is no state, it makes no sense, another command works on it for seconds, or it cannot
/// be written.
fn edit<T>(
    root: &Path,
    id: &ContainerId,
    change: impl FnOnce(&mut serde_json::Value) -> io::Result<T>,
) -> io::Result<T> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let _lock = lock(File::open(find(root, id, ".lock")?.ok_or_else(missing)?)?)?;
    let file = find(root, id, ".state")?.ok_or_else(missing)?;
    let strange = |e: &dyn std::fmt::Display| io::Error::other(format!("{}: {e}", file.display()));
    let mut state = serde_json::from_slice(&fs::read(&file)?).map_err(|e| strange(&e))?;
    if !matches!(state, serde_json::Value::Object(_)) {
        return Err(strange(&"it is no object"));
    }
    let result = change(&mut state).map_err(|e| strange(&e))?;
    let new = file.with_extension("state.new");
    fs::write(&new, state.to_string())?;
    fs::rename(new, file)?;
    Ok(result)
}

/// Locks `file` as runsc's commands do. Blocks for [`LOCK_TIME`] at most.
#[expect(clippy::disallowed_methods, reason = "for threads that may block")]
fn lock(mut file: File) -> io::Result<Flock<File>> {
    let until = Instant::now() + LOCK_TIME;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EWOULDBLOCK)) if Instant::now() < until => file = again,
            Err((_, e)) => return Err(e.into()),
        }
        thread::sleep(LOCK_POLL);
    }
}

/// Removes the files of container `id`, as runsc does after it has destroyed it.
///
/// # Errors
/// The first file that cannot be removed.
pub(crate) fn remove(root: &Path, id: &ContainerId) -> io::Result<()> {
    if let Some(state) = find(root, id, ".state")? {
        fs::remove_file(state)?;
    }
    remove_remains(root, id)
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
    let is_root = lock
        .as_ref()
        .is_some_and(|lock| lock.ends_with(&root_container));
    let socket = is_root.then(|| root.join(format!("runsc-{id}.sock")));
    for path in lock.into_iter().chain(socket) {
        remove_file_if_there(&path)?;
    }
    Ok(())
}

/// Removes the filestores of a container that a killed `create` has left. A filestore lies in
/// the directory whose changes it holds.
///
/// # Errors
/// When the bundle makes no sense, or a filestore cannot be removed.
pub(crate) fn remove_filestores_of(
    bundle: &Path,
    id: &ContainerId,
    sandbox: &ContainerId,
) -> io::Result<()> {
    let text = fs::read(bundle.join("config.json"))?;
    let spec: Spec = serde_json::from_slice(&text).map_err(io::Error::other)?;
    // Those in volumes are shared by the sandbox, and go with its root container.
    let volumes = spec
        .mounts
        .unwrap_or_default()
        .into_iter()
        .filter(|_| id == sandbox);
    let dirs = volumes
        .map(|mount| mount.source)
        .filter(|source| source.is_absolute());
    for dir in dirs.chain([bundle.join(spec.root.path)]) {
        remove_filestore(&dir, sandbox.as_str())?;
    }
    Ok(())
}

/// Removes the filestore of a sandbox from one directory, if there is one. runsc's own `delete`
/// forgets it when the container could not be started.
///
/// # Errors
/// When it cannot be removed.
pub(crate) fn remove_filestore(dir: &Path, sandbox: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(format!(".gvisor.filestore.{sandbox}"))) {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// The containers of `sandbox` that runsc knows, but for its root container.
///
/// # Errors
/// When the directory cannot be read.
pub(crate) fn members_of(root: &Path, sandbox: &str) -> io::Result<Vec<ContainerId>> {
    let ending = format!("_sandbox:{sandbox}.state");
    let containers = names(root)?.into_iter().filter_map(|name| {
        let id = name.strip_suffix(&ending).filter(|id| *id != sandbox)?;
        id.parse().ok()
    });
    Ok(containers.collect())
}

/// Removes what is left of containers of `sandbox` that are gone: locks, which a command on a
/// container makes anew that another one deletes at the same time, and states that somebody who
/// was killed has half written.
///
/// # Errors
/// The first file that cannot be removed.
pub(crate) fn remove_leftovers(root: &Path, sandbox: &str) -> io::Result<()> {
    let ending = format!("_sandbox:{sandbox}");
    for name in names(root)? {
        let kinds = [".lock", ".state.new"];
        let container = kinds.iter().find_map(|kind| name.strip_suffix(kind));
        let is_left = container.is_some_and(|container| {
            container.ends_with(&ending) && !root.join(format!("{container}.state")).exists()
        });
        if is_left {
            remove_file_if_there(&root.join(name))?;
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
    let is_it = |name: &String| name.starts_with(&start) && name.ends_with(ending);
    let name = names(root)?.into_iter().find(is_it);
    Ok(name.map(|name| root.join(name)))
}

/// The names of the files in `root`, none where there is no such directory yet.
fn names(root: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(id: &str) -> ContainerId {
        id.parse().unwrap()
    }

    #[test]
    fn any_state_file_is_read_or_refused() {
        let root = tempfile::tempdir().unwrap();
        let id: ContainerId = "c".parse().unwrap();
        let file = root.path().join("c_sandbox:c.state");
        bolero::check!().for_each(|text: &[u8]| {
            std::fs::write(&file, text).unwrap();
            let _ = State::load(root.path(), &id);
        });
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
        assert_eq!(
            (sandbox.id.as_str(), sandbox.pid, sandbox.uid),
            ("s", 7, 65534)
        );
        assert_eq!(sandbox.control_socket, Path::new("/run/x.sock"));
    }

    #[test]
    fn a_root_that_is_not_there_knows_nobody() {
        assert!(
            State::load(Path::new("/no/such/root"), &id("a"))
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn the_cgroup_of_a_sandbox_is_noted_and_nothing_else_changes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s_sandbox:s.state");
        fs::write(dir.path().join("s_sandbox:s.lock"), "").unwrap();
        let with = |cgroup: &str| {
            let text =
                format!(r#"{{"id":"s","x":[1.5],"sandbox":{{"id":"s","cgroup":{cgroup}}}}}"#);
            serde_json::from_str::<serde_json::Value>(&text).unwrap()
        };
        for (before, after) in [
            (
                r#"{"cgroupv1":{"name":"/a","parents":{"cpu":"x"},"own":{"cpu":true}}}"#,
                r#"{"cgroupv1":{"name":"/p/b","parents":{"cpu":"x"},"own":{}}}"#,
            ),
            (
                r#"{"cgroupv2":{"mountpoint":"/m","path":"/a","own":["/m/a"]}}"#,
                r#"{"cgroupv2":{"mountpoint":"/m","path":"/p/b","own":null}}"#,
            ),
            (r#"{"cgroupunknown":null}"#, r#"{"cgroupunknown":null}"#),
        ] {
            fs::write(&file, with(before).to_string()).unwrap();
            set_cgroup(dir.path(), &id("s"), "/p/b").unwrap();
            let text = fs::read_to_string(&file).unwrap();
            let state: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(state, with(after));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(set_cgroup(dir.path(), &id("t"), "/p").is_err());
        for garbage in ["[]", "{}", "x"] {
            fs::write(&file, garbage).unwrap();
            assert!(set_cgroup(dir.path(), &id("s"), "/p").is_err(), "{garbage}");
        }
    }

    #[test]
    fn a_container_is_noted_as_running_with_the_score_that_is_due() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s_sandbox:s.state");
        fs::write(dir.path().join("s_sandbox:s.lock"), "").unwrap();
        for (spec, score) in [
            (r#"{"process":{"oomScoreAdj":-998}}"#, Some(-998)),
            (r#"{"process":{}}"#, None),
        ] {
            let text = format!(r#"{{"id":"s","status":"created","spec":{spec},"goferPid":0}}"#);
            fs::write(&file, text).unwrap();
            assert_eq!(set_running(dir.path(), &id("s")).unwrap(), score);
            let text = fs::read_to_string(&file).unwrap();
            let state: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(
                (&state["status"], &state["goferPid"]),
                (&"running".into(), &0.into())
            );
        }
    }

    #[test]
    fn garbage_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a_sandbox:a.state"), "{").unwrap();
        let error = State::load(dir.path(), &id("a")).unwrap_err().to_string();
        assert!(error.contains("a_sandbox:a.state"), "{error}");
    }

    #[test]
    fn filestores_are_removed_where_they_are_the_containers_own() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, volume) = (dir.path().join("b"), dir.path().join("v"));
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::create_dir(&volume).unwrap();
        let spec = serde_json::json!({
            "root": {"path": "rootfs"},
            "mounts": [{"source": volume}, {"source": "tmpfs"}, {"source": "/dev/null"}, {}],
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let in_root = bundle.join("rootfs/.gvisor.filestore.s");
        let in_volume = volume.join(".gvisor.filestore.s");
        for file in [&in_root, &in_volume] {
            fs::write(file, "").unwrap();
        }
        remove_filestores_of(&bundle, &id("c"), &id("s")).unwrap();
        assert!(!in_root.exists() && in_volume.exists());
        remove_filestores_of(&bundle, &id("s"), &id("s")).unwrap();
        assert!(!in_volume.exists());
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
        let names = [
            "a_sandbox:a.lock",
            "runsc-a.sock",
            "b_sandbox:a.lock",
            "c_sandbox:c.state",
            "c_sandbox:c.lock",
            "runsc-c.sock",
        ];
        for name in names {
            fs::write(dir.path().join(name), "").unwrap();
        }
        for container in ["a", "c", "d"] {
            remove_remains(dir.path(), &id(container)).unwrap();
        }
        let left = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let mut names: Vec<_> = entries
                .map(|e| e.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            names
        };
        fs::write(dir.path().join("d_sandbox:c.state"), "").unwrap();
        assert_eq!(members_of(dir.path(), "c").unwrap(), [id("d")]);
        fs::remove_file(dir.path().join("d_sandbox:c.state")).unwrap();
        let whole = ["c_sandbox:c.lock", "c_sandbox:c.state", "runsc-c.sock"];
        assert_eq!(left()[0], "b_sandbox:a.lock");
        assert_eq!(left()[1..], whole);
        for sandbox in ["a", "c"] {
            remove_leftovers(dir.path(), sandbox).unwrap();
        }
        assert_eq!(left(), whole);
    }
}
