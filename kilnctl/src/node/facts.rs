// SPDX-License-Identifier: Apache-2.0

//! What can be seen of a node: files, processes, and what its programs say of themselves.

use std::{
    env,
    ffi::OsStr,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use kiln_node_install::{config_argument, output};
use nix::sys::statvfs::FsFlags;
use tokio::process::Command;

/// How long a program may take to say something of itself.
const ANSWER: Duration = Duration::from_secs(20);

/// A containerd that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Running {
    pub(super) program: PathBuf,
    /// The configuration that it was told to use.
    pub(super) config: Option<PathBuf>,
}

/// The first containerd that runs. Blocks.
pub(super) fn running_containerd() -> Option<Running> {
    let mut pids: Vec<u32> = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.into_iter().find_map(|pid| {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let name = fs::read_to_string(dir.join("comm")).ok()?;
        if name.trim() != "containerd" {
            return None;
        }
        let arguments = fs::read(dir.join("cmdline")).ok()?;
        Some(Running {
            program: fs::read_link(dir.join("exe")).ok()?,
            config: config_argument(&arguments),
        })
    })
}

/// Where the program `name` is: in `dirs`, else in PATH. Blocks.
pub(super) fn find_program(name: &str, dirs: &[&Path]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = dirs.iter().map(|d| (*d).to_owned());
    let mut places = dirs
        .chain(env::split_paths(&path))
        .map(|dir| dir.join(name));
    places.find(|p| is_executable(p))
}

/// Whether `path` is a program. Blocks.
pub(super) fn is_executable(path: &Path) -> bool {
    let meta = fs::metadata(path);
    meta.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Whether no program can be executed where `path`, or what there is of it, lies: the file system
/// is mounted `noexec`. `None` where it cannot be looked at. Blocks.
pub(super) fn is_noexec(path: &Path) -> Option<bool> {
    let there = path.ancestors().find(|p| p.exists())?;
    let flags = nix::sys::statvfs::statvfs(there).ok()?.flags();
    Some(flags.contains(FsFlags::ST_NOEXEC))
}

/// What a program prints.
///
/// # Errors
/// When it cannot be run, fails, or takes too long.
pub(super) async fn ask<A: AsRef<OsStr>>(program: &Path, args: &[A]) -> Result<String> {
    let done = output(Command::new(program).args(args), ANSWER).await;
    let done = done.map_err(|e| {
        let what = match e.kind() {
            io::ErrorKind::TimedOut => format!("{} does not answer", program.display()),
            _ => format!("run {}", program.display()),
        };
        anyhow::Error::new(e).context(what)
    })?;
    let words = String::from_utf8_lossy(&done.stderr);
    ensure!(
        done.status.success(),
        "{}: {}: {}",
        program.display(),
        done.status,
        words.trim()
    );
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Space of a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) free: u64,
    pub(super) total: u64,
}

/// Space where `path`, or what there is of it, lies. Blocks.
pub(super) fn space(path: &Path) -> Option<Space> {
    let there = path.ancestors().find(|p| p.exists())?;
    let stat = nix::sys::statvfs::statvfs(there).ok()?;
    let block = stat.fragment_size();
    Some(Space {
        free: stat.blocks_available().saturating_mul(block),
        total: stat.blocks().saturating_mul(block),
    })
}

/// Bytes of memory that the node could give, `MemAvailable` of proc_meminfo(5). Blocks.
pub(super) fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib << 10)
}

/// Names of the cgroup controllers, and which version has them. Blocks.
pub(super) fn cgroup_controllers() -> (u8, Vec<String>) {
    let mount = Path::new("/sys/fs/cgroup");
    if let Ok(text) = fs::read_to_string(mount.join("cgroup.controllers")) {
        return (2, text.split_whitespace().map(str::to_owned).collect());
    }
    let entries = fs::read_dir(mount).into_iter().flatten().flatten();
    (
        1,
        entries
            .filter_map(|e| e.file_name().into_string().ok())
            .collect(),
    )
}

/// Options that `/proc` is mounted with. Blocks.
pub(super) fn proc_options() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut lines = mounts
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>());
    let proc = lines.find(|fields| fields.get(1) == Some(&"/proc"))?;
    proc.get(3).map(|options| (*options).to_owned())
}
