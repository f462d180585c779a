// SPDX-License-Identifier: Apache-2.0

//! FIFOs as containerd uses them for stdio: the reader opens first and without waiting.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{sys::stat::Mode, unistd::mkfifo};

/// Pause between two looks into a FIFO.
pub(crate) const POLL: Duration = Duration::from_millis(5);

/// How long output may take to come.
const LIMIT: Duration = Duration::from_secs(120);

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A FIFO, with its reading end open.
#[derive(Debug)]
pub struct Fifo {
    path: PathBuf,
    reader: File,
}

impl Fifo {
    /// Makes one in `dir`.
    ///
    /// # Errors
    /// The file system's.
    pub fn new(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(format!("{}-{name}", NEXT.fetch_add(1, Ordering::Relaxed)));
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
            .with_context(|| format!("make {}", path.display()))?;
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)?;
        Ok(Self { path, reader })
    }

    /// Its path, as a request names it.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Reads to the end of file, which comes when the shim and the process have let go.
    ///
    /// # Errors
    /// When the end does not come; with what came.
    pub async fn read_to_end(&self) -> Result<String> {
        let mut bytes = Vec::new();
        let start = Instant::now();
        loop {
            match (&self.reader).read_to_end(&mut bytes) {
                Ok(_) => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("read a FIFO"),
            }
            if start.elapsed() > LIMIT {
                bail!(
                    "no end of file in {}; it had {:?}",
                    self.path.display(),
                    String::from_utf8_lossy(&bytes)
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// What is in it now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read_now(&self) -> Result<String> {
        let mut bytes = Vec::new();
        match (&self.reader).read_to_end(&mut bytes) {
            Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(e).context("read a FIFO"),
            _ => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        }
    }

    /// Reads until it holds `text`, and returns all that came.
    ///
    /// # Errors
    /// When it does not come; with what came.
    pub async fn read_until(&self, text: &str) -> Result<String> {
        let mut all = String::new();
        let start = Instant::now();
        loop {
            all += &self.read_now()?;
            if all.contains(text) {
                return Ok(all);
            }
            if start.elapsed() > LIMIT {
                bail!("no {text:?} in {}; it had {all:?}", self.path.display());
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Opens the writing end, for a FIFO that is a process's input.
    ///
    /// # Errors
    /// The file system's.
    pub fn writer(&self) -> Result<File> {
        Ok(OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.path)?)
    }

    /// Writes `text` and closes the writing end again.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn write(&self, text: &str) -> Result<()> {
        self.writer()?
            .write_all(text.as_bytes())
            .context("write to a FIFO")
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        // The directory goes with the test in any case.
        fs::remove_file(&self.path).ok();
    }
}

/// The output of one process.
#[derive(Debug)]
pub struct Output {
    /// Its standard output.
    pub stdout: Fifo,
    /// Its standard error.
    pub stderr: Fifo,
}

impl Output {
    /// Makes both FIFOs in `dir`.
    ///
    /// # Errors
    /// The file system's.
    #[allow(clippy::needless_pass_by_value)] // the directory is the caller's to give away
    pub fn new(name: &str, dir: PathBuf) -> Result<Self> {
        let short: String = name.chars().take(16).collect();
        Ok(Self {
            stdout: Fifo::new(&dir, &format!("{short}.out"))?,
            stderr: Fifo::new(&dir, &format!("{short}.err"))?,
        })
    }

    /// Reads both to the end of file.
    ///
    /// # Errors
    /// When an end does not come.
    pub async fn read_to_end(&self) -> Result<(String, String)> {
        Ok((
            self.stdout.read_to_end().await?,
            self.stderr.read_to_end().await?,
        ))
    }
}
