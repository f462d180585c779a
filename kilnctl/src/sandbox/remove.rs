// SPDX-License-Identifier: Apache-2.0

//! `kilnctl rm`: claims and Sandboxes go.

use anyhow::{Context as _, Result, bail};
use kiln_crds::{Sandbox, SandboxClaim};
use kube::{Resource as _, ResourceExt as _, api::DeleteParams, runtime::wait::await_condition};

use super::{
    Space,
    find::{Found, find},
};
use crate::{args::users::Remove, output::say};

/// What a user has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Claim,
    Sandbox,
}

impl Kind {
    /// How people call it.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Claim => "claim",
            Self::Sandbox => "sandbox",
        }
    }

    /// How kubectl calls it.
    fn resource(self) -> String {
        let (plural, group) = match self {
            Self::Claim => ("sandboxclaim", SandboxClaim::group(&())),
            Self::Sandbox => ("sandbox", Sandbox::group(&())),
        };
        format!("{plural}.{group}")
    }
}

/// Deletes claims and Sandboxes, and waits until they and their Pods are gone.
///
/// # Errors
/// When one is not there, or is a claim's: it would be made again.
pub(crate) async fn run(space: &Space, args: &Remove) -> Result<()> {
    for name in &args.names {
        let kind = match find(space, name).await? {
            Found::Claim(..) => Kind::Claim,
            Found::Sandbox(sandbox) => match claim_of(&sandbox) {
                Some(claim) => bail!("sandbox {name:?} is of claim {claim:?}; delete the claim"),
                None => Kind::Sandbox,
            },
        };
        // What it owns goes before it.
        delete(space, kind, name, &DeleteParams::foreground()).await?;
        gone(space, kind, name).await?;
        say(&format!("{} {name:?} deleted", kind.resource()));
    }
    Ok(())
}

/// Waits until one is gone.
async fn gone(space: &Space, kind: Kind, name: &str) -> Result<()> {
    let done = match kind {
        Kind::Claim => await_condition(space.claims(), name, is_none)
            .await
            .map(drop),
        Kind::Sandbox => await_condition(space.sandboxes(), name, is_none)
            .await
            .map(drop),
    };
    done.with_context(|| format!("wait until {} {name:?} is gone", kind.word()))
}

fn is_none<K>(found: Option<&K>) -> bool {
    found.is_none()
}

/// Has one deleted. One that is gone is success.
///
/// # Errors
/// What the apiserver answers.
pub(crate) async fn delete(
    space: &Space,
    kind: Kind,
    name: &str,
    params: &DeleteParams,
) -> Result<()> {
    let done = match kind {
        Kind::Claim => space.claims().delete(name, params).await.map(drop),
        Kind::Sandbox => space.sandboxes().delete(name, params).await.map(drop),
    };
    match done {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        done => done.map_err(|e| space.explain(e)),
    }
}

/// Name of the claim that owns a Sandbox.
pub(crate) fn claim_of(sandbox: &Sandbox) -> Option<&str> {
    let owners = sandbox.owner_references();
    let claim = owners.iter().find(|o| o.kind == SandboxClaim::kind(&()));
    claim.map(|owner| owner.name.as_str())
}
