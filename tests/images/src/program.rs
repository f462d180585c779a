// SPDX-License-Identifier: Apache-2.0
//! The two programs that images are made of, busybox and the guest: one file each, many names.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// How long a program may take to list its names; it takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a file is no use as a program of an image.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It could not be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Images hold no loader and no C library.
    #[error("{0:?} is not a statically linked 64-bit ELF program")]
    NotStatic(PathBuf),
    /// It could not be run.
    #[error("cannot run {path:?} --list")]
    Run {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It ran, but did not do as multi-call programs do.
    #[error("{0:?} --list does not list the names it goes by")]
    NoList(PathBuf),
}

/// A static program with many names.
pub(crate) struct Program {
    /// The file.
    pub(crate) bytes: Vec<u8>,
    /// The names under which it does different things, in its own order.
    pub(crate) applets: Vec<String>,
}

impl Program {
    /// Reads the program and asks it for its names.
    pub(crate) async fn load(path: &Path) -> Result<Self, ProgramError> {
        let bytes = tokio::fs::read(path)
            .await
            .map_err(|source| ProgramError::Read {
                path: path.to_owned(),
                source,
            })?;
        if !is_static(&bytes) {
            return Err(ProgramError::NotStatic(path.to_owned()));
        }
        let mut command = Command::new(path);
        command
            .arg("--list")
            .env_clear()
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let output = timeout(PATIENCE, command.output())
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let output = output.map_err(|source| ProgramError::Run {
            path: path.to_owned(),
            source,
        })?;
        let applets: Vec<String> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(str::to_owned)
            .collect();
        let names = applets
            .iter()
            .all(|name| !name.is_empty() && !name.contains('/') && !name.starts_with('.'));
        if !output.status.success() || applets.is_empty() || !names {
            return Err(ProgramError::NoList(path.to_owned()));
        }
        Ok(Self { bytes, applets })
    }

    /// A copy that does not know `applet`, one of its names; `None` if its table of names is not
    /// as busybox writes it.
    ///
    /// Debian's busybox shell runs its own applets without looking for files. The shell of the
    /// images that this project stands in for looks for files, and critest sees the difference
    /// when it masks /bin/ls.
    pub(crate) fn without(&self, applet: &str) -> Option<Vec<u8>> {
        let at = self.applets.iter().position(|name| name == applet)?;
        let (before, after) = (
            self.applets.get(at.checked_sub(1)?)?,
            self.applets.get(at + 1)?,
        );
        // Names are found by a search that stops at a larger one: the order must stay.
        let (last, rest) = applet.as_bytes().split_last()?;
        let other = [rest, &[last.checked_sub(1)?]].concat();
        if other.as_slice() <= before.as_bytes() {
            return None;
        }
        let row = |name: &[u8]| {
            [
                b"\0",
                before.as_bytes(),
                b"\0",
                name,
                b"\0",
                after.as_bytes(),
                b"\0",
            ]
            .concat()
        };
        let (old, new) = (row(applet.as_bytes()), row(&other));
        let mut places = self
            .bytes
            .windows(old.len())
            .enumerate()
            .filter(|(_, w)| *w == old)
            .map(|(i, _)| i);
        let place = places.next().filter(|_| places.next().is_none())?;
        let mut bytes = self.bytes.clone();
        bytes[place..place + new.len()].copy_from_slice(&new);
        Some(bytes)
    }
}

/// Whether `file` is a little-endian 64-bit ELF program that asks for no loader (ELF-64 object file
/// format 1.5: file header, program header).
pub(crate) fn is_static(file: &[u8]) -> bool {
    const PT_INTERP: u64 = 3;
    let number = |at: usize, size: usize| {
        let bytes = file.get(at..at.checked_add(size)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0u64, |value, byte| value << 8 | u64::from(*byte)),
        )
    };
    let header = |n: u64| {
        let table = number(32, 8)?;
        let at = table.checked_add(n.checked_mul(number(54, 2)?)?)?;
        number(usize::try_from(at).ok()?, 4)
    };
    file.starts_with(b"\x7fELF\x02\x01")
        && number(56, 2).is_some_and(|count| {
            (0..count).all(|n| header(n).is_some_and(|kind| kind != PT_INTERP))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(names: &str) -> Program {
        let bytes = format!("code\0{}\0\0data\0ls\0", names.replace(' ', "\0")).into_bytes();
        Program {
            bytes,
            applets: names.split(' ').map(str::to_owned).collect(),
        }
    }

    #[test]
    fn one_name_is_hidden_and_nothing_else_changes() {
        let program = table("ln losetup ls lsmod");
        let hidden = String::from_utf8(program.without("ls").unwrap()).unwrap();
        assert_eq!(hidden, "code\0ln\0losetup\0lr\0lsmod\0\0data\0ls\0");
    }

    #[test]
    fn a_table_that_is_not_understood_is_left_alone() {
        assert_eq!(
            table("ls lsmod").without("ls"),
            None,
            "no neighbour to find it by"
        );
        assert_eq!(
            table("lr ls lsmod").without("ls"),
            None,
            "the other name is taken"
        );
        assert_eq!(table("ln losetup lsmod").without("ls"), None, "not there");
        let mut twice = table("ln losetup ls lsmod");
        twice.bytes.extend_from_within(..);
        assert_eq!(twice.without("ls"), None, "which of the two?");
    }

    #[tokio::test]
    async fn scripts_and_dynamic_programs_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        for contents in [
            &b""[..],
            b"#!/bin/sh\n",
            b"\x7fELF\x02\x01",
            &std::fs::read("/bin/sh").unwrap(),
        ] {
            std::fs::write(&path, contents).unwrap();
            assert!(matches!(
                Program::load(&path).await,
                Err(ProgramError::NotStatic(_))
            ));
        }
        let missing = Program::load(&directory.path().join("missing")).await;
        assert!(matches!(missing, Err(ProgramError::Read { .. })));
    }
}
