// SPDX-License-Identifier: Apache-2.0

//! Where a test keeps what it starts: one directory, one cgroup, one network namespace.
//!
//! Tests do not meet each other, nor what the machine runs, and all of a test can be found and
//! ended: by [`Place::destroy`], when the place is dropped (also by a panic), when the runner of
//! the suite is told to end, and by the next [`Place::new`] where it was killed.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};

use crate::{
    agent,
    cgroup::Cgroup,
    leaks::{self, SCRATCH, Scope, Snapshot},
    mounts,
    netns::Netns,
    process::{Proc, signal_to},
    wait,
};

/// Places are `/tmp/kn-XXXXX`: the paths of UNIX sockets in them must stay below 108 bytes with a
/// container's id of 64.
const PARENT: &str = "/tmp";
const PREFIX: &str = "kn-";

/// Directory of the bundles of containerd's tasks, in a place, by namespace.
pub(crate) const TASKS: &str = "state/io.containerd.runtime.v2.task";

/// containerd's own socket, below the directory of a place.
pub(crate) const CONTAINERD_SOCKET: &str = "c.sock";

/// Directory of the sockets of shims, in a place.
pub(crate) const SHIM_SOCKETS: &str = "s";

/// Where CNI keeps results by network and container (containernetworking/cni `libcni`, `CacheDir`).
const CNI_RESULTS: &str = "/var/lib/cni/results";

/// How long the last of a Pod may take to go when it has been reported gone.
const SETTLES: Duration = Duration::from_secs(120);

/// A directory without an owner this old has lost it, and is not about to get one.
const ORPHANED: Duration = Duration::from_secs(60);

/// The directories of this process's places.
static LIVE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A place.
#[derive(Debug)]
pub struct Place {
    remains: Remains,
    netns: Netns,
    baseline: Snapshot,
    ids: Mutex<BTreeSet<String>>,
    /// Held as long as the test lives, so that others know.
    _owner: Flock<File>,
}

impl Place {
    /// Makes a place, and takes away those of tests that are gone.
    ///
    /// # Errors
    /// When something of it cannot be made.
    pub fn new() -> Result<Self> {
        sweep();
        let netns = Netns::new()?;
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .rand_bytes(5)
            .tempdir_in(PARENT)
            .context("make a directory")?;
        let owner = File::create(dir.path().join("owner"))?;
        let owner = Flock::lock(owner, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)
            .context("lock the place")?;
        DirBuilder::new()
            .mode(0o700)
            .create(dir.path().join(SHIM_SOCKETS))?;
        let name = name_of(dir.path());
        let cgroup = Cgroup::new(&name)?;
        let remains = Remains {
            name,
            dir: dir.keep(),
            cgroup,
        };
        locked(&LIVE).push(remains.dir.clone());
        Ok(Self {
            remains,
            netns,
            baseline: Snapshot::default(),
            ids: Mutex::default(),
            _owner: owner,
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.remains.dir
    }

    /// Its name, which its cgroup has, too.
    pub fn name(&self) -> &str {
        &self.remains.name
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.remains.cgroup
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its processes: all in its cgroup, and all that name its directory.
    pub fn processes(&self) -> Vec<Proc> {
        self.remains.processes()
    }

    /// Takes what is there now for what may be there at the end.
    ///
    /// # Errors
    /// When something cannot be listed.
    pub fn set_baseline(&mut self) -> Result<()> {
        self.baseline = self.snapshot()?;
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let owns = |id: &str| log.contains(id) || locked(&self.ids).contains(id);
        Snapshot::take(&Scope {
            dir: self.dir(),
            cgroup: self.cgroup(),
            netns: &self.netns,
            owns: &owns,
        })
    }

    /// The file for the log of the place's containerd, in which all its containers are named.
    pub(crate) fn log(&self) -> PathBuf {
        self.dir().join("containerd.log")
    }

    /// Takes a container for one of the place where there is no containerd to name it.
    pub(crate) fn remember(&self, id: &str) {
        locked(&self.ids).insert(id.to_owned());
    }

    /// Waits until nothing bears `id` any more: no process, mount, cgroup or file.
    ///
    /// # Errors
    /// What is left.
    pub async fn expect_gone(&self, id: &str) -> Result<()> {
        self.settle(|now| now.mentions(id)).await
    }

    /// Waits until there is no more than at the baseline.
    ///
    /// # Errors
    /// What is left.
    pub async fn check_for_leaks(&self) -> Result<()> {
        self.settle(|now| self.baseline.compare(now)).await
    }

    async fn settle(&self, left: impl Fn(&Snapshot) -> Option<String>) -> Result<()> {
        let mut last = None;
        let clean = wait::until("nothing left behind", SETTLES, async || {
            last = self
                .snapshot()
                .map_or_else(|e| Some(format!("{e:#}")), |now| left(&now));
            last.is_none().then_some(())
        });
        if clean.await.is_err() {
            bail!("left behind:\n{}", last.unwrap_or_default());
        }
        Ok(())
    }

    /// Kills, unmounts and removes all of it. Doing it twice is fine. Blocks.
    ///
    /// # Errors
    /// The first thing that stays.
    pub fn destroy(&self) -> Result<()> {
        // Held all the while: what a signal has begun to take away is left to that.
        let mut live = locked(&LIVE);
        if live.iter().any(|dir| dir == self.dir()) {
            self.remains.destroy()?;
            live.retain(|dir| dir != self.dir());
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(e) = self.destroy() {
            report(&format!("test place {}: {e:#}", self.name()));
        }
    }
}

/// Takes away all places of this process, which is about to end by a signal. Blocks.
pub(crate) fn destroy_all() {
    for dir in locked(&LIVE).drain(..) {
        Remains::of(dir).destroy_or_report();
    }
}

fn locked<T>(list: &Mutex<T>) -> MutexGuard<'_, T> {
    // A list has no invariant that a panic could break.
    list.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What of a place outlives its test.
#[derive(Debug)]
struct Remains {
    name: String,
    dir: PathBuf,
    cgroup: Cgroup,
}

impl Remains {
    fn of(dir: PathBuf) -> Self {
        let name = name_of(&dir);
        Self {
            cgroup: Cgroup::existing(&name),
            name,
            dir,
        }
    }

    fn destroy_or_report(&self) {
        if let Err(e) = self.destroy() {
            report(&format!("test place {}: {e:#}", self.name));
        }
    }

    fn processes(&self) -> Vec<Proc> {
        let inside = self.cgroup.processes();
        let dir = self.dir.to_string_lossy();
        let ours = |p: &Proc| {
            p.pid != std::process::id() && (inside.contains(&p.pid) || p.argv.contains(&*dir))
        };
        Proc::all().into_iter().filter(ours).collect()
    }

    fn destroy(&self) -> Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        for process in self.processes() {
            signal_to(process.pid, Signal::SIGKILL)?;
        }
        self.cgroup.destroy()?;
        let agent = agent::state_dir(&self.name);
        for dir in [&self.dir, &agent] {
            mounts::unmount_below(dir)?;
        }
        match fs::remove_dir_all(agent) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
        let namespaces = fs::read_dir(self.dir.join(TASKS))
            .into_iter()
            .flatten()
            .flatten();
        // Those of containerd, and those that a test makes in its stead.
        for bundles in namespaces.map(|n| n.path()).chain([self.dir.join("b")]) {
            leaks::remove_scratch(&bundles).with_context(|| format!("clean {SCRATCH}"))?;
        }
        for result in fs::read_dir(CNI_RESULTS).into_iter().flatten().flatten() {
            if result.file_name().to_string_lossy().starts_with(&self.name) {
                fs::remove_file(result.path())?;
            }
        }
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }
}

/// Takes away what tests have left that were killed.
fn sweep() {
    for entry in fs::read_dir(PARENT).into_iter().flatten().flatten() {
        let dir = entry.path();
        if name_of(&dir).starts_with(PREFIX) && is_orphan(&dir) {
            Remains::of(dir).destroy_or_report();
        }
    }
}

fn name_of(dir: &Path) -> String {
    dir.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn is_orphan(dir: &Path) -> bool {
    match File::open(dir.join("owner")) {
        Ok(file) => Flock::lock(file, FlockArg::LockExclusiveNonblock).is_ok(),
        Err(_) => {
            let made = dir
                .metadata()
                .and_then(|m| m.modified())
                .unwrap_or_else(|_| SystemTime::now());
            SystemTime::now().duration_since(made).unwrap_or_default() > ORPHANED
        }
    }
}

#[allow(clippy::print_stderr)] // a destructor has nobody to return an error to
fn report(words: &str) {
    eprintln!("{words}");
}
