// SPDX-License-Identifier: Apache-2.0

//! A cluster of a test's own, which is gone when the test is.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Result, ensure};
use kiln_tests::{
    agent::Agent,
    mounts,
    netns::Netns,
    place::Place,
    process::{Cmd, Proc, tail},
    tools,
};

use super::{Cluster, host};

/// How long `kiln-cluster` may take.
const DEADLINE: Duration = Duration::from_secs(300);

/// A running cluster, made by `kiln-cluster` as a user would.
pub struct Private {
    cluster: Cluster,
    program: PathBuf,
    cgroup: String,
    sysctls: BTreeMap<String, String>,
    /// Ends what `kiln-cluster down` does not, also when the test is killed.
    place: Place,
}

impl Private {
    /// Starts one by the program `kiln-cluster`.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start(program: &Path) -> Result<Self> {
        Self::start_by(program, &["up"]).await
    }

    /// Starts one whose containerd knows nothing of the handler.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_bare(program: &Path) -> Result<Self> {
        Self::start_by(program, &["up", "--bare"]).await
    }

    async fn start_by(program: &Path, words: &[&str]) -> Result<Self> {
        let place = Place::new()?;
        let cgroup = format!("{}/cluster", place.name());
        let private = Self {
            cluster: Cluster::new(&place.dir().join("c"), &cgroup)?,
            program: program.to_owned(),
            cgroup,
            sysctls: host::sysctls(),
            place,
        };
        private.run_words(private.cluster.dir(), words).await?;
        Ok(private)
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// A directory for files of the test.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.place.dir()
    }

    /// Runs `kiln-cluster` on it, and returns what that says.
    ///
    /// # Errors
    /// When it fails; with its message.
    pub async fn run(&self, command: &str) -> Result<String> {
        self.run_in(self.cluster.dir(), command).await
    }

    /// The same, on another directory.
    ///
    /// # Errors
    /// When it fails; with its message.
    pub async fn run_in(&self, dir: &Path, command: &str) -> Result<String> {
        self.run_words(dir, &[command]).await
    }

    async fn run_words(&self, dir: &Path, words: &[&str]) -> Result<String> {
        Cmd::new(&self.program)
            .args(words)
            .args(["--cgroup", &self.cgroup])
            .env("KILN_CLUSTER", dir)
            .deadline(DEADLINE)
            .run()
            .await
    }

    /// What starts its containerd anew, as a command line.
    #[must_use]
    pub fn restart_command(&self) -> Vec<String> {
        let dir = self.cluster.dir().display().to_string();
        let program = self.program.display().to_string();
        let words = [&program, "restart-containerd", "--dir", &dir];
        words
            .into_iter()
            .chain(["--cgroup", &self.cgroup])
            .map(str::to_owned)
            .collect()
    }

    /// Where its containerd listens.
    #[must_use]
    pub fn containerd_socket(&self) -> PathBuf {
        self.cluster.layout.containerd_socket()
    }

    /// What is made for it alone.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Starts the node's agent, from which the Pods of class `gvisor` adopt. `more` is its
    /// configuration beside paths, and `kubeconfig` says who it is in the cluster.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn run_agent(&self, more: &str, kubeconfig: &Path) -> Result<Agent> {
        let runtime = self.cluster.layout.etc("runsc.toml");
        let agent = Agent::new(&self.place, &runtime, more)?;
        let node = self.cluster.node();
        agent.run_on(&self.place, node, kubeconfig).await?;
        Ok(agent)
    }

    /// A command of kubectl, with all rights.
    ///
    /// # Errors
    /// When there is no kubectl.
    pub fn kubectl<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Cmd> {
        let command = Cmd::new(&tools::program("kubectl")?)
            .args(args)
            .env("KUBECONFIG", self.cluster.kubeconfig())
            .env("HOME", self.dir());
        Ok(command)
    }

    /// The ids of what containerd keeps as the sandboxes of a namespace's Pods.
    ///
    /// # Errors
    /// containerd's.
    pub async fn sandboxes(&self, namespace: &str) -> Result<Vec<String>> {
        let socket = self.cluster.layout.containerd_socket();
        let ids = Cmd::new(&tools::program("crictl")?)
            .args(["-r", &format!("unix://{}", socket.display())])
            .args(["pods", "-q", "--no-trunc", "--namespace", namespace])
            .run()
            .await?;
        Ok(ids.lines().map(str::to_owned).collect())
    }

    /// The ends of the logs that tell most.
    #[must_use]
    pub fn log(&self) -> String {
        let end = |program| {
            let log = self.cluster.layout.log(program);
            format!("--- end of {program}'s log\n{}\n", tail(&log))
        };
        ["kube-apiserver", "containerd", "kubelet"]
            .map(end)
            .concat()
    }

    /// Ends it by `kiln-cluster down`, twice, and looks for what it has left.
    ///
    /// # Errors
    /// What is left.
    pub async fn end(self) -> Result<()> {
        let netns = self.cluster.netns()?;
        self.run("down").await?;
        self.expect_nothing_left(&netns)?;
        self.run("down").await?;
        self.place.destroy()
    }

    fn expect_nothing_left(&self, netns: &Netns) -> Result<()> {
        let dir = self.cluster.dir();
        ensure!(!dir.exists(), "{} is left", dir.display());
        let mounts = mounts::below(dir)?;
        ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
        let processes = Proc::with(&dir.display().to_string());
        ensure!(processes.is_empty(), "processes are left: {processes:?}");
        let cgroups = self.cluster.cgroup().dirs();
        ensure!(cgroups.is_empty(), "cgroups are left: {cgroups:?}");
        // The pair of links is gone, though this descriptor still keeps the namespace.
        let links = netns.links()?;
        ensure!(!links.contains(&"eth0".to_owned()), "links: {links:?}");
        let now = host::sysctls();
        ensure!(now == self.sysctls, "{:?} became {now:?}", self.sysctls);
        let network = self.cluster.layout.pod_network();
        for entry in host::DIRS.iter().flat_map(fs::read_dir).flatten().flatten() {
            let path = entry.path();
            let target = fs::read_link(&path).unwrap_or_default();
            let is_ours = target.starts_with(dir) || path.to_string_lossy().contains(&network);
            ensure!(!is_ours, "{} is left", path.display());
        }
        Ok(())
    }
}

/// After a failure: the place ends the cluster, but does not put the host's sysctls back.
impl Drop for Private {
    fn drop(&mut self) {
        let down = std::process::Command::new(&self.program)
            .args(["down", "--cgroup", &self.cgroup])
            .env("KILN_CLUSTER", self.cluster.dir())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status();
        // What it has to say is on the standard error; the place does the rest.
        down.ok();
    }
}
