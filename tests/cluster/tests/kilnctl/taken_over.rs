// SPDX-License-Identifier: Apache-2.0

//! What was somebody else's, and is ours.

use std::fs;

use anyhow::{Context, Result, ensure};
use kiln_cluster::account::deploy;
use kiln_tests::wait;
use serde_json::{Value, json};

use crate::env::Env;

/// A definition of somebody else's: its versions are converted by a webhook, and it has a field
/// and an annotation that ours has not.
fn theirs() -> Result<Value> {
    let file = deploy().join("crds/agents.x-k8s.io_sandboxes.yaml");
    let mut definition: Value = serde_saphyr::from_str(&fs::read_to_string(file)?)?;
    definition["metadata"]["annotations"] = json!({"theirs": "here"});
    definition["spec"]["conversion"] = json!({"strategy": "Webhook", "webhook": {
        "conversionReviewVersions": ["v1"],
        "clientConfig": {"service": {"namespace": "default", "name": "theirs", "path": "/convert"}},
    }});
    let spec = definition.pointer_mut(SPEC).context("no schema")?;
    spec["theirs"] = json!({"type": "string"});
    Ok(definition)
}

/// Where a definition has the fields of `spec`.
const SPEC: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties";

/// Fails where something of [`theirs`] is left.
async fn nothing_is_theirs(env: &Env) -> Result<()> {
    let now = env.get("crd sandboxes.agents.x-k8s.io").await?;
    let conversion = &now["spec"]["conversion"];
    ensure!(*conversion == json!({"strategy": "None"}), "{conversion}");
    let spec = now.pointer(SPEC).context("no schema")?;
    ensure!(spec.get("theirs").is_none(), "their field is there");
    let annotations = &now["metadata"]["annotations"];
    ensure!(annotations.get("theirs").is_none(), "{annotations}");
    Ok(())
}

pub(crate) async fn a_former_owner_leaves_nothing_in_definitions(env: &Env) -> Result<()> {
    let theirs = theirs()?.to_string();
    // By kubectl, as docs/install-containerd.md has it.
    env.plane
        .kubectl_with(&["create", "-f", "-"], &theirs)
        .await?;
    // Until then the apiserver writes its status, and a replacement may meet that.
    wait::until("it to be served", wait::SOON, async || {
        let now = env.get("sandbox").await.ok()?;
        now["items"].is_array().then_some(())
    })
    .await?;
    let crds = deploy().join("crds").display().to_string();
    // It fails for those that somebody else has not.
    let replaced = env.plane.kubectl(&["replace", "-f", &crds]).await;
    let apply = ["apply", "--server-side", "--force-conflicts", "-f", &crds];
    env.plane
        .kubectl(&apply)
        .await
        .with_context(|| format!("{replaced:?}"))?;
    nothing_is_theirs(env).await.context("by kubectl")?;
    env.plane.kubectl(&["delete", "-f", &crds]).await?;
    // The second one comes over ours.
    for how in [
        "create -f -",
        "apply --server-side --force-conflicts --field-manager=somebody -f -",
    ] {
        let words: Vec<&str> = how.split(' ').collect();
        env.plane.kubectl_with(&words, &theirs).await?;
        env.does("enable --take-over --wait=false").await?;
        nothing_is_theirs(env).await.context(how)?;
    }
    let said = env.does("enable --wait=false").await?;
    ensure!(said.contains("nothing had to be changed"), "{said}");
    env.purge().await
}
