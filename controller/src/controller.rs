// SPDX-License-Identifier: Apache-2.0

//! All kinds together: whose change makes work for whom, and who does which work.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Service};
use kiln_crds::{PodSnapshotStorageConfig, keys};

use crate::{
    claim,
    context::Context,
    error::Result,
    node, pool,
    queue::{Lane, Outcome, Work, WorkKind},
    sandbox, snapshot, template,
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
        watches.start(None, self, |c, change| {
            sandbox::changed(&c.context, &c.sandboxes, change);
        });
        watches.start(ours, self, |c, change| {
            sandbox::pod_changed(&c.context, change);
        });
        watches.start::<Service, _>(ours, self, |c, change| {
            sandbox::child_changed(&c.context, change);
        });
        watches.start::<PersistentVolumeClaim, _>(ours, self, |c, change| {
            sandbox::child_changed(&c.context, change);
        });
        if !extensions {
            return;
        }
        watches.start(None, self, |c, change| {
            claim::changed(&c.context, &c.claims, change);
        });
        watches.start(None, self, |c, change| {
            pool::changed(&c.context, &c.pools, change);
        });
        watches.start(None, self, |c, change| {
            template::changed(&c.context, change);
        });
        watches.start(None, self, |c, change| {
            template::policy_changed(&c.context, change);
        });
        watches.start(None, self, |c, change| {
            node::changed(&c.context, change);
        });
        if !self.context.snapshots {
            return;
        }
        watches.start(None, self, |c, change| {
            snapshot::changed(&c.context, change);
        });
        watches.start(None, self, |c, change| {
            snapshot::trigger_changed(&c.context, change);
        });
        watches.start(None, self, |c, change| {
            snapshot::policy_changed(&c.context, change);
        });
        watches.start::<PodSnapshotStorageConfig, _>(None, self, |_, _| {});
    }

    /// Does one piece of work.
    pub(crate) async fn reconcile(&self, work: &Work, lane: Lane) -> Result<Outcome> {
        let (context, key) = (&self.context, &work.key);
        match work.kind {
            WorkKind::Claim => claim::reconcile(context, &self.claims, key, lane).await,
            WorkKind::Sandbox => sandbox::reconcile(context, &self.sandboxes, key, lane).await,
            WorkKind::Pool => pool::reconcile(context, &self.pools, key, lane).await,
            WorkKind::Template => template::reconcile(context, key, lane).await,
            WorkKind::Node => node::reconcile(context, &self.nodes).await,
            WorkKind::Trigger => snapshot::reconcile_trigger(context, key, lane).await,
            WorkKind::Snapshot => snapshot::reconcile(context, key).await,
        }
    }
}
