// SPDX-License-Identifier: Apache-2.0

//! All kinds together: whose change makes work for whom, and who does which work.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Service};
use kiln_crds::keys;

use crate::{
    claim,
    context::Context,
    error::Result,
    node, pool,
    queue::{Class, Lane, Outcome, Work},
    sandbox, template,
    watch::{Synced, Watches},
};

/// See the module.
pub(crate) struct Controller {
    pub(crate) context: Arc<Context>,
    claims: claim::State,
    sandboxes: sandbox::State,
    pools: pool::State,
    nodes: node::State,
}

impl Controller {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            claims: claim::State::default(),
            sandboxes: sandbox::State::default(),
            pools: pool::State::default(),
            nodes: node::State::default(),
        }
    }

    /// Starts all watches; without `extensions` those of Sandboxes alone.
    pub(crate) fn watch(self: &Arc<Self>, synced: &Arc<Synced>, extensions: bool) {
        let watches = Watches::new(Arc::clone(&self.context), Arc::clone(synced));
        let ours = Some(keys::SANDBOX_NAME_HASH);
        let controller = || Arc::clone(self);
        let c = controller();
        watches.start(None, move |change| {
            sandbox::changed(&c.context, &c.sandboxes, change);
        });
        let c = controller();
        watches.start(ours, move |change| sandbox::pod_changed(&c.context, change));
        let c = controller();
        watches.start::<Service>(ours, move |change| {
            sandbox::child_changed(&c.context, change);
        });
        let c = controller();
        watches.start::<PersistentVolumeClaim>(ours, move |change| {
            sandbox::child_changed(&c.context, change);
        });
        if extensions {
            self.watch_extensions(&watches);
        }
    }

    fn watch_extensions(self: &Arc<Self>, watches: &Watches) {
        let controller = || Arc::clone(self);
        let c = controller();
        watches.start(None, move |change| {
            claim::changed(&c.context, &c.claims, change);
        });
        let c = controller();
        watches.start(None, move |change| {
            pool::changed(&c.context, &c.pools, change);
        });
        let c = controller();
        watches.start(None, move |change| template::changed(&c.context, change));
        let c = controller();
        watches.start(None, move |change| {
            template::policy_changed(&c.context, change);
        });
        let c = controller();
        watches.start(None, move |change| node::changed(&c.context, change));
    }

    /// Does one piece of work.
    pub(crate) async fn reconcile(&self, work: &Work, lane: Lane) -> Result<Outcome> {
        let (context, key) = (&self.context, &work.key);
        match work.class {
            Class::Claim => claim::reconcile(context, &self.claims, key, lane).await,
            Class::Sandbox => sandbox::reconcile(context, &self.sandboxes, key, lane).await,
            Class::Pool => pool::reconcile(context, &self.pools, key, lane).await,
            Class::Template => template::reconcile(context, key, lane).await,
            Class::Node => node::reconcile(context, &self.nodes).await,
        }
    }
}
