// SPDX-License-Identifier: Apache-2.0

//! The headless Service of a Sandbox.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::core::v1::{Container, Service, ServicePort, ServiceSpec},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kiln_crds::{Sandbox, keys};
use kube::ResourceExt;
use serde_json::{Value, json};

use super::pod;
use crate::{owner, patch};

/// The Service that a Sandbox has.
pub(super) fn desired(sandbox: &Sandbox) -> Service {
    let identity = pod::identity(sandbox);
    let ports = ports(sandbox);
    Service {
        metadata: ObjectMeta {
            name: Some(sandbox.name_any()),
            namespace: sandbox.namespace(),
            labels: Some(identity.clone()),
            owner_references: Some(vec![owner::reference(sandbox)]),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".to_owned()),
            selector: Some(identity),
            ports: (!ports.is_empty()).then_some(ports),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// The patch that makes an existing Service what it should be; `None` where it is.
pub(super) fn drift(service: &Service, sandbox: &Sandbox) -> Option<Value> {
    let wanted = desired(sandbox);
    let view = |service: &Service, with_ports: bool| {
        let spec = service.spec.as_ref();
        let hash = service.labels().get(keys::SANDBOX_NAME_HASH);
        let ports = spec.and_then(|s| s.ports.as_deref()).unwrap_or_default();
        let ports: Vec<Value> = ports.iter().map(port_view).collect();
        let mut view = json!({
            "metadata": {"labels": {keys::SANDBOX_NAME_HASH: hash}},
            "spec": {"selector": spec.and_then(|s| s.selector.as_ref())},
        });
        if with_ports {
            view["spec"]["ports"] = ports.into();
        }
        view
    };
    // A Service that was not asked for keeps the ports that somebody gave it.
    let with_ports = sandbox.spec.service == Some(true);
    let mut patch = patch::diff(&view(service, with_ports), &view(&wanted, with_ports));
    if owner::of(service, sandbox) != owner::Ownership::Ours {
        let patch = patch.get_or_insert_with(|| json!({"metadata": {}}));
        patch["metadata"]["ownerReferences"] = json!([owner::reference(sandbox)]);
    }
    patch
}

fn port_view(port: &ServicePort) -> Value {
    json!({
        "name": port.name,
        "port": port.port,
        "protocol": port.protocol,
        "targetPort": port.target_port,
    })
}

/// One port for each port and protocol of the containers; the first name that one has counts.
fn ports(sandbox: &Sandbox) -> Vec<ServicePort> {
    let spec = &sandbox.spec.pod_template.spec;
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|c| c.restart_policy.as_deref() == Some("Always"));
    let mut named: BTreeMap<(i32, String), Option<String>> = BTreeMap::new();
    let mut taken = BTreeSet::new();
    for container in spec.containers.iter().chain(sidecars) {
        for (port, protocol, name) in container_ports(container) {
            let entry = named.entry((port, protocol)).or_default();
            if let Some(name) = name
                && entry.is_none()
                && taken.insert(name.clone())
            {
                *entry = Some(name);
            }
        }
    }
    let ports = named.into_iter().map(|((port, protocol), name)| {
        let name = name.unwrap_or_else(|| free_name(port, &protocol, &taken));
        taken.insert(name.clone());
        ServicePort {
            name: Some(name),
            port,
            protocol: Some(protocol),
            target_port: Some(IntOrString::Int(port)),
            ..ServicePort::default()
        }
    });
    ports.collect()
}

fn container_ports(container: &Container) -> impl Iterator<Item = (i32, String, Option<String>)> {
    let ports = container.ports.iter().flatten();
    ports.filter(|p| p.container_port != 0).map(|p| {
        let protocol = p.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        let name = p.name.clone().filter(|name| !name.is_empty());
        (p.container_port, protocol, name)
    })
}

fn free_name(port: i32, protocol: &str, taken: &BTreeSet<String>) -> String {
    let base = format!("p-{port}-{}", protocol.to_lowercase());
    let others = (2..).map(|n| format!("{base}-{n}"));
    std::iter::once(base.clone())
        .chain(others)
        .find(|name| !taken.contains(name))
        .unwrap_or(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(containers: &Value) -> Sandbox {
        serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": "box", "namespace": "ns", "uid": "u1"},
            "spec": {"service": true, "podTemplate": {"spec": {"containers": containers}}},
        }))
        .unwrap()
    }

    #[test]
    fn ports_come_from_the_containers_once_each() {
        let sandbox = sandbox(&json!([
            {"name": "a", "ports": [{"containerPort": 80}, {"containerPort": 53, "protocol": "UDP", "name": "dns"}]},
            {"name": "b", "ports": [{"containerPort": 80, "name": "web"}, {"containerPort": 81, "name": "web"}, {"containerPort": 9}, {"containerPort": 8, "name": "p-9-tcp"}]},
        ]));
        let names: Vec<String> = ports(&sandbox)
            .into_iter()
            .map(|p| format!("{}/{}={}", p.port, p.protocol.unwrap(), p.name.unwrap()))
            .collect();
        assert_eq!(
            names,
            [
                "8/TCP=p-9-tcp",
                "9/TCP=p-9-tcp-2",
                "53/UDP=dns",
                "80/TCP=web",
                "81/TCP=p-81-tcp"
            ]
        );
    }

    #[test]
    fn a_service_that_drifts_is_put_right() {
        let sandbox = sandbox(&json!([{"name": "a", "ports": [{"containerPort": 80}]}]));
        let mut service = desired(&sandbox);
        assert!(drift(&service, &sandbox).is_none());
        service.spec.as_mut().unwrap().selector = Some(BTreeMap::new());
        assert!(drift(&service, &sandbox).unwrap()["spec"]["selector"].is_object());
    }
}
