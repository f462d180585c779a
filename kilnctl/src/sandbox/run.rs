// SPDX-License-Identifier: Apache-2.0

//! `kilnctl run`: a new sandbox, a command in it, and its end.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use kiln_crds::{Sandbox, SandboxClaim};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use serde_json::{Value, json};

use super::{
    Space, exec,
    find::{sandbox_of, target},
    ready,
    remove::{self, Kind},
    signals,
};
use crate::{
    args::users::{Run, Source},
    output::{complain, tell},
};

/// Prefix of generated names.
const PREFIX: &str = "run-";

/// Time for which a sandbox of an image sleeps: the longest that every `sleep` understands.
const FOR_EVER: &str = "2147483647";

/// Runs a command in a new sandbox, and returns its exit code.
///
/// # Errors
/// When the sandbox is not made, is not ready in time, or the command cannot be run.
pub(crate) async fn run(space: &Space, args: &Run) -> Result<ExitCode> {
    let signals = signals::ended()?;
    let (kind, name) = create(space, args).await?;
    let done = tokio::select! {
        done = work(space, args, kind, &name) => done,
        code = signals => Ok(ExitCode::from(code)),
    };
    if !args.rm {
        tell(&format!(
            "{} {name:?} stays; `kilnctl rm {name}` deletes it",
            kind.word()
        ));
    } else if let Err(e) = remove::delete(space, kind, &name, &DeleteParams::background()).await {
        complain(&format!("{} {name:?} is left: {e:#}", kind.word()));
    }
    done
}

async fn work(space: &Space, args: &Run, kind: Kind, name: &str) -> Result<ExitCode> {
    let sandbox = match kind {
        Kind::Sandbox => {
            ready::until(space, space.sandboxes(), name, "Ready", args.timeout).await?
        }
        Kind::Claim => {
            let claim = ready::until(space, space.claims(), name, "Ready", args.timeout).await?;
            let sandbox = sandbox_of(&claim).context("the claim is ready without a sandbox")?;
            let sandbox = space.sandboxes().get(sandbox).await;
            sandbox.map_err(|e| space.explain(e))?
        }
    };
    let target = target(&sandbox, args.process.container.as_deref())?;
    exec::run(space, &target, &args.process).await
}

/// Makes a claim or a Sandbox, and returns its name.
async fn create(space: &Space, args: &Run) -> Result<(Kind, String)> {
    let params = PostParams::default();
    let metadata = match &args.name {
        Some(name) => json!({"name": name}),
        None => json!({"generateName": PREFIX}),
    };
    match claim(&args.source) {
        Some(spec) => {
            let mut claim: SandboxClaim = serde_json::from_value(json!({
                "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
                "metadata": metadata, "spec": {},
            }))?;
            claim.spec = serde_json::from_value(spec)?;
            let made = space.claims().create(&params, &claim).await;
            let made = made.map_err(|e| space.explain(e))?;
            Ok((Kind::Claim, made.name_any()))
        }
        None => {
            let image = args.source.image.as_deref().unwrap_or_default();
            let sandbox: Sandbox = serde_json::from_value(json!({
                "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
                "metadata": metadata, "spec": of_image(image, &args.runtime_class),
            }))?;
            let made = space.sandboxes().create(&params, &sandbox).await;
            let made = made.map_err(|e| space.explain(e))?;
            Ok((Kind::Sandbox, made.name_any()))
        }
    }
}

/// Spec of a claim; `None` if the sandbox is of an image.
fn claim(source: &Source) -> Option<Value> {
    let pool = source.pool.as_ref();
    let template = source.template.as_ref();
    pool.map(|pool| json!({"warmPoolRef": {"name": pool}}))
        .or_else(|| template.map(|t| json!({"sandboxTemplateRef": {"name": t}})))
}

/// Spec of a Sandbox that waits for commands.
fn of_image(image: &str, class: &str) -> Value {
    json!({"podTemplate": {"spec": {
        "runtimeClassName": class,
        "automountServiceAccountToken": false,
        // As process 1, `sleep` does not end by SIGTERM.
        "terminationGracePeriodSeconds": 1,
        "containers": [{"name": "main", "image": image, "command": ["sleep", FOR_EVER]}],
    }}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_names_pool_or_template() {
        let source = |pool: Option<&str>, template: Option<&str>| Source {
            image: None,
            pool: pool.map(str::to_owned),
            template: template.map(str::to_owned),
        };
        let spec = claim(&source(Some("p"), None)).unwrap();
        assert_eq!(spec, json!({"warmPoolRef": {"name": "p"}}));
        let spec = claim(&source(None, Some("t"))).unwrap();
        assert_eq!(spec, json!({"sandboxTemplateRef": {"name": "t"}}));
        assert_eq!(claim(&source(None, None)), None);
    }
}
