// SPDX-License-Identifier: Apache-2.0

//! The sandbox behind a name, which is that of a claim or of a Sandbox.

use anyhow::{Context as _, Result, anyhow, bail};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_crds::{Sandbox, SandboxClaim, keys};
use kube::ResourceExt as _;

use super::Space;

/// Annotation of Pods that kubectl reads too: the container that people mean.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// What a name stands for.
#[derive(Debug)]
pub(crate) enum Found {
    /// A claim, and the Sandbox that it has got.
    Claim(Box<SandboxClaim>, Option<Box<Sandbox>>),
    /// A Sandbox that was not asked for by a claim's name.
    Sandbox(Box<Sandbox>),
}

/// A container of a Pod.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) pod: String,
    pub(crate) container: Option<String>,
}

/// Finds what `name` stands for; a claim is looked for first.
///
/// # Errors
/// When there is neither a claim nor a Sandbox of that name.
pub(crate) async fn find(space: &Space, name: &str) -> Result<Found> {
    let explain = |e| space.explain(e);
    let sandboxes = space.sandboxes();
    if let Some(claim) = space.claims().get_opt(name).await.map_err(explain)? {
        let sandbox = match sandbox_of(&claim) {
            Some(sandbox) => sandboxes.get_opt(sandbox).await.map_err(explain)?,
            None => None,
        };
        return Ok(Found::Claim(Box::new(claim), sandbox.map(Box::new)));
    }
    let found = sandboxes.get_opt(name).await.map_err(explain)?;
    found
        .map(|sandbox| Found::Sandbox(Box::new(sandbox)))
        .with_context(|| format!("no claim or sandbox {name:?} in namespace {:?}", space.name))
}

/// Name of the Sandbox that a claim has got.
pub(crate) fn sandbox_of(claim: &SandboxClaim) -> Option<&str> {
    claim.status.as_ref()?.sandbox.as_ref()?.name.as_deref()
}

impl Found {
    /// The Sandbox.
    ///
    /// # Errors
    /// When the claim has none yet, with the reason.
    pub(crate) fn sandbox(&self) -> Result<&Sandbox> {
        let (claim, sandbox) = match self {
            Self::Sandbox(sandbox) => return Ok(sandbox),
            Self::Claim(claim, sandbox) => (claim, sandbox),
        };
        sandbox.as_deref().ok_or_else(|| {
            let conditions = claim.status.as_ref().map(|s| &s.conditions[..]);
            let why = condition(conditions.unwrap_or_default(), "Ready").map(words);
            let why = why.unwrap_or_else(|| "the controller has not seen it yet".to_owned());
            anyhow!("claim {:?} has no sandbox: {why}", claim.name_any())
        })
    }

    /// The container to talk to: `container`, or the one that the template means.
    ///
    /// # Errors
    /// When the sandbox has no Pod.
    pub(crate) fn target(&self, container: Option<&str>) -> Result<Target> {
        target(self.sandbox()?, container)
    }
}

/// The container of `sandbox` to talk to: `container`, or the one that its template means.
///
/// # Errors
/// When the Sandbox is suspended.
pub(crate) fn target(sandbox: &Sandbox, container: Option<&str>) -> Result<Target> {
    let name = sandbox.name_any();
    if sandbox.spec.is_suspended() {
        bail!("sandbox {name:?} is suspended; `kilnctl resume {name}` starts it");
    }
    let template = &sandbox.spec.pod_template;
    let annotations = template.metadata.annotations.as_ref();
    let named = annotations.and_then(|a| a.get(DEFAULT_CONTAINER));
    let first = template.spec.containers.first().map(|c| &c.name);
    Ok(Target {
        pod: pod(sandbox),
        container: container.map(str::to_owned).or(named.or(first).cloned()),
    })
}

/// Name of a Sandbox's Pod, which has another one if a pool has made it.
pub(crate) fn pod(sandbox: &Sandbox) -> String {
    let noted = sandbox.annotations().get(keys::POD_NAME);
    noted.cloned().unwrap_or_else(|| sandbox.name_any())
}

/// The condition of a type.
pub(crate) fn condition<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == kind)
}

/// Reason and message of a condition.
pub(crate) fn words(condition: &Condition) -> String {
    match condition.message.as_str() {
        "" => condition.reason.clone(),
        message => format!("{}: {message}", condition.reason),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sandbox(annotations: &Value, template: &Value) -> Sandbox {
        serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": "s", "annotations": annotations},
            "spec": {"podTemplate": {"metadata": {"annotations": template},
                "spec": {"containers": [{"name": "first"}, {"name": "second"}]}}},
        }))
        .unwrap()
    }

    #[test]
    fn the_container_is_the_one_that_people_mean() {
        let plain = sandbox(&json!({}), &json!({}));
        let of = |sandbox: &Sandbox, named| {
            let target = target(sandbox, named).unwrap();
            (target.pod, target.container.unwrap())
        };
        assert_eq!(of(&plain, None), ("s".to_owned(), "first".to_owned()));
        assert_eq!(of(&plain, Some("x")), ("s".to_owned(), "x".to_owned()));
        let noted = sandbox(
            &json!({(keys::POD_NAME): "pool-1"}),
            &json!({(DEFAULT_CONTAINER): "second"}),
        );
        assert_eq!(of(&noted, None), ("pool-1".to_owned(), "second".to_owned()));
    }

    #[test]
    fn a_suspended_sandbox_says_how_it_is_resumed() {
        let mut suspended = sandbox(&json!({}), &json!({}));
        suspended.spec.replicas = Some(0);
        let refused = target(&suspended, None).unwrap_err().to_string();
        assert!(refused.contains("kilnctl resume s"), "{refused}");
    }
}
