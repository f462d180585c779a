// SPDX-License-Identifier: Apache-2.0

//! `kilnctl suspend` and `kilnctl resume`.

use anyhow::Result;
use kiln_crds::Sandbox;
use kube::{
    ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use super::{
    Space,
    find::{condition, find, words},
    ready::{self, Conditions as _},
};
use crate::{args::users::Mode, output::say};

/// Condition of a Sandbox that was resumed: whether its processes went on where they were.
const MEMORY_KEPT: &str = "MemoryKept";

/// Ends the Pod of a sandbox, which stays with its volumes.
///
/// # Errors
/// When there is no such sandbox, or it still runs when the time is over.
pub(crate) async fn suspend(space: &Space, args: &Mode) -> Result<()> {
    let found = find(space, &args.name).await?;
    let name = found.sandbox()?.name_any();
    patch(space, &name, &json!({"operatingMode": "Suspended"})).await?;
    ready::until(space, space.sandboxes(), &name, "Suspended", args.timeout).await?;
    say(&format!("sandbox {name:?} suspended"));
    Ok(())
}

/// Starts a suspended sandbox, and says whether it has its memory.
///
/// # Errors
/// When there is no such sandbox, or it is not ready when the time is over.
pub(crate) async fn resume(space: &Space, args: &Mode) -> Result<()> {
    let found = find(space, &args.name).await?;
    let sandbox = found.sandbox()?;
    let name = sandbox.name_any();
    patch(space, &name, &running(sandbox)).await?;
    let resumed = ready::until(space, space.sandboxes(), &name, "Ready", args.timeout).await?;
    say(&format!("sandbox {name:?} resumed{}", memory(&resumed)));
    Ok(())
}

async fn patch(space: &Space, name: &str, spec: &Value) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": spec}));
    let params = PatchParams::default();
    let patched = space.sandboxes().patch(name, &params, &patch).await;
    patched.map(drop).map_err(|e| space.explain(e))
}

/// What has a Sandbox run, also one that v1alpha1 has suspended.
fn running(sandbox: &Sandbox) -> Value {
    match sandbox.spec.replicas {
        Some(0) => json!({"operatingMode": "Running", "replicas": 1}),
        _ => json!({"operatingMode": "Running"}),
    }
}

/// Says whether memory was kept, if the Sandbox knows.
fn memory(sandbox: &Sandbox) -> String {
    match condition(sandbox.conditions(), MEMORY_KEPT) {
        Some(c) if c.status == "True" => " with its memory".to_owned(),
        Some(c) => format!(" without its memory: {}", words(c)),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(spec: &Value, conditions: &Value) -> Sandbox {
        let mut sandbox: Sandbox = serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox", "metadata": {"name": "s"},
            "spec": {"podTemplate": {"spec": {"containers": []}}},
            "status": {"conditions": conditions},
        }))
        .unwrap();
        sandbox.spec.replicas = spec["replicas"].as_i64().and_then(|n| n.try_into().ok());
        sandbox
    }

    #[test]
    fn both_versions_are_resumed() {
        let beta = sandbox(&json!({}), &json!([]));
        assert_eq!(running(&beta), json!({"operatingMode": "Running"}));
        let alpha = sandbox(&json!({"replicas": 0}), &json!([]));
        assert_eq!(running(&alpha)["replicas"], 1);
    }

    #[test]
    fn memory_is_told_of_if_it_is_known() {
        let of = |status: &str| {
            let condition = json!([{"type": "MemoryKept", "status": status, "reason": "Changed",
                "message": "other runsc", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
            memory(&sandbox(&json!({}), &condition))
        };
        assert_eq!(of("True"), " with its memory");
        assert_eq!(of("False"), " without its memory: Changed: other runsc");
        assert_eq!(memory(&sandbox(&json!({}), &json!([]))), "");
    }
}
