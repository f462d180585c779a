// SPDX-License-Identifier: Apache-2.0

//! A container with a prestarted gofer: from its bundle to what the sentry and runsc's state are told.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::{
        stat::Mode,
        statfs::{FUSE_SUPER_MAGIC, NFS_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, statfs},
    },
};
use serde_json::{Value, json};

use super::{
    DIRS, PrestartedGofer, ROOT, has_direct_files,
    mounts::{Access, Depth, Tree, attach_in},
};
use crate::{Config, ContainerId};

/// What a container writes into its root file system, and where that stays (gVisor
/// `runsc/boot/gofer_conf.go`, `GoferMountConfUpperType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upper {
    /// In the root file system itself.
    None = 0,
    /// In the sandbox's memory.
    Memory = 1,
    /// In one file in the root file system.
    Own = 2,
}

impl Upper {
    /// As the flag `overlay2` says; `None` where it says more than is understood here.
    pub(super) fn of(flags: &BTreeMap<String, String>) -> Option<Self> {
        match flags.get("overlay2").map(String::as_str) {
            None | Some("root:self") => Some(Self::Own),
            Some("root:memory") => Some(Self::Memory),
            Some("none") => Some(Self::None),
            Some(_) => None,
        }
    }
}

/// Container whose files a prestarted gofer serves.
#[derive(Debug)]
pub(crate) struct GoferContainer {
    /// As the sentry is to have it.
    spec: Value,
    uppers: Vec<Upper>,
    /// The files for overlays, and then the connections, in the order of the mounts.
    pub(crate) files: Vec<OwnedFd>,
    filestore: Option<PathBuf>,
    gofer: u32,
    /// Global settings that the sentry reads for a container.
    conf: Value,
}

/// Files of the host that a gofer serves: the root file system, or a mount.
#[derive(Debug)]
struct Served {
    source: PathBuf,
    /// Path inside the container.
    target: PathBuf,
    is_dir: bool,
    depth: Depth,
    access: Access,
}

impl GoferContainer {
    /// Puts the files of the bundle of a container of `sandbox` over the mount points of a
    /// prestarted gofer. Blocks.
    ///
    /// # Errors
    /// Why it must be left to the command; the gofer is spent then.
    pub(crate) fn new(
        config: &Config,
        bundle: &Path,
        sandbox: &ContainerId,
        gofer: PrestartedGofer,
    ) -> io::Result<Self> {
        let mut spec: Value = serde_json::from_slice(&fs::read(bundle.join("config.json"))?)?;
        check(&spec)?;
        let configured = Upper::of(&config.flags).ok_or_else(|| unfit("overlay2"))?;
        let root = bundle.join(text(&spec["root"]["path"]));
        spec["root"]["path"] = root.to_string_lossy().into();
        let readonly = spec["root"]["readonly"] == true;
        let upper = if readonly { Upper::None } else { configured };
        let mut member = Self {
            uppers: vec![upper],
            files: Vec::new(),
            filestore: None,
            gofer: gofer.pid(),
            conf: settings(config),
            spec: Value::Null,
        };
        let access = match upper {
            Upper::None if !readonly => Access::Write,
            _ => Access::Read,
        };
        let mut served = vec![Served {
            source: root.clone(),
            target: "/".into(),
            is_dir: true,
            depth: Depth::All,
            access,
        }];
        let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut);
        for mount in mounts.into_iter().flatten() {
            if let Some(one) = serve(mount, bundle)? {
                served.push(one);
                member.uppers.push(Upper::None);
            }
        }
        check_targets(&served, readonly)?;
        let files = mount_served(gofer, served)?;
        if upper == Upper::Own {
            let name = format!(".gvisor.filestore.{sandbox}");
            // Not by the path: an open file would keep that from being unmounted.
            let tree = Tree::plain_copy(&root, Depth::TopOnly)?;
            let way = format!("/proc/self/fd/{}/{name}", tree.top().as_raw_fd());
            let mut options = OpenOptions::new();
            options.read(true).write(true).create_new(true).mode(0o666);
            let file = options.custom_flags(libc::O_NOFOLLOW).open(way)?;
            member.filestore = Some(root.join(name));
            member.files.push(file.into());
        }
        member.files.extend(files);
        if has_direct_files(&config.flags) {
            own_users(&mut spec);
        }
        member.spec = spec;
        Ok(member)
    }

    /// What runsc would write down of the container when it has made it. The sandbox is described
    /// by what is written of its root container.
    ///
    /// # Errors
    /// Where that says of the sandbox what is not understood here.
    pub(crate) fn state(
        &self,
        id: &ContainerId,
        bundle: &Path,
        root_container: &Value,
    ) -> io::Result<Value> {
        let sandbox = &root_container["sandbox"];
        if !sandbox.is_object() || is_shared(sandbox, &self.spec) {
            return Err(unfit("a volume is shared within the sandbox"));
        }
        let saver = &root_container["saver"];
        Ok(json!({
            "id": id.as_str(),
            "spec": self.spec,
            "bundleDir": bundle,
            // When the sandbox was made, which is as good for a list.
            "createdAt": root_container["createdAt"],
            "owner": "",
            "consoleSocket": "",
            "status": "created",
            "goferPid": self.gofer,
            "sandbox": sandbox,
            // That of the host is the caller's.
            "compatCgroup": {"cgroupunknown": null},
            "saver": {
                "rootDir": saver["rootDir"],
                "id": {"sandboxId": saver["id"]["sandboxId"], "containerId": id.as_str()},
            },
            "goferMountConfs": null,
        }))
    }

    /// Arguments of `containerManager.StartSubcontainer` (`boot.StartArgs`).
    pub(crate) fn start_args(&self, id: &ContainerId, sentry: u32) -> Value {
        let mut spec = self.spec.clone();
        join_root_pids(&mut spec, sentry);
        json!({
            "Spec": spec,
            "Conf": self.conf,
            "CID": id.as_str(),
            "NumGoferFilestoreFDs": usize::from(self.filestore.is_some()),
            "IsDevIoFilePresent": false,
            "GoferMountConfs": self.mount_confs(),
            "IsRootfsUpperTarFilePresent": false,
        })
    }

    /// `goferMountConfs` of runsc's state.
    pub(crate) fn mount_confs(&self) -> Value {
        let conf = |upper: &Upper| json!({"lower": LISAFS, "upper": *upper as u8});
        self.uppers.iter().map(conf).collect()
    }

    /// The process that serves its files.
    pub(crate) fn gofer(&self) -> u32 {
        self.gofer
    }

    /// `oomScoreAdj` of its specification.
    pub(crate) fn oom_score(&self) -> Option<i64> {
        self.spec["process"]["oomScoreAdj"].as_i64()
    }

    /// Takes back what a command would find in its way. Blocks.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn take_back(self) -> io::Result<()> {
        match &self.filestore {
            Some(path) => fs::remove_file(path),
            None => Ok(()),
        }
    }
}

/// `boot.Lisafs`.
const LISAFS: u8 = 1;

fn unfit(why: &str) -> io::Error {
    io::Error::other(why.to_owned())
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Leaves to the command what it would refuse or do more for (gVisor
/// `runsc/specutils/specutils.go`, `ValidateSpec`).
fn check(spec: &Value) -> io::Result<()> {
    let process = &spec["process"];
    let namespaces = spec.pointer("/linux/namespaces").and_then(Value::as_array);
    let has_users = |list: &Vec<Value>| list.iter().any(|ns| ns["type"] == "user");
    let annotations = spec["annotations"].as_object();
    let tells_runsc = annotations.is_some_and(|a| a.keys().any(|k| k.starts_with("dev.gvisor.")));
    let reasons = [
        (process["terminal"] == true, "it has a terminal"),
        (
            process["args"].as_array().is_none_or(Vec::is_empty),
            "it has no program",
        ),
        (
            !text(&process["selinuxLabel"]).is_empty(),
            "it has an SELinux label",
        ),
        (
            text(&spec["root"]["path"]).is_empty(),
            "it has no root file system",
        ),
        (namespaces.is_some_and(has_users), "it has users of its own"),
        (
            spec["linux"]["devices"]
                .as_array()
                .is_some_and(|d| !d.is_empty()),
            "it has devices",
        ),
        (tells_runsc, "its annotations are for runsc"),
        (!spec["hooks"].is_null(), "it has hooks"),
    ];
    match reasons.into_iter().find(|(applies, _)| *applies) {
        Some((_, why)) => Err(unfit(why)),
        None => Ok(()),
    }
}

/// Whether the sandbox shares what a gofer would serve to the container of `spec`. It then takes
/// no connection for it (gVisor `runsc/boot/vfs.go`, `getSharedMount`).
fn is_shared(sandbox: &Value, spec: &Value) -> bool {
    let hints = sandbox.pointer("/mountHints/mounts");
    let hints = hints.and_then(Value::as_object);
    let sources: Vec<_> = hints
        .into_iter()
        .flatten()
        .map(|(_, hint)| &hint["mount"]["source"])
        .collect();
    let mounts = spec["mounts"].as_array();
    mounts
        .into_iter()
        .flatten()
        .any(|mount| is_bind(mount) && sources.contains(&&mount["source"]))
}

/// Whether something of the host is mounted, by type or by option.
#[must_use]
pub fn is_bind(mount: &Value) -> bool {
    let options = mount["options"].as_array();
    let mut options = options.into_iter().flatten();
    mount["type"] == "bind" || options.any(|o| o == "bind" || o == "rbind")
}

/// Describes a mount that a gofer serves (gVisor `specutils.HasMountConfig`), and completes its
/// options as a gofer would. `None` for a mount that the sentry makes by itself.
fn serve(mount: &mut Value, bundle: &Path) -> io::Result<Option<Served>> {
    let options = mount["options"].as_array().cloned().unwrap_or_default();
    let has = |name: &str| options.iter().any(|o| o == name);
    if mount["type"] == "erofs" {
        return Err(unfit("a mount is an image"));
    }
    let source = text(&mount["source"]);
    if !is_bind(mount) || source.is_empty() {
        return Ok(None);
    }
    let source = bundle.join(source);
    let kind = fs::metadata(&source)?.file_type();
    if kind.is_socket() || kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
        return Err(unfit("a mount is neither file nor directory"));
    }
    let more = match statfs(&source)?.filesystem_type() {
        OVERLAYFS_SUPER_MAGIC => Some("overlayfs_stale_read"),
        NFS_SUPER_MAGIC | FUSE_SUPER_MAGIC => Some("disable_file_handle_sharing"),
        _ => None,
    };
    let depth = if has("rbind") {
        Depth::All
    } else {
        Depth::TopOnly
    };
    let access = if has("ro") {
        Access::Read
    } else {
        Access::Write
    };
    mount["source"] = source.to_string_lossy().into();
    mount["type"] = "bind".into();
    let options = options.into_iter().chain(more.map(Value::from));
    mount["options"] = options.collect();
    Ok(Some(Served {
        source,
        target: Path::new("/").join(text(&mount["destination"])),
        is_dir: kind.is_dir(),
        depth,
        access,
    }))
}

/// Refuses targets that the sentry cannot make by itself, or would not take for the same as a
/// gofer, which follows links and `..` before the sentry sees them. The first of `served` is the
/// root file system.
///
/// # Errors
/// Why the container must be left to the command.
fn check_targets(served: &[Served], root_is_readonly: bool) -> io::Result<()> {
    for one in served.iter().skip(1) {
        let mut parts = one.target.components();
        if parts.any(|part| part == Component::ParentDir) {
            return Err(unfit("a mount's target leads upwards"));
        }
        // The sentry looks for the target in the nearest mount around it.
        let around = served.iter().enumerate().filter(|(_, dir)| {
            dir.is_dir && dir.target != one.target && one.target.starts_with(&dir.target)
        });
        let nearest = around.max_by_key(|(_, dir)| dir.target.components().count());
        let Some((n, dir)) = nearest else {
            continue;
        };
        // An overlay takes what the sentry makes in a root file system that is not read-only.
        let is_readonly = if n == 0 {
            root_is_readonly
        } else {
            dir.access == Access::Read
        };
        let inner = one.target.strip_prefix(&dir.target);
        match find(&dir.source, inner.map_err(io::Error::other)?) {
            Ok(()) => {}
            Err(Errno::ELOOP) => return Err(unfit("a link is where something is mounted")),
            // A directory is made in the sandbox's memory, where that is needed.
            Err(_) if is_readonly && !one.is_dir => {
                return Err(unfit("a file is mounted where nothing can be made"));
            }
            Err(_) => {}
        }
    }
    Ok(())
}

/// Looks for `path` below `root`, and follows no symbolic link on the way.
///
/// # Errors
/// `ELOOP` for a link.
fn find(root: &Path, path: &Path) -> nix::Result<()> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let root = open(root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    openat2(&root, path, how).map(drop)
}

/// Mounts what is served over the mount points of the gofer, and returns the connections of these in its order. The others
/// are closed.
fn mount_served(gofer: PrestartedGofer, served: Vec<Served>) -> io::Result<Vec<OwnedFd>> {
    let mut files = gofer.connections;
    let mut dirs: Vec<OwnedFd> = files.drain(..DIRS).collect();
    let (mut trees, mut connections) = (Vec::new(), Vec::new());
    for one in served {
        let (free, letter) = if one.is_dir {
            (&mut dirs, 'd')
        } else {
            (&mut files, 'f')
        };
        // From the last on: how many are left is the number of the next.
        let connection = free.pop().ok_or_else(|| unfit("it has too many mounts"))?;
        let target = PathBuf::from(format!("{ROOT}/{letter}{}", free.len()));
        connections.push(connection);
        trees.push((Tree::copy(&one.source, one.depth, one.access)?, target));
    }
    attach_in(&gofer.process, trees)?;
    Ok(connections)
}

/// Where a sandbox runs in a user namespace of its own, as each of its containers says (gVisor
/// `runsc/container/container.go`, `modifySpecForDirectfs`).
fn own_users(spec: &mut Value) {
    let all = json!([{"containerID": 0, "hostID": 0, "size": u32::MAX}]);
    let linux = &mut spec["linux"];
    linux["uidMappings"] = all.clone();
    linux["gidMappings"] = all;
    match linux.get_mut("namespaces").and_then(Value::as_array_mut) {
        Some(list) => list.push(json!({"type": "user"})),
        None => linux["namespaces"] = json!([{"type": "user"}]),
    }
}

/// A container that names the sentry's own pid namespace is to be in the sandbox's (gVisor
/// `Sandbox.fixPidns`).
fn join_root_pids(spec: &mut Value, sentry: u32) {
    let own = format!("/proc/{sentry}/ns/pid");
    let list = spec.pointer_mut("/linux/namespaces");
    if let Some(list) = list.and_then(Value::as_array_mut) {
        list.retain(|ns| ns["type"] != "pid" || ns["path"] != own.as_str());
    }
}

/// `config.Config` as far as a sentry looks at it for a container that is not its first; what is
/// not here is zero in Go.
fn settings(config: &Config) -> Value {
    json!({
        "RootDir": config.root,
        "Platform": "systrap",
        // Shared: volumes may change from outside.
        "FileAccessMounts": 1,
        "DirectFS": has_direct_files(&config.flags),
        "EnableRaw": config.is_on("net-raw"),
        "OCISeccomp": config.is_on("oci-seccomp"),
        // None of its own, and no limit.
        "DCache": -1,
        "FDLimit": -1,
        "NumNetworkChannels": 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(change: impl FnOnce(&mut Value)) -> Value {
        let mut spec = json!({
            "process": {"args": ["x"], "terminal": false},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "mount"}]},
            "annotations": {"io.kubernetes.cri.container-type": "container"},
        });
        change(&mut spec);
        spec
    }

    #[test]
    fn what_needs_more_than_slots_is_left_to_the_command() {
        check(&spec(|_| {})).unwrap();
        let changes: [fn(&mut Value); 7] = [
            |s| s["process"]["terminal"] = true.into(),
            |s| s["process"]["args"] = json!([]),
            |s| s["root"] = Value::Null,
            |s| s["linux"]["namespaces"] = json!([{"type": "user"}]),
            |s| s["linux"]["devices"] = json!([{"path": "/dev/x"}]),
            |s| s["annotations"]["dev.gvisor.flag.debug"] = "true".into(),
            |s| s["hooks"] = json!({"prestart": []}),
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert!(check(&spec(change)).is_err(), "{n}");
        }
    }

    #[test]
    fn mounts_that_are_no_file_or_directory_are_refused_and_others_not_served() {
        let mut proc = json!({"destination": "/proc", "type": "proc", "source": "proc"});
        let bundle = Path::new("/");
        assert!(serve(&mut proc, bundle).unwrap().is_none());
        let mut null = json!({"destination": "/x", "type": "bind", "source": "/dev/null"});
        assert!(serve(&mut null, bundle).is_err());
        let dir = tempfile::tempdir().unwrap();
        let mut volume =
            json!({"destination": "x/y", "source": dir.path(), "options": ["bind", "ro"]});
        let served = serve(&mut volume, bundle).unwrap().unwrap();
        assert_eq!(served.target, Path::new("/x/y"));
        assert!(served.is_dir && served.access == Access::Read && served.depth == Depth::TopOnly);
        assert_eq!(volume["type"], "bind");
    }

    #[test]
    fn targets_that_a_sentry_would_not_find_as_a_gofer_does_are_left_to_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let [root, volume] = ["root", "volume"].map(|name| dir.path().join(name));
        for inner in ["root/etc", "root/cfg", "volume/sub"] {
            fs::create_dir_all(dir.path().join(inner)).unwrap();
        }
        for file in ["root/etc/here", "root/cfg/hidden", "volume/there"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        for (target, link) in [
            ("/nowhere", "root/etc/dangling"),
            ("/etc", "root/linked"),
            ("there", "volume/link"),
        ] {
            std::os::unix::fs::symlink(target, dir.path().join(link)).unwrap();
        }
        let served = |source: &Path, target: &str, access| Served {
            source: source.to_owned(),
            target: target.into(),
            is_dir: source.is_dir(),
            depth: Depth::All,
            access,
        };
        // A file, or with a slash at the end a directory.
        let refusal = |target: &str, cfg: Access, root_is_readonly| {
            let source = if target.ends_with('/') {
                volume.clone()
            } else {
                volume.join("there")
            };
            let all = [
                served(&root, "/", Access::Read),
                // In an order in which one lies in another that comes later.
                served(&source, target.trim_end_matches('/'), Access::Read),
                served(&volume, "/cfg", cfg),
            ];
            let refused = check_targets(&all, root_is_readonly).err();
            refused.map(|e| e.to_string())
        };
        let (read, write) = (Access::Read, Access::Write);
        for (target, cfg, root_is_readonly, expected) in [
            ("/etc/here", read, true, None),
            ("/etc/new", read, false, None),
            ("/etc/new", write, true, Some("nothing can be made")),
            ("/etc/new/", read, true, None),
            ("/cfg/there", read, true, None),
            ("/cfg/hidden", read, false, Some("nothing can be made")),
            ("/cfg/sub/new", read, false, Some("nothing can be made")),
            ("/cfg/new", write, true, None),
            ("/cfg/new/", read, true, None),
            ("/cfg", read, false, None),
            ("/etc/dangling", read, false, Some("a link")),
            ("/linked/here", read, false, Some("a link")),
            ("/linked/new/", read, false, Some("a link")),
            ("/cfg/link", write, false, Some("a link")),
            ("/etc/../etc/here", read, false, Some("upwards")),
            ("/..", read, false, Some("upwards")),
        ] {
            let refused = refusal(target, cfg, root_is_readonly);
            let fits = match (&refused, expected) {
                (Some(words), Some(expected)) => words.contains(expected),
                (refused, expected) => refused.is_none() && expected.is_none(),
            };
            assert!(fits, "{target} {cfg:?} {root_is_readonly}: {refused:?}");
        }
    }

    #[test]
    fn what_the_sandbox_shares_is_served_by_no_gofer() {
        let sandbox = json!({"mountHints": {"mounts": {"v": {"mount": {"source": "/v"}}}}});
        let of = |kind: &str, source: &str, options: &[&str]| {
            let mount = json!({"type": kind, "source": source, "options": options});
            is_shared(&sandbox, &spec(|s| s["mounts"] = json!([mount])))
        };
        assert!(of("bind", "/v", &["rw"]));
        assert!(of("none", "/v", &["rbind"]));
        assert!(!of("tmpfs", "/v", &["rw"]));
        assert!(!of("bind", "/other", &["rw"]));
        assert!(!is_shared(&json!({"mountHints": {}}), &spec(|_| {})));
    }

    #[test]
    fn the_pid_namespace_of_the_sentry_is_the_sandboxes_own() {
        let mut own = spec(|_| {});
        join_root_pids(&mut own, 7);
        assert_eq!(own["linux"]["namespaces"], json!([{"type": "mount"}]));
        let mut other = spec(|_| {});
        join_root_pids(&mut other, 8);
        assert_eq!(other, spec(|_| {}));
        own_users(&mut other);
        assert_eq!(other["linux"]["namespaces"][2]["type"], "user");
    }
}
