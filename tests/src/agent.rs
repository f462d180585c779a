// SPDX-License-Identifier: Apache-2.0

//! The agent of a node: what it holds ready, the Pods of handler `gvisor-warm` adopt.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::{
    Agent as Client, AgentError, Shape,
    api::{ReportResponse, Warm},
};
use nix::sys::signal::Signal;
use tokio::sync::Mutex;

use crate::{
    mounts,
    place::{CONTAINERD_SOCKET, Place},
    process::{self, Cmd, Daemon},
    tools, wait,
};

/// Directories of agents: on the file system of the shims' own, so that one can be renamed into
/// the other.
const PARENT: &str = "/run";

/// How long an agent may take to try its runtime out, and to boot what it is to hold.
const READY: Duration = Duration::from_secs(300);

/// How long it may take to end.
const END: Duration = Duration::from_secs(120);

/// How long it may take to destroy all that it held.
const DRAINS: Duration = Duration::from_secs(300);

/// An agent.
#[derive(Debug)]
pub struct Agent {
    config: PathBuf,
    state: PathBuf,
    log: PathBuf,
    daemon: Mutex<Option<Daemon>>,
}

/// Where the agent of the place `name` keeps its state.
pub(crate) fn state_dir(name: &str) -> PathBuf {
    Path::new(PARENT).join(format!("{name}-agent"))
}

/// The configuration of an agent that holds `warm` sandboxes, and `total` at most.
#[must_use]
pub fn holding(warm: u32, total: u32) -> String {
    format!(
        "[limits]\ntotal = {total}\nboots = 2\npause_ms = 0\n\
         [[class]]\nname = \"gvisor\"\nwarm = {warm}\n"
    )
}

/// The socket of the agent of the place `name`.
#[must_use]
pub fn socket(name: &str) -> PathBuf {
    state_dir(name).join("a.sock")
}

/// A case that failed has not drained it: its sandboxes would be in the way of the next.
impl Drop for Agent {
    fn drop(&mut self) {
        let pid = self.daemon.get_mut().take().and_then(|d| d.pid());
        if let Some(pid) = pid {
            process::signal_to(pid, Signal::SIGKILL).ok();
        }
        // A place that is gone has taken all of it away.
        if !self.state.exists() || !self.config.exists() {
            return;
        }
        let Ok(agent) = tools::ours("kiln-node-agent") else {
            return;
        };
        // There is nobody to tell that this fails, too.
        std::process::Command::new(agent)
            .args(["--drain", "--config"])
            .arg(&self.config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .ok();
    }
}

impl Agent {
    /// An agent for the handler whose runtime `runtime_config` describes. `more` is the rest of
    /// its configuration.
    ///
    /// # Errors
    /// When its configuration cannot be written.
    pub fn new(place: &Place, runtime_config: &Path, more: &str) -> Result<Self> {
        let state = state_dir(place.name());
        let text = format!(
            "socket = \"{}\"\nstate = \"{}\"\nruntime_config = \"{}\"\ncontainerd = \"{}\"\npause = \"{}\"\ncgroup = \"/{}/warm\"\n{more}\n",
            socket(place.name()).display(),
            state.display(),
            runtime_config.display(),
            place.dir().join(CONTAINERD_SOCKET).display(),
            tools::pause()?.display(),
            place.name(),
        );
        let config = place.dir().join("agent.toml");
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        Ok(Self {
            config,
            state,
            log: place.dir().join("agent.log"),
            daemon: Mutex::default(),
        })
    }

    /// Runs it without a cluster.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn run(&self, place: &Place) -> Result<()> {
        self.run_by(place, &[]).await
    }

    /// The same by the words of a command that becomes it.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn run_by(&self, place: &Place, command: &[&str]) -> Result<()> {
        self.start(place, command, &["--standalone".as_ref()], &[])
            .await
    }

    /// Runs it as the agent of `node` in the cluster of `kubeconfig`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn run_on(&self, place: &Place, node: &str, kubeconfig: &Path) -> Result<()> {
        let args = ["--node-name", node].map(OsStr::new);
        let envs = [("KUBECONFIG", kubeconfig.as_os_str())];
        // It must reach the apiserver, as the host's own programs do.
        self.start(place, &[], &args, &envs).await
    }

    async fn start(
        &self,
        place: &Place,
        command: &[&str],
        args: &[&OsStr],
        envs: &[(&str, &OsStr)],
    ) -> Result<()> {
        let agent = tools::ours("kiln-node-agent")?;
        let config = ["--config".as_ref(), self.config.as_os_str()];
        let mut words: Vec<&OsStr> = command.iter().map(OsStr::new).collect();
        words.push(agent.as_os_str());
        words.extend(args.iter().copied().chain(config));
        let (program, args) = words.split_first().context("no program")?;
        let daemon = Daemon::start(
            Path::new(program),
            args,
            envs,
            None,
            place.cgroup(),
            &self.log,
        )?;
        *self.daemon.lock().await = Some(daemon);
        Ok(())
    }

    /// Its pid, while it runs.
    pub async fn pid(&self) -> Option<u32> {
        self.daemon.lock().await.as_ref().and_then(Daemon::pid)
    }

    /// Ends it by `signal`. Warm sandboxes stay.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop(&self, signal: Signal) -> Result<()> {
        match self.daemon.lock().await.take() {
            Some(mut daemon) => daemon.stop(signal, END).await.context("stop the agent"),
            None => Ok(()),
        }
    }

    /// Ends it and destroys what it held.
    ///
    /// # Errors
    /// When something cannot be destroyed.
    pub async fn drain(&self) -> Result<()> {
        self.stop(Signal::SIGTERM).await?;
        if !self.state.exists() {
            return Ok(());
        }
        let args = [
            OsStr::new("--drain"),
            OsStr::new("--config"),
            self.config.as_os_str(),
        ];
        let output = Cmd::new(&tools::ours("kiln-node-agent")?)
            .args(args)
            .deadline(DRAINS)
            .output()
            .await?;
        ensure!(
            output.status.success(),
            "drain: {}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        let left = fs::read_dir(&self.state).into_iter().flatten().count();
        let is_mount = !mounts::below(&self.state)?.is_empty();
        let is_gone = is_mount || !self.state.exists();
        ensure!(left == 0 && is_gone, "{} is left", self.state.display());
        Ok(())
    }

    /// A connection to it, as a shim has one.
    ///
    /// # Errors
    /// When it does not listen.
    pub async fn client(&self) -> Result<Client> {
        let socket = self.state.join("a.sock");
        Ok(patiently(async || Client::connect(&socket).await).await?)
    }

    /// Asks it for a sandbox as a shim does, again where it is late.
    ///
    /// # Errors
    /// The agent's; that it is late only when it stays so.
    pub async fn acquire(&self, shape: &Shape, sandbox_id: &str) -> Result<Warm, AgentError> {
        let socket = self.state.join("a.sock");
        patiently(async || {
            let client = Client::connect(&socket).await?;
            client.acquire(shape, sandbox_id).await
        })
        .await
    }

    /// What it holds.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn report(&self) -> Result<ReportResponse> {
        let socket = self.state.join("a.sock");
        let report = patiently(async || Client::connect(&socket).await?.report().await);
        Ok(report.await?)
    }

    /// How many sandboxes it holds ready of the classes that its configuration names.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn ready(&self) -> Result<u32> {
        let classes = self.report().await?.classes;
        let named = classes.iter().filter(|c| !c.class.is_empty());
        Ok(named.map(|c| c.ready).sum())
    }

    /// How many of its sandboxes became Pods.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn adopted(&self) -> Result<u64> {
        Ok(self.report().await?.classes.iter().map(|c| c.adopted).sum())
    }

    /// Waits until it holds `count` sandboxes ready of the classes that its configuration names.
    ///
    /// # Errors
    /// When it does not come to that, with its log.
    pub async fn expect_ready(&self, count: u32) -> Result<()> {
        let look = async || (self.ready().await.ok()? == count).then_some(());
        let what = format!("{count} warm sandboxes");
        let found = wait::until(&what, READY, look).await;
        found.with_context(|| self.log())
    }

    /// Waits until it holds `count` sandboxes ready, at least.
    ///
    /// # Errors
    /// When it does not come to that, with its log.
    pub async fn expect_all_ready(&self, count: u32) -> Result<()> {
        let start = Instant::now();
        while !self.ready().await.is_ok_and(|ready| ready >= count) {
            ensure!(start.elapsed() < READY, "not {count} warm\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Waits until it holds a sandbox ready.
    ///
    /// # Errors
    /// When it does not come to that, with its log.
    pub async fn expect_some(&self) -> Result<()> {
        let start = Instant::now();
        while !self.ready().await.is_ok_and(|ready| ready > 0) {
            ensure!(start.elapsed() < READY, "no warm sandbox\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// How long adoptions took, in milliseconds, as it has logged them.
    #[must_use]
    pub fn adoption_times(&self) -> Vec<f64> {
        let told = self.log_lines("is adopted after");
        let micros = told
            .iter()
            .filter_map(|line| line.rsplit(' ').nth(1)?.parse::<f64>().ok());
        micros.map(|us| us / 1000.0).collect()
    }

    /// How many sandboxes it has handed out, as it has logged them.
    #[must_use]
    pub fn handed_out(&self) -> usize {
        self.log_lines(" is for ").len()
    }

    /// The lines of its log that have `words` in them.
    fn log_lines(&self, words: &str) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = log.lines().filter(|line| line.contains(words));
        lines.map(str::to_owned).collect()
    }

    /// The end of its log.
    pub fn log(&self) -> String {
        crate::process::tail(&self.log)
    }

    /// The directory in which its sandboxes are.
    pub fn state(&self) -> &Path {
        &self.state
    }
}

/// Calls the agent again as long as it is late, which it is for calls of shims on a busy machine.
async fn patiently<T>(call: impl AsyncFn() -> Result<T, AgentError>) -> Result<T, AgentError> {
    let start = Instant::now();
    loop {
        match call().await {
            Err(AgentError::Timeout(_)) if start.elapsed() < wait::SOON => {}
            answer => return answer,
        }
    }
}
