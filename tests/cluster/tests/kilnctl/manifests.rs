// SPDX-License-Identifier: Apache-2.0

//! The files of `deploy/`, as others apply them.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result, ensure};
use kiln_cluster::account::deploy;
use serde_json::Value;

use crate::env::{Env, NAMESPACE};

/// Files of `deploy/` that are applied, by directory.
const DIRS: [&str; 3] = ["crds", "base", "examples"];

const OVERLAYS: [&str; 3] = ["base", "overlays/gke-standard", "overlays/kind-like"];

/// Has the apiserver look at objects without making them. It knows every field, or says so.
async fn check(env: &Env, file: &str, input: &str) -> Result<()> {
    let apply = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        "--validate=strict",
        "-f",
        file,
    ];
    let said = env.plane.kubectl_with(&apply, input).await;
    said.with_context(|| file.to_owned()).map(drop)
}

fn yaml_files(dir: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let is_manifest = path.extension().is_some_and(|e| e == "yaml")
            && path.file_stem().is_some_and(|s| s != "kustomization");
        if is_manifest {
            files.push(path.display().to_string());
        }
    }
    ensure!(!files.is_empty(), "no YAML in {}", dir.display());
    Ok(files)
}

async fn kustomize(env: &Env, overlay: &str) -> Result<String> {
    let dir = deploy().join(overlay).display().to_string();
    env.plane.kubectl(&["kustomize", &dir]).await
}

pub(crate) async fn all_are_accepted_as_they_are(env: &Env) -> Result<()> {
    // Namespace and kinds must be there, also for a look.
    env.does("enable --wait=false").await?;
    for dir in DIRS {
        for file in yaml_files(&deploy().join(dir))? {
            check(env, &file, "").await?;
        }
    }
    for overlay in OVERLAYS {
        let objects = kustomize(env, overlay).await?;
        check(env, "-", &objects).await.context(overlay)?;
    }
    env.purge().await
}

/// Where a part of an object is not as it was applied: its path, and both.
fn drift(applied: &Value, found: &Value, path: &str) -> Vec<String> {
    match (applied, found) {
        (Value::Object(fields), Value::Object(_)) => fields
            .iter()
            .flat_map(|(key, value)| drift(value, &found[key], &format!("{path}.{key}")))
            .collect(),
        (Value::Array(items), Value::Array(others)) if items.len() == others.len() => items
            .iter()
            .zip(others)
            .flat_map(|(item, other)| drift(item, other, &format!("{path}[]")))
            .collect(),
        _ if applied == found => Vec::new(),
        _ => vec![format!("{path}: {applied} is {found}")],
    }
}

/// Who compares what is there with what was applied, as tools for GitOps do, must find no
/// difference: it would be applied for ever.
pub(crate) async fn what_is_applied_comes_back_as_it_is(env: &Env) -> Result<()> {
    env.does("enable --wait=false").await?;
    for dir in ["crds", "base"] {
        for file in yaml_files(&deploy().join(dir))? {
            let applied: Vec<Value> = serde_saphyr::from_multiple(&fs::read_to_string(&file)?)?;
            let found = env.get(&format!("-f {file}")).await?;
            let found = match found["items"].as_array() {
                Some(items) => items.clone(),
                None => vec![found],
            };
            ensure!(
                applied.len() == found.len(),
                "{file}: {} objects",
                found.len()
            );
            for (applied, found) in applied.iter().zip(&found) {
                let drift = drift(applied, found, "");
                ensure!(drift.is_empty(), "{file}: {drift:?}");
            }
        }
    }
    env.purge().await
}

/// What a user may put before and behind all names, and another namespace.
const RENAMED: &str = "namespace: sandboxes
namePrefix: team-
nameSuffix: -blue
resources: [base]
";

pub(crate) async fn agents_are_held_to_their_node_under_other_names(env: &Env) -> Result<()> {
    let overlay = env.plane.dir().join("renamed");
    fs::create_dir_all(overlay.join("base"))?;
    for entry in fs::read_dir(deploy().join("base"))? {
        let entry = entry?;
        fs::copy(entry.path(), overlay.join("base").join(entry.file_name()))?;
    }
    fs::write(overlay.join("kustomization.yaml"), RENAMED)?;
    let overlay = overlay.display().to_string();
    env.plane
        .kubectl(&["apply", "--server-side", "-k", &overlay])
        .await?;
    let agent = "--as=system:serviceaccount:sandboxes:team-kiln-node-agent-blue";
    let of = |node: &str| format!("--as-user-extra=authentication.kubernetes.io/node-name={node}");
    let ready = r#"{"metadata": {"labels": {"kiln.dev/gvisor": "ready"}}}"#;
    let patch = async |of: &str| {
        let patch = [
            "patch",
            "node",
            "node-0",
            "--type=merge",
            "-p",
            ready,
            agent,
            of,
        ];
        env.plane.kubectl(&patch).await
    };
    kiln_tests::wait::until("the policy", kiln_tests::wait::SOON, async || {
        let refused = patch(&of("other")).await.err()?;
        format!("{refused:#}")
            .contains("an agent may write of its own node only")
            .then_some(())
    })
    .await?;
    patch(&of("node-0")).await.context("its own node")?;
    let unlabel = ["label", "node", "node-0", "kiln.dev/gvisor-"];
    env.plane.kubectl(&unlabel).await?;
    env.plane
        .kubectl(&["delete", "-k", &overlay])
        .await
        .map(drop)
}

pub(crate) async fn kustomize_has_the_same_objects(env: &Env) -> Result<()> {
    let titles = |list: &Value| -> BTreeSet<String> {
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let title = |o: &Value| format!("{} {}", o["kind"], o["metadata"]["name"]);
        items.iter().map(title).collect()
    };
    env.plane
        .kubectl(&["create", "namespace", NAMESPACE])
        .await?;
    let mut overlays = Vec::new();
    for overlay in OVERLAYS {
        let objects = kustomize(env, overlay).await?;
        let apply = [
            "apply",
            "--server-side",
            "--dry-run=server",
            "-ojson",
            "-f",
            "-",
        ];
        let list: Value = serde_json::from_str(&env.plane.kubectl_with(&apply, &objects).await?)?;
        overlays.push(titles(&list));
    }
    env.plane
        .kubectl(&["delete", "namespace", NAMESPACE])
        .await?;
    env.does("enable --wait=false").await?;
    let ours = env.objects("app.kubernetes.io/managed-by=kilnctl").await?;
    let ours: BTreeSet<String> = ours
        .iter()
        .map(|o| {
            let kind = o.types.as_ref().map_or("?", |t| &t.kind);
            format!(
                "{:?} {:?}",
                kind,
                o.metadata.name.as_deref().unwrap_or_default()
            )
        })
        .filter(|title| !title.starts_with("\"CustomResourceDefinition\""))
        // Made by Kubernetes for a Service, with its labels.
        .filter(|title| !title.starts_with("\"Endpoint"))
        .collect();
    ensure!(overlays[0] == ours, "{:?}, not {ours:?}", overlays[0]);
    ensure!(overlays[2] == ours, "{:?}, not {ours:?}", overlays[2]);
    // GKE has the class already.
    let class: BTreeSet<String> = ["\"RuntimeClass\" \"gvisor\"".to_owned()].into();
    let lacks: BTreeSet<String> = ours.difference(&overlays[1]).cloned().collect();
    ensure!(lacks == class, "{lacks:?}");
    env.purge().await
}
