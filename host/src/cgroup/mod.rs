// SPDX-License-Identifier: Apache-2.0

//! The host cgroup of a sandbox: where its sentry and gofers are charged and limited.
//!
//! runsc creates and removes it; the shim keeps its limits up to date and reads its counters.
//! Works on cgroup v2 and on v1, where a hybrid system counts as v1. Below a kubelet's
//! `kubepods` the Pod's own cgroup, one level up, already has the right limits (with the
//! overhead of the RuntimeClass in them), so that nothing is limited here a second time.

mod limits;

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write as _},
    path::{Component, Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use crate::reap::kill_found;

pub use limits::{Limits, PERIOD_US};

/// There if systemd runs the host (sd_booted(3)).
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// How often, and with which pause, a cgroup is tried to be removed whose processes are dying.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// How long a cgroup is looked at until nothing is in it any more: what is moved makes its
/// children elsewhere, but one that is on its way out stays where it is.
const MOVE_TIME: Duration = Duration::from_secs(2);

/// Rounds of that without a pause.
const MOVE_ROUNDS: u32 = 3;

/// Pause between later rounds.
const MOVE_PAUSE: Duration = Duration::from_millis(1);

/// Where cgroup file systems are mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";

/// "No limit" in the form of cgroup v1: the largest multiple of the page size that fits i64.
/// containerd's CRI plugin takes 0 for a limit of nothing and answers an absurd
/// `availableBytes` (`internal/cri/server/container_stats_list.go`, `getAvailableBytes`).
pub const UNLIMITED: u64 = 0x7fff_ffff_ffff_f000;

/// Controllers of v1 that a sandbox may have a directory in.
const V1_CONTROLLERS: [&str; 13] = [
    "blkio",
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "freezer",
    "hugetlb",
    "memory",
    "net_cls",
    "net_prio",
    "perf_event",
    "pids",
    "rdma",
];

/// Failure of an operation on a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path names no cgroup, or leaves the hierarchy.
    #[error("{0}")]
    Path(String),
    /// A file or directory of the hierarchy failed.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was done.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl CgroupError {
    fn io(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { op, path, source }
    }
}

/// Result of an operation on a cgroup.
pub type Result<T, E = CgroupError> = std::result::Result<T, E>;

/// Transient unit of systemd that is the cgroup of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    /// Name of the slice that the scope is in, such as `kubepods-pod1.slice`.
    pub slice: String,
    /// Name of the scope, such as `cri-containerd-1.scope`.
    pub unit: String,
}

/// Which cgroup interface the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// v1, also where v2 is mounted beside it without controllers.
    V1,
    /// v2 only.
    V2,
}

/// A sandbox's cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {
    mount: PathBuf,
    version: Version,
    path: PathBuf,
}

/// Counters of a cgroup. What the host does not have is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// CPU time, nanoseconds.
    pub cpu_ns: u64,
    /// CPU time in the kernel, nanoseconds.
    pub cpu_kernel_ns: u64,
    /// CPU time outside the kernel, nanoseconds.
    pub cpu_user_ns: u64,
    /// Scheduling periods in which the cgroup wanted CPU.
    pub periods: u64,
    /// Periods in which it was throttled.
    pub throttled_periods: u64,
    /// Time for which it was throttled, nanoseconds.
    pub throttled_ns: u64,
    /// Bytes of memory charged.
    pub memory: u64,
    /// Bytes of file cache that nobody used lately; the rest is the working set.
    pub inactive_file: u64,
    /// Tasks.
    pub pids: u64,
}

/// Kills of the OOM killer in a sandbox's cgroup, and in that of its Pod: `None` where nobody counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OomKills {
    own: Option<u64>,
    pod: Option<u64>,
}

impl OomKills {
    /// Whether there were others after `before`.
    pub fn rose_since(&self, before: &Self) -> bool {
        match self.own {
            Some(own) => own > before.own.unwrap_or_default(),
            None => self.pod > before.pod.or(Some(0)),
        }
    }
}

impl Cgroup {
    /// The cgroup at `cgroups_path` of an OCI spec, in either notation: a path of cgroupfs, or
    /// systemd's `slice:prefix:name`.
    ///
    /// # Errors
    /// [`CgroupError::Path`] for a path that leaves the hierarchy.
    pub fn new(mount: &Path, cgroups_path: &str) -> Result<Self> {
        let path = cgroupfs_path(cgroups_path);
        let inside = Path::new(&path).components();
        if path.is_empty()
            || path.contains('\0')
            || inside.clone().any(|c| c == Component::ParentDir)
        {
            return Err(CgroupError::Path(format!(
                "cgroupsPath {cgroups_path:?} is not a path"
            )));
        }
        let path: PathBuf = inside
            .filter(|c| matches!(c, Component::Normal(_)))
            .collect();
        if path.as_os_str().is_empty() {
            // The root of the hierarchy holds the whole host.
            return Err(CgroupError::Path(format!(
                "cgroupsPath {cgroups_path:?} names no cgroup"
            )));
        }
        let version = if mount.join("cgroup.controllers").exists() {
            Version::V2
        } else {
            Version::V1
        };
        Ok(Self {
            mount: mount.to_owned(),
            version,
            path,
        })
    }

    /// Another cgroup of the same host.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn beside(&self, cgroups_path: &str) -> Result<Self> {
        Self::new(&self.mount, cgroups_path)
    }

    /// The path for `cgroupsPath`, in the notation of cgroupfs.
    pub fn spec_path(&self) -> String {
        format!("/{}", self.path.display())
    }

    /// The scope that systemd makes of this cgroup: where it runs the host, one of cgroup v2 in a
    /// slice. Others are for whoever uses them to make.
    pub fn scope(&self) -> Option<Scope> {
        let is_systemds = self.version == Version::V2 && self.mount == Path::new(MOUNT);
        let scope = self.as_scope().filter(|_| is_systemds)?;
        Path::new(SYSTEMD_RUNS).exists().then_some(scope)
    }

    /// What systemd calls it, if it is named as a scope in a slice.
    fn as_scope(&self) -> Option<Scope> {
        let name = |path: &Path| path.file_name()?.to_str().map(str::to_owned);
        let scope = Scope {
            slice: name(self.path.parent()?)?,
            unit: name(&self.path)?,
        };
        let named = scope.slice.ends_with(".slice") && scope.unit.ends_with(".scope");
        named.then_some(scope)
    }

    /// Its processes. Blocks.
    fn pids(&self) -> BTreeSet<u32> {
        let lists = self.hierarchies().into_iter();
        // What is not there has no processes.
        let lists = lists.filter_map(|h| fs::read_to_string(self.procs(&h)).ok());
        let pids = |list: String| -> Vec<u32> {
            list.lines().filter_map(|pid| pid.parse().ok()).collect()
        };
        lists.flat_map(pids).collect()
    }

    /// Which interface the host has.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Whether a kubelet limits the Pod around this cgroup.
    pub fn in_kubepods(&self) -> bool {
        self.path
            .components()
            .any(|c| c.as_os_str().to_string_lossy().starts_with("kubepods"))
    }

    /// Sets what `limits` has; what it lacks is lifted.
    ///
    /// # Errors
    /// The first file that could not be written. A memory limit below what is in use and cannot
    /// be reclaimed is refused by v1 (`EBUSY`).
    pub fn apply(&self, limits: &Limits) -> Result<()> {
        let quota = limits.cpu_quota_us.map(|q| q.max(1_000));
        let shares = limits.cpu_shares.unwrap_or(1024);
        let memory = limits.memory;
        match self.version {
            Version::V1 => {
                let memory = memory.map_or("-1".to_owned(), |m| m.to_string());
                self.write("memory", "memory.limit_in_bytes", &memory)?;
                self.write("cpu", "cpu.cfs_period_us", &PERIOD_US.to_string())?;
                self.write("cpu", "cpu.cfs_quota_us", &quota.unwrap_or(-1).to_string())?;
                self.write("cpu", "cpu.shares", &shares.to_string())
            }
            Version::V2 => {
                self.regain_controllers();
                let max = |x: Option<i64>| x.map_or("max".to_owned(), |x| x.to_string());
                // The conversion of the OCI runtimes (runc libcontainer/cgroups/utils.go).
                let weight = 1 + (shares.max(2) - 2) * 9_999 / 262_142;
                self.write("memory", "memory.max", &max(memory))?;
                self.write("cpu", "cpu.max", &format!("{} {PERIOD_US}", max(quota)))?;
                self.write("cpu", "cpu.weight", &weight.to_string())
            }
        }
    }

    /// Has the cgroups around this one share their controllers with it once more, if somebody has
    /// taken them back.
    fn regain_controllers(&self) {
        if self.file("memory", "memory.max").exists() {
            return;
        }
        let mut dir = self.mount.clone();
        for level in &self.path {
            share_controllers(&dir);
            dir.push(level);
        }
    }

    /// The limits of the cgroup around this one.
    pub fn parent_limits(&self) -> Limits {
        let Some(path) = self.path.parent() else {
            return Limits::default();
        };
        let parent = Self {
            path: path.to_owned(),
            ..self.clone()
        };
        let number = |controller, file| parent.read(controller, file).trim().parse::<i64>().ok();
        match self.version {
            Version::V1 => {
                let quota = number("cpu", "cpu.cfs_quota_us");
                let memory = number("memory", "memory.limit_in_bytes");
                Limits {
                    memory: memory.filter(|m| m.cast_unsigned() < UNLIMITED),
                    cpu_quota_us: quota_us(quota, number("cpu", "cpu.cfs_period_us")),
                    cpu_shares: number("cpu", "cpu.shares").map(i64::cast_unsigned),
                }
            }
            Version::V2 => {
                let cpu = parent.read("cpu", "cpu.max");
                let mut words = cpu.split_whitespace().map(str::parse::<i64>);
                let (quota, period) = (words.next(), words.next());
                Limits {
                    memory: number("memory", "memory.max"),
                    cpu_quota_us: quota_us(quota.and_then(Result::ok), period.and_then(Result::ok)),
                    cpu_shares: None,
                }
            }
        }
    }

    /// How many processes the OOM killer has killed in this cgroup. Below a kubelet's `kubepods` also
    /// in the Pod's cgroup around it, which is still there when systemd has taken away a scope in
    /// which nothing is left.
    pub fn oom_kills(&self) -> OomKills {
        let file = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let of = |cgroup: &Self| {
            let text = fs::read_to_string(cgroup.file("memory", file)).ok()?;
            Some(field(&text, "oom_kill"))
        };
        let is_in_pods = self.version == Version::V2 && self.in_kubepods();
        let pod = self.path.parent().filter(|_| is_in_pods);
        OomKills {
            own: of(self),
            pod: pod.and_then(|path| {
                of(&Self {
                    path: path.to_owned(),
                    ..self.clone()
                })
            }),
        }
    }

    /// What the cgroup uses.
    pub fn usage(&self) -> Usage {
        let stat = self.read("memory", "memory.stat");
        match self.version {
            Version::V1 => {
                let cpu = self.read("cpu", "cpu.stat");
                let number = |controller, file| parse(&self.read(controller, file));
                Usage {
                    cpu_ns: number("cpuacct", "cpuacct.usage"),
                    cpu_kernel_ns: number("cpuacct", "cpuacct.usage_sys"),
                    cpu_user_ns: number("cpuacct", "cpuacct.usage_user"),
                    periods: field(&cpu, "nr_periods"),
                    throttled_periods: field(&cpu, "nr_throttled"),
                    throttled_ns: field(&cpu, "throttled_time"),
                    memory: number("memory", "memory.usage_in_bytes"),
                    inactive_file: field(&stat, "total_inactive_file"),
                    pids: number("pids", "pids.current"),
                }
            }
            Version::V2 => {
                let cpu = self.read("cpu", "cpu.stat");
                let ns = |name| field(&cpu, name).saturating_mul(1_000);
                Usage {
                    cpu_ns: ns("usage_usec"),
                    cpu_kernel_ns: ns("system_usec"),
                    cpu_user_ns: ns("user_usec"),
                    periods: field(&cpu, "nr_periods"),
                    throttled_periods: field(&cpu, "nr_throttled"),
                    throttled_ns: ns("throttled_usec"),
                    memory: parse(&self.read("memory", "memory.current")),
                    inactive_file: field(&stat, "inactive_file"),
                    pids: parse(&self.read("pids", "pids.current")),
                }
            }
        }
    }

    /// Makes the cgroup in every hierarchy of the host, as a runtime would. Blocks.
    ///
    /// # Errors
    /// The first directory that cannot be made.
    pub fn make(&self) -> Result<()> {
        for hierarchy in self.hierarchies() {
            let mut dir = hierarchy.clone();
            for level in &self.path {
                if self.version == Version::V2 {
                    share_controllers(&dir);
                }
                dir.push(level);
                match fs::create_dir(&dir) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(CgroupError::io("make cgroup", &dir)(e));
                    }
                    _ => {}
                }
                if hierarchy.ends_with("cpuset") {
                    inherit_cpuset(&dir).map_err(CgroupError::io("set up cgroup", &dir))?;
                }
            }
        }
        Ok(())
    }

    /// Moves every process of `from` here, also those that are made meanwhile. Blocks.
    ///
    /// # Errors
    /// When a process cannot be moved, or ever more appear.
    #[expect(clippy::disallowed_methods, reason = "for threads that may block")]
    pub fn take_all(&self, from: &Self) -> Result<()> {
        let until = Instant::now() + MOVE_TIME;
        for hierarchy in self.hierarchies() {
            let (source, target) = (from.procs(&hierarchy), self.procs(&hierarchy));
            let mut rounds = 0;
            loop {
                let pids = match fs::read_to_string(&source) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                    read => read.map_err(CgroupError::io("read", &source))?,
                };
                if pids.is_empty() {
                    break;
                }
                if Instant::now() > until {
                    let words = io::Error::other("ever more processes appear in it");
                    return Err(CgroupError::io("empty", &source)(words));
                }
                rounds += 1;
                if rounds > MOVE_ROUNDS {
                    thread::sleep(MOVE_PAUSE);
                }
                move_to(&target, &pids).map_err(CgroupError::io("write", &target))?;
            }
        }
        Ok(())
    }

    /// The list of its processes in a hierarchy.
    fn procs(&self, hierarchy: &Path) -> PathBuf {
        hierarchy.join(&self.path).join("cgroup.procs")
    }

    /// Where the hierarchies are that a sandbox has a directory in.
    fn hierarchies(&self) -> Vec<PathBuf> {
        match self.version {
            Version::V2 => vec![self.mount.clone()],
            Version::V1 => {
                let names = V1_CONTROLLERS.iter().chain(&["systemd"]);
                let paths = names.filter_map(|name| self.mount.join(name).canonicalize().ok());
                let mut paths: Vec<_> = paths.collect();
                // Two controllers of one hierarchy are two names of it.
                paths.sort_unstable();
                paths.dedup();
                paths
            }
        }
    }

    /// Removes the empty directories of this cgroup; what is not there is fine. Waits a second at
    /// most for processes that have been killed to be gone. Blocks.
    ///
    /// # Errors
    /// The last directory that is still in use.
    pub fn remove(&self) -> Result<()> {
        let mut dirs: Vec<PathBuf> = match self.version {
            Version::V2 => vec![self.mount.join(&self.path)],
            Version::V1 => V1_CONTROLLERS
                .iter()
                .chain(&["systemd", "unified"])
                .map(|c| self.mount.join(c).join(&self.path))
                .collect(),
        };
        dirs.dedup();
        let mut result = Ok(());
        for dir in dirs {
            if let Err(e) = remove_when_empty(&dir) {
                result = Err(CgroupError::io("remove cgroup", &dir)(e));
            }
        }
        result
    }

    /// Kills every process in this cgroup. Does not wait for their ends. Blocks.
    pub fn kill(&self) {
        // cgroup v2, kernel 5.14. What is not there has no processes, or cannot kill them at once.
        let kill = fs::OpenOptions::new()
            .write(true)
            .open(self.file("", "cgroup.kill"));
        if kill.is_ok_and(|mut file| file.write_all(b"1").is_ok()) {
            return;
        }
        kill_found(self.pids(), |pid| self.pids().contains(&pid));
    }

    fn file(&self, controller: &str, file: &str) -> PathBuf {
        match self.version {
            Version::V1 => self.mount.join(controller).join(&self.path).join(file),
            Version::V2 => self.mount.join(&self.path).join(file),
        }
    }

    fn read(&self, controller: &str, file: &str) -> String {
        // A controller that the host lacks counts nothing.
        fs::read_to_string(self.file(controller, file)).unwrap_or_default()
    }

    fn write(&self, controller: &str, file: &str, value: &str) -> Result<()> {
        let path = self.file(controller, file);
        let written = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut f| f.write_all(value.as_bytes()));
        match written {
            // No such controller on this host: nothing can be limited with it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done.map_err(CgroupError::io("write", &path)),
        }
    }
}

/// Has a cgroup of v2 give its children the controllers that it has: without, they can neither be
/// limited nor looked at (kernel doc `cgroup-v2`, "Enabling and Disabling"). runsc does the same
/// where it makes a cgroup.
fn share_controllers(dir: &Path) {
    let names = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    for name in names.split_whitespace() {
        let shared = fs::write(dir.join("cgroup.subtree_control"), format!("+{name}"));
        // Some controllers cannot be shared out on some hosts, and are not missed there.
        if let Err(e) = shared {
            log::debug!("{}: {name}: {e}", dir.display());
        }
    }
}

/// Gives a new cgroup of v1's `cpuset` what its parent has: without, it takes no process.
fn inherit_cpuset(dir: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(file);
        if fs::read_to_string(&path)?.trim().is_empty() {
            let parent = dir.parent().unwrap_or(dir).join(file);
            fs::write(&path, fs::read(parent)?)?;
        }
    }
    Ok(())
}

/// Writes each of `pids`, a line each, to `procs`. One that has ended is moved enough.
fn move_to(procs: &Path, pids: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(procs)?;
    for pid in pids.lines() {
        match file.write_all(pid.as_bytes()) {
            Err(e) if e.raw_os_error() != Some(libc::ESRCH) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// A quota as microseconds of [`PERIOD_US`]; what is not positive is no quota.
fn quota_us(quota: Option<i64>, period: Option<i64>) -> Option<i64> {
    let period = period.filter(|p| *p > 0).unwrap_or(PERIOD_US);
    let quota = quota.filter(|q| *q > 0)?;
    Some(quota.checked_mul(PERIOD_US)? / period)
}

/// Turns systemd's `slice:prefix:name` into the path that systemd gives the unit: every dash of
/// a slice's name is a level (systemd.slice(5)).
fn cgroupfs_path(path: &str) -> String {
    let parts: Vec<&str> = path.split(':').collect();
    let [slice, prefix, name] = parts[..] else {
        return path.to_owned();
    };
    let mut dirs = String::new();
    if let Some(stem) = slice.strip_suffix(".slice").filter(|stem| *stem != "-") {
        for (end, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
            dirs.push_str(&stem[..end]);
            dirs.push_str(".slice/");
        }
    }
    format!("/{dirs}{prefix}-{name}.scope")
}

fn parse(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

fn field(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
        .map_or(0, parse)
}

#[expect(clippy::disallowed_methods, reason = "for threads that may block")]
fn remove_when_empty(dir: &Path) -> io::Result<()> {
    for _ in 0..REMOVE_TRIES {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => thread::sleep(REMOVE_PAUSE),
            done => return done,
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_notations_name_the_same_kind_of_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = |p: &str| Cgroup::new(dir.path(), p).unwrap().spec_path();
        assert_eq!(path("/k8s.io/abc"), "/k8s.io/abc");
        assert_eq!(path("relative/abc"), "/relative/abc");
        assert_eq!(
            path("kubepods-burstable-pod1.slice:cri-containerd:abc"),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope"
        );
        assert_eq!(path("system.slice:p:n"), "/system.slice/p-n.scope");
        for bad in ["", "/", "/./", "/a/../../b", "a\0b"] {
            assert!(Cgroup::new(dir.path(), bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn who_is_in_it_is_killed_by_it_or_by_number() {
        let mount = tempfile::tempdir().unwrap();
        let sleeper = || {
            let mut sleep = std::process::Command::new("/bin/sleep");
            sleep.arg("3600").spawn().unwrap()
        };
        let mut child = sleeper();
        let list = mount.path().join("memory/a");
        fs::create_dir_all(&list).unwrap();
        fs::write(list.join("cgroup.procs"), format!("{}\n", child.id())).unwrap();
        Cgroup::new(mount.path(), "/a").unwrap().kill();
        assert!(!child.wait().unwrap().success());

        fs::write(mount.path().join("cgroup.controllers"), "").unwrap();
        let unified = mount.path().join("a");
        fs::create_dir(&unified).unwrap();
        let mut child = sleeper();
        fs::write(unified.join("cgroup.procs"), format!("{}\n", child.id())).unwrap();
        fs::write(unified.join("cgroup.kill"), "").unwrap();
        Cgroup::new(mount.path(), "/a").unwrap().kill();
        assert_eq!(
            fs::read_to_string(unified.join("cgroup.kill")).unwrap(),
            "1"
        );
        assert!(child.try_wait().unwrap().is_none());
        fs::remove_file(unified.join("cgroup.kill")).unwrap();
        Cgroup::new(mount.path(), "/a").unwrap().kill();
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn hostile_numbers_do_not_overflow() {
        let huge = Limits::of(
            &json!({"memory": {"limit": i64::MAX}, "cpu": {"quota": i64::MAX, "period": 1}}),
        );
        assert_eq!(huge.cpu_quota_us, None);
        assert_eq!(Limits::sum(&[huge, huge]).memory, Some(i64::MAX));
    }

    #[test]
    fn a_new_cgroup_of_v2_has_the_controllers_of_its_parents() {
        let mount = tempfile::tempdir().unwrap();
        let parent = mount.path().join("k8s.io");
        fs::create_dir(&parent).unwrap();
        for dir in [mount.path(), &parent] {
            fs::write(dir.join("cgroup.controllers"), "memory\n").unwrap();
        }
        Cgroup::new(mount.path(), "/k8s.io/abc")
            .unwrap()
            .make()
            .unwrap();
        for dir in [mount.path(), &parent] {
            let shared = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap();
            assert_eq!(shared, "+memory");
        }
        assert!(!parent.join("abc/cgroup.subtree_control").exists());
    }

    #[test]
    fn a_scope_is_what_is_named_so_in_a_slice() {
        let named = |path| Cgroup::new(Path::new("/nowhere"), path).unwrap().as_scope();
        let scope = named("kubepods-pod1.slice:cri-containerd:abc").unwrap();
        assert_eq!(
            (scope.slice.as_str(), scope.unit.as_str()),
            ("kubepods-pod1.slice", "cri-containerd-abc.scope")
        );
        for path in ["/k8s.io/abc", "/a.slice/abc", "/a/abc.scope", "/abc.scope"] {
            assert_eq!(named(path), None, "{path}");
        }
    }

    #[test]
    fn kills_are_seen_also_when_the_scope_is_gone() {
        let mount = tempfile::tempdir().unwrap();
        fs::write(mount.path().join("cgroup.controllers"), "memory").unwrap();
        let pod = mount.path().join("kubepods.slice/kubepods-pod1.slice");
        let dir = pod.join("cri-containerd-abc.scope");
        fs::create_dir_all(&dir).unwrap();
        let counts = |dir: &Path, kills| {
            fs::write(dir.join("memory.events"), format!("oom_kill {kills}\n")).unwrap();
        };
        let cgroup = Cgroup::new(mount.path(), "kubepods-pod1.slice:cri-containerd:abc").unwrap();
        counts(&pod, 3); // of an earlier sandbox of the Pod
        counts(&dir, 0);
        let before = cgroup.oom_kills();
        assert!(!cgroup.oom_kills().rose_since(&before));
        counts(&dir, 1);
        assert!(cgroup.oom_kills().rose_since(&before));
        fs::remove_dir_all(&dir).unwrap();
        assert!(!cgroup.oom_kills().rose_since(&before));
        counts(&pod, 4);
        assert!(cgroup.oom_kills().rose_since(&before));
        fs::remove_dir_all(&pod).unwrap();
        assert!(!cgroup.oom_kills().rose_since(&before));
    }

    #[test]
    fn limits_come_after_controllers_that_were_taken() {
        let mount = tempfile::tempdir().unwrap();
        let pod = mount.path().join("kubepods.slice/kubepods-pod1.slice");
        fs::create_dir_all(pod.join("abc")).unwrap();
        for dir in [mount.path(), &pod] {
            fs::write(dir.join("cgroup.controllers"), "memory\n").unwrap();
        }
        let cgroup = "/kubepods.slice/kubepods-pod1.slice/abc";
        let cgroup = Cgroup::new(mount.path(), cgroup).unwrap();
        cgroup.apply(&Limits::default()).unwrap();
        let shared = fs::read_to_string(pod.join("cgroup.subtree_control")).unwrap();
        assert_eq!(shared, "+memory");
    }

    #[test]
    fn v2_files_are_written_and_read() {
        let mount = tempfile::tempdir().unwrap();
        fs::write(mount.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
        let dir = mount.path().join("k8s.io/abc");
        fs::create_dir_all(&dir).unwrap();
        let cgroup = Cgroup::new(mount.path(), "/k8s.io/abc").unwrap();
        fs::write(dir.join("memory.max"), "").unwrap();
        fs::write(
            dir.join("cpu.stat"),
            "usage_usec 7\nuser_usec 5\nsystem_usec 2\nnr_throttled 1\n",
        )
        .unwrap();
        fs::write(
            dir.join("memory.events"),
            "oom 3\noom_kill 2\noom_group_kill 0\n",
        )
        .unwrap();
        cgroup
            .apply(&Limits {
                memory: Some(4096),
                cpu_quota_us: Some(50_000),
                cpu_shares: Some(1024),
            })
            .unwrap();
        assert_eq!(fs::read_to_string(dir.join("memory.max")).unwrap(), "4096");
        assert_eq!(cgroup.oom_kills().own, Some(2));
        let usage = cgroup.usage();
        assert_eq!(
            (usage.cpu_ns, usage.cpu_kernel_ns, usage.throttled_periods),
            (7_000, 2_000, 1)
        );
    }
}
