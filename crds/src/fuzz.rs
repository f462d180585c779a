// SPDX-License-Identifier: Apache-2.0

//! Objects that an apiserver has let through, with anything in them: they are read, or an error
//! says why not, and what was read is written as something that reads the same.

use bolero::check;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{Sandbox, SandboxClaim, SandboxNode, SandboxTemplate, SandboxWarmPool};

fn read<T: DeserializeOwned + Serialize>(object: &Value) {
    let Ok(one) = serde_json::from_value::<T>(object.clone()) else {
        return;
    };
    let written = serde_json::to_value(&one).unwrap();
    let again: T = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(serde_json::to_value(&again).unwrap(), written);
}

/// A Pod's template, with what is read in ways of its own in it.
fn pod_template() -> Value {
    json!({
        "metadata": {"labels": {"a": "b"}},
        "spec": {
            "containers": [{"name": "c", "image": "i", "resources": {"limits": {"cpu": 1, "memory": "1Gi"}}}],
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": 1}}],
        },
    })
}

fn object(kind: &str, spec: &Value, status: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": kind, "metadata": {"name": "n", "labels": {"a": "b"}},
        "spec": spec, "status": status,
    })
}

fn valid() -> [Value; 5] {
    let time = "9999-12-31T23:59:59Z";
    let condition = json!({
        "type": "Ready", "status": "True", "reason": "R", "message": "m",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let claims =
        json!([{"metadata": {"name": "v"}, "spec": {"resources": {"requests": {"storage": 1}}}}]);
    let sandbox = json!({
        "podTemplate": pod_template(), "volumeClaimTemplates": claims, "shutdownTime": time,
        "replicas": 1, "service": true,
    });
    let template =
        json!({"podTemplate": pod_template(), "networkPolicy": {"ingress": [], "egress": []}});
    let pool = json!({"replicas": 2, "sandboxTemplateRef": {"name": "t"}, "updateStrategy": {"type": "Recreate"}});
    let claim = json!({
        "warmPoolRef": {"name": "p"}, "env": [{"name": "A", "value": "b"}],
        "lifecycle": {"shutdownTime": time, "ttlSecondsAfterFinished": 5},
    });
    let node =
        json!({"classes": [{"class": "gvisor", "memoryBytes": 1, "cpuMilli": 1, "warm": 1}]});
    let status = json!({"conditions": [condition], "replicas": 1, "readyReplicas": 1});
    [
        object("Sandbox", &sandbox, &status),
        object("SandboxTemplate", &template, &Value::Null),
        object("SandboxWarmPool", &pool, &status),
        object("SandboxClaim", &claim, &status),
        object("SandboxNode", &node, &status),
    ]
}

/// Pointers (RFC 6901) to all that is in `value`, below `at`.
fn places(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(fields) => {
            for (name, field) in fields {
                places(field, &format!("{at}/{}", name.replace('/', "~1")), all);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                places(item, &format!("{at}/{index}"), all);
            }
        }
        _ => {}
    }
}

fn values() -> [Value; 14] {
    [
        Value::Null,
        json!(true),
        json!(0),
        json!(-1),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e300),
        json!(""),
        json!("10000-01-01T00:00:00Z"),
        json!("-009999-01-01T00:00:00Z"),
        json!("9999-12-31T23:59:60+23:59"),
        json!([]),
        json!([null, 1, {}]),
        json!({}),
    ]
}

#[test]
fn any_object_is_read_or_refused() {
    let values = values();
    check!().with_type::<Vec<(u16, u8)>>().for_each(|edits| {
        for mut object in valid() {
            for (place, value) in edits {
                let mut all = Vec::new();
                places(&object, "", &mut all);
                let place = &all[usize::from(*place) % all.len()];
                if let Some(place) = object.pointer_mut(place) {
                    *place = values[usize::from(*value) % values.len()].clone();
                }
            }
            read::<Sandbox>(&object);
            read::<SandboxTemplate>(&object);
            read::<SandboxWarmPool>(&object);
            read::<SandboxClaim>(&object);
            read::<SandboxNode>(&object);
        }
    });
}

#[test]
fn what_is_valid_is_read() {
    let [sandbox, template, pool, claim, node] = valid();
    serde_json::from_value::<Sandbox>(sandbox).unwrap();
    serde_json::from_value::<SandboxTemplate>(template).unwrap();
    serde_json::from_value::<SandboxWarmPool>(pool).unwrap();
    serde_json::from_value::<SandboxClaim>(claim).unwrap();
    serde_json::from_value::<SandboxNode>(node).unwrap();
}
