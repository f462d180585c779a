// SPDX-License-Identifier: Apache-2.0

//! A template: the NetworkPolicy that its Sandboxes share, and the defaults that make them safe.

mod build;
mod triggers;

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::{core::v1::Pod, networking::v1::NetworkPolicy};
use kiln_crds::{Sandbox, SandboxTemplate, keys};
use kube::{Resource, ResourceExt, api::DeleteParams};
use serde_json::json;

use crate::{
    cache::Key,
    context::Context,
    error::{self, Error, Result},
    known::Known,
    owner,
    queue::{Lane, Outcome},
};
pub(crate) use build::secure;
use build::{correction, is_managed, policy, policy_key};
pub(crate) use triggers::{changed, policy_changed};

/// When to look again at Pods without a label that they will get.
const UNLABELLED: Duration = Duration::from_secs(1);
/// Makes the NetworkPolicy of a template what it says.
pub(crate) async fn reconcile(context: &Context, key: &Key, lane: Lane) -> Result<Outcome> {
    let Some(template) = context.find_whole::<SandboxTemplate>(key, lane).await? else {
        return Ok(Outcome::Done);
    };
    if template.meta().deletion_timestamp.is_some() {
        return Ok(Outcome::Done);
    }
    label(context, &template).await?;
    let are_labelled = are_labelled(context, &template);
    put_policy_right(context, &template, are_labelled, lane).await?;
    Ok(match are_labelled {
        true => Outcome::Done,
        false => Outcome::Again(UNLABELLED),
    })
}

/// Whether all Pods that a template's policy is for have the label that no other template's have.
/// Those of an earlier controller get it when their Sandboxes are looked at.
fn are_labelled(context: &Context, template: &SandboxTemplate) -> bool {
    let hash = keys::name_hash(&template.name_any());
    let namespace = template.namespace();
    let pods = context.store.pods.all();
    !pods.iter().any(|pod| {
        pod.namespace() == namespace
            && pod.labels().get(keys::TEMPLATE_REF_HASH) == Some(&hash)
            && !pod.labels().contains_key(keys::TEMPLATE_NAME_DIGEST)
            && belongs_to_sandbox(context, pod)
    })
}

/// Whether a Pod is a Sandbox's: labels alone are anybody's.
fn belongs_to_sandbox(context: &Context, pod: &Known<Pod>) -> bool {
    let owner = owner::controller(pod).filter(|o| owner::is_kind::<Sandbox>(o));
    owner.is_some_and(|owner| {
        let key = Key::new(&pod.namespace().unwrap_or_default(), &owner.name);
        let sandbox = context.store.sandboxes.get(&key);
        sandbox.is_some_and(|sandbox| owner::controls(&*sandbox, pod))
    })
}

/// Sees that a template has its NetworkPolicy before a Pod of it is made.
///
/// # Errors
/// When somebody else's is in its place, or the apiserver refuses it.
pub(crate) async fn ensure_policy(
    context: &Context,
    template: &SandboxTemplate,
    lane: Lane,
) -> Result<()> {
    let key = policy_key(template);
    let is_there = |policy: Arc<Known<NetworkPolicy>>| owner::controls(template, &*policy);
    if !is_managed(&template.spec) || context.store.policies.get(&key).is_some_and(is_there) {
        return Ok(());
    }
    let are_labelled = are_labelled(context, template);
    put_policy_right(context, template, are_labelled, lane).await
}

/// Makes the NetworkPolicy of a template what it says, and records an event if that fails.
async fn put_policy_right(
    context: &Context,
    template: &SandboxTemplate,
    are_labelled: bool,
    lane: Lane,
) -> Result<()> {
    let done = write_policy(context, template, are_labelled, lane).await;
    if let Err(e) = &done
        && !matches!(e, Error::Heavy)
    {
        let reason = match e {
            Error::ForeignPolicy { .. } => "NetworkPolicyConflict",
            _ => "NetworkPolicyFailed",
        };
        let note = format!("no Pod of this template can be made without its NetworkPolicy: {e}");
        context.events.warn(template, reason, note);
    }
    done
}

async fn write_policy(
    context: &Context,
    template: &SandboxTemplate,
    are_labelled: bool,
    lane: Lane,
) -> Result<()> {
    let router = &context.options.router_namespace;
    let wanted = policy(template, router, are_labelled);
    let policy_key = Key::of(&wanted);
    let found = match context.store.policies.get(&policy_key) {
        Some(found) => Some(context.whole(&found, lane).await?),
        None => context.fetch(&policy_key).await?,
    };
    let is_ours = found
        .as_ref()
        .is_none_or(|p| owner::controls(template, &**p));
    if !is_managed(&template.spec) {
        if let Some(policy) = found.filter(|_| is_ours) {
            context.delete(&*policy, DeleteParams::default()).await?;
        }
        return Ok(());
    }
    if !is_ours {
        return Err(Error::ForeignPolicy {
            name: wanted.name_any(),
            template: template.name_any(),
        });
    }
    match found {
        None => match context.create(&wanted).await {
            // Made just now, for another Pod or by somebody else.
            Err(e) if error::is_conflict(&e) => {
                let found = context.fetch::<NetworkPolicy>(&policy_key).await?;
                if !found.is_some_and(|p| owner::controls(template, &*p)) {
                    return Err(e.into());
                }
            }
            made => drop(made?),
        },
        Some(found) => {
            if let Some(patch) = correction(&found, &wanted)? {
                context.patch::<NetworkPolicy>(&policy_key, &patch).await?;
            }
        }
    }
    Ok(())
}

async fn label(context: &Context, template: &SandboxTemplate) -> Result<()> {
    let hash = keys::name_hash(&template.name_any());
    if template.labels().get(keys::TEMPLATE_REF_HASH) == Some(&hash) {
        return Ok(());
    }
    let patch = json!({"metadata": {"labels": {keys::TEMPLATE_REF_HASH: hash}}});
    context
        .patch::<SandboxTemplate>(&Key::of(template), &patch)
        .await?;
    Ok(())
}
