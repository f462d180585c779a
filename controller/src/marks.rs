// SPDX-License-Identifier: Apache-2.0

//! Names that Sandboxes and claims bear in labels, annotations and references. Whoever may write an
//! object can write them: they prove nothing.

use kiln_crds::{Sandbox, SandboxClaim, keys};
use kube::ResourceExt;

use crate::{known::NAME, owner};

/// The claim that a Sandbox was for, if nobody owns it now.
pub(crate) fn ownerless_claim(sandbox: &Sandbox) -> Option<&str> {
    let was_claimed = sandbox.labels().contains_key(keys::CLAIM_UID);
    let is_ownerless = was_claimed && owner::controller(sandbox).is_none();
    let claim = sandbox.annotations().get(keys::CLAIM_NAME);
    claim.filter(|_| is_ownerless).map(String::as_str)
}

/// The one pool of its template that a claim takes a Sandbox from; `None` if it does not say which.
pub(crate) fn named_pool(claim: &SandboxClaim) -> Option<&str> {
    let name = claim.spec.warmpool.as_deref();
    name.filter(|name| !matches!(*name, "" | "none" | "default"))
}

/// The template that a Sandbox was made from.
pub(crate) fn template_of(sandbox: &Sandbox) -> Option<&str> {
    let name = sandbox.annotations().get(keys::TEMPLATE_REF);
    // No template has a longer name. The name goes into metrics, and outlines do not have longer ones.
    let name = name.filter(|name| name.len() < NAME);
    name.map(String::as_str)
}
