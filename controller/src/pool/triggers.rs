// SPDX-License-Identifier: Apache-2.0

//! Work that a change of a pool makes.

use kiln_crds::SandboxWarmPool;

use super::State;
use crate::{
    cache::{IndexKey, Key},
    context::Context,
    enqueue,
    queue::WorkKind,
    watch::Change,
};

/// Has a pool looked at, what nodes hold for it, and the claims that may wait for it.
pub(crate) fn changed(context: &Context, state: &State, change: &Change<'_, SandboxWarmPool>) {
    if change.is_known() {
        return;
    }
    let key = Key::of(change.object());
    match change {
        Change::Gone(_) => state.forget(&key),
        Change::Seen { new, old } => {
            let template = |pool: &SandboxWarmPool| pool.spec.sandbox_template_ref.name.clone();
            if old.is_none_or(|old| template(old) != template(new)) {
                enqueue::claims(context, &IndexKey::Pool(key.clone()));
            }
        }
    }
    enqueue::nodes(context);
    context.add(WorkKind::Pool, key);
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use kiln_crds::SandboxNode;

    use super::*;
    use crate::{known::Known, lock::lock};

    /// A controller without an apiserver, which knows one node.
    fn context() -> Context {
        let url = "http://127.0.0.1:1".parse().unwrap();
        let client = kube::Client::try_from(kube::Config::new(url)).unwrap();
        let args = crate::args::Args::defaults();
        let options = args.options().unwrap();
        let context = Context::new(
            client,
            options,
            false,
            args.limits(),
            crate::metrics::Metrics::new(),
        );
        let node = serde_json::json!({
            "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "n"}, "spec": {},
        });
        let node: SandboxNode = serde_json::from_value(node).unwrap();
        context.store.nodes.put(Known::of(node));
        context
    }

    #[tokio::test(start_paused = true)]
    async fn a_pool_that_is_gone_leaves_no_demand_and_nothing_to_the_next_of_its_name() {
        let (context, state) = (context(), State::default());
        let pool: SandboxWarmPool = serde_json::from_value(serde_json::json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "resourceVersion": "7"},
            "spec": {"replicas": 2, "sandboxTemplateRef": {"name": "t"}},
        }))
        .unwrap();
        let key = Key::of(&pool);
        lock(&state.pending_statuses).insert(key.clone(), Instant::now());
        changed(&context, &state, &Change::Gone(&pool));
        assert!(!lock(&state.pending_statuses).contains_key(&key));
        let mut kinds = Vec::new();
        while let Ok((work, _)) =
            tokio::time::timeout(Duration::from_secs(5), context.queue.next()).await
        {
            kinds.push(work.kind);
        }
        assert_eq!(kinds, [WorkKind::Pool, WorkKind::Node]);
    }
}
