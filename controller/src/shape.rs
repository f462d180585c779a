// SPDX-License-Identifier: Apache-2.0

//! What a Pod's sandbox is booted for.

use k8s_openapi::{
    api::core::v1::{Container, PodSpec, ResourceRequirements},
    apimachinery::pkg::api::resource::Quantity,
};
pub(crate) use kiln_crds::NodeClassSpec as WantedShape;
use kiln_crds::NodeClassStatus as HeldShape;

use crate::{condition::shorten, known::NAME, quantity};

/// Class and limits of a Pod, which its sandbox has from its boot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Shape {
    /// Name of the RuntimeClass.
    pub(crate) class: String,
    /// Bytes; 0 for no limit.
    pub(crate) memory: i64,
    /// Thousandths of a CPU; 0 for no limit.
    pub(crate) cpu: i64,
}

impl Shape {
    /// The shape of the sandbox that a kubelet will ask for; `None` for a Pod without a class.
    pub(crate) fn of(pod: &PodSpec) -> Option<Self> {
        let class = pod.runtime_class_name.as_ref().filter(|c| !c.is_empty())?;
        // Bytes are rounded up from their thousandths.
        let memory = limit(pod, "memory").saturating_add(999) / 1_000;
        Some(Self {
            class: class.clone(),
            memory,
            cpu: limit(pod, "cpu"),
        })
    }

    /// Whether what a node holds would do.
    pub(crate) fn is_served_by(&self, held: &HeldShape) -> bool {
        held.class == self.class
            && held.memory_bytes == self.memory
            && (held.cpu_milli == self.cpu || held.cpu_milli == 0)
    }

    /// Asks a node for `warm` of them.
    pub(crate) fn wanted(&self, warm: usize) -> WantedShape {
        WantedShape {
            class: self.class.clone(),
            memory_bytes: self.memory,
            cpu_milli: self.cpu,
            warm: i32::try_from(warm).unwrap_or(i32::MAX),
        }
    }
}

/// Leaves of a Pod what its [`Shape`] follows from, in little space.
pub(crate) fn outline(pod: &PodSpec) -> PodSpec {
    let Some(shape) = Shape::of(pod) else {
        return PodSpec::default();
    };
    let limits = [
        ("memory", Quantity(shape.memory.to_string())),
        ("cpu", Quantity(format!("{}m", shape.cpu))),
    ];
    let limits = limits.map(|(name, limit)| (name.to_owned(), limit));
    PodSpec {
        runtime_class_name: Some(shorten(shape.class, NAME)),
        resources: Some(ResourceRequirements {
            limits: Some(limits.into()),
            ..ResourceRequirements::default()
        }),
        ..PodSpec::default()
    }
}

/// The limit of a whole Pod in thousandths, by the rule of kubelet and scheduler
/// (`component-helpers/resource`, `PodLimits`): the Pod's own where it has one, else that of all
/// containers which run at the same time. Those without one count as nothing.
fn limit(pod: &PodSpec, resource: &str) -> i64 {
    if let Some(own) = of(pod.resources.as_ref(), resource) {
        return own;
    }
    let of_container = |c: &Container| of(c.resources.as_ref(), resource).unwrap_or(0);
    let mut main = pod
        .containers
        .iter()
        .map(of_container)
        .fold(0, i64::saturating_add);
    let mut sidecars = 0_i64;
    let mut start = 0_i64;
    for container in pod.init_containers.iter().flatten() {
        let limit = of_container(container);
        if container.restart_policy.as_deref() == Some("Always") {
            main = main.saturating_add(limit);
            sidecars = sidecars.saturating_add(limit);
            start = start.max(sidecars);
        } else {
            start = start.max(limit.saturating_add(sidecars));
        }
    }
    main.max(start)
}

fn of(resources: Option<&ResourceRequirements>, resource: &str) -> Option<i64> {
    let Quantity(text) = resources?.limits.as_ref()?.get(resource)?;
    quantity::milli(text)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn with_class(spec: &Value) -> PodSpec {
        let mut pod = json!({"runtimeClassName": "gvisor", "containers": []});
        pod.as_object_mut()
            .unwrap()
            .extend(spec.as_object().unwrap().clone());
        serde_json::from_value(pod).unwrap()
    }

    fn shape(spec: &Value) -> Option<(i64, i64)> {
        let shape = Shape::of(&with_class(spec))?;
        Some((shape.memory, shape.cpu))
    }

    fn container(memory: &str, cpu: &str) -> Value {
        json!({"name": "c", "resources": {"limits": {"memory": memory, "cpu": cpu}}})
    }

    #[test]
    fn a_shape_has_the_limits_that_the_kubelet_sums_up() {
        let sidecar = |memory: &str, cpu: &str| {
            let mut sidecar = container(memory, cpu);
            sidecar["restartPolicy"] = json!("Always");
            sidecar
        };
        for (spec, expected) in [
            (json!({}), (0, 0)),
            (json!({"containers": [{"name": "none"}]}), (0, 0)),
            (
                json!({"containers": [container("128Mi", "500m"), container("1000", "1"), {"name": "none"}]}),
                ((128 << 20) + 1_000, 1_500),
            ),
            (
                json!({"containers": [container("1Mi", "100m")], "initContainers": [container("3Mi", "50m"), container("2Mi", "50m")]}),
                (3 << 20, 100),
            ),
            (
                json!({"containers": [container("1Mi", "100m")], "initContainers": [sidecar("2Mi", "10m"), container("9Mi", "0")]}),
                (11 << 20, 110),
            ),
            (
                json!({"containers": [container("1Mi", "100m")], "resources": {"limits": {"memory": "7Mi"}}}),
                (7 << 20, 100),
            ),
        ] {
            assert_eq!(shape(&spec), Some(expected), "{spec}");
            let spec = with_class(&spec);
            assert_eq!(Shape::of(&outline(&spec)), Shape::of(&spec));
        }
        assert_eq!(shape(&json!({"runtimeClassName": null})), None);
        assert_eq!(shape(&json!({"runtimeClassName": ""})), None);
    }

    #[test]
    fn what_a_node_holds_serves_its_own_shape() {
        let shape = Shape {
            class: "gvisor".to_owned(),
            memory: 7,
            cpu: 500,
        };
        let held = |class: &str, memory_bytes, cpu_milli| HeldShape {
            class: class.to_owned(),
            memory_bytes,
            cpu_milli,
            ..HeldShape::default()
        };
        for (held, serves) in [
            (held("gvisor", 7, 500), true),
            (held("gvisor", 7, 0), true),
            (held("gvisor", 7, 600), false),
            (held("gvisor", 0, 500), false),
            (held("kata", 7, 500), false),
        ] {
            assert_eq!(shape.is_served_by(&held), serves, "{held:?}");
        }
    }
}
