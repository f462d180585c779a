// SPDX-License-Identifier: Apache-2.0

//! What the containers of a Pod share within their sandbox.
//!
//! runsc mounts each volume of each container as a file system of its own: locks, sockets and
//! watches of one container mean nothing to another. Only what a hint names is one file system
//! for all (gVisor `runsc/boot/mount_hints.go`). The hints are the node's: those of the Pod's
//! annotations are dropped.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use kiln_agent_api::shm;
use log::info;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use runsc_wrapper::is_bind;
use serde_json::Value;

use crate::{
    bundle::Spec,
    error::{Error, Result},
};

/// Where a kubelet has the emptyDirs of a Pod, below the Pod's directory (kubernetes
/// `pkg/volume/emptydir/empty_dir.go`).
const EMPTY_DIRS: &str = "volumes/kubernetes.io~empty-dir";

/// Where it mounts parts of volumes (kubernetes `pkg/volume/util/subpath/subpath_linux.go`).
const SUBPATHS: &str = "volume-subpaths";

/// Begins the name of the file in which a sentry keeps what is in a volume.
const FILESTORE: &str = ".gvisor.filestore.";

/// What the containers of one Pod share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    /// Where the host has a `/dev/shm` for the Pod.
    shm: Option<String>,
    /// The kubelet's directory of the Pod, where emptyDirs are shared.
    pod: PathBuf,
    volumes: Vec<Volume>,
}

/// An emptyDir that is one file system of the sandbox.
#[derive(Debug, PartialEq, Eq)]
struct Volume {
    name: String,
    /// The kubelet's directory.
    path: String,
    /// Bytes that fit, where it is of medium `Memory`: what is in it is in the sandbox's memory.
    /// Of any other it is in one file in the kubelet's directory, by which the kubelet counts and
    /// limits it.
    memory: Option<u64>,
    /// Owner and mode of its mount.
    options: String,
}

impl Shared {
    /// What containers of the Pod share whose sandbox has `spec`, on a node whose kubelet has its
    /// Pods in `pods`, or leaves emptyDirs alone. Blocks.
    ///
    /// # Errors
    /// When the Pod's emptyDirs cannot be looked at.
    pub(crate) fn of(spec: &Spec, pods: &Path) -> Result<Self> {
        let mut shared = Self {
            shm: shm_source(spec),
            ..Self::default()
        };
        let uid = spec.pod_uid().filter(|uid| is_name(uid));
        if let (false, Some(uid)) = (pods.as_os_str().is_empty(), uid) {
            // As it is in the mounts of containers: containerd resolves links.
            shared.pod = match pods.canonicalize() {
                Ok(pods) => pods.join(uid),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(shared),
                Err(e) => return Err(Error::io("look at", pods)(e)),
            };
            let dir = shared.pod.join(EMPTY_DIRS);
            shared.volumes = empty_dirs(&dir).map_err(Error::io("look at", &dir))?;
        }
        Ok(shared)
    }

    /// Refuses a container to which a part of a shared volume would be mounted: it would get the
    /// kubelet's directory, in which nothing of the volume is.
    ///
    /// # Errors
    /// [`Error::Denied`] for that.
    pub(crate) fn check(&self, spec: &Spec) -> Result<()> {
        let mounts = spec.value()["mounts"].as_array().into_iter().flatten();
        let sources = mounts.filter_map(|mount| mount["source"].as_str());
        for source in sources {
            let part = Path::new(source).strip_prefix(self.pod.join(SUBPATHS));
            let name = part.ok().and_then(|part| part.iter().next());
            let volume = self.volumes.iter().find(|v| name == Some(v.name.as_ref()));
            if let Some(volume) = volume {
                return Err(Error::Denied(format!(
                    "subPath of emptyDir {:?}: this node shares emptyDirs within the sandbox, and \
                     none by parts (shared_empty_dirs in the [kiln] table of the node's runtime \
                     configuration)",
                    volume.name
                )));
            }
        }
        Ok(())
    }

    /// Tells runsc, by the mounts of a container and the hints of the sandbox's first.
    pub(crate) fn write_into(&self, spec: &mut Spec, is_first: bool) {
        let spec = spec.value_mut();
        if let Some(source) = &self.shm {
            mount_shm(spec, source);
        }
        for volume in self.volumes.iter().filter(|v| v.memory.is_some()) {
            for mount in binds_of(spec, &volume.path) {
                mount["type"] = "tmpfs".into();
                mount["options"] = shm::limiting(&options_of(mount)).into();
            }
        }
        if !is_first {
            return;
        }
        if self.shm.is_some() {
            shm::hint(spec);
        }
        for volume in &self.volumes {
            let size = volume.memory.map(|bytes| format!(",size={bytes}"));
            let options = format!("{}{}", volume.options, size.unwrap_or_default());
            shm::write_hint(spec, &hint_name(&volume.name), &volume.path, &options);
        }
    }
}

/// The name of the hint for a volume of this name. Whatever that is, it is no other hint's.
fn hint_name(volume: &str) -> String {
    format!("emptydir-{volume}")
}

/// Where on the host containerd keeps the `/dev/shm` of the Pod whose sandbox has `spec`. `None`
/// where the Pod has none of its own: it is no Pod, or has the host's.
fn shm_source(spec: &Spec) -> Option<String> {
    let mounts = spec.value()["mounts"].as_array()?;
    let mount = mounts.iter().find(|m| m["destination"] == shm::PATH)?;
    let source = mount["source"].as_str()?;
    (spec.is_pod() && source != shm::PATH).then(|| source.to_owned())
}

/// Mounts the Pod's `/dev/shm`, which is at `source` on the host, from within the sandbox. A
/// volume that the container has there stays.
fn mount_shm(spec: &mut Value, source: &str) {
    for mount in binds_of(spec, source).filter(|m| m["destination"] == shm::PATH) {
        *mount = shm::mount(&options_of(mount));
    }
}

/// The mounts of what the host has at `source`.
fn binds_of<'a>(spec: &'a mut Value, source: &str) -> impl Iterator<Item = &'a mut Value> {
    let mounts = spec["mounts"].as_array_mut().into_iter().flatten();
    mounts.filter(move |mount| mount["source"] == source && is_bind(mount))
}

fn options_of(mount: &Value) -> Vec<Value> {
    mount["options"].as_array().cloned().unwrap_or_default()
}

/// The emptyDirs in `dir` that can be shared. Those have nothing in them that their containers
/// would miss. Blocks.
fn empty_dirs(dir: &Path) -> io::Result<Vec<Volume>> {
    // A path of the kubelet's own has no links.
    match dir.canonicalize() {
        Ok(real) if real == dir => {}
        Ok(_) => return Ok(Vec::new()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    }
    let device = dir.metadata()?.dev();
    let mut volumes = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Neither follows a link.
        if !entry.file_type()?.is_dir() || !is_name(&name) {
            continue;
        }
        let (path, meta) = (entry.path(), entry.metadata()?);
        let mut memory = None;
        if meta.dev() != device {
            memory = tmpfs_bytes(&path)?;
            if memory.is_none() {
                info!("emptyDir {name} is not shared: it is in a file system of another kind");
                continue;
            }
        }
        if !is_empty(&path)? {
            info!("emptyDir {name} is not shared: something is in it");
            continue;
        }
        volumes.push(Volume {
            name,
            path: path.to_string_lossy().into_owned(),
            memory,
            options: options(&meta),
        });
    }
    Ok(volumes)
}

/// Whether it can be the name of a volume or the uid of a Pod: it is no path then, and has no dot,
/// at which runsc splits the key of an annotation.
fn is_name(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    !name.is_empty() && name.len() <= 63 && name.chars().all(is_plain)
}

/// How many bytes fit into the tmpfs at `path`, as which a kubelet mounts a volume of medium
/// `Memory`. `None` for any other file system.
fn tmpfs_bytes(path: &Path) -> io::Result<Option<u64>> {
    let fs = statfs(path)?;
    let bytes = fs.blocks().saturating_mul(fs.block_size().unsigned_abs());
    Ok((fs.filesystem_type() == TMPFS_MAGIC).then_some(bytes))
}

/// Whether nothing is in the directory, beside what the sentry of an earlier sandbox of the Pod has
/// left.
fn is_empty(path: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let is_filestore = entry.file_name().to_string_lossy().starts_with(FILESTORE);
        if !is_filestore || !entry.file_type()?.is_file() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Options that give a mount the owner and mode of the kubelet's directory.
fn options(meta: &Metadata) -> String {
    let (mode, uid, gid) = (meta.mode() & 0o7777, meta.uid(), meta.gid());
    format!("rw,mode={mode:o},uid={uid},gid={gid}")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use serde_json::json;

    use super::*;

    const OF_THE_POD: &str = "/run/containerd/sandboxes/pod1/shm";

    /// A container with `/dev/shm` from `source`.
    fn spec(kind: &str, source: &str, options: &[&str]) -> Spec {
        let spec = json!({
            "annotations": {
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-uid": "u-1",
            },
            "mounts": [
                {"destination": "/dev/shm", "type": "bind", "source": source, "options": options},
                {"destination": "/other", "type": "bind", "source": OF_THE_POD, "options": ["rbind"]},
            ],
        });
        Spec::parse(spec.to_string().as_bytes()).unwrap()
    }

    fn shared(spec: &Spec) -> Shared {
        Shared::of(spec, Path::new("")).unwrap()
    }

    #[test]
    fn only_a_pod_has_shared_memory_of_its_own() {
        let source = |kind, source| shared(&spec(kind, source, &["rbind", "ro"])).shm;
        assert_eq!(source("sandbox", OF_THE_POD).as_deref(), Some(OF_THE_POD));
        assert_eq!(source("sandbox", "/dev/shm"), None);
        assert_eq!(source("container", OF_THE_POD), None);
        assert_eq!(shared(&Spec::parse(b"{}").unwrap()).shm, None);
    }

    #[test]
    fn shared_memory_is_mounted_from_within_the_sandbox() {
        let mut first = spec("sandbox", OF_THE_POD, &["rbind", "ro"]);
        let shared = shared(&first);
        shared.write_into(&mut first, true);
        let mut member = spec("container", OF_THE_POD, &["rbind", "rprivate", "rw"]);
        shared.write_into(&mut member, false);
        for (spec, options) in [(&first, json!(["ro"])), (&member, json!([]))] {
            let mounts = &spec.value()["mounts"];
            assert_eq!(mounts[0], shm::mount(options.as_array().unwrap()));
            assert_eq!(mounts[0]["options"], options);
            assert_eq!(mounts[1]["source"], OF_THE_POD);
        }
        let has_hint = |spec: &Spec| {
            let source = &spec.value()["mounts"][0]["source"];
            let mut annotations = spec.value()["annotations"].as_object().unwrap().values();
            annotations.any(|value| value == source)
        };
        assert!(has_hint(&first) && !has_hint(&member));
    }

    #[test]
    fn a_volume_in_the_place_of_shared_memory_stays() {
        let shared = shared(&spec("sandbox", OF_THE_POD, &["rbind", "ro"]));
        let volume = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache";
        let mut member = spec("container", volume, &["rbind", "rw"]);
        let before = member.value().clone();
        shared.write_into(&mut member, false);
        assert_eq!(*member.value(), before);
    }

    /// A kubelet's directory with a Pod that has emptyDirs of these names.
    fn kubelet(names: &[&str]) -> (tempfile::TempDir, PathBuf) {
        let pods = tempfile::tempdir().unwrap();
        let volumes = pods.path().join("u-1").join(EMPTY_DIRS);
        for name in names {
            fs::create_dir_all(volumes.join(name)).unwrap();
        }
        (pods, volumes)
    }

    fn names(shared: &Shared) -> Vec<&str> {
        let mut names: Vec<_> = shared.volumes.iter().map(|v| v.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn empty_dirs_are_hinted_as_the_kubelet_made_them() {
        let (pods, volumes) = kubelet(&["data"]);
        fs::set_permissions(volumes.join("data"), PermissionsExt::from_mode(0o2777)).unwrap();
        let mut first = spec("sandbox", OF_THE_POD, &["rbind", "ro"]);
        Shared::of(&first, pods.path())
            .unwrap()
            .write_into(&mut first, true);
        let hint = |field| {
            &first.value()["annotations"][format!("dev.gvisor.spec.mount.emptydir-data.{field}")]
        };
        assert_eq!(*hint("source"), volumes.join("data").to_str().unwrap());
        assert_eq!(
            (hint("type"), hint("share")),
            (&json!("tmpfs"), &json!("pod"))
        );
        let meta = volumes.join("data").metadata().unwrap();
        let owner = format!("rw,mode=2777,uid={},gid={}", meta.uid(), meta.gid());
        assert_eq!(*hint("options"), owner);
    }

    #[test]
    fn what_is_of_medium_memory_is_in_the_sandboxes() {
        let shared = Shared {
            volumes: vec![Volume {
                name: "data".into(),
                path: OF_THE_POD.into(),
                memory: Some(4096),
                options: "rw".into(),
            }],
            ..Shared::default()
        };
        let mut first = spec("sandbox", "/v", &["rbind", "rw"]);
        shared.write_into(&mut first, true);
        let options = &first.value()["annotations"]["dev.gvisor.spec.mount.emptydir-data.options"];
        assert_eq!(options, "rw,size=4096");
        let mut member = spec("container", "/v", &["rbind", "rw"]);
        shared.write_into(&mut member, false);
        let mounts = &member.value()["mounts"];
        assert_eq!(mounts[0]["type"], "bind");
        let other =
            json!({"destination": "/other", "type": "tmpfs", "source": OF_THE_POD, "options": []});
        assert_eq!(mounts[1], other);
    }

    #[test]
    fn only_empty_directories_of_the_kubelet_are_hinted() {
        let (pods, volumes) = kubelet(&["used", "left", "planted", "dot.ted", "plain"]);
        fs::write(volumes.join("used/file"), "").unwrap();
        fs::write(volumes.join("left/.gvisor.filestore.old"), "").unwrap();
        symlink("/etc/passwd", volumes.join("planted/.gvisor.filestore.x")).unwrap();
        symlink("plain", volumes.join("link")).unwrap();
        fs::write(volumes.join("file"), "").unwrap();
        let pod = spec("sandbox", OF_THE_POD, &[]);
        let of = |pods: &Path| Shared::of(&pod, pods).unwrap();
        assert_eq!(names(&of(pods.path())), ["left", "plain"]);
        assert!(names(&of(Path::new(""))).is_empty());
        assert!(names(&of(&pods.path().join("none"))).is_empty());
        // A link to the kubelet's directory is the node's; one in it is nobody's.
        let other = tempfile::tempdir().unwrap();
        symlink(pods.path(), other.path().join("pods")).unwrap();
        assert_eq!(names(&of(&other.path().join("pods"))), ["left", "plain"]);
        symlink(pods.path().join("u-1"), other.path().join("u-1")).unwrap();
        assert!(names(&of(other.path())).is_empty());
    }

    #[test]
    fn an_uid_is_no_path() {
        let (pods, _) = kubelet(&["data"]);
        for uid in ["../x/u-1", ".", "", "u-1/"] {
            let spec = json!({"annotations": {"io.kubernetes.cri.sandbox-uid": uid}});
            let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
            assert!(names(&Shared::of(&spec, pods.path()).unwrap()).is_empty());
        }
    }

    #[test]
    fn no_part_of_a_shared_volume_is_mounted() {
        let (pods, _) = kubelet(&["data"]);
        let shared = Shared::of(&spec("sandbox", OF_THE_POD, &[]), pods.path()).unwrap();
        let real = pods.path().canonicalize().unwrap();
        let of = |path: &str| {
            let source = real.join("u-1").join(path);
            shared.check(&spec("container", source.to_str().unwrap(), &[]))
        };
        let refused = of("volume-subpaths/data/c/0").unwrap_err().to_string();
        assert!(refused.contains("shared_empty_dirs"), "{refused}");
        of("volume-subpaths/other/c/0").unwrap();
        of("volumes/kubernetes.io~empty-dir/data").unwrap();
        Shared::default()
            .check(&spec("container", "/x", &[]))
            .unwrap();
    }
}
