// SPDX-License-Identifier: Apache-2.0

//! The cgroup that everything of one test node is in: containerd and its shims in `daemon`, Pods
//! beside it. It tells what belongs to the node, and what is in it can be ended.
//!
//! On cgroup v1 each controller has a hierarchy of its own. Runtimes make a container's
//! directories in all of them, while one, the *tracking* hierarchy, is enough to know processes.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::process::{Proc, signal_to};

const MOUNT: &str = "/sys/fs/cgroup";

/// How long killed processes may take to go.
const KILLED: Duration = Duration::from_secs(20);

/// A node's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    name: String,
}

impl Cgroup {
    /// Makes the cgroup `name`, one level below the root.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(name: &str) -> Result<Self> {
        let cgroup = Self {
            name: name.to_owned(),
        };
        for hierarchy in hierarchies() {
            make(&hierarchy.join(name))?;
        }
        let daemon = cgroup.tracking()?.join("daemon");
        fs::create_dir(&daemon).with_context(|| format!("make {}", daemon.display()))?;
        Ok(cgroup)
    }

    /// One that another process has made.
    pub fn existing(name: &str) -> Self {
        Self {
            name: name.to_owned(),
        }
    }

    /// Its path as a Pod's `cgroup_parent`.
    pub fn parent(&self) -> String {
        format!("/{}", self.name)
    }

    /// The file that moves a process into the part for daemons.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn procs_file(&self) -> Result<File> {
        let path = self.tracking()?.join("daemon/cgroup.procs");
        File::options()
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))
    }

    /// Gives it an eighth of the weight of other cgroups.
    ///
    /// # Errors
    /// The kernel's.
    pub fn yield_cpu(&self) -> Result<()> {
        for dir in hierarchies() {
            // docs.kernel.org: admin-guide/cgroup-v2 and scheduler/sched-design-CFS; 100 and 1024
            // are the defaults.
            for (file, weight) in [("cpu.weight", "12"), ("cpu.shares", "128")] {
                let file = dir.join(&self.name).join(file);
                if file.exists() {
                    fs::write(&file, weight)
                        .with_context(|| format!("write {}", file.display()))?;
                }
            }
        }
        Ok(())
    }

    fn tracking(&self) -> Result<PathBuf> {
        let first = hierarchies()
            .into_iter()
            .next()
            .context("no cgroup hierarchy is mounted")?;
        Ok(first.join(&self.name))
    }

    /// Every directory of it, in all hierarchies.
    pub fn dirs(&self) -> Vec<PathBuf> {
        let mut dirs = Vec::new();
        for hierarchy in hierarchies() {
            collect_dirs(&hierarchy.join(&self.name), &mut dirs);
        }
        dirs
    }

    /// The processes in it.
    pub fn processes(&self) -> Vec<u32> {
        let pids = self
            .dirs()
            .into_iter()
            .filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok());
        let pids: BTreeSet<u32> = pids
            .flat_map(|text| {
                text.lines()
                    .filter_map(|l| l.parse().ok())
                    .collect::<Vec<_>>()
            })
            .collect();
        pids.into_iter()
            .filter(|pid| Proc::find(*pid).is_some())
            .collect()
    }

    /// A file of the cgroup at `path` below this one, such as `memory.limit_in_bytes`; `v1` and
    /// `v2` are its controller with its names on either interface.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, path: &str, controller: &str, v1: &str, v2: &str) -> Result<String> {
        let file = if is_v2() {
            Path::new(MOUNT).join(&self.name).join(path).join(v2)
        } else {
            Path::new(MOUNT)
                .join(controller)
                .join(&self.name)
                .join(path)
                .join(v1)
        };
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        Ok(text.trim().to_owned())
    }

    /// Makes a cgroup for a Pod below this one, limited to `memory` bytes, as a kubelet does, and
    /// returns its path as a Pod's `cgroup_parent`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pod(&self, name: &str, memory: i64) -> Result<String> {
        let limit = if is_v2() {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        self.pod_with(name, "memory", limit, memory)
    }

    /// The same, limited to `pids` processes and threads.
    ///
    /// # Errors
    /// The kernel's.
    pub fn pod_of_few(&self, name: &str, pids: i64) -> Result<String> {
        self.pod_with(name, "pids", "pids.max", pids)
    }

    fn pod_with(&self, name: &str, controller: &str, file: &str, value: i64) -> Result<String> {
        let levels = format!("{}/kubepods/{name}", self.name);
        for hierarchy in hierarchies() {
            let mut dir = hierarchy.clone();
            for level in levels.split('/') {
                dir.push(level);
                if !dir.exists() {
                    make(&dir)?;
                }
            }
            if is_v2() || hierarchy.ends_with(controller) {
                fs::write(dir.join(file), value.to_string())
                    .with_context(|| format!("limit {}", dir.display()))?;
            }
        }
        Ok(format!("/{levels}"))
    }

    /// Removes what [`Cgroup::pod`] has made.
    ///
    /// # Errors
    /// The kernel's, also when it is still in use.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        for hierarchy in hierarchies() {
            let parent = hierarchy.join(&self.name).join("kubepods");
            for dir in [parent.join(name), parent] {
                match fs::remove_dir(&dir) {
                    // Another Pod may have the parent, too.
                    Err(e)
                        if !matches!(
                            e.kind(),
                            io::ErrorKind::NotFound
                                | io::ErrorKind::ResourceBusy
                                | io::ErrorKind::DirectoryNotEmpty
                        ) =>
                    {
                        return Err(e).with_context(|| format!("remove {}", dir.display()));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Kills what is in it and removes it. Blocks.
    ///
    /// # Errors
    /// When processes stay or a directory cannot be removed.
    pub fn destroy(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            let pids = self.processes();
            if pids.is_empty() {
                break;
            }
            for pid in &pids {
                signal_to(*pid, Signal::SIGKILL)?;
            }
            if start.elapsed() > KILLED {
                bail!("processes {pids:?} of cgroup {} do not die", self.name);
            }
            pause();
        }
        loop {
            let mut dirs = self.dirs();
            dirs.sort_by_key(|dir| std::cmp::Reverse(dir.components().count()));
            let failed = dirs.iter().find_map(|dir| match fs::remove_dir(dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Some((dir, e)),
                _ => None,
            });
            match failed {
                None => return Ok(()),
                // The kernel takes a moment to let go of a process that has ended.
                Some(_) if start.elapsed() < KILLED => pause(),
                Some((dir, e)) => {
                    return Err(e).with_context(|| format!("remove {}", dir.display()));
                }
            }
        }
    }
}

/// Whether the machine has cgroup v2 only.
pub fn is_v2() -> bool {
    Path::new(MOUNT).join("cgroup.controllers").exists()
}

/// The roots of all hierarchies. The first is the one to track processes by: one without
/// controllers where there is one, because runtimes move processes in the others.
fn hierarchies() -> Vec<PathBuf> {
    if is_v2() {
        return vec![MOUNT.into()];
    }
    let entries = fs::read_dir(MOUNT).into_iter().flatten().flatten();
    // `cpu` may be a link to `cpu,cpuacct`.
    let roots = entries
        .filter_map(|e| e.path().canonicalize().ok())
        .filter(|p| p.join("cgroup.procs").exists());
    let mut roots: Vec<_> = roots.collect::<BTreeSet<_>>().into_iter().collect();
    let rank = |root: &PathBuf| {
        ["unified", "systemd", "pids"]
            .iter()
            .position(|n| root.ends_with(n))
            .unwrap_or(3)
    };
    roots.sort_by_key(rank);
    roots
}

/// Makes a directory. A new cpuset of v1 is empty, and nothing can run in an empty one; a new
/// cgroup of v2 counts and limits memory only where its parent says so.
fn make(dir: &Path) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("make {}", dir.display()))?;
    let Some(parent) = dir.parent() else {
        return Ok(());
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if !is_v2() && parent.join(file).exists() {
            fs::write(dir.join(file), fs::read(parent.join(file))?)
                .with_context(|| format!("write {file}"))?;
        }
    }
    if is_v2() {
        fs::write(parent.join("cgroup.subtree_control"), "+memory +cpu +pids")
            .context("enable controllers")?;
    }
    Ok(())
}

fn collect_dirs(dir: &Path, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    into.push(dir.to_owned());
    for entry in entries
        .flatten()
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
    {
        collect_dirs(&entry.path(), into);
    }
}

#[allow(clippy::disallowed_methods)] // no runtime is there when a test panics
fn pause() {
    std::thread::sleep(Duration::from_millis(50));
}
