// SPDX-License-Identifier: Apache-2.0

//! `kiln-cluster`: a whole Kubernetes on this machine, with Kiln behind RuntimeClass `gvisor`.
//!
//! It runs until it is taken away, beside whatever else the machine runs. It needs root, and no
//! network.

#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, Write},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use kiln_cluster::cluster::{Cluster, Parts, Up};
use kiln_images::{Images, Sources};
use kiln_tests::tools;
use nix::unistd::Uid;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

/// A whole Kubernetes on this machine, with Kiln behind RuntimeClass gvisor.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Where all of it is kept [default: $KILN_CLUSTER, else /var/lib/kiln-cluster]
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// Its cgroup [default: the name of the directory]
    #[arg(long, global = true)]
    cgroup: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start it, unless it runs.
    Up {
        /// Without Kiln in it: no handler, no RuntimeClass.
        #[arg(long)]
        bare: bool,
    },
    /// End it and take all of it away.
    Down,
    /// Say what runs of it; the exit code is 0 when all of it does.
    Status,
    /// Start its containerd anew. Containers run on.
    RestartContainerd,
    /// What the cluster runs to have images to pull.
    #[command(hide = true)]
    ServeImages {
        /// The program inside the images.
        #[arg(long)]
        guest: PathBuf,
        /// Where to serve them.
        #[arg(long)]
        listen: SocketAddr,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse()).await {
        Ok(code) => code,
        Err(e) => {
            complain(&format!("kiln-cluster: {e:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<ExitCode> {
    if let Command::ServeImages { guest, listen } = &cli.command {
        return serve_images(guest, *listen).await;
    }
    ensure!(
        Uid::effective().is_root(),
        "needs root: it starts a kubelet"
    );
    let cluster = cli.cluster()?;
    match cli.command {
        Command::Up { bare } => up(&cluster, bare).await,
        Command::Down => down(&cluster).await,
        Command::RestartContainerd => {
            cluster.restart_containerd().await?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Status | Command::ServeImages { .. } => status(&cluster).await,
    }
}

impl Cli {
    fn cluster(&self) -> Result<Cluster> {
        let dir = match &self.dir {
            Some(dir) => std::path::absolute(dir)?,
            None => match env::var_os("KILN_CLUSTER").filter(|v| !v.is_empty()) {
                Some(dir) => std::path::absolute(dir)?,
                None => "/var/lib/kiln-cluster".into(),
            },
        };
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        Cluster::new(&dir, self.cgroup.as_deref().unwrap_or(&name))
    }
}

async fn up(cluster: &Cluster, bare: bool) -> Result<ExitCode> {
    let start = Instant::now();
    if !cluster.is_up().await {
        let mut steps = Steps::new();
        let this = env::current_exe().context("find this program")?;
        let mut parts = Parts::built(this).await?;
        parts.handler = !bare;
        steps.done("programs");
        let found = cluster.up(&parts, &mut |what| steps.done(what)).await?;
        if found == Up::Started {
            say(&format!("{}  up", seconds(start.elapsed())))?;
            return next(cluster);
        }
    }
    say(&format!("{}  runs already", seconds(start.elapsed())))?;
    next(cluster)
}

/// What a user types next.
fn next(cluster: &Cluster) -> Result<ExitCode> {
    let bin = tools::program("kubectl")?.with_file_name("");
    say(&format!(
        "\nexport KUBECONFIG={} PATH={}:$PATH",
        cluster.kubeconfig().display(),
        bin.display().to_string().trim_end_matches('/'),
    ))?;
    let overrides = r#"{"spec":{"runtimeClassName":"gvisor"}}"#;
    say(&format!(
        "kubectl run hello --rm -i --restart=Never --image=busybox --overrides='{overrides}' -- dmesg"
    ))?;
    Ok(ExitCode::SUCCESS)
}

async fn down(cluster: &Cluster) -> Result<ExitCode> {
    let start = Instant::now();
    cluster.down().await?;
    say(&format!("{}  down", seconds(start.elapsed())))?;
    Ok(ExitCode::SUCCESS)
}

async fn status(cluster: &Cluster) -> Result<ExitCode> {
    let processes = cluster.processes();
    for process in &processes {
        let state = if process.is_running() {
            "runs"
        } else {
            "has ended"
        };
        say(&format!("{:>8}  {state}  {}", process.pid, process.name))?;
    }
    if cluster.is_up().await {
        say(&format!("up, in {}", cluster.dir().display()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let how = if processes.is_empty() {
        "down"
    } else {
        "not up as a whole"
    };
    say(how)?;
    Ok(ExitCode::FAILURE)
}

/// Serves the test images until it is told to end.
async fn serve_images(guest: &Path, listen: SocketAddr) -> Result<ExitCode> {
    let mut end = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let images = Images::build(&Sources::in_cache(&tools::cache()?, guest.to_owned())).await?;
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen on {listen}"))?;
    let registry = images.serve(listener)?;
    end.recv().await;
    registry.shutdown().await;
    Ok(ExitCode::SUCCESS)
}

/// Tells of steps as they are done, each with how long it took.
struct Steps {
    last: Instant,
}

impl Steps {
    fn new() -> Self {
        Self {
            last: Instant::now(),
        }
    }

    fn done(&mut self, what: &str) {
        let took = self.last.elapsed();
        self.last = Instant::now();
        // Whoever cannot be told of a step is not told of the end either, and that is an error.
        say(&format!("{}  {what}", seconds(took))).ok();
    }
}

fn seconds(time: Duration) -> String {
    format!("{:>6.2} s", time.as_secs_f64())
}

fn say(line: &str) -> Result<()> {
    writeln!(io::stdout(), "{line}").context("write to standard output")
}

#[allow(clippy::print_stderr)] // where an error goes
fn complain(words: &str) {
    eprintln!("{words}");
}
