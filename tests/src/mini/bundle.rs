// SPDX-License-Identifier: Apache-2.0

//! OCI bundles as containerd lays them out.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use containerd_shim_protos::api::Mount;
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::{Value, json};

use super::NAMESPACE;
use crate::cgroup::Cgroup;

/// A bundle to be written.
#[derive(Debug)]
#[must_use]
pub struct BundleBuilder<'a> {
    place: &'a Path,
    id: String,
    namespace: String,
    spec: Value,
}

impl<'a> BundleBuilder<'a> {
    pub(crate) fn new(place: &'a Path, cgroup: &Cgroup, id: &str) -> Self {
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_KILL",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SYS_CHROOT"
        ]);
        let spec = json!({
            "ociVersion": "1.1.0",
            "process": {
                "args": ["sleep", "3600"],
                "cwd": "/",
                "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                "user": {"uid": 0, "gid": 0},
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
                "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "hostname": "mini",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "annotations": {},
            "linux": {
                "cgroupsPath": format!("{}/{id}", cgroup.parent()),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
                "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            },
        });
        Self {
            place,
            id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            spec,
        }
    }

    /// Makes it one of another namespace of containerd, with a cgroup after that.
    pub fn in_namespace(mut self, namespace: &str) -> Self {
        namespace.clone_into(&mut self.namespace);
        self.edit(|spec| {
            let path = &mut spec["linux"]["cgroupsPath"];
            *path = format!("{}-{namespace}", path.as_str().unwrap_or_default()).into();
        })
    }

    /// Sets the command.
    pub fn args(self, args: &[&str]) -> Self {
        self.edit(|spec| spec["process"]["args"] = json!(args))
    }

    /// Runs a shell script.
    pub fn script(self, script: &str) -> Self {
        self.args(&["sh", "-c", script])
    }

    /// Makes it the sandbox of a Pod.
    pub fn sandbox(self) -> Self {
        let id = self.id.clone();
        self.annotate("sandbox", &id)
    }

    /// Makes it a container of the Pod with sandbox `sandbox`.
    pub fn member_of(self, sandbox: &str) -> Self {
        self.annotate("container", sandbox)
    }

    fn annotate(self, kind: &str, sandbox: &str) -> Self {
        self.edit(|spec| {
            spec["annotations"]["io.kubernetes.cri.container-type"] = kind.into();
            spec["annotations"]["io.kubernetes.cri.sandbox-id"] = sandbox.into();
        })
    }

    /// Changes anything of the spec.
    pub fn edit(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.spec);
        self
    }

    /// The spec as it would be written.
    pub fn spec_text(&self) -> String {
        self.spec.to_string()
    }

    /// Writes the bundle.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(self) -> Result<Bundle> {
        let bundles = match self.namespace.as_str() {
            NAMESPACE => "b".to_owned(),
            other => format!("b-{other}"),
        };
        let dir = self.place.join(bundles).join(&self.id);
        for name in ["rootfs", "upper", "work"] {
            fs::create_dir_all(dir.join(name))
                .with_context(|| format!("make {}", dir.display()))?;
        }
        fs::write(dir.join("config.json"), self.spec.to_string())?;
        let log = dir.join("log");
        mkfifo(&log, Mode::S_IRUSR | Mode::S_IWUSR).context("make the log's FIFO")?;
        collect_log(&log, &dir.join("shim.log"))?;
        Ok(Bundle {
            id: self.id,
            namespace: self.namespace,
            dir,
            place: self.place.to_owned(),
        })
    }
}

/// Reads the shim's log as containerd does, into a file.
fn collect_log(fifo: &Path, into: &Path) -> Result<()> {
    // With a writer of its own the reader sees no end when a shim goes.
    let mut log = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(fifo)?;
    let mut file = File::create(into)?;
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            match log.read(&mut buffer) {
                Ok(n) if file.write_all(&buffer[..n]).is_ok() => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    tokio::time::sleep(super::fifo::POLL).await;
                }
                _ => return,
            }
        }
    });
    Ok(())
}

/// A bundle on disk.
#[derive(Debug, Clone)]
pub struct Bundle {
    id: String,
    namespace: String,
    dir: PathBuf,
    place: PathBuf,
}

impl Bundle {
    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// containerd's namespace of the container.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A directory for stdio.
    pub fn io_dir(&self) -> PathBuf {
        self.place.join("io")
    }

    /// The file with what the shim has logged.
    pub fn log(&self) -> PathBuf {
        self.dir.join("shim.log")
    }

    /// Its root file system as a snapshotter would describe it: an overlay of the place's.
    pub fn mounts(&self) -> Vec<Mount> {
        let at = |name: &str| self.dir.join(name).display().to_string();
        vec![Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", self.place.join("rootfs").display()),
                format!("upperdir={}", at("upper")),
                format!("workdir={}", at("work")),
            ],
            ..Mount::default()
        }]
    }

    /// The name under which containerd would know it, for messages.
    pub fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    /// Removes it from disk.
    ///
    /// # Errors
    /// The file system's, also when something is still mounted in it.
    pub fn remove(self) -> Result<()> {
        fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }
}
