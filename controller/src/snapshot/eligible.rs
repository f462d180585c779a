// SPDX-License-Identifier: Apache-2.0

//! Which Pods can be snapshotted, by their spec.

use k8s_openapi::api::core::v1::{Container, PodSpec};
use kiln_crds::Sandbox;

/// Fields of a Pod that its next one has otherwise. A process has read them by then.
const CHANGING: [&str; 5] = [
    "status.podIP",
    "status.podIPs",
    "metadata.uid",
    "status.hostIP",
    "status.hostIPs",
];

/// Resources that are no devices.
const PLAIN: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

/// Says why no snapshot can be taken of the Pods of a Sandbox; `None` if one can.
pub(super) fn ineligibility(sandbox: &Sandbox) -> Option<String> {
    let spec = &sandbox.spec.pod_template.spec;
    let claims = sandbox.spec.volume_claim_templates.iter().flatten();
    let is_shared = claims
        .flat_map(|claim| claim.spec.access_modes.iter().flatten())
        .any(|mode| mode == "ReadWriteMany");
    if is_shared {
        return Some("others may write to a ReadWriteMany volume meanwhile".to_owned());
    }
    if spec.host_network == Some(true) {
        return Some("it is on the node's network".to_owned());
    }
    if spec.host_pid == Some(true) || spec.host_ipc == Some(true) {
        return Some("it shares processes or IPC with the node".to_owned());
    }
    if spec.resource_claims.iter().flatten().next().is_some() {
        return Some("it has devices by resource claims".to_owned());
    }
    if spec.host_users == Some(false) {
        return Some("it has a user namespace".to_owned());
    }
    of_volumes(spec).or_else(|| containers(spec).find_map(of_container))
}

fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
}

fn of_volumes(spec: &PodSpec) -> Option<String> {
    let volumes = spec.volumes.iter().flatten();
    volumes.into_iter().find_map(|volume| {
        let name = &volume.name;
        if let Some(claim) = &volume.persistent_volume_claim
            && claim.read_only != Some(true)
        {
            return Some(format!("others may write to volume {name} meanwhile"));
        }
        let is_written = || {
            let mounts = containers(spec).flat_map(|c| c.volume_mounts.iter().flatten());
            mounts
                .filter(|m| m.name == *name)
                .any(|m| m.read_only != Some(true))
        };
        let is_hosts = volume.host_path.is_some() || volume.nfs.is_some();
        (is_hosts && is_written()).then(|| format!("others may write to volume {name} meanwhile"))
    })
}

fn of_container(container: &Container) -> Option<String> {
    let name = &container.name;
    let context = container.security_context.as_ref();
    if context.and_then(|c| c.privileged) == Some(true) {
        return Some(format!("container {name} is privileged"));
    }
    if container.volume_devices.iter().flatten().next().is_some() {
        return Some(format!("container {name} has a block device"));
    }
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|r| r.limits.as_ref());
    let is_device =
        |key: &&String| !PLAIN.contains(&key.as_str()) && !key.starts_with("hugepages-");
    if let Some(device) = limits.into_iter().flat_map(|l| l.keys()).find(is_device) {
        return Some(format!("container {name} has a device ({device})"));
    }
    let fields = container.env.iter().flatten().filter_map(|env| {
        let field = env.value_from.as_ref()?.field_ref.as_ref()?;
        Some((&env.name, &field.field_path))
    });
    let mut changing = fields.filter(|(_, path)| CHANGING.contains(&path.as_str()));
    let (variable, path) = changing.next()?;
    Some(format!(
        "variable {variable} of container {name} is {path}, which another Pod has otherwise"
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn ineligibility_of(spec: &Value, claims: &Value) -> Option<String> {
        let sandbox = json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "metadata": {"name": "b"},
            "spec": {"podTemplate": {"spec": spec}, "volumeClaimTemplates": claims},
        });
        ineligibility(&serde_json::from_value(sandbox).unwrap())
    }

    fn with(container: &Value) -> Value {
        let mut whole = json!({"name": "c", "image": "i"});
        for (key, value) in container.as_object().unwrap() {
            whole[key] = value.clone();
        }
        json!({"containers": [whole]})
    }

    #[test]
    fn what_its_next_pod_could_not_take_up_is_refused() {
        let host_path = |read_only: bool| {
            let mut spec = with(&json!({"volumeMounts": [
                {"name": "v", "mountPath": "/v", "readOnly": read_only},
            ]}));
            spec["volumes"] = json!([{"name": "v", "hostPath": {"path": "/x"}}]);
            spec
        };
        let env = |path: &str| {
            with(&json!({"env": [{"name": "V", "valueFrom": {"fieldRef": {"fieldPath": path}}}]}))
        };
        let mut network = with(&json!({}));
        network["hostNetwork"] = true.into();
        let mut users = with(&json!({}));
        users["hostUsers"] = false.into();
        let mut claim = with(&json!({}));
        claim["volumes"] = json!([{"name": "v", "persistentVolumeClaim": {"claimName": "x"}}]);
        for (spec, word) in [
            (network, "network"),
            (users, "user namespace"),
            (claim, "volume v"),
            (host_path(false), "volume v"),
            (
                with(&json!({"securityContext": {"privileged": true}})),
                "privileged",
            ),
            (
                with(&json!({"resources": {"limits": {"nvidia.com/gpu": "1"}}})),
                "nvidia.com/gpu",
            ),
            (
                with(&json!({"volumeDevices": [{"name": "v", "devicePath": "/dev/x"}]})),
                "block device",
            ),
            (env("status.podIP"), "variable V"),
            (env("metadata.uid"), "variable V"),
        ] {
            let why = ineligibility_of(&spec, &json!(null)).unwrap_or_default();
            assert!(why.contains(word), "{spec}: {why}");
        }
        let claims =
            json!([{"metadata": {"name": "v"}, "spec": {"accessModes": ["ReadWriteMany"]}}]);
        assert!(ineligibility_of(&with(&json!({})), &claims).is_some());
        let own = json!([{"metadata": {"name": "v"}, "spec": {"accessModes": ["ReadWriteOnce"]}}]);
        let mut plain = with(&json!({"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}));
        plain["volumes"] = json!([{"name": "e", "emptyDir": {}}]);
        for spec in [plain, host_path(true), env("metadata.name")] {
            assert_eq!(ineligibility_of(&spec, &own), None);
        }
    }
}
