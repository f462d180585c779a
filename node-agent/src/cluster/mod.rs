// SPDX-License-Identifier: Apache-2.0

//! The node in the cluster: what it should hold is read from its `SandboxNode`, and what it holds
//! is written there.

mod conditions;
mod events;
mod label;
mod snapshots;
mod status;

pub(crate) use snapshots::Restored;
pub use snapshots::{Outcomes, OutcomesReceiver, SnapshotReporter};

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::Time};
use kiln_crds::{NodeClassSpec, SandboxNode, SandboxNodeStatus, keys};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams},
    runtime::watcher,
};
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use self::{
    conditions::{installed, served},
    status::status,
};
use crate::{installer::Installer, warm::WarmManager};
use kiln_node_install::config::{Class, Config, default_sysctl};

/// Who writes.
const MANAGER: &str = "kiln-node-agent";

/// Least time between two writes.
const MIN_WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// Longest time between two writes.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How long the apiserver is left alone after it refused.
const RETRY: Duration = Duration::from_secs(5);

/// Period of CPU quotas in microseconds, as a kubelet sets it.
const CPU_PERIOD: u64 = 100_000;

/// The agent's side of a `SandboxNode`.
pub struct Reporter {
    client: Client,
    node: String,
    manager: Arc<WarmManager>,
    installer: Installer,
}

impl Reporter {
    /// Makes one for the node of this name, with what the manager holds and whether the node is as
    /// it must be.
    pub fn new(
        client: Client,
        node: String,
        manager: Arc<WarmManager>,
        installer: Installer,
    ) -> Self {
        Self {
            client,
            node,
            manager,
            installer,
        }
    }

    fn api(&self) -> Api<SandboxNode> {
        Api::all(self.client.clone())
    }

    /// Reads and writes, for ever.
    pub async fn run(self) {
        tokio::join!(
            self.follow(),
            self.report(),
            self.label(),
            self.publish_events()
        );
    }

    /// Has the manager hold what the object says.
    async fn follow(&self) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        let mut events = pin!(watcher(self.api(), config));
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) => {
                    let wanted = !node.annotations().contains_key(keys::REMOVE);
                    self.installer.set_wanted(wanted);
                    let wished = node.spec.classes.iter();
                    let wished = wished.filter_map(|c| class(c, &self.manager.config));
                    self.manager.wish(wished.collect());
                }
                // What it last said holds as long as nobody says otherwise.
                Ok(_) => {}
                Err(e) => {
                    warn!("watch SandboxNode {}: {e}", self.node);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Writes what the manager holds whenever that changes, and from time to time without.
    async fn report(&self) {
        while let Err(e) = self.make().await {
            warn!("make SandboxNode {}: {e}", self.node);
            tokio::time::sleep(RETRY).await;
        }
        info!("SandboxNode {} is there", self.node);
        let mut ticks = interval(MIN_WRITE_INTERVAL);
        // After a slow write the next must not follow at once.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last: Option<(SandboxNodeStatus, Instant)> = None;
        loop {
            ticks.tick().await;
            let before = last.as_ref().map(|(status, _)| status);
            let mut status = status(&self.manager.snapshot(), &self.manager.config, before);
            let health = self.installer.health().borrow().clone();
            let installed = installed(&self.installer.state().borrow(), &health, before);
            status.conditions.extend(installed);
            status.conditions.push(served(&health, before));
            let old = |(old, at): &(SandboxNodeStatus, Instant)| {
                at.elapsed() < HEARTBEAT && *old == status
            };
            if last.as_ref().is_some_and(old) {
                continue;
            }
            match self.write(&status).await {
                Ok(()) => last = Some((status, Instant::now())),
                Err(e) => {
                    warn!("write SandboxNode {}: {e}", self.node);
                    tokio::time::sleep(RETRY).await;
                    // It may be gone, with its node or by hand.
                    self.make().await.ok();
                }
            }
        }
    }

    /// Makes the object, owned by its node, so that it goes with it.
    async fn make(&self) -> kube::Result<()> {
        let node = Api::<Node>::all(self.client.clone())
            .get(&self.node)
            .await?;
        let owner = json!({
            "apiVersion": Node::api_version(&()), "kind": Node::kind(&()),
            "name": node.name_any(), "uid": node.uid(),
        });
        let object = json!({
            "apiVersion": SandboxNode::api_version(&()), "kind": SandboxNode::kind(&()),
            "metadata": {"name": self.node, "ownerReferences": [owner]}, "spec": {},
        });
        let params = PatchParams::apply(MANAGER).force();
        self.api()
            .patch(&self.node, &params, &Patch::Apply(object))
            .await?;
        Ok(())
    }

    async fn write(&self, status: &SandboxNodeStatus) -> kube::Result<()> {
        let status = SandboxNodeStatus {
            heartbeat: Some(Time(Timestamp::now())),
            ..status.clone()
        };
        let object = json!({
            "apiVersion": SandboxNode::api_version(&()), "kind": SandboxNode::kind(&()),
            "metadata": {"name": self.node}, "status": status,
        });
        let params = PatchParams::apply(MANAGER).force();
        self.api()
            .patch_status(&self.node, &params, &Patch::Apply(object))
            .await?;
        Ok(())
    }
}

/// What is to be held for a wish, where it is for this node's class.
fn class(wish: &NodeClassSpec, config: &Config) -> Option<Class> {
    if wish.class != config.runtime_class {
        return None;
    }
    let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
    Some(Class {
        name: wish.class.clone(),
        warm: u32::try_from(wish.warm).unwrap_or_default(),
        memory: positive(wish.memory_bytes).map(|m| m.saturating_add(config.overhead)),
        cpu: positive(wish.cpu_milli)
            .map(|milli| (milli.saturating_mul(CPU_PERIOD) / 1000, CPU_PERIOD)),
        sysctl: default_sysctl(),
    })
}
