// SPDX-License-Identifier: Apache-2.0

//! What is written of containers that no command has made: see [`crate::gofer`].

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use super::{edit, find};
use crate::ContainerId;

/// What is written of the root container of `sandbox`.
///
/// # Errors
/// When there is nothing, or it cannot be read.
pub(crate) fn root_container(root: &Path, sandbox: &ContainerId) -> io::Result<Value> {
    let file = find(root, sandbox, ".state")?;
    let file = file.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok(serde_json::from_slice(&fs::read(file)?)?)
}

/// Writes `state` of the new container `id` of `sandbox`, in the way of runsc: nobody else may be
/// making one of that name.
///
/// # Errors
/// When there is one, or it cannot be written; then nothing stays.
pub(crate) fn add(
    root: &Path,
    id: &ContainerId,
    sandbox: &ContainerId,
    state: &Value,
) -> io::Result<()> {
    let path = |ending: &str| -> PathBuf { root.join(format!("{id}_sandbox:{sandbox}.{ending}")) };
    let (lock_file, state_file) = (path("lock"), path("state"));
    let mut options = OpenOptions::new();
    options.create_new(true).write(true).mode(0o640);
    let lock = options.open(&lock_file)?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
    let written = options
        .open(&state_file)
        .and_then(|file| Ok(serde_json::to_writer(file, state)?));
    if written.is_err() {
        for file in [state_file, lock_file] {
            fs::remove_file(file).ok(); // the first error is the one to tell
        }
    }
    written
}

/// Writes that the container `id` runs, with its files served as `mount_confs` say.
///
/// # Errors
/// See [`edit`].
pub(crate) fn set_started(root: &Path, id: &ContainerId, mount_confs: Value) -> io::Result<()> {
    edit(root, id, |state| {
        state["status"] = "running".into();
        state["goferMountConfs"] = mount_confs;
        Ok(())
    })
}

/// Writes that nothing serves the files of the container `id` yet.
///
/// # Errors
/// See [`edit`].
pub(crate) fn forget_gofer(root: &Path, id: &ContainerId) -> io::Result<()> {
    edit(root, id, |state| {
        state["goferPid"] = 0.into();
        Ok(())
    })
}

/// The lowest `oomScoreAdj` of the containers of `sandbox` but its root container, which is what
/// its sentry gets (gVisor `runsc/container/container.go`, `adjustSandboxOOMScoreAdj`).
///
/// # Errors
/// When the directory cannot be read. A container that just goes has no say.
pub(crate) fn lowest_oom_score(root: &Path, sandbox: &ContainerId) -> io::Result<Option<i64>> {
    let ending = format!("_sandbox:{sandbox}.state");
    let own = format!("{sandbox}{ending}");
    let mut lowest = None;
    for entry in fs::read_dir(root)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if !name.ends_with(&ending) || name == own {
            continue;
        }
        let Ok(file) = File::open(root.join(&*name)) else {
            continue;
        };
        let state: Value = serde_json::from_reader(io::BufReader::new(file)).unwrap_or_default();
        let score = state.pointer("/spec/process/oomScoreAdj");
        if let Some(score) = score.and_then(Value::as_i64) {
            lowest = Some(lowest.map_or(score, |low: i64| low.min(score)));
        }
    }
    Ok(lowest)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_container_is_added_once_and_its_score_counts() {
        let dir = tempfile::tempdir().unwrap();
        let (root, s): (_, ContainerId) = (dir.path(), "s".parse().unwrap());
        let state = |score: i64| json!({"status": "created", "goferPid": 9, "spec": {"process": {"oomScoreAdj": score}}});
        add(root, &s, &s, &state(-998)).unwrap();
        assert_eq!(root_container(root, &s).unwrap()["goferPid"], 9);
        assert_eq!(lowest_oom_score(root, &s).unwrap(), None);
        for (name, score) in [("a", 900), ("b", 100)] {
            let id: ContainerId = name.parse().unwrap();
            add(root, &id, &s, &state(score)).unwrap();
            assert!(add(root, &id, &s, &state(score)).is_err());
        }
        assert_eq!(lowest_oom_score(root, &s).unwrap(), Some(100));
        let a: ContainerId = "a".parse().unwrap();
        set_started(root, &a, json!([{"lower": 1, "upper": 2}])).unwrap();
        forget_gofer(root, &a).unwrap();
        let text = fs::read(root.join("a_sandbox:s.state")).unwrap();
        let state: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            (&state["status"], &state["goferPid"]),
            (&json!("running"), &json!(0))
        );
        assert_eq!(state["goferMountConfs"][0]["upper"], 2);
    }
}
