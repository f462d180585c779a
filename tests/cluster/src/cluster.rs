// SPDX-License-Identifier: Apache-2.0

//! A whole Kubernetes of one node: etcd, the control plane, containerd with our handler, kubelet
//! and kube-proxy.
//!
//! It outlives the program that starts it. All of it is in one directory, one cgroup and one
//! network namespace, which a pair of links joins to the host's:
//!
//! ```text
//! pki/  etc/            certificates with kubeconfigs; the configuration of every program
//! log/                  a log of each
//! bin/                  our shim and runsc, as they are installed on a node
//! netns                 the network namespace
//! state.json            what runs, and what is to be put back at the end
//! etcd/ containerd/ …   data
//! ```
//!
//! Users are told apart as in any cluster: Node and RBAC authorization, and NodeRestriction.
//!
//! - `layout` says where things are;
//! - `start` is the order in which everything is started;
//! - `network` makes the network;
//! - `config` writes the files, `programs` the command lines;
//! - `state` remembers;
//! - `host` is what of the host is changed, and put back;
//! - [`Private`] is a cluster for one test.

mod config;
mod host;
mod layout;
mod network;
mod private;
mod programs;
mod ready;
mod start;
mod state;

use std::{
    env,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use kiln_images::guest;
use kiln_tests::{cgroup::Cgroup, mounts, netns::Netns, process::signal_to, tools, wait};
use kube::Client;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};

pub use self::{config::replace_line, private::Private, state::Process};
use self::{
    layout::{Layout, NODE},
    start::Start,
    state::State,
};
use crate::control_plane;

/// Longest path of a cluster's directory: sockets in it end at 107 bytes, with a container's id.
const LONGEST: usize = 36;

/// How long the apiserver of a running cluster may take to answer: one that is slow is not to be
/// taken away.
const ANSWERS: Duration = Duration::from_secs(30);

/// What goes into a cluster that is not in the cache of third-party programs.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The shim behind handler `gvisor`; it is copied.
    pub shim: PathBuf,
    /// The runtime that the shim drives.
    pub runsc: PathBuf,
    /// The program inside the test images.
    pub guest: PathBuf,
    /// A program that serves the test images when its arguments are `serve-images --guest GUEST`
    /// and `--listen ADDRESS`.
    pub images: PathBuf,
    /// Whether containerd knows the handler, and the cluster its class, from the start.
    pub handler: bool,
}

impl Parts {
    /// What was built of this workspace, and the pinned runsc. `$KILN_SHIM`, `$KILN_RUNSC` and
    /// `$KILN_GUEST` name others. `images` is the program `kiln-cluster`.
    ///
    /// # Errors
    /// When something is not built.
    pub async fn built(images: PathBuf) -> Result<Self> {
        let guest = match env::var_os("KILN_GUEST") {
            Some(path) => path.into(),
            None => {
                let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
                guest::build(&workspace).await?
            }
        };
        Ok(Self {
            shim: tools::installed_shim()?,
            runsc: tools::runsc()?,
            guest,
            images,
            handler: true,
        })
    }
}

/// What [`Cluster::up`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Up {
    /// It ran already, and nothing was changed.
    Already,
    /// It was started.
    Started,
}

/// A cluster, running or not.
#[derive(Debug, Clone)]
pub struct Cluster {
    layout: Layout,
}

impl Cluster {
    /// The cluster in `dir`, with the cgroup `cgroup` below the root.
    ///
    /// # Errors
    /// When the path is not absolute or too long.
    pub fn new(dir: &Path, cgroup: &str) -> Result<Self> {
        ensure!(dir.is_absolute(), "{} is not absolute", dir.display());
        let length = dir.as_os_str().len();
        ensure!(
            length <= LONGEST,
            "{}: longer than {LONGEST} characters, too long for the sockets in it",
            dir.display()
        );
        Ok(Self {
            layout: Layout::new(dir, cgroup),
        })
    }

    /// Where everything of it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.layout.dir
    }

    /// The kubeconfig of a user with all rights.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.layout.pki().join("admin.conf")
    }

    /// The name of its node.
    #[must_use]
    pub fn node(&self) -> &'static str {
        NODE
    }

    /// Its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> Cgroup {
        Cgroup::existing(&self.layout.cgroup)
    }

    /// A client with all rights.
    ///
    /// # Errors
    /// When the cluster has never been up.
    pub async fn client(&self) -> Result<Client> {
        control_plane::client(&self.kubeconfig()).await
    }

    /// The directory that its kubelet keeps Pods in.
    #[must_use]
    pub fn kubelet_pods(&self) -> PathBuf {
        self.layout.at("kubelet/pods")
    }

    /// The network namespace of its node.
    ///
    /// # Errors
    /// When the cluster is not up.
    pub fn netns(&self) -> Result<Netns> {
        Netns::open(&self.layout.netns())
    }

    /// Its programs as they were started, also those that have ended since; empty when it is down.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        State::load(&self.layout).processes
    }

    /// Whether all of its programs run and the apiserver answers.
    pub async fn is_up(&self) -> bool {
        let state = State::load(&self.layout);
        if !state.is_complete || state.processes.iter().any(|p| !p.is_running()) {
            return false;
        }
        let Ok(client) = self.client().await else {
            return false;
        };
        let answer = tokio::time::timeout(ANSWERS, ready::is_serving(&client)).await;
        answer.unwrap_or(false)
    }

    /// Starts it, unless it runs; what is left of one that does not run as a whole is taken away
    /// first. `tell` hears of every step when it is done.
    ///
    /// # Errors
    /// When something does not come up, with the end of its log. What was started is left to be
    /// looked at, for [`Cluster::down`] to take away.
    pub async fn up(&self, parts: &Parts, tell: &mut dyn FnMut(&str)) -> Result<Up> {
        let _lock = self.lock()?;
        if self.is_up().await {
            return Ok(Up::Already);
        }
        self.take_away().await.context("take the last one away")?;
        let mut start = Start::new(&self.layout, parts)?;
        start.all(tell).await.with_context(|| {
            let logs = self.layout.at("log");
            format!(
                "the cluster does not come up; logs are in {}",
                logs.display()
            )
        })?;
        Ok(Up::Started)
    }

    /// Ends it and takes all of it away. One that is not there is fine.
    ///
    /// # Errors
    /// What stays; the rest is taken away all the same.
    pub async fn down(&self) -> Result<()> {
        if !self.dir().exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        self.take_away().await?;
        fs::remove_dir(self.dir()).with_context(|| format!("remove {}", self.dir().display()))
    }

    /// Kills one of its programs as a crash does, and starts it again as it was.
    ///
    /// # Errors
    /// When there is none of this name, or when it cannot be started again.
    pub async fn restart(&self, name: &str) -> Result<()> {
        self.start_again(name, Signal::SIGKILL).await
    }

    /// Starts its containerd anew, as it was started, and moves this process to where it is.
    /// Containers run on.
    ///
    /// # Errors
    /// When it does not run, does not end, or does not come back.
    pub async fn restart_containerd(&self) -> Result<()> {
        // The caller may be a container that is not to hold what is started here.
        State::load(&self.layout).join("containerd")?;
        self.start_again("containerd", Signal::SIGTERM).await?;
        let state = State::load(&self.layout);
        let socket = self.layout.containerd_socket();
        ready::until(
            "containerd",
            async || ready::listens(&socket),
            || state.expect_running(&self.layout),
        )
        .await
    }

    async fn start_again(&self, name: &str, signal: Signal) -> Result<()> {
        let _lock = self.lock()?;
        let mut state = State::load(&self.layout);
        let old = state.take(name).with_context(|| format!("no {name}"))?;
        let mut again = old.command()?;
        signal_to(old.pid, signal)?;
        // Its ports are free when all of it has gone.
        let process = PathBuf::from(format!("/proc/{}", old.pid));
        wait::until_true(&format!("the end of {name}"), wait::SOON, || {
            !process.exists()
        })
        .await?;
        again = again
            .netns(&self.netns()?)
            .cgroup(&self.cgroup())
            .dir(self.dir());
        let pid = again.detached(&self.layout.log(name))?;
        state.add(name, pid);
        state.save(&self.layout)
    }

    /// Held while a cluster is changed.
    fn lock(&self) -> Result<Flock<File>> {
        let dir = self.dir();
        let what = dir.display();
        fs::create_dir_all(dir).with_context(|| format!("make {what}"))?;
        let file = File::open(dir).with_context(|| format!("open {what}"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, e)| e)
            .with_context(|| format!("another program starts or ends the cluster in {what}"))?;
        let is_there = dir.metadata().is_ok_and(|m| {
            lock.metadata()
                .is_ok_and(|l| (l.dev(), l.ino()) == (m.dev(), m.ino()))
        });
        ensure!(is_there, "{what} was taken away at this moment: try again");
        Ok(lock)
    }

    /// Ends everything and empties the directory. Goes on after a failure.
    async fn take_away(&self) -> Result<()> {
        let mut entries = fs::read_dir(self.dir()).context("read the directory")?;
        if entries.next().is_none() {
            return Ok(());
        }
        ensure!(
            self.layout.state().exists(),
            "{} has files of others: name an empty directory",
            self.dir().display()
        );
        let state = State::load(&self.layout);
        let killed = state.kill().and(self.cgroup().destroy());
        let mut failures = Failures::default();
        failures.note(killed);
        failures.note(network::remove(state.link.as_deref()).await);
        failures.note(host::restore(&self.layout, &state));
        failures.note(mounts::unmount_below(self.dir()));
        failures.all()?;
        self.empty()
    }

    /// Removes what is in the directory; the file that says whose it is, last.
    fn empty(&self) -> Result<()> {
        let state = self.layout.state();
        let entries = fs::read_dir(self.dir())?;
        for path in entries.flatten().map(|e| e.path()).filter(|p| *p != state) {
            let removed = if path.is_dir() && !path.is_symlink() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.with_context(|| format!("remove {}", path.display()))?;
        }
        fs::remove_file(&state).with_context(|| format!("remove {}", state.display()))
    }
}

/// Errors of steps that do not depend on each other.
#[derive(Default)]
struct Failures(Vec<String>);

impl Failures {
    fn note(&mut self, result: Result<()>) {
        self.0.extend(result.err().map(|e| format!("{e:#}")));
    }

    fn all(self) -> Result<()> {
        if !self.0.is_empty() {
            bail!("{}", self.0.join("; "));
        }
        Ok(())
    }
}
