// SPDX-License-Identifier: Apache-2.0

//! `kilnctl cp`: files and directories, as a tar archive through `tar` in the sandbox.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use kube::api::{AttachParams, AttachedProcess};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    task::spawn_blocking,
};
use tokio_util::io::SyncIoBridge;

use super::{
    Space,
    exec::{BUFFER, status_of},
    find::{Target, find},
};
use crate::{args::users::Copy, output::tell};

/// Copies between this machine and a sandbox.
///
/// # Errors
/// When not exactly one side is in a sandbox, or something cannot be read or written.
pub(crate) async fn run(space: &Space, args: &Copy) -> Result<()> {
    match (Side::of(&args.from), Side::of(&args.to)) {
        (Side::Here(from), Side::Sandbox(name, to)) => {
            let target = find(space, name).await?.target(args.container.as_deref())?;
            upload(space, &target, from, to).await
        }
        (Side::Sandbox(name, from), Side::Here(to)) => {
            let target = find(space, name).await?.target(args.container.as_deref())?;
            download(space, &target, from, to).await
        }
        _ => bail!("one of the two must be NAME:PATH, and the other a path on this machine"),
    }
}

/// Where a file is.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Here(&'a Path),
    Sandbox(&'a str, &'a str),
}

impl<'a> Side<'a> {
    /// Reads `NAME:PATH`, or a path; one with a slash before the colon is a path.
    fn of(text: &'a str) -> Self {
        match text.split_once(':') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') => {
                Self::Sandbox(name, path)
            }
            _ => Self::Here(Path::new(text)),
        }
    }
}

/// Splits a path in a sandbox into directory and name. A name that is missing is `default`.
fn split<'a>(path: &'a str, default: Option<&'a str>) -> Result<(&'a str, &'a str)> {
    let (dir, name) = match path.rsplit_once('/') {
        Some(("", name)) => ("/", name),
        Some((dir, name)) => (dir, name),
        None => (".", path),
    };
    let name = if name.is_empty() { default } else { Some(name) };
    match name {
        Some(name) if name != "." && name != ".." => Ok((dir, name)),
        _ => bail!("{path:?} does not end in the name of a file or directory"),
    }
}

async fn upload(space: &Space, target: &Target, from: &Path, to: &str) -> Result<()> {
    let own = from.file_name().and_then(|name| name.to_str());
    let (dir, name) = split(to, own)?;
    ensure!(from.exists(), "{} does not exist", from.display());
    let command = ["tar", "-xmf", "-", "-C", dir];
    let mut tar = start(space, target, &command, true).await?;
    let input = tar.stdin().context("no input")?;
    let (from, name) = (from.to_owned(), name.to_owned());
    let packed = spawn_blocking(move || pack(input, &from, &name));
    let ended = ended(&mut tar).await;
    // Why tar has failed says more than that it reads no more.
    ended.and(packed.await.context("pack")?)
}

fn pack(to: impl AsyncWrite + Unpin, from: &Path, name: &str) -> Result<()> {
    let mut bridge = SyncIoBridge::new(to);
    let mut archive = tar::Builder::new(&mut bridge);
    archive.follow_symlinks(false);
    match from.is_dir() {
        true => archive.append_dir_all(name, from),
        false => archive.append_path_with_name(fs::canonicalize(from)?, name),
    }
    .and_then(|()| archive.finish())
    .with_context(|| format!("read {}", from.display()))?;
    drop(archive);
    bridge.shutdown().context("send the archive")
}

async fn download(space: &Space, target: &Target, from: &str, to: &Path) -> Result<()> {
    let (dir, name) = split(from.trim_end_matches('/'), None)?;
    let to = if to.is_dir() {
        to.join(name)
    } else {
        to.to_owned()
    };
    let command = ["tar", "-cf", "-", "-C", dir, "--", name];
    let mut tar = start(space, target, &command, false).await?;
    let output = tar.stdout().context("no output")?;
    let name = name.to_owned();
    let unpacked = spawn_blocking(move || unpack(output, &name, &to));
    let ended = ended(&mut tar).await;
    ended.and(unpacked.await.context("unpack")?)
}

/// Unpacks `name` of an archive as `to`. A sandbox is not trusted: nothing is written but files and
/// directories below a new directory, and only what has the right name comes out of that.
fn unpack(from: impl AsyncRead + Unpin, name: &str, to: &Path) -> Result<()> {
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let fresh = tempfile::tempdir_in(parent);
    let fresh = fresh.with_context(|| format!("write to {}", parent.display()))?;
    let mut bridge = SyncIoBridge::new(from);
    let mut archive = tar::Archive::new(&mut bridge);
    for entry in archive.entries().context("read the archive")? {
        let mut entry = entry.context("read the archive")?;
        let kind = entry.header().entry_type();
        if kind.is_file() || kind.is_dir() {
            entry.unpack_in(fresh.path()).context("unpack")?;
        } else {
            let path: PathBuf = entry.path().context("read the archive")?.into_owned();
            tell(&format!(
                "{}: skipped, as it is no file or directory",
                path.display()
            ));
        }
    }
    // The end of a stream of tar is padded.
    std::io::copy(&mut bridge, &mut std::io::sink()).context("read the archive")?;
    let unpacked = fresh.path().join(name);
    ensure!(unpacked.exists(), "the sandbox has sent no {name:?}");
    fs::rename(&unpacked, to).with_context(|| format!("write {}", to.display()))
}

async fn start(
    space: &Space,
    target: &Target,
    command: &[&str],
    sends: bool,
) -> Result<AttachedProcess> {
    let params = AttachParams {
        container: target.container.clone(),
        stdin: sends,
        stdout: !sends,
        stderr: true,
        tty: false,
        max_stdin_buf_size: Some(BUFFER),
        max_stdout_buf_size: Some(BUFFER),
        max_stderr_buf_size: Some(BUFFER),
    };
    let started = space
        .pods()
        .exec(&target.pod, command.to_vec(), &params)
        .await;
    started.map_err(|e| space.explain(e))
}

/// Waits for tar's end; fails with its words unless it succeeds.
async fn ended(tar: &mut AttachedProcess) -> Result<()> {
    let status = tar.take_status().context("no status")?;
    let mut errors = String::new();
    if let Some(mut stderr) = tar.stderr() {
        stderr.read_to_string(&mut errors).await.ok();
    }
    let status = status.await.context("the connection is lost")?;
    match status_of(&status) {
        Ok(0) => Ok(()),
        Ok(code) => bail!("tar in the sandbox ended with {code}: {}", errors.trim()),
        Err(e) => Err(e.context("run tar in the sandbox")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_is_here_or_in_a_sandbox() {
        assert_eq!(Side::of("s:/tmp/f"), Side::Sandbox("s", "/tmp/f"));
        for here in ["/tmp/f", "f", "./s:f", ":f"] {
            assert_eq!(Side::of(here), Side::Here(Path::new(here)));
        }
    }

    #[test]
    fn a_path_has_directory_and_name() {
        assert_eq!(split("/f", None).unwrap(), ("/", "f"));
        assert_eq!(split("/tmp/f", None).unwrap(), ("/tmp", "f"));
        assert_eq!(split("f", None).unwrap(), (".", "f"));
        assert_eq!(split("/tmp/", Some("own")).unwrap(), ("/tmp", "own"));
        for wrong in ["", "/", "/tmp/..", "."] {
            assert!(split(wrong, None).is_err(), "{wrong}");
        }
    }

    /// Has an archive with these entries unpacked as `to`.
    async fn unpacked(entries: &[(&str, tar::EntryType)], to: &Path) -> Result<()> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, kind) in entries {
            let mut header = tar::Header::new_gnu();
            // The crate writes no such names.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.set_link_name("/etc/passwd").unwrap();
            header.set_size(0);
            header.set_cksum();
            archive.append(&header, &[][..]).unwrap();
        }
        let bytes = archive.into_inner().unwrap();
        let to = to.to_owned();
        spawn_blocking(move || unpack(&bytes[..], "f", &to))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn nothing_is_written_but_what_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("got");
        use tar::EntryType as E;
        for bad in [
            &[("../f", E::Regular), ("other", E::Regular)][..],
            &[("f", E::Symlink)],
            &[("f", E::Link)],
            &[],
        ] {
            assert!(unpacked(bad, &to).await.is_err(), "{bad:?}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{bad:?}");
        }
        let good = [("f", E::Directory), ("f/a", E::Regular), ("x", E::Regular)];
        unpacked(&good, &to).await.unwrap();
        assert!(to.join("a").is_file());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
