// SPDX-License-Identifier: Apache-2.0

//! What a cluster changes of the host that is not in its directory, cgroup or network namespace.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use kiln_tests::leaks::{SCRATCH, remove_scratch};

use super::{layout::Layout, state::State};

/// What kubelet sets in /proc/sys (`setupKernelTunables` in pkg/kubelet/cm).
const SYSCTLS: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// Where kubelet makes links to the logs of containers.
const LOG_LINKS: &str = "/var/log/containers";

/// Where the CNI library keeps results, by network and container.
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// What kubelet wants of the cgroup that it is given, on a machine with cgroup v2 only.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "hugetlb", "memory", "pids"];

/// Where all that is.
pub(super) const DIRS: [&str; 3] = [LOG_LINKS, CNI_RESULTS, SCRATCH];

/// What kubelet sets, as it is now.
pub(super) fn sysctls() -> BTreeMap<String, String> {
    let value = |name: &str| {
        let text = fs::read_to_string(sysctl(name)).ok()?;
        Some((name.to_owned(), text.trim().to_owned()))
    };
    SYSCTLS.into_iter().filter_map(value).collect()
}

/// Notes how things are.
pub(super) fn note(state: &mut State) {
    state.sysctls = sysctls();
    if !Path::new(LOG_LINKS).exists() {
        state.new_dirs.push(LOG_LINKS.into());
    }
}

/// Puts things back as they were. What runs no more.
pub(super) fn restore(layout: &Layout, state: &State) -> Result<()> {
    for (name, value) in &state.sysctls {
        let path = sysctl(name);
        // One that was not changed may not be writable.
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() != value) {
            fs::write(&path, value).with_context(|| format!("write {}", path.display()))?;
        }
    }
    remove_scratch(&layout.bundles()).with_context(|| format!("clean {SCRATCH}"))?;
    // With those that lead nowhere, which any kubelet removes.
    remove_in(LOG_LINKS, |path| {
        fs::read_link(path).is_ok_and(|to| to.starts_with(&layout.dir) || !to.exists())
    })?;
    let network = layout.pod_network();
    remove_in(CNI_RESULTS, |path| {
        let name = path.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with(&format!("{network}-"))
    })?;
    for dir in &state.new_dirs {
        match fs::remove_dir(dir) {
            // Another kubelet may use it by now.
            Err(e)
                if !matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                return Err(e).with_context(|| format!("remove {}", dir.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// On cgroup v2, gives `cgroup`, which is to be made, the controllers that kubelet wants.
pub(super) fn enable_controllers(cgroup: &str) -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let Ok(there) = fs::read_to_string(root.join("cgroup.controllers")) else {
        return Ok(()); // v1
    };
    let wanted = CONTROLLERS
        .iter()
        .filter(|c| there.split_whitespace().any(|t| t == **c));
    let list: String = wanted.map(|c| format!("+{c} ")).collect();
    let mut parents: Vec<_> = Path::new(cgroup).ancestors().skip(1).collect();
    parents.reverse();
    for parent in parents {
        let file = root.join(parent).join("cgroup.subtree_control");
        fs::write(&file, &list).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Removes the files in `dir` that are `ours`.
fn remove_in(dir: &str, ours: impl Fn(&Path) -> bool) -> Result<()> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for path in entries.map(|e| e.path()).filter(|path| ours(path)) {
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

fn sysctl(name: &str) -> PathBuf {
    Path::new("/proc/sys").join(name)
}
