// SPDX-License-Identifier: Apache-2.0

//! A controller under test: ours, or another of the same duties.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};
use kiln_tests::{
    place::Place,
    process::{Background, Cmd},
    wait,
};
use nix::{sys::signal::Signal, unistd::Pid};

use crate::control_plane::{ControlPlane, free_ports};

/// How long it may take to fill its caches.
const STARTS: Duration = Duration::from_secs(180);

/// A running controller.
pub struct Controller {
    process: Background,
    port: u16,
}

impl Controller {
    /// Starts the controller of this workspace with `flags`, as its ServiceAccount.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start(plane: &ControlPlane, flags: &[&str]) -> Result<Self> {
        let flags = [&["--leader-elect=false"], flags].concat();
        Self::start_as(&plane.account().await?, plane.place(), &flags).await
    }

    /// Starts a program with the flags of upstream's controller, with all rights.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_program(
        plane: &ControlPlane,
        program: &Path,
        flags: &[&str],
    ) -> Result<Self> {
        let flags = [&["--leader-elect=false"], flags].concat();
        Self::launch(program, plane.kubeconfig(), plane.place(), &flags).await
    }

    /// Starts the controller of this workspace as who `kubeconfig` says, with the files of
    /// `place` and `flags`.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_as(kubeconfig: &Path, place: &Place, flags: &[&str]) -> Result<Self> {
        Self::launch(&program()?, kubeconfig, place, flags).await
    }

    async fn launch(
        program: &Path,
        kubeconfig: &Path,
        place: &Place,
        flags: &[&str],
    ) -> Result<Self> {
        let [port, metrics] = free_ports()?;
        let log = place.dir().join(format!("controller-{port}.log"));
        let process = Cmd::new(program)
            .args([
                "--extensions=true",
                &format!("--health-probe-bind-address=127.0.0.1:{port}"),
                &format!("--metrics-bind-address=127.0.0.1:{metrics}"),
            ])
            .args(flags)
            .env("KUBECONFIG", kubeconfig)
            .env("POD_NAMESPACE", "default")
            .cgroup(place.cgroup())
            .background(&log)?;
        let ready = wait::until("the controller", STARTS, async || {
            let answer = get(port, "/readyz").await.ok()?;
            answer.starts_with("HTTP/1.1 200").then_some(())
        });
        ready.await.with_context(|| process.text())?;
        Ok(Self {
            process,
            port: metrics,
        })
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.text()
    }

    /// Its metrics.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn metrics(&self) -> Result<String> {
        get(self.port, "/metrics").await
    }

    /// Memory that it has in RAM, in bytes (`VmRSS` of proc(5)).
    ///
    /// # Errors
    /// When it is gone.
    pub fn memory(&self) -> Result<u64> {
        self.kernels("VmRSS:")
    }

    /// The most memory that it has had in RAM, in bytes (`VmHWM` of proc(5)).
    ///
    /// # Errors
    /// When it is gone.
    pub fn peak_memory(&self) -> Result<u64> {
        self.kernels("VmHWM:")
    }

    fn kernels(&self, field: &str) -> Result<u64> {
        let pid = self.process.pid().context("the controller has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix(field))
            .with_context(|| format!("no {field}"))?;
        let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
        Ok(kib << 10)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.process.pid().context("the controller has ended")?;
        Ok(nix::sys::signal::kill(
            Pid::from_raw(pid.cast_signed()),
            signal,
        )?)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn ended(mut self) -> Result<std::process::ExitStatus> {
        self.process.ended().await
    }
}

/// The program: `$KILN_CONTROLLER`, else the workspace's, which lies beside the tests'.
///
/// # Errors
/// When it was not built.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("KILN_CONTROLLER") {
        return Ok(path.into());
    }
    let mut dir = std::env::current_exe()?;
    while dir.pop() {
        let path = dir.join("kiln-controller");
        if path.is_file() {
            return Ok(path);
        }
    }
    anyhow::bail!("no kiln-controller; build it with `cargo build -p kiln-controller`")
}

async fn get(port: u16, path: &str) -> Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
