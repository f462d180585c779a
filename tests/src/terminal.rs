// SPDX-License-Identifier: Apache-2.0

//! A user at a terminal: a command on a pty of its own.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    libc,
    pty::{Winsize, openpty},
    unistd::setsid,
};

use crate::{process::Cmd, wait};

const POLL: Duration = Duration::from_millis(10);

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(120);

/// A command with the terminal that it runs on.
#[derive(Debug)]
pub struct Terminal {
    child: tokio::process::Child,
    master: File,
    seen: String,
}

impl Terminal {
    /// Runs `command` on a new terminal.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run(command: &Cmd, columns: u16, rows: u16) -> Result<Self> {
        let pty = openpty(Some(&size(columns, rows)), None).context("open a pty")?;
        let slave = File::from(pty.slave);
        let mut run = command.prepared()?;
        run.stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(Stdio::from(slave))
            .kill_on_drop(true);
        // SAFETY: between fork and exec the child only calls setsid(2) and ioctl(2), on the
        // terminal that is its standard input by then.
        unsafe {
            run.pre_exec(|| {
                setsid()?;
                nix::errno::Errno::result(libc::ioctl(0, libc::TIOCSCTTY, 0))
                    .map(drop)
                    .map_err(io::Error::from)
            });
        }
        let child = run
            .spawn()
            .with_context(|| format!("run {}", command.words()))?;
        let master = File::from(pty.master);
        fcntl(master.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("set O_NONBLOCK")?;
        Ok(Self {
            child,
            master,
            seen: String::new(),
        })
    }

    /// Types `text`.
    ///
    /// # Errors
    /// When it does not fit.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.master.write_all(text.as_bytes()).context("type")
    }

    /// Changes the window's size; the command gets SIGWINCH.
    ///
    /// # Errors
    /// The kernel's.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = size(columns, rows);
        // SAFETY: the descriptor is open, and TIOCSWINSZ only reads the winsize that the pointer
        // is valid for (tty_ioctl(4)).
        let rc = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        nix::errno::Errno::result(rc).context("resize the terminal")?;
        Ok(())
    }

    /// Waits until the screen shows `text` after what was waited for before.
    ///
    /// # Errors
    /// When it does not come; with what did.
    pub async fn expect(&mut self, text: &str) -> Result<()> {
        let start = Instant::now();
        loop {
            self.read();
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return Ok(());
            }
            if start.elapsed() > ANSWER {
                bail!("no {text:?} on the terminal; it shows {:?}", self.seen);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits for the end of the command.
    ///
    /// # Errors
    /// When it does not end; with what the terminal shows.
    pub async fn ended(mut self) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            // A full terminal would stop the command.
            self.read();
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > wait::SOON {
                bail!("the command goes on; the terminal shows {:?}", self.seen);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn read(&mut self) {
        let mut bytes = Vec::new();
        // It ends with EAGAIN, or with EIO once the command is gone: what came is in `bytes`.
        self.master.read_to_end(&mut bytes).ok();
        self.seen += &String::from_utf8_lossy(&bytes);
    }
}

fn size(columns: u16, rows: u16) -> Winsize {
    Winsize {
        ws_col: columns,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
