// SPDX-License-Identifier: Apache-2.0
//! Test images, made here and given to containerd: no test needs a registry on the network.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use kiln_images::{Images, Sources, hosts};
//!
//! let sources = Sources::in_cache("/root/.cache/kiln".as_ref(), "target/…/kiln-guest".into());
//! let images = Images::build(&sources).await?;
//! let registry = images.serve(tokio::net::TcpListener::bind("127.0.0.1:0").await?)?;
//! hosts::write("/tmp/certs.d".as_ref(), registry.address())?;
//! // … containerd pulls any image of `images.all` through /tmp/certs.d …
//! registry.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! Every image is the same bytes on every run, so its digests may be compared between machines
//! that have the same busybox and Python.

pub mod archive;
mod cache;
mod catalogue;
mod digest;
pub mod guest;
pub mod hosts;
mod image;
mod layer;
mod program;
mod reference;
mod registry;
pub mod release;
pub mod sbom;

use std::io;
use std::path::{Path, PathBuf};

use tokio::net::TcpListener;

pub use cache::Cache;
pub use catalogue::{CatalogueError, OUTSIDE};
pub use digest::{Digest, NotADigest};
pub use image::{Blob, Config, Empty, Image, architecture};
pub use layer::{Attributes, Layer, LayerBuilder, LayerError};
pub use program::ProgramError;
pub use reference::{NotAReference, Reference};
pub use registry::Registry;

use catalogue::Parts;
use program::Program;

/// Where Debian's package busybox-static puts the program.
const SYSTEM_BUSYBOX: &str = "/bin/busybox";

/// What images are made from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// A statically linked busybox.
    pub busybox: PathBuf,
    /// The guest program; [`guest::build`] makes it.
    pub guest: PathBuf,
    /// A tree with Python in usr/bin. Without it there is no image `python`.
    pub python: PathBuf,
    /// Where compressed layers are kept between runs, if anywhere.
    pub cache: Option<PathBuf>,
}

impl Sources {
    /// What `tests/deps/install.sh` left in the cache directory: `bin/busybox` (or else the
    /// system's own) and `python-rootfs`. Compressed layers are kept there too.
    #[must_use]
    pub fn in_cache(directory: &Path, guest: PathBuf) -> Self {
        let busybox = Self::busybox_in(&directory.join("bin"));
        Self {
            busybox,
            guest,
            python: directory.join("python-rootfs"),
            cache: Some(directory.join("images")),
        }
    }

    /// `busybox` of the directory, or else the system's own.
    #[must_use]
    pub fn busybox_in(directory: &Path) -> PathBuf {
        let cached = directory.join("busybox");
        if cached.exists() {
            cached
        } else {
            SYSTEM_BUSYBOX.into()
        }
    }
}

/// Why there are no images.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// One of the two programs is no use.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The cache directory cannot be made.
    #[error("cannot use {path:?} as a cache")]
    Cache {
        /// The directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// One of the images cannot be made.
    #[error(transparent)]
    Image(#[from] CatalogueError),
    /// The work was cut off, by a panic or the end of the runtime.
    #[error("the images were not finished")]
    Unfinished(#[from] tokio::task::JoinError),
}

/// All test images, in memory.
#[derive(Clone, Debug)]
pub struct Images {
    /// The images.
    pub all: Vec<Image>,
    /// What was left out and why, for people to read.
    pub left_out: Vec<String>,
}

impl Images {
    /// Makes every image. Takes seconds of one CPU the first time, most of it for Python.
    ///
    /// # Errors
    /// A source is missing or of no use; Python alone may be missing.
    pub async fn build(sources: &Sources) -> Result<Self, BuildError> {
        let busybox = Program::load(&sources.busybox).await?;
        let guest = Program::load(&sources.guest).await?;
        let Sources { python, cache, .. } = sources.clone();
        let work = tokio::task::spawn_blocking(move || {
            let open = |path: PathBuf| {
                Cache::open(&path).map_err(|source| BuildError::Cache { path, source })
            };
            let cache = cache.map(open).transpose()?;
            let has_python = python.join("usr/bin/python3").exists();
            let left_out = if has_python {
                Vec::new()
            } else {
                vec![format!("python: there is no {python:?}/usr/bin/python3")]
            };
            let python = has_python.then_some(python.as_path());
            let all = catalogue::images(&Parts {
                busybox: &busybox,
                guest: &guest,
                python,
                cache: cache.as_ref(),
            })?;
            Ok(Self { all, left_out })
        });
        work.await?
    }

    /// Serves them to whoever connects; see [`Registry`].
    ///
    /// # Errors
    /// The listener's address cannot be found out.
    pub fn serve(&self, listener: TcpListener) -> io::Result<Registry> {
        Registry::start(&self.all, listener)
    }

    /// The image of this full name, such as `docker.io/library/busybox:latest`.
    #[must_use]
    pub fn find(&self, reference: &str) -> Option<&Image> {
        self.all
            .iter()
            .find(|image| image.references.iter().any(|r| r.to_string() == reference))
    }
}
