// SPDX-License-Identifier: Apache-2.0

//! Who controls an object. Owners are compared by namespace, group, kind and uid, never by version:
//! objects written by other versions of the API stay what they are.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};

/// The reference that makes `owner` the controller of an object.
pub(crate) fn reference<K: Resource<DynamicType = ()> + ResourceExt>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.name_any(),
        uid: owner.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The reference to an object's controller.
pub(crate) fn controller<K: ResourceExt>(object: &K) -> Option<&OwnerReference> {
    object
        .owner_references()
        .iter()
        .find(|r| r.controller == Some(true))
}

/// Whether a reference names an object of kind `K`.
pub(crate) fn is_kind<K: Resource<DynamicType = ()>>(reference: &OwnerReference) -> bool {
    let group = reference.api_version.split_once('/').map_or("", |(g, _)| g);
    group == K::group(&()) && reference.kind == K::kind(&())
}

/// Whether `owner` controls `object`, which is in the same namespace.
pub(crate) fn controls<O, K>(owner: &O, object: &K) -> bool
where
    O: Resource<DynamicType = ()> + ResourceExt,
    K: ResourceExt,
{
    let is_owner =
        |r: &OwnerReference| Some(&r.uid) == owner.meta().uid.as_ref() && is_kind::<O>(r);
    owner.meta().namespace == object.meta().namespace && controller(object).is_some_and(is_owner)
}

/// Whose an object is, as seen by `owner`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ownership {
    Ours,
    Nobodys,
    Theirs,
}

pub(crate) fn of<O, K>(object: &K, owner: &O) -> Ownership
where
    O: Resource<DynamicType = ()> + ResourceExt,
    K: ResourceExt,
{
    if controls(owner, object) {
        Ownership::Ours
    } else if controller(object).is_some() {
        Ownership::Theirs
    } else {
        Ownership::Nobodys
    }
}
