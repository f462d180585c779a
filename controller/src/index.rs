// SPDX-License-Identifier: Apache-2.0

//! Keys under which the caches find objects, apart from their names.

use kiln_crds::{Sandbox, SandboxClaim, SandboxWarmPool, keys};
use kube::ResourceExt;

use crate::{
    cache::{IndexKey, Key},
    marks::{named_pool, ownerless_claim},
    owner,
};

impl IndexKey {
    /// Key of what `owner` controls.
    pub(crate) fn owned_by(owner: &impl ResourceExt) -> Self {
        Self::Owner {
            namespace: owner.namespace().unwrap_or_default(),
            uid: owner.uid().unwrap_or_default(),
        }
    }

    /// Key of a pool, and of the Sandboxes that bear its mark and that nobody owns.
    pub(crate) fn members_of(pool: &SandboxWarmPool) -> Self {
        Self::Member {
            namespace: pool.namespace().unwrap_or_default(),
            hash: keys::name_hash(&pool.name_any()),
        }
    }

    /// Key of the pools that a Sandbox which nobody owns may belong to; `None` for any other.
    pub(crate) fn pools_of(orphan: &Sandbox) -> Option<Self> {
        let hash = orphan.labels().get(keys::WARM_POOL)?;
        owner::controller(orphan).is_none().then(|| Self::Member {
            namespace: orphan.namespace().unwrap_or_default(),
            hash: hash.clone(),
        })
    }
}

/// Key of an object by its owner.
pub(crate) fn of_owned<K: ResourceExt>(object: &K) -> Vec<IndexKey> {
    let key = owner::controller(object).map(|owner| IndexKey::Owner {
        namespace: object.namespace().unwrap_or_default(),
        uid: owner.uid.clone(),
    });
    key.into_iter().collect()
}

/// Key of an object by its own uid.
pub(crate) fn of_itself<K: ResourceExt>(object: &K) -> Vec<IndexKey> {
    vec![IndexKey::owned_by(object)]
}

/// Key of a Sandbox by its owner. Without one, it is that of its pool, or of the claim that it was for.
pub(crate) fn of_sandbox(sandbox: &Sandbox) -> Vec<IndexKey> {
    let claim = || {
        let namespace = sandbox.namespace().unwrap_or_default();
        ownerless_claim(sandbox).map(|claim| IndexKey::Claim(Key::new(&namespace, claim)))
    };
    let owned = of_owned(sandbox).pop();
    let key = owned.or_else(|| IndexKey::pools_of(sandbox));
    key.or_else(claim).into_iter().collect()
}

/// Keys of a pool by its template and by its mark.
pub(crate) fn of_pool(pool: &SandboxWarmPool) -> Vec<IndexKey> {
    let namespace = pool.namespace().unwrap_or_default();
    let template = Key::new(&namespace, &pool.spec.sandbox_template_ref.name);
    vec![IndexKey::Template(template), IndexKey::members_of(pool)]
}

/// Keys of a claim by the pools and the template that it may wait for.
pub(crate) fn of_claim(claim: &SandboxClaim) -> Vec<IndexKey> {
    let namespace = claim.namespace().unwrap_or_default();
    let pool = claim.spec.warm_pool_ref.as_ref().map(|r| r.name.as_str());
    let template = claim.spec.sandbox_template_ref.iter();
    pool.into_iter()
        .chain(named_pool(claim))
        .map(|name| IndexKey::Pool(Key::new(&namespace, name)))
        .chain(template.map(|r| IndexKey::Template(Key::new(&namespace, &r.name))))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn claims_are_found_by_what_they_may_wait_for() {
        let keys = |spec: Value| {
            let claim = json!({
                "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
                "metadata": {"name": "c", "namespace": "ns"}, "spec": spec,
            });
            of_claim(&serde_json::from_value(claim).unwrap())
        };
        let pool = || IndexKey::Pool(Key::new("ns", "p"));
        let template = || IndexKey::Template(Key::new("ns", "t"));
        assert_eq!(keys(json!({"warmPoolRef": {"name": "p"}})), [pool()]);
        for (warmpool, expected) in [
            ("p", vec![pool(), template()]),
            ("none", vec![template()]),
            ("default", vec![template()]),
        ] {
            let spec = json!({"sandboxTemplateRef": {"name": "t"}, "warmpool": warmpool});
            assert_eq!(keys(spec), expected, "{warmpool}");
        }
    }
}
