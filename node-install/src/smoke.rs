// SPDX-License-Identifier: Apache-2.0

//! A container for trial: what containerd runs by the installed shim must be in a sandbox.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Error, containerd::Containerd};

/// containerd's namespace of the trial, which the kubelet does not look at.
const NAMESPACE: &str = "kiln-trial";

/// The container.
const ID: &str = "kiln-trial";

/// How long it may take, and what takes it away.
const RUN: Duration = Duration::from_secs(90);
const CLEAN: Duration = Duration::from_secs(20);

/// What a kernel says of itself.
const KERNEL: &str = "/proc/version";

/// A trial.
pub(super) struct Trial<'a> {
    pub(super) containerd: &'a Containerd,
    pub(super) shim: &'a Path,
    pub(super) runtime_config: &'a Path,
    /// Where its files may be for a while.
    pub(super) dir: &'a Path,
}

impl Trial<'_> {
    /// Runs `pause`, which says what kernel it runs on, and expects another than the node's.
    pub(super) async fn run(&self, pause: &Path) -> Result<(), Error> {
        let rootfs = self.dir.join("trial");
        // What a run that was cut off has left.
        self.clean(&rootfs).await;
        let said = match make_rootfs(&rootfs, pause) {
            Ok(()) => self.start(&rootfs).await,
            Err(e) => Err(Error::at("make", &rootfs)(e)),
        };
        self.clean(&rootfs).await;
        let said = said.map_err(|e| Error::Smoke(e.to_string()))?;
        let node = fs::read_to_string(KERNEL).map_err(Error::at("read", Path::new(KERNEL)))?;
        if said.is_empty() || said.trim() == node.trim() {
            return Err(Error::Smoke(format!(
                "it should be on a kernel of its own, and says {said:?}"
            )));
        }
        Ok(())
    }

    async fn start(&self, rootfs: &Path) -> Result<String, Error> {
        let mut args: Vec<&OsStr> = ["-n", NAMESPACE, "run", "--rm", "--rootfs", "--cgroup", ""]
            .map(OsStr::new)
            .into();
        args.extend([
            OsStr::new("--runtime"),
            self.shim.as_os_str(),
            OsStr::new("--runtime-config-path"),
            self.runtime_config.as_os_str(),
            rootfs.as_os_str(),
        ]);
        args.extend([ID, "/kiln-pause", "kernel"].map(OsStr::new));
        self.containerd.ctr(&args, RUN).await
    }

    /// Takes away what is left of it; mostly that is nothing but the namespace.
    async fn clean(&self, rootfs: &Path) {
        let run = async |words: &[&str]| {
            let args: Vec<_> = words.iter().map(OsStr::new).collect();
            self.containerd.ctr(&args, CLEAN).await
        };
        let listed = run(&["-n", NAMESPACE, "containers", "ls", "-q"]).await;
        if listed.is_ok_and(|ids| ids.lines().any(|id| id == ID)) {
            run(&["-n", NAMESPACE, "tasks", "rm", "-f", ID]).await.ok();
            run(&["-n", NAMESPACE, "containers", "rm", ID]).await.ok();
        }
        // Neither is there when nothing went wrong, or nothing has been run.
        run(&["namespaces", "rm", NAMESPACE]).await.ok();
        fs::remove_dir_all(rootfs).ok();
    }
}

fn make_rootfs(dir: &PathBuf, pause: &Path) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    for inner in ["dev", "proc", "sys"] {
        fs::create_dir(dir.join(inner))?;
    }
    fs::copy(pause, dir.join("kiln-pause")).map(drop)
}
