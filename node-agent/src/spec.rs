// SPDX-License-Identifier: Apache-2.0

//! The OCI bundle of a warm sandbox: our own first process, on a root file system with nothing
//! else in it.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use kiln_agent_api::{Shape, shm};
use kiln_host::oom;
use runsc_wrapper::ContainerId;
use serde_json::{Value, json};

use crate::erofs;

/// Weight of the CPU time of all warm sandboxes together, by the file of each version of cgroups:
/// 256 shares beside the 1024 for each CPU of the node that kubelet gives to all Pods. Booting must
/// not slow what runs, but go on.
const CPU_WEIGHT: [(&str, &str); 2] = [("cpu.shares", "256"), ("cpu.weight", "10")];

/// What CRI gives the first process of a Pod (kubelet's `qos.PodInfraOOMAdj`).
const OOM_SCORE_ADJ: i64 = -998;

/// How long killed processes may take to leave their cgroup.
pub(crate) const END_TIME: Duration = Duration::from_secs(1);

/// Pause between two looks at whether they have.
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// `cgroupsPath` of sandbox `id` below the cgroup `parent`.
pub(crate) fn cgroup_of(parent: &str, id: &str) -> String {
    format!("{}/{id}", parent.trim_end_matches('/'))
}

/// The spec of a root container, before it has a shape: what [`Shape::of`] is asked about.
pub(crate) fn blank() -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/pause"],
            "cwd": "/",
            "noNewPrivileges": true,
            "oomScoreAdj": OOM_SCORE_ADJ.max(oom::lowest_score_adj().unwrap_or(i64::MIN)),
        },
        "root": {"readonly": true},
        // Until it is a Pod's. A domain name that is the same shows that the runtime makes it so.
        "hostname": "warm",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "namespaces": namespaces,
            "resources": {},
        },
    })
}

/// Writes the bundle of sandbox `id` into `dir`. The sentry reads `image`, if there is one, in
/// place of `rootfs` (gVisor `runsc/boot/mount_hints.go`). Blocks.
pub(crate) fn write(
    dir: &Path,
    id: &ContainerId,
    shape: &Shape,
    (rootfs, image): (&Path, Option<&Path>),
    cgroup: &str,
) -> io::Result<()> {
    let mut spec = blank();
    shape.apply(&mut spec);
    spec["root"]["path"] = rootfs.to_string_lossy().into();
    spec["linux"]["cgroupsPath"] = cgroup.into();
    let annotations = &mut spec["annotations"];
    annotations["io.kubernetes.cri.container-type"] = "sandbox".into();
    annotations["io.kubernetes.cri.sandbox-id"] = id.as_str().into();
    if let Some(image) = image {
        annotations["dev.gvisor.spec.rootfs.source"] = image.to_string_lossy().into();
        annotations["dev.gvisor.spec.rootfs.type"] = "erofs".into();
    }
    fs::write(dir.join("config.json"), spec.to_string())
}

/// Makes the root file system of warm sandboxes, as a directory at `rootfs` and as an image, anew
/// if the program has changed. Blocks.
pub(crate) fn write_rootfs(rootfs: &Path, image: &Path, pause: &Path) -> io::Result<()> {
    const DIRS: [&str; 5] = ["dev", "etc", "proc", "sys", "tmp"];
    let program = fs::read(pause)?;
    fs::create_dir_all(rootfs)?;
    for dir in DIRS {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    replace(&rootfs.join("pause"), &program)?;
    replace(image, &erofs::image(&DIRS, "pause", &program)?)
}

/// Puts another file in the place of one with other content: sandboxes keep what they have.
fn replace(target: &Path, content: &[u8]) -> io::Result<()> {
    if fs::read(target).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let new = target.with_extension("new");
    fs::write(&new, content)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(new, target)
}

/// Writes the bundle of a container that finds out whether slots work: a program that is in a
/// volume, beside a file that is mounted alone, in a root file system that is `rootfs`. Blocks.
pub(crate) fn write_trial(dir: &Path, rootfs: &Path, sandbox: &ContainerId) -> io::Result<()> {
    let bind = |source: &Path, target: &str| {
        json!({"destination": target, "type": "bind", "source": source,
               "options": ["rbind", "rprivate", "ro"]})
    };
    let mut process = kiln_agent_api::naming_process("trial");
    process["args"][0] = "/tmp/pause".into();
    let spec = json!({
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": rootfs, "readonly": false},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            bind(rootfs, "/tmp"),
            bind(&rootfs.join("pause"), "/pause"),
            shm::mount(&[]),
        ],
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": sandbox.as_str(),
        },
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]},
    });
    fs::create_dir(dir)?;
    fs::write(dir.join("config.json"), spec.to_string())
}

/// On hosts with both versions of cgroups: leaves this process's cgroup of version 2 for the one
/// that `path` is in. runsc makes cgroups of version 1 there, so that its sandboxes stay where
/// this process is, and whoever ends the agent's container would end Pods with it. Blocks.
///
/// # Errors
/// The kernel's.
pub(crate) fn leave_own_cgroup(path: &str) -> io::Result<()> {
    let parent = Path::new(path).parent().unwrap_or(Path::new("/"));
    let below = parent.strip_prefix("/").unwrap_or(parent);
    let procs = Path::new("/sys/fs/cgroup/unified")
        .join(below)
        .join("cgroup.procs");
    match procs.exists() {
        true => fs::write(procs, "0"),
        false => Ok(()),
    }
}

/// Where the cgroup `path` is, or would be, in every hierarchy of the host. Blocks.
fn directories_of(path: &str) -> io::Result<Vec<PathBuf>> {
    let path = path.trim_matches('/');
    let mount = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(mount)?.flatten().map(|e| e.path());
    let all = hierarchies.chain([mount.to_owned()]);
    Ok(all.map(|hierarchy| hierarchy.join(path)).collect())
}

/// Puts process `pid` into the cgroup `path` in every hierarchy of the host that has it. Blocks.
pub(crate) fn join_cgroup(path: &str, pid: u32) -> io::Result<()> {
    for dir in directories_of(path)? {
        let procs = dir.join("cgroup.procs");
        if procs.exists() {
            fs::write(procs, pid.to_string())?;
        }
    }
    Ok(())
}

/// Lets Pods go before what is in the cgroup `path` and below, where there is one. Blocks.
pub(crate) fn yield_cpu(path: &str) -> io::Result<()> {
    for dir in directories_of(path)? {
        for (file, weight) in CPU_WEIGHT {
            let file = dir.join(file);
            if file.exists() {
                fs::write(file, weight)?;
            }
        }
    }
    Ok(())
}

/// Removes the cgroup `path` from every hierarchy of the host, if nothing is in it. What is in
/// use after `patience`, or not there, stays so. Blocks.
#[expect(clippy::disallowed_methods, reason = "for threads that may block")]
pub(crate) fn remove_cgroup(path: &str, patience: Duration) {
    let until = Instant::now() + patience;
    let mut dirs = directories_of(path).unwrap_or_default();
    loop {
        // Processes that have been killed are in it for a while.
        let is_busy = |e: io::Error| e.kind() == io::ErrorKind::ResourceBusy;
        dirs.retain(|dir| fs::remove_dir(dir).is_err_and(is_busy));
        if dirs.is_empty() || Instant::now() >= until {
            return;
        }
        thread::sleep(REMOVE_PAUSE);
    }
}

/// Removes the cgroups below `path` in the same way. Blocks.
pub(crate) fn remove_cgroups_below(path: &str, patience: Duration) {
    let dirs = directories_of(path).unwrap_or_default();
    let below = dirs.iter().flat_map(fs::read_dir).flatten().flatten();
    let below = below.filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
    let names: BTreeSet<_> = below.map(|dir| dir.file_name()).collect();
    for name in names {
        remove_cgroup(&cgroup_of(path, &name.to_string_lossy()), patience);
    }
}

/// Bytes of memory that the processes in the cgroup `path` and below hold. Blocks.
pub(crate) fn held_memory(path: &str) -> u64 {
    let path = path.trim_matches('/');
    let mount = Path::new("/sys/fs/cgroup");
    let files = [
        mount.join(path).join("memory.current"),
        mount
            .join("memory")
            .join(path)
            .join("memory.usage_in_bytes"),
    ];
    let read = |file: &PathBuf| fs::read_to_string(file).ok()?.trim().parse().ok();
    files.iter().find_map(read).unwrap_or(0)
}

/// Bytes of memory that the node could give without swapping, `MemAvailable` of proc_meminfo(5).
/// Blocks.
pub(crate) fn available_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}
