// SPDX-License-Identifier: Apache-2.0

//! Cgroups of warm sandboxes, in both versions.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Weight of the CPU time of all warm sandboxes together, by the file of each version of cgroups:
/// 256 shares beside the 1024 for each CPU of the node that kubelet gives to all Pods. Booting must
/// not slow what runs, but go on.
const CPU_WEIGHT: [(&str, &str); 2] = [("cpu.shares", "256"), ("cpu.weight", "10")];

/// How long killed processes may take to leave their cgroup.
pub(crate) const END_TIME: Duration = Duration::from_secs(1);

/// Pause between two attempts to remove a cgroup.
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// `cgroupsPath` of sandbox `id` below the cgroup `parent`.
pub(crate) fn cgroup_of(parent: &str, id: &str) -> String {
    format!("{}/{id}", parent.trim_end_matches('/'))
}

/// On hosts with both versions of cgroups: leaves this process's cgroup of version 2 for the one
/// that `path` is in. runsc makes cgroups of version 1 there, so that its sandboxes stay where
/// this process is, and whoever ends the agent's container would end Pods with it. Blocks.
///
/// # Errors
/// The kernel's.
pub(crate) fn leave_own_cgroup(path: &str) -> io::Result<()> {
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    let below = parent.strip_prefix("/").unwrap_or(parent);
    let procs = Path::new("/sys/fs/cgroup/unified")
        .join(below)
        .join("cgroup.procs");
    match procs.exists() {
        true => fs::write(procs, "0"),
        false => Ok(()),
    }
}

/// Where the cgroup `path` is, or would be, in every hierarchy of the host. Blocks.
fn directories_of(path: &str) -> io::Result<Vec<PathBuf>> {
    let path = path.trim_matches('/');
    let mount = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(mount)?.flatten().map(|e| e.path());
    let all = hierarchies.chain([mount.to_owned()]);
    Ok(all.map(|hierarchy| hierarchy.join(path)).collect())
}

/// Puts process `pid` into the cgroup `path` in every hierarchy of the host that has it. Blocks.
pub(crate) fn join_cgroup(path: &str, pid: u32) -> io::Result<()> {
    for dir in directories_of(path)? {
        let procs = dir.join("cgroup.procs");
        if procs.exists() {
            fs::write(procs, pid.to_string())?;
        }
    }
    Ok(())
}

/// Lets Pods go before what is in the cgroup `path` and below, where there is one. Blocks.
pub(crate) fn yield_cpu(path: &str) -> io::Result<()> {
    for dir in directories_of(path)? {
        for (file, weight) in CPU_WEIGHT {
            let file = dir.join(file);
            if file.exists() {
                fs::write(file, weight)?;
            }
        }
    }
    Ok(())
}

/// Removes the cgroup `path` from every hierarchy of the host, if nothing is in it. What is in
/// use after `patience`, or not there, stays so. Blocks.
#[expect(clippy::disallowed_methods, reason = "for threads that may block")]
pub(crate) fn remove_cgroup(path: &str, patience: Duration) {
    let until = Instant::now() + patience;
    let mut dirs = directories_of(path).unwrap_or_default();
    loop {
        // Processes that have been killed are in it for a while.
        let is_busy = |e: io::Error| e.kind() == io::ErrorKind::ResourceBusy;
        dirs.retain(|dir| fs::remove_dir(dir).is_err_and(is_busy));
        if dirs.is_empty() || Instant::now() >= until {
            return;
        }
        thread::sleep(REMOVE_PAUSE);
    }
}

/// Removes the cgroups below `path` in the same way. Blocks.
pub(crate) fn remove_cgroups_below(path: &str, patience: Duration) {
    let dirs = directories_of(path).unwrap_or_default();
    let below = dirs.iter().flat_map(fs::read_dir).flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
    let names: BTreeSet<_> = below.map(|dir| dir.file_name()).collect();
    for name in names {
        remove_cgroup(&cgroup_of(path, &name.to_string_lossy()), patience);
    }
}

/// Bytes of memory that the processes in the cgroup `path` and below hold. Blocks.
pub(crate) fn held_memory(path: &str) -> u64 {
    let path = path.trim_matches('/');
    let mount = Path::new("/sys/fs/cgroup");
    let files = [
        mount.join(path).join("memory.current"),
        mount
            .join("memory")
            .join(path)
            .join("memory.usage_in_bytes"),
    ];
    let read = |file: &PathBuf| fs::read_to_string(file).ok()?.trim().parse().ok();
    files.iter().find_map(read).unwrap_or(0)
}
