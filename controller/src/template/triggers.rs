// SPDX-License-Identifier: Apache-2.0

//! Work that a change of a template, or of its NetworkPolicy, makes.

use k8s_openapi::api::networking::v1::NetworkPolicy;
use kiln_crds::SandboxTemplate;
use kube::ResourceExt;

use super::build::POLICY_SUFFIX;
use crate::{
    cache::{IndexKey, Key},
    context::Context,
    enqueue, owner,
    queue::WorkKind,
    watch::Change,
};

/// Has a template looked at, all that is made from it, and what nodes hold for it.
pub(crate) fn changed(context: &Context, change: &Change<'_, SandboxTemplate>) {
    enqueue::nodes(context);
    enqueue_all(context, Key::of(change.object()));
}

/// Has a template looked at, and all that is made from it.
fn enqueue_all(context: &Context, template: Key) {
    let of_template = IndexKey::Template(template.clone());
    for pool in context.store.pools.find(&of_template) {
        let pool = Key::of(&*pool);
        context.add(WorkKind::Pool, pool.clone());
        enqueue::claims(context, &IndexKey::Pool(pool));
    }
    enqueue::claims(context, &of_template);
    context.add(WorkKind::Template, template);
}

/// A policy is its template's, or in the way of it.
pub(crate) fn policy_changed(context: &Context, change: &Change<'_, NetworkPolicy>) {
    let policy = change.object();
    let owner = owner::controller(policy).filter(|o| owner::is_kind::<SandboxTemplate>(o));
    let name = policy.name_any();
    let template = owner.map(|o| o.name.as_str());
    if let Some(template) = template.or_else(|| name.strip_suffix(POLICY_SUFFIX)) {
        let namespace = policy.namespace().unwrap_or_default();
        enqueue_all(context, Key::new(&namespace, template));
    }
}
