// SPDX-License-Identifier: Apache-2.0

//! `/dev/shm` of a Pod: one file system of the sandbox, which all its containers mount.
//!
//! runsc shares a mount between containers if the spec of the sandbox's first container has a
//! hint for its source (gVisor `runsc/boot/mount_hints.go`). The hint is read at boot, when a
//! sandbox that is made ahead has no Pod. Its source is therefore the same for all Pods.

use serde_json::{Value, json};

/// Where containers have it.
pub const PATH: &str = "/dev/shm";

/// Source of the mount. Nothing can be there, so no mount of a directory of the host has it.
const SOURCE: &str = "/proc/kiln/shm";

/// Bytes that fit, as many as in the file system that containerd makes for each Pod (containerd
/// `internal/cri/server/podsandbox/sandbox_run_linux.go`, `setupSandboxFiles`).
const BYTES: u64 = 64 << 20;

/// Prefix of the annotations that are runsc's hints for mounts.
pub(crate) const HINTS: &str = "dev.gvisor.spec.mount.";

/// Name of the hint.
const NAME: &str = "kiln-shm";

/// Writes the hint into the spec of a sandbox's first container.
pub fn hint(spec: &mut Value) {
    // What of a mount's own options is stricter still applies to it.
    write_hint(spec, NAME, SOURCE, &format!("rw,mode=1777,size={BYTES}"));
}

/// Writes into the spec of a sandbox's first container that what mounts have of `source` is one file
/// system of the sandbox, mounted with `options`. The `name` has no dot.
pub fn write_hint(spec: &mut Value, name: &str, source: &str, options: &str) {
    let fields = [
        ("source", source),
        ("type", "tmpfs"),
        ("share", "pod"),
        ("options", options),
    ];
    for (field, value) in fields {
        spec["annotations"][format!("{HINTS}{name}.{field}")] = value.into();
    }
}

/// Whether [`hint`] writes an annotation with this key.
pub(crate) fn is_hint(key: &str) -> bool {
    key.strip_prefix(HINTS)
        .and_then(|key| key.strip_prefix(NAME))
        .is_some_and(|field| field.starts_with('.'))
}

/// The mount of it, with those of a container's `options` that take something from it.
#[must_use]
pub fn mount(options: &[Value]) -> Value {
    json!({
        "destination": PATH,
        "type": "tmpfs",
        "source": SOURCE,
        "options": limiting(options),
    })
}

/// Those of `options` of a bind mount that mean the same for a mount from within a sandbox.
#[must_use]
pub fn limiting(options: &[Value]) -> Vec<Value> {
    const KEPT: [&str; 4] = ["ro", "nosuid", "nodev", "noexec"];
    let kept = options
        .iter()
        .filter(|option| KEPT.iter().any(|kept| *option == kept));
    kept.cloned().collect()
}
