// SPDX-License-Identifier: Apache-2.0

//! What the containers of a Pod share within their sandbox.
//!
//! runsc mounts each volume of each container as a file system of its own: locks, sockets and
//! watches of one container mean nothing to another. Only what a hint names is one file system
//! for all. The hints are the node's: those of the Pod's annotations are dropped.

use kiln_agent_api::shm;
use serde_json::Value;

use crate::bundle::{Spec, is_bind};

/// Where on the host containerd keeps the `/dev/shm` of the Pod whose sandbox has `spec`. `None`
/// where the Pod has none of its own: it is no Pod, or has the host's.
pub(crate) fn shm_source(spec: &Spec) -> Option<String> {
    let source = shm_mount(spec.value())?["source"].as_str()?;
    (spec.is_pod() && source != shm::PATH).then(|| source.to_owned())
}

fn shm_mount(spec: &Value) -> Option<&Value> {
    let mounts = spec["mounts"].as_array()?;
    mounts.iter().find(|m| m["destination"] == shm::PATH)
}

/// Mounts the Pod's `/dev/shm`, which is at `source` on the host, from within the sandbox. A
/// volume that the container has there stays. The sandbox's first container brings the hint.
pub(crate) fn share_shm(spec: &mut Spec, source: &str, is_first: bool) {
    let spec = spec.value_mut();
    let mounts = spec["mounts"].as_array_mut();
    for mount in mounts.into_iter().flatten() {
        if mount["destination"] == shm::PATH && mount["source"] == source && is_bind(mount) {
            let options = mount["options"].as_array();
            *mount = shm::mount(options.map_or(&[], Vec::as_slice));
        }
    }
    if is_first {
        shm::hint(spec);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const OF_THE_POD: &str = "/run/containerd/sandboxes/pod1/shm";

    /// A container with `/dev/shm` from `source`.
    fn spec(kind: &str, source: &str, options: &[&str]) -> Spec {
        let spec = json!({
            "annotations": {"io.kubernetes.cri.container-type": kind},
            "mounts": [
                {"destination": "/dev/shm", "type": "bind", "source": source, "options": options},
                {"destination": "/other", "type": "bind", "source": OF_THE_POD, "options": ["rbind"]},
            ],
        });
        Spec::parse(spec.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn only_a_pod_has_one_of_its_own() {
        let source = |kind, source| shm_source(&spec(kind, source, &["rbind", "ro"]));
        assert_eq!(source("sandbox", OF_THE_POD).as_deref(), Some(OF_THE_POD));
        assert_eq!(source("sandbox", "/dev/shm"), None);
        assert_eq!(source("container", OF_THE_POD), None);
        assert_eq!(shm_source(&Spec::parse(b"{}").unwrap()), None);
    }

    #[test]
    fn the_pods_is_mounted_from_within_the_sandbox() {
        let mut first = spec("sandbox", OF_THE_POD, &["rbind", "ro"]);
        share_shm(&mut first, OF_THE_POD, true);
        let mut member = spec("container", OF_THE_POD, &["rbind", "rprivate", "rw"]);
        share_shm(&mut member, OF_THE_POD, false);
        for (spec, options) in [(&first, json!(["ro"])), (&member, json!([]))] {
            let mounts = &spec.value()["mounts"];
            assert_eq!(mounts[0], shm::mount(options.as_array().unwrap()));
            assert_eq!(mounts[0]["options"], options);
            assert_eq!(mounts[1]["source"], OF_THE_POD);
        }
        let hint = |spec: &Spec| {
            let source = mounted(spec)["source"].clone();
            let annotations = spec.value()["annotations"].as_object().unwrap().clone();
            annotations.values().any(|value| *value == source)
        };
        assert!(hint(&first) && !hint(&member));
    }

    fn mounted(spec: &Spec) -> &Value {
        shm_mount(spec.value()).unwrap()
    }

    #[test]
    fn a_volume_in_its_place_stays() {
        let volume = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/cache";
        let mut member = spec("container", volume, &["rbind", "rw"]);
        let before = mounted(&member).clone();
        share_shm(&mut member, OF_THE_POD, false);
        assert_eq!(*mounted(&member), before);
    }
}
