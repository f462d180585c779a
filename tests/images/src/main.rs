// SPDX-License-Identifier: Apache-2.0
//! `kiln-images`: the test images on the command line.

use std::env;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand};
use kiln_images::{Cache, Images, Sources, archive, guest, hosts, release, sbom};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Makes the test images and gives them to containerd.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve the images as a registry until SIGTERM; prints the port.
    Serve {
        /// Where to listen. Only a loopback address: there is no authentication.
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        #[command(flatten)]
        sources: SourceArgs,
    },
    /// Write each image to a file for `ctr images import`; prints the paths.
    Export {
        /// The directory for the files, which is made if it is not there.
        #[arg(long)]
        out: PathBuf,
        /// Only these images, by their short or full names.
        images: Vec<String>,
        #[command(flatten)]
        sources: SourceArgs,
    },
    /// Print the images: short name, digest, full names.
    List {
        #[command(flatten)]
        sources: SourceArgs,
    },
    /// Send containerd to a registry on a port of this machine, whatever the host in an image's name.
    Hosts {
        /// What containerd's `registry.config_path` or ctr's `--hosts-dir` names.
        #[arg(long)]
        certs_dir: PathBuf,
        /// The registry's port.
        #[arg(long)]
        port: u16,
    },
    /// Write the images that `deploy/` names to files for `ctr images import`, with bills of what is
    /// in them; prints the paths.
    Release {
        /// Directories with static programs, of one architecture each or of several.
        #[arg(long, required = true)]
        programs: Vec<PathBuf>,
        /// Registry and path before the images' names.
        #[arg(long, default_value = "docker.io/library")]
        registry: String,
        /// The tag.
        #[arg(long, default_value = "dev")]
        tag: String,
        /// The directory for the files, which is made if it is not there.
        #[arg(long)]
        out: PathBuf,
    },
    /// Build the program inside the images; prints its path.
    BuildGuest,
}

/// What images are made from. The cache is $KILN_CACHE, or else kiln in $XDG_CACHE_HOME or ~/.cache.
#[derive(Args)]
struct SourceArgs {
    /// The directory with busybox [default: bin in the cache; /bin/busybox if it has none]
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// The tree with Python [default: python-rootfs in the cache]
    #[arg(long)]
    python: Option<PathBuf>,
    /// The program inside the images [default: build it]
    #[arg(long)]
    guest: Option<PathBuf>,
    /// Where to keep compressed layers [default: images in the cache]
    #[arg(long)]
    cache: Option<PathBuf>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run(Cli::parse().command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell when stderr is closed too.
            let _ = writeln!(io::stderr(), "kiln-images: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve { listen, sources } => serve(listen, sources).await,
        Command::Export {
            out,
            images,
            sources,
        } => export(&out, &images, sources).await,
        Command::List { sources } => list(&sources.build().await?),
        Command::Hosts { certs_dir, port } => {
            let registry = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
            let path = hosts::write(&certs_dir, registry).context("write hosts.toml")?;
            say(&path.display().to_string())
        }
        Command::Release {
            programs,
            registry,
            tag,
            out,
        } => {
            let cache =
                Cache::open(&cache_directory()?.join("images")).context("open the cache")?;
            let linked = sbom::workspace().context("ask cargo what is linked")?;
            let paths = release::release(
                &programs,
                &registry,
                &tag,
                Some(&cache),
                Some(&linked),
                &out,
            )?;
            for path in paths {
                say(&path.display().to_string())?;
            }
            Ok(())
        }
        Command::BuildGuest => say(&guest::build(workspace()).await?.display().to_string()),
    }
}

impl SourceArgs {
    async fn build(self) -> Result<Images> {
        let guest = match self.guest {
            Some(path) => path,
            None => guest::build(workspace()).await?,
        };
        let mut sources = Sources::in_cache(&cache_directory()?, guest);
        if let Some(directory) = self.bin_dir {
            sources.busybox = Sources::busybox_in(&directory);
        }
        sources.python = self.python.unwrap_or(sources.python);
        sources.cache = self.cache.or(sources.cache);
        let images = Images::build(&sources).await.context("make the images")?;
        for reason in &images.left_out {
            writeln!(io::stderr(), "kiln-images: left out {reason}").context("write to stderr")?;
        }
        Ok(images)
    }
}

async fn serve(listen: SocketAddr, sources: SourceArgs) -> Result<()> {
    ensure!(
        listen.ip().is_loopback(),
        "{listen} is not a loopback address"
    );
    // Before the port is told: whoever knows it may send the signal.
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let images = tokio::select! {
        images = sources.build() => images?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("listen on {listen}"))?;
    let registry = images.serve(listener).context("serve the images")?;
    say(&registry.address().port().to_string())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    registry.shutdown().await;
    Ok(())
}

async fn export(out: &Path, only: &[String], sources: SourceArgs) -> Result<()> {
    let mut images = sources.build().await?;
    if !only.is_empty() {
        let by_name = |name: &String| {
            let image = images
                .all
                .iter()
                .find(|i| i.name == name)
                .or_else(|| images.find(name));
            image
                .cloned()
                .with_context(|| format!("there is no image {name}"))
        };
        images.all = only.iter().map(by_name).collect::<Result<_>>()?;
    }
    for path in
        archive::export(&images.all, out).with_context(|| format!("write to {}", out.display()))?
    {
        say(&path.display().to_string())?;
    }
    Ok(())
}

fn list(images: &Images) -> Result<()> {
    for image in &images.all {
        let names: Vec<String> = image.references.iter().map(ToString::to_string).collect();
        say(&format!(
            "{} {} {}",
            image.name,
            image.manifest.digest,
            names.join(" ")
        ))?;
    }
    Ok(())
}

/// Prints one line of what was asked for.
fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("write to stdout")
}

/// What is downloaded or built once lies here.
fn cache_directory() -> Result<PathBuf> {
    let path = |name: &str| {
        env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let cache = path("KILN_CACHE")
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("kiln")))
        .or_else(|| Some(path("HOME")?.join(".cache/kiln")));
    cache.context("find the cache: neither KILN_CACHE nor HOME is set")
}

/// The root of the workspace that this program was built in.
fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}
