// SPDX-License-Identifier: Apache-2.0

//! Everything that comes from outside, with anything in it: an answer or an error, never a panic,
//! which would take the Pod's shim down. `cargo test` tries some thousand inputs; `cargo bolero
//! test` goes on for as long as it is let.

use std::path::Path;

use bolero::check;
use containerd_shim::Flags;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use kiln_agent_api::Policy;
use kiln_host::cgroup::{Cgroup, Limits};
use serde_json::{Value, json};

use crate::{bundle::Spec, cli::bootstrap_params, config::config_path, paths};

/// Takes a `config.json` the way that create does.
fn drive(text: &[u8]) {
    let Ok(mut spec) = Spec::parse(text) else {
        return;
    };
    let policy = Policy {
        allow_privileged: true,
        allow_host_network: true,
        ..Policy::default()
    };
    // Refusals are answers.
    let _ = (
        spec.role(),
        spec.check(&policy, Some(7)),
        spec.check(&Policy::default(), None),
    );
    let limits = Limits::sum(&[spec.limits().unwrap_or_default(), spec.pod_limits()]);
    let _ = (
        spec.network(),
        spec.log_dir(),
        spec.terminal(),
        spec.shares_pids(),
        spec.restore_image(),
    );
    let path = spec.cgroups_path().unwrap_or("/pods/p");
    let Ok(cgroup) = Cgroup::new(Path::new("/nowhere"), path) else {
        return;
    };
    assert!(!cgroup.spec_path().contains(".."));
    spec.rewrite(&cgroup, Some(&limits));
    assert!(!paths::tests::has_unclean(spec.value()));
}

fn valid() -> Value {
    json!({
        "annotations": {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"},
        "hooks": {},
        "process": {"terminal": false, "oomScoreAdj": 0, "cwd": "/"},
        "linux": {
            "cgroupsPath": "/pods/c",
            "namespaces": [{"type": "network", "path": "/proc/7/ns/net"}, {"type": "pid"}],
            "resources": {"cpu": {"shares": 2, "quota": 1, "period": 1}, "memory": {"limit": 1}, "devices": [{"allow": false}]},
            "rootfsPropagation": "rshared",
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "devices": [{"path": "/dev/x"}],
        },
        "mounts": [{"destination": "/m", "options": ["rshared"]}],
    })
}

const PATHS: [&str; 32] = [
    "",
    "/annotations",
    "/annotations/io.kubernetes.cri.container-type",
    "/annotations/io.kubernetes.cri.sandbox-id",
    "/hooks",
    "/process",
    "/process/terminal",
    "/process/oomScoreAdj",
    "/process/cwd",
    "/linux",
    "/linux/cgroupsPath",
    "/linux/namespaces",
    "/linux/namespaces/0",
    "/linux/namespaces/0/type",
    "/linux/namespaces/0/path",
    "/linux/resources",
    "/linux/resources/cpu",
    "/linux/resources/cpu/quota",
    "/linux/resources/cpu/period",
    "/linux/resources/memory",
    "/linux/resources/memory/limit",
    "/linux/resources/devices/0",
    "/linux/rootfsPropagation",
    "/linux/maskedPaths",
    "/linux/maskedPaths/0",
    "/linux/readonlyPaths/0",
    "/linux/devices",
    "/linux/devices/0",
    "/linux/devices/0/path",
    "/mounts/0",
    "/mounts/0/destination",
    "/mounts/0/options",
];

fn values() -> [Value; 18] {
    [
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("sandbox"),
        json!("/../.."),
        json!("/a/./b//"),
        json!("//"),
        json!("a:b:c"),
        json!([]),
        json!([null, 1, {}]),
        json!({}),
        json!({"allow": true, "access": "rwm"}),
    ]
}

#[test]
fn a_spec_of_any_bytes_is_answered() {
    check!().for_each(drive);
}

#[test]
fn a_spec_of_any_shape_is_answered() {
    let values = values();
    check!().with_type::<Vec<(u8, u8)>>().for_each(|edits| {
        let mut spec = valid();
        for (path, value) in edits {
            let path = PATHS[usize::from(*path) % PATHS.len()];
            if let Some(place) = spec.pointer_mut(path) {
                *place = values[usize::from(*value) % values.len()].clone();
            }
        }
        drive(spec.to_string().as_bytes());
    });
}

#[test]
fn whatever_containerd_pipes_in_is_answered() {
    let flags = Flags {
        id: "c".into(),
        namespace: "n".into(),
        ..Flags::default()
    };
    check!().for_each(|input: &[u8]| {
        let _ = bootstrap_params(input, &flags);
        let type_url = "runtimeoptions.v1.Options".to_owned();
        let _ = config_path(&Any {
            type_url,
            value: input.to_vec(),
            ..Any::default()
        });
    });
}
