// SPDX-License-Identifier: Apache-2.0

//! The OCI bundle of a warm sandbox: our own first process, on a root file system with nothing
//! else in it.

use std::{fs, io, path::Path};

use kiln_agent_api::{Shape, naming_process, shm};
use kiln_host::oom;
use runsc_wrapper::ContainerId;
use serde_json::{Value, json};

/// What CRI gives the first process of a Pod (kubelet's `qos.PodInfraOOMAdj`).
const OOM_SCORE_ADJ: i64 = -998;

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

/// Writes the bundle of a container that finds out whether prestarted gofers work: a program that is in a
/// volume, beside a file that is mounted alone, in a root file system that is `rootfs`. Blocks.
pub(crate) fn write_trial(dir: &Path, rootfs: &Path, sandbox: &ContainerId) -> io::Result<()> {
    let bind = |source: &Path, target: &str| {
        json!({"destination": target, "type": "bind", "source": source,
               "options": ["rbind", "rprivate", "ro"]})
    };
    let mut process = naming_process("trial");
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
