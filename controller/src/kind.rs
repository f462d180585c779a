// SPDX-License-Identifier: Apache-2.0

//! Kinds of objects that the controller keeps, and what is kept of each.

use k8s_openapi::api::{
    core::v1::{ContainerStatus, PersistentVolumeClaim, Pod, PodSpec, Service},
    networking::v1::NetworkPolicy,
};
use kiln_crds::{
    PodSnapshot, PodSnapshotManualTrigger, PodSnapshotPolicy, PodSnapshotStorageConfig,
    PodTemplate, Sandbox, SandboxClaim, SandboxNode, SandboxTemplate, SandboxTemplateSpec,
    SandboxWarmPool, keys,
};
use kube::{Api, Client, Resource, ResourceExt};

use crate::{
    blocked,
    condition::shorten,
    known::{Answer, Kind, NAME, Print, outline_conditions, outline_names},
    shape,
};

macro_rules! namespaced {
    () => {
        fn api(client: Client, namespace: &str) -> Api<Answer<Self>> {
            Api::namespaced(client, namespace)
        }
    };
}

impl Kind for Sandbox {
    namespaced!();

    fn outline(&mut self) {
        self.spec.pod_template = PodTemplate::default();
        self.spec.volume_claim_templates = None;
        if let Some(status) = &mut self.status {
            outline_conditions(&mut status.conditions);
            outline_names(&mut status.pod_ips);
            status.node_name = status.node_name.take().map(|name| shorten(name, NAME));
            status.selector = None;
            status.service = None;
            status.service_fqdn = None;
        }
    }

    fn print(&self) -> Option<Print> {
        Print::of(self)
    }
}

impl Kind for SandboxClaim {
    namespaced!();

    fn outline(&mut self) {
        let spec = &mut self.spec;
        spec.env = None;
        spec.volume_claim_templates = None;
        spec.additional_pod_metadata = None;
        let pool = spec.warm_pool_ref.as_mut().map(|r| &mut r.name);
        let template = spec.sandbox_template_ref.as_mut().map(|r| &mut r.name);
        for name in [pool, template, spec.warmpool.as_mut()]
            .into_iter()
            .flatten()
        {
            *name = shorten(std::mem::take(name), NAME);
        }
        if let Some(status) = &mut self.status {
            outline_conditions(&mut status.conditions);
            status.sandbox = None;
        }
    }
}

impl Kind for SandboxWarmPool {
    namespaced!();

    fn outline(&mut self) {
        let name = &mut self.spec.sandbox_template_ref.name;
        *name = shorten(std::mem::take(name), NAME);
        self.status = None;
    }
}

impl Kind for SandboxTemplate {
    namespaced!();

    fn outline(&mut self) {
        self.spec = SandboxTemplateSpec {
            pod_template: PodTemplate {
                spec: shape::outline(&self.spec.pod_template.spec),
                ..PodTemplate::default()
            },
            ..SandboxTemplateSpec::default()
        };
    }
}

impl Kind for Service {
    namespaced!();

    fn is_watched(&self) -> bool {
        is_tracked(self)
    }

    fn outline(&mut self) {
        self.spec = None;
        self.status = None;
    }
}

impl Kind for PersistentVolumeClaim {
    const IS_READ_WHOLE: bool = false;

    namespaced!();

    fn is_watched(&self) -> bool {
        is_tracked(self)
    }

    fn outline(&mut self) {
        self.spec = None;
        self.status = None;
    }
}

impl Kind for NetworkPolicy {
    namespaced!();

    fn outline(&mut self) {
        self.spec = None;
    }
}

impl Kind for PodSnapshot {
    const IS_READ_WHOLE: bool = false;

    namespaced!();

    // The controller's own, apart from the agent's status.
    fn outline(&mut self) {
        if let Some(status) = &mut self.status {
            outline_conditions(&mut status.conditions);
        }
    }
}

impl Kind for PodSnapshotManualTrigger {
    const IS_READ_WHOLE: bool = false;

    namespaced!();

    fn outline(&mut self) {
        let pod = std::mem::take(&mut self.spec.target_pod);
        self.spec.target_pod = shorten(pod, NAME);
        if let Some(status) = &mut self.status {
            outline_conditions(&mut status.conditions);
            status.snapshot_created = None;
        }
    }
}

impl Kind for PodSnapshotPolicy {
    const IS_READ_WHOLE: bool = false;

    namespaced!();

    // An administrator's, and few.
    fn outline(&mut self) {}
}

impl Kind for PodSnapshotStorageConfig {
    const IS_READ_WHOLE: bool = false;

    fn api(client: Client, _namespace: &str) -> Api<Answer<Self>> {
        Api::all(client)
    }

    fn outline(&mut self) {}
}

impl Kind for SandboxNode {
    const IS_READ_WHOLE: bool = false;

    fn api(client: Client, _namespace: &str) -> Api<Answer<Self>> {
        Api::all(client)
    }

    fn is_optional() -> bool {
        true
    }

    // Nodes are few, and their agents' own.
    fn outline(&mut self) {}
}

impl Kind for Pod {
    namespaced!();

    fn is_watched(&self) -> bool {
        is_tracked(self)
    }

    fn trim(&mut self) {
        self.meta_mut().managed_fields = None;
        self.spec = self.spec.take().map(|spec| PodSpec {
            node_name: spec.node_name,
            ..PodSpec::default()
        });
        if let Some(status) = &mut self.status {
            keep_waiting(&mut status.container_statuses);
            keep_waiting(&mut status.init_container_statuses);
        }
    }

    fn outline(&mut self) {
        self.status = self.status.as_ref().and_then(blocked::outline);
    }
}

/// Leaves of `containers` who they are that wait, and for what.
fn keep_waiting(containers: &mut Option<Vec<ContainerStatus>>) {
    let all = containers.take().into_iter().flatten();
    let waiting = all.filter(|c| c.state.as_ref().is_some_and(|s| s.waiting.is_some()));
    let waiting = waiting.map(|container| ContainerStatus {
        name: container.name,
        state: container.state,
        ..ContainerStatus::default()
    });
    *containers = Some(waiting.collect()).filter(|left: &Vec<_>| !left.is_empty());
}

/// Whether an object bears the label that its kind is watched by.
fn is_tracked<K: ResourceExt>(object: &K) -> bool {
    object.labels().contains_key(keys::SANDBOX_NAME_HASH)
}
