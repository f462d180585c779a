// SPDX-License-Identifier: Apache-2.0

//! Containers whose gofer was started before there was anything to serve.
//!
//! A gofer is two starts of runsc, and `runsc create` and `start` are one more each. All of that
//! can be paid ahead: a gofer is started with empty directories and files, its
//! *mount points*, each with a connection of its own. They are in a file system of this gofer's, which nobody can write to
//! (`spawn.rs`). When the container comes, its root file system and volumes are put over mount points
//! (`mounts.rs`), and the sentry gets the connections of these mount points over its control socket, as
//! `runsc start` would give it those of a new gofer (gVisor `runsc/sandbox/sandbox.go`,
//! `StartSubcontainer`). What runsc would write down of the container is written here
//! (`container.rs`), so that its other commands find it.
//!
//! The call's arguments belong to the release ([`Release`](crate::Release)). A container that needs more than
//! there is, and whatever fails before the sentry has begun with it, is left to the commands.

pub(crate) mod container;
mod mounts;
mod pass;
mod spawn;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use kiln_host::reap::pidfd_open;
use nix::{
    fcntl::OFlag,
    sys::socket::{AddressFamily, SockFlag, SockType, socketpair},
    unistd::pipe2,
};
use serde_json::{Value, json};

use crate::{Config, ContainerId};

use container::Upper;
pub use container::is_bind;
use spawn::{Places, Program, Users, Waiting};

/// How many directories a gofer can serve that was started ahead: the root file system and
/// volumes.
const DIRS: usize = 8;

/// How many single files: a Pod's `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf` and
/// termination log, and two more.
const FILES: usize = 6;

/// Flags of runsc that are understood here; any other may change what a container is.
const FLAGS: [&str; 6] = [
    "directfs",
    "host-uds",
    "net-raw",
    "oci-seccomp",
    "overlay2",
    "platform",
];

/// Where the mount points are in a gofer's mount namespace (gVisor `runsc/cmd/gofer.go`, `setupRootFS`).
const ROOT: &str = "/root";

/// Most bytes that a gofer says about its mounts.
const MOUNTS_LIMIT: u64 = 64 << 10;

/// A gofer that was started ahead.
#[derive(Debug)]
pub struct PrestartedGofer {
    pid: u32,
    /// The same by a pidfd, which stays that of this process.
    process: OwnedFd,
    /// Its connections: those of [`DIRS`] directories, then those of [`FILES`] files. When all
    /// are closed, it ends.
    connections: Vec<OwnedFd>,
}

/// Puts a process that was just started, and has done nothing yet, where it belongs.
pub type PutInPlace = Box<dyn FnOnce(u32) -> io::Result<()> + Send>;

impl PrestartedGofer {
    /// Number of connections.
    pub const COUNT: usize = DIRS + FILES;

    /// The gofer on the host.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Writes what prestarted gofers are made from into `dir`, where no other process writes.
    /// Blocks.
    ///
    /// # Errors
    /// When something cannot be written.
    pub fn prepare(dir: &Path) -> io::Result<()> {
        let root = places(dir);
        fs::create_dir_all(&root)?;
        let mount = |name: String| {
            json!({
                "destination": format!("/{name}"), "type": "bind", "source": root.join(name),
                // As the sentry is to use what will be there.
                "options": ["bind", "rw"],
            })
        };
        let mounts: Vec<_> = dirs().chain(files()).map(mount).collect();
        let spec = json!({
            "ociVersion": "1.0.0",
            "process": {"args": ["slots"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": root, "readonly": true},
            "mounts": mounts,
        });
        let new = dir.join("config.json.new");
        fs::write(&new, spec.to_string())?;
        fs::rename(new, dir.join("config.json"))
    }

    /// Starts a gofer with what was prepared in `dir`, as a child that nobody but the caller will
    /// wait for. Blocks.
    pub(crate) fn start(
        config: &Config,
        dir: &Path,
        sandbox: &ContainerId,
        place: PutInPlace,
    ) -> io::Result<Self> {
        let (mounts, gofer_mounts) = pipe2(OFlag::O_CLOEXEC)?;
        // Asked only for what cannot be read, and everything can be.
        let (_rpc, gofer_rpc) = pair()?;
        let (gate, gofer_gate) = pair()?;
        drop(gate); // what it would wait for is done before it starts
        let spec = File::open(dir.join("config.json"))?.into();
        let mut fds = vec![spec, gofer_mounts, gofer_rpc, gofer_gate];
        let mut connections = Vec::new();
        // The gofer's own root has one too, which nobody needs.
        let (_root, gofer_root) = pair()?;
        fds.push(gofer_root);
        for _ in 0..Self::COUNT {
            let (ours, gofers) = pair()?;
            connections.push(ours);
            fds.push(gofers);
        }
        let confs = vec!["lisafs:none"; Self::COUNT + 1].join(",");
        let io_fds = (0..=Self::COUNT).map(|n| format!("--io-fds={}", 7 + n));
        let mut args = vec![
            "runsc-gofer".to_owned(),
            format!("--root={}", config.root.display()),
        ];
        args.extend(config.flag_args("slots"));
        args.extend([
            "gofer".to_owned(),
            format!("--bundle={}", dir.display()),
            format!("--gofer-mount-confs={confs}"),
            "--spec-fd=3".to_owned(),
            "--mounts-fd=4".to_owned(),
            "--rpc-fd=5".to_owned(),
            "--sync-chroot-fd=6".to_owned(),
        ]);
        args.extend(io_fds);
        // For people, who see it in the list of processes.
        args.push(sandbox.to_string());
        let users = if has_direct_files(&config.flags) {
            Users::Own
        } else {
            Users::Host
        };
        let program = Program {
            file: &config.binary,
            args,
            env: &["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            fds,
            users,
            places: Places {
                at: &places(dir),
                dirs: dirs().collect(),
                files: files().collect(),
            },
        };
        let waiting = program.start()?;
        let pid = waiting.pid;
        let ready = Self::when_ready(waiting, connections, mounts, place);
        if ready.is_err() {
            spawn::end(pid);
        }
        ready
    }

    /// Lets a gofer go on, and waits until it is ready.
    fn when_ready(
        waiting: Waiting,
        connections: Vec<OwnedFd>,
        mounts: OwnedFd,
        place: PutInPlace,
    ) -> io::Result<Self> {
        let gofer = Self {
            pid: waiting.pid,
            process: pidfd_open(waiting.pid)?,
            connections,
        };
        place(gofer.pid)?;
        waiting.go();
        // It says what it has mounted when everything is where it is to be.
        let mut said = String::new();
        File::from(mounts)
            .take(MOUNTS_LIMIT)
            .read_to_string(&mut said)?;
        let listed: Option<Vec<Value>> = serde_json::from_str(&said).ok();
        if listed.is_none_or(|mounts| mounts.len() != Self::COUNT) {
            return Err(io::Error::other(
                "a gofer started ahead did not become ready",
            ));
        }
        Ok(gofer)
    }
}

/// Where a gofer has its mount points when it starts, on what was prepared in `dir`.
fn places(dir: &Path) -> PathBuf {
    dir.join("root")
}

/// Names of the mount points for directories, in the order of their connections.
fn dirs() -> impl Iterator<Item = String> {
    (0..DIRS).map(|n| format!("d{n}"))
}

/// Names of the mount points for single files, whose connections come after those.
fn files() -> impl Iterator<Item = String> {
    (0..FILES).map(|n| format!("f{n}"))
}

fn pair() -> nix::Result<(OwnedFd, OwnedFd)> {
    socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
}

/// Whether a container is with these flags what is understood here.
pub(crate) fn has_plain_files(flags: &BTreeMap<String, String>) -> bool {
    let host_uds = flags.get("host-uds").is_none_or(|uds| uds == "none");
    flags.keys().all(|flag| FLAGS.contains(&flag.as_str()))
        && host_uds
        && Upper::of(flags).is_some()
}

/// Whether sentries open files by themselves (flag `directfs`, on unless it is turned off).
fn has_direct_files(flags: &BTreeMap<String, String>) -> bool {
    flags
        .get("directfs")
        .is_none_or(|on| crate::config::is_true(on))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_for_flags_that_are_understood() {
        for (flags, expected) in [
            (&[][..], true),
            (&[("host-uds", "none"), ("net-raw", "false")], true),
            (&[("directfs", "false"), ("overlay2", "none")], true),
            (&[("overlay2", "all:memory")], false),
            (&[("overlay2", "root:/var/tmp")], false),
            (&[("overlay2", "root:memory")], true),
            (&[("host-uds", "open")], false),
            (&[("debug-log", "/tmp/")], false),
            (&[("network", "host")], false),
        ] {
            let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
            let map = flags.iter().map(own).collect();
            assert_eq!(has_plain_files(&map), expected, "{flags:?}");
        }
    }

    #[test]
    fn what_gofers_are_made_from_can_be_written_again() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            PrestartedGofer::prepare(dir.path()).unwrap();
        }
        let text = fs::read(dir.path().join("config.json")).unwrap();
        let spec: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            spec["mounts"].as_array().unwrap().len(),
            PrestartedGofer::COUNT
        );
        // What is there is each gofer's own.
        assert!(fs::read_dir(places(dir.path())).unwrap().next().is_none());
    }
}
