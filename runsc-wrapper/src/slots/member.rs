// SPDX-License-Identifier: Apache-2.0

//! A container in slots: from its bundle to what the sentry and runsc's state are told.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{FileTypeExt as _, OpenOptionsExt},
    },
    path::{Path, PathBuf},
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
    DIRS, ROOT, Slots, has_direct_files,
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

/// A container whose files are in slots.
#[derive(Debug)]
pub(crate) struct Member {
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

/// A mount that a gofer serves.
#[derive(Debug)]
struct Served {
    tree: Tree,
    is_dir: bool,
}

impl Member {
    /// Puts the files of the bundle of a container of `sandbox` into slots. Blocks.
    ///
    /// # Errors
    /// Why it must be left to the command; the slots are spent then.
    pub(crate) fn new(
        config: &Config,
        bundle: &Path,
        sandbox: &ContainerId,
        slots: Slots,
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
            gofer: slots.pid(),
            conf: settings(config),
            spec: Value::Null,
        };
        let access = match upper {
            Upper::None if !readonly => Access::Write,
            _ => Access::Read,
        };
        let mut served = vec![Served {
            tree: Tree::copy(&root, Depth::All, access)?,
            is_dir: true,
        }];
        let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut);
        for mount in mounts.into_iter().flatten() {
            if let Some(one) = serve(mount, bundle, (&root, readonly))? {
                served.push(one);
                member.uppers.push(Upper::None);
            }
        }
        let files = seat(slots, served)?;
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
        let hints = sandbox.pointer("/mountHints/mounts");
        let has_hints = hints
            .and_then(Value::as_object)
            .is_some_and(|h| !h.is_empty());
        if !sandbox.is_object() || has_hints {
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

/// Makes a tree of the source of a mount, if it is one that a gofer serves (gVisor
/// `specutils.HasMountConfig`), and completes its options as a gofer would. Its target is the
/// sentry's to make, which it cannot where a file is missing in a root file system that is
/// read-only, or a symbolic link leads to where nothing is.
fn serve(
    mount: &mut Value,
    bundle: &Path,
    (root, readonly): (&Path, bool),
) -> io::Result<Option<Served>> {
    let options = mount["options"].as_array().cloned().unwrap_or_default();
    let has = |name: &str| options.iter().any(|o| o == name);
    if mount["type"] == "erofs" {
        return Err(unfit("a mount is an image"));
    }
    let is_bind = mount["type"] == "bind" || has("bind") || has("rbind");
    let source = text(&mount["source"]);
    if !is_bind || source.is_empty() {
        return Ok(None);
    }
    let source = bundle.join(source);
    let kind = fs::metadata(&source)?.file_type();
    if kind.is_socket() || kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
        return Err(unfit("a mount is neither file nor directory"));
    }
    let target = text(&mount["destination"]);
    match find(root, target, ResolveFlag::empty()) {
        Ok(()) => {}
        Err(_) if readonly && !kind.is_dir() => {
            return Err(unfit(
                "a file is mounted that a read-only root file system lacks",
            ));
        }
        Err(_) if find(root, target, ResolveFlag::RESOLVE_NO_SYMLINKS) == Err(Errno::ELOOP) => {
            return Err(unfit("a link is where something is mounted"));
        }
        Err(_) => {}
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
    let tree = Tree::copy(&source, depth, access)?;
    mount["source"] = source.to_string_lossy().into();
    mount["type"] = "bind".into();
    let options = options.into_iter().chain(more.map(Value::from));
    mount["options"] = options.collect();
    Ok(Some(Served {
        tree,
        is_dir: kind.is_dir(),
    }))
}

/// Looks for `path` in the root file system `root`, where its symbolic links cannot lead out.
fn find(root: &Path, path: &str, resolve: ResolveFlag) -> nix::Result<()> {
    let resolve = resolve | ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(resolve);
    let root = open(root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    openat2(&root, path, how).map(drop)
}

/// Puts trees over slots, and returns the connections of these in the order of the trees. The
/// others are closed.
fn seat(slots: Slots, served: Vec<Served>) -> io::Result<Vec<OwnedFd>> {
    let mut files = slots.connections;
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
        trees.push((one.tree, target));
    }
    attach_in(&slots.process, trees)?;
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
        let root = tempfile::tempdir().unwrap();
        let at = |readonly| (root.path(), readonly);
        let bundle = Path::new("/");
        assert!(serve(&mut proc, bundle, at(false)).unwrap().is_none());
        let mut null = json!({"destination": "/x", "type": "bind", "source": "/dev/null"});
        assert!(serve(&mut null, bundle, at(false)).is_err());
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let mut hosts = json!({"destination": "/etc/hosts", "type": "bind", "source": file});
        assert!(serve(&mut hosts, bundle, at(true)).is_err());
        fs::create_dir(root.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/nowhere", root.path().join("etc/hosts")).unwrap();
        let refused = serve(&mut hosts, bundle, at(false)).unwrap_err();
        assert!(refused.to_string().contains("a link"), "{refused}");
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
