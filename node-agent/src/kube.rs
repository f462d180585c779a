// SPDX-License-Identifier: Apache-2.0

//! The node in the cluster: what it should hold is read from its `SandboxNode`, and what it holds
//! is written there.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt;
use jiff::Timestamp;
use k8s_openapi::{
    api::core::v1::{Node, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
};
use kiln_agent_api::Shape;
use kiln_crds::{
    NodeClassSpec, NodeClassStatus, NodeRuntimeWays, NodeTotal, SandboxNode, SandboxNodeStatus,
    keys,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{
        events::{self, Event, EventType, Recorder},
        watcher,
    },
};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{info, warn};

use crate::{
    config::{Class, default_sysctl},
    install::Health,
    keeper::{Guarding, Keeper},
    pool::Counts,
    presence::{Presence, State},
    ways::Ways,
};

/// Who writes.
const MANAGER: &str = "kiln-node-agent";

/// Least time between two writes.
const PAUSE: Duration = Duration::from_secs(1);

/// Longest time between two writes.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How long the apiserver is left alone after it refused.
const RETRY: Duration = Duration::from_secs(5);

/// How often the node's label is written where nothing has changed.
const LABEL: Duration = Duration::from_secs(60);

/// Start of the label of nodes on which Pods of a class can run; the class follows.
const READY_LABEL: &str = "kiln.dev/";

/// Longest text of an event, in characters; 1024 bytes are allowed.
const NOTE: usize = 256;

/// Period of CPU quotas in microseconds, as a kubelet sets it.
const PERIOD: u64 = 100_000;

/// The agent's side of a `SandboxNode`.
pub struct Reporter {
    client: Client,
    node: String,
    keeper: Arc<Keeper>,
    presence: Presence,
}

impl Reporter {
    /// For the node of this name, with what the keeper holds and whether the node is as it must
    /// be.
    pub fn new(client: Client, node: String, keeper: Arc<Keeper>, presence: Presence) -> Self {
        Self {
            client,
            node,
            keeper,
            presence,
        }
    }

    fn api(&self) -> Api<SandboxNode> {
        Api::all(self.client.clone())
    }

    /// Reads and writes, for ever.
    pub async fn run(self) {
        tokio::join!(self.follow(), self.report(), self.label(), self.tell());
    }

    /// Has the node's label say whether Pods of the class can run there. It is written again from
    /// time to time, because without it no Pod comes: a node may lose its labels, or be made anew.
    async fn label(&self) {
        let key = format!("{READY_LABEL}{}", self.keeper.class());
        let nodes: Api<Node> = Api::all(self.client.clone());
        let (mut state, mut health) = (self.presence.state(), self.keeper.health());
        loop {
            let value = label_of(&state.borrow_and_update(), &health.borrow_and_update());
            let mut pause = LABEL;
            if let Some(value) = value {
                let patch = Patch::Merge(json!({"metadata": {"labels": {(key.as_str()): value}}}));
                let params = PatchParams::default();
                if let Err(e) = nodes.patch_metadata(&self.node, &params, &patch).await {
                    warn!("label node {}: {e}", self.node);
                    pause = RETRY;
                }
            }
            // The senders live as long as `self`.
            tokio::select! {
                _ = state.changed() => {}
                _ = health.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Tells of what happens to the node by events of it.
    async fn tell(&self) {
        let reporter = events::Reporter {
            controller: MANAGER.to_owned(),
            instance: Some(self.node.clone()),
        };
        let recorder = Recorder::new(self.client.clone(), reporter);
        let (mut state, mut health) = (self.presence.state(), self.keeper.health());
        let mut last = (state.borrow().clone(), health.borrow().clone());
        loop {
            // The senders live as long as `self`.
            tokio::select! {
                _ = state.changed() => {}
                _ = health.changed() => {}
            }
            let now = (
                state.borrow_and_update().clone(),
                health.borrow_and_update().clone(),
            );
            let of_health = (now.1 != last.1).then(|| event_of_health(&last.1, &now.1));
            let of_state = (now.0 != last.0).then(|| event_of_state(&now.0));
            last = now;
            for event in [of_health, of_state].into_iter().flatten().flatten() {
                if let Err(e) = recorder.publish(&event, &self.reference().await).await {
                    warn!("event {} of node {}: {e}", event.reason, self.node);
                }
            }
        }
    }

    /// The node, as events name it.
    async fn reference(&self) -> ObjectReference {
        let nodes = Api::<Node>::all(self.client.clone());
        let node = nodes.get_opt(&self.node).await;
        let node = node.ok().flatten().unwrap_or_default();
        ObjectReference {
            api_version: Some(Node::api_version(&()).into_owned()),
            kind: Some(Node::kind(&()).into_owned()),
            name: Some(self.node.clone()),
            uid: node.uid(),
            ..ObjectReference::default()
        }
    }

    /// Has the keeper hold what the object says.
    async fn follow(&self) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        let mut events = pin!(watcher(self.api(), config));
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(node) | watcher::Event::InitApply(node)) => {
                    let wanted = !node.annotations().contains_key(keys::REMOVE);
                    self.presence.set_wanted(wanted);
                    let wished = node.spec.classes.iter();
                    let wished = wished.filter_map(|c| class(c, &self.keeper));
                    self.keeper.wish(wished.collect());
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

    /// Writes what the keeper holds whenever that changes, and from time to time without.
    async fn report(&self) {
        while let Err(e) = self.make().await {
            warn!("make SandboxNode {}: {e}", self.node);
            tokio::time::sleep(RETRY).await;
        }
        info!("SandboxNode {} is there", self.node);
        let mut ticks = interval(PAUSE);
        // After a slow write the next must not follow at once.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last: Option<(SandboxNodeStatus, Instant)> = None;
        loop {
            ticks.tick().await;
            let before = last.as_ref().map(|(status, _)| status);
            let mut status = status(&self.keeper, before);
            let health = self.keeper.health().borrow().clone();
            let installed = installed(&self.presence.state().borrow(), &health, before);
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
fn class(wish: &NodeClassSpec, keeper: &Keeper) -> Option<Class> {
    if wish.class != keeper.class() {
        return None;
    }
    let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
    Some(Class {
        name: wish.class.clone(),
        warm: u32::try_from(wish.warm).unwrap_or_default(),
        memory: positive(wish.memory_bytes).map(|m| m.saturating_add(keeper.overhead())),
        cpu: positive(wish.cpu_milli).map(|milli| (milli.saturating_mul(PERIOD) / 1000, PERIOD)),
        sysctl: default_sysctl(),
    })
}

/// What the node's label should be, null for none, where that is the agent's to say.
fn label_of(state: &State, health: &Health) -> Option<Value> {
    match state {
        State::Others => None,
        State::Installing | State::Installed(_) | State::InstallFailed { .. }
            if matches!(health, Health::Bad(_)) =>
        {
            Some(Value::Null)
        }
        State::Installed(_) => Some(json!("ready")),
        State::InstallFailed {
            is_installed: true, ..
        } if *health == Health::Good => Some(json!("ready")),
        // Each of the last ones: the first may be over before the last label is written.
        State::InstallFailed {
            is_installed: false,
            ..
        }
        | State::Removing
        | State::InUse(_)
        | State::Removed(_)
        | State::RemoveFailed(_) => Some(Value::Null),
        // It is as it was, or nobody's to say.
        _ => None,
    }
}

/// What the keeper holds, without the time.
fn status(keeper: &Keeper, last: Option<&SandboxNodeStatus>) -> SandboxNodeStatus {
    let (held, runtime) = (keeper.held(), keeper.runtime());
    let name = keeper.class().to_owned();
    let overhead = keeper.overhead();
    let guarding = keeper.guarding();
    keeper.look(|pool, problem| {
        let shapes = pool.shapes();
        // Those that boot hold memory, too.
        let all = shapes
            .iter()
            .map(|(_, _, of)| u64::from(of.ready + of.warming))
            .sum::<u64>()
            .max(1);
        let classes: Vec<_> = shapes
            .into_iter()
            .map(|(shape, _, counts)| NodeClassStatus {
                held_bytes: signed(held / all * u64::from(counts.ready)),
                room: small(pool.room()),
                ..class_status(&name, overhead, shape, &counts)
            })
            .collect();
        let runtime = runtime.filter(|_| problem.is_empty());
        let ways = runtime.as_ref().map(|(_, ways)| runtime_ways(*ways));
        SandboxNodeStatus {
            heartbeat: None,
            runtime_ways: ways.map(|w| (name.clone(), w)).into_iter().collect(),
            runtime_versions: runtime.map(|(v, _)| (name, v)).into_iter().collect(),
            // Also where it holds none of any class yet.
            total: Some(NodeTotal {
                room: small(pool.room()),
                ..NodeTotal::of(&classes)
            }),
            classes,
            conditions: vec![ready(problem, last), guarded(&guarding, last)],
        }
    })
}

fn runtime_ways(ways: Ways) -> NodeRuntimeWays {
    NodeRuntimeWays {
        known: ways.is_known,
        start: ways.start_name().to_owned(),
        image: ways.image,
        gofers: ways.gofers,
    }
}

/// What is said of the sandboxes of one shape, but for what all shapes share.
fn class_status(class: &str, overhead: u64, shape: &Shape, counts: &Counts) -> NodeClassStatus {
    let cpu = shape
        .cpu
        .map(|(quota, period)| quota.saturating_mul(1000) / period.max(1));
    let boot = counts.boot_time().map(|t| t.as_millis());
    NodeClassStatus {
        class: class.to_owned(),
        memory_bytes: shape
            .memory
            .map_or(0, |m| signed(m.saturating_sub(overhead))),
        cpu_milli: cpu.map_or(0, signed),
        ready: small(counts.ready),
        warming: small(counts.warming),
        adopted: signed(counts.adopted),
        missed: signed(counts.missed),
        boot_p50_ms: boot.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)),
        ..NodeClassStatus::default()
    }
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn small(n: u32) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

/// Whether the node boots sandboxes ahead.
fn ready(problem: &str, last: Option<&SandboxNodeStatus>) -> Condition {
    match problem {
        "" => condition("Ready", "True", "SandboxesCanBeAdopted", problem, last),
        _ => condition("Ready", "False", "NoWarmSandboxes", problem, last),
    }
}

/// Whether what Pods of the class need is on the node, where that is the agent's to say.
fn installed(
    state: &State,
    health: &Health,
    last: Option<&SandboxNodeStatus>,
) -> Option<Condition> {
    let (status, reason, message) = match (state, health) {
        (State::Installed(_), Health::Bad(why)) => ("False", "Damaged", why.as_str()),
        (State::Installed(words), _) => ("True", "Installed", words.as_str()),
        (State::InstallFailed { why, is_installed }, _) => match (is_installed, health) {
            (true, Health::Bad(_)) => ("False", "RepairFailed", why.as_str()),
            (true, _) => ("False", "UpgradeFailed", why.as_str()),
            (false, _) => ("False", "InstallFailed", why.as_str()),
        },
        (state, _) => state_of_others(state)?,
    };
    Some(condition(keys::INSTALLED, status, reason, message, last))
}

/// What is said of a state in which it does not count what is on the node.
fn state_of_others(state: &State) -> Option<(&'static str, &'static str, &str)> {
    Some(match state {
        State::Others | State::Installed(_) | State::InstallFailed { .. } => return None,
        State::Installing => ("Unknown", "Installing", ""),
        State::Removing => ("False", "Removing", ""),
        State::InUse(words) => ("False", keys::IN_USE, words.as_str()),
        State::Removed(words) => ("False", keys::REMOVED, words.as_str()),
        State::RemoveFailed(why) => ("False", keys::REMOVE_FAILED, why.as_str()),
    })
}

/// Whether Pods of the class can start.
fn served(health: &Health, last: Option<&SandboxNodeStatus>) -> Condition {
    let (status, reason, message) = match health {
        Health::Unknown(why) => ("Unknown", "NotSeen", why.as_str()),
        Health::Good => ("True", "PodsCanStart", ""),
        Health::Bad(why) => ("False", "PodsCannotStart", why.as_str()),
    };
    condition(keys::HANDLER_SERVED, status, reason, message, last)
}

/// What is told of a change from `before` to `now`.
fn event_of_health(before: &Health, now: &Health) -> Option<Event> {
    match (before, now) {
        (_, Health::Bad(why)) => Some(event(EventType::Warning, "SandboxesCannotStart", why)),
        (Health::Bad(_), Health::Good) => {
            let words = "Pods of the class can start again";
            Some(event(EventType::Normal, "SandboxesCanStart", words))
        }
        _ => None,
    }
}

/// What is told of a state that has just begun.
fn event_of_state(state: &State) -> Option<Event> {
    match state {
        State::Installed(words) => Some(event(EventType::Normal, "SandboxesInstalled", words)),
        State::InstallFailed { why, .. } => {
            Some(event(EventType::Warning, "SandboxesNotInstalled", why))
        }
        State::RemoveFailed(why) => Some(event(EventType::Warning, "SandboxesNotRemoved", why)),
        _ => None,
    }
}

fn event(type_: EventType, reason: &str, note: &str) -> Event {
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note.chars().take(NOTE).collect()),
        action: "Install".to_owned(),
        secondary: None,
    }
}

/// Whether Pods of the node can send to link-local and metadata addresses.
fn guarded(guarding: &Guarding, last: Option<&SandboxNodeStatus>) -> Condition {
    let (status, reason, message) = match guarding {
        Guarding::Unknown => ("Unknown", "NotTriedYet", ""),
        Guarding::Works => ("True", "PacketsAreDropped", ""),
        Guarding::Off => ("False", "AllowedByConfiguration", ""),
        Guarding::Fails(why) => ("False", "CannotDropPackets", why.as_str()),
    };
    condition("LinkLocalDropped", status, reason, message, last)
}

/// A condition; the time is that of the last change of its status.
fn condition(
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    last: Option<&SandboxNodeStatus>,
) -> Condition {
    let before = last.and_then(|l| l.conditions.iter().find(|c| c.type_ == kind));
    let since = before
        .filter(|c| c.status == status)
        .map(|c| c.last_transition_time.clone());
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(1024).collect(),
        last_transition_time: since.unwrap_or_else(|| Time(Timestamp::now())),
        observed_generation: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The label, and the reason of condition `Installed`.
    fn said(state: &State, health: &Health) -> (Option<Value>, Option<String>) {
        let condition = installed(state, health, None);
        (label_of(state, health), condition.map(|c| c.reason))
    }

    #[test]
    fn a_node_on_which_pods_cannot_start_loses_its_label() {
        let failed = |is_installed| State::InstallFailed {
            why: "why".to_owned(),
            is_installed,
        };
        let unknown = Health::Unknown("no containerd".to_owned());
        let bad = Health::Bad("the shim is gone".to_owned());
        let installed = State::Installed("sandboxes run".to_owned());
        let (ready, none) = (Some(json!("ready")), Some(Value::Null));
        for (state, health, label, reason) in [
            (&installed, &unknown, &ready, "Installed"),
            (&installed, &Health::Good, &ready, "Installed"),
            (&installed, &bad, &none, "Damaged"),
            // It is as it was until it is known how it is.
            (&State::Installing, &unknown, &None, "Installing"),
            (&State::Installing, &bad, &none, "Installing"),
            (&failed(true), &unknown, &None, "UpgradeFailed"),
            (&failed(true), &Health::Good, &ready, "UpgradeFailed"),
            (&failed(true), &bad, &none, "RepairFailed"),
            (&failed(false), &Health::Good, &none, "InstallFailed"),
            (&State::Removing, &Health::Good, &none, "Removing"),
        ] {
            let found = said(state, health);
            let wanted = (label.clone(), Some(reason.to_owned()));
            assert_eq!(found, wanted, "{state:?} {health:?}");
        }
        assert_eq!(said(&State::Others, &bad), (None, None));
    }

    #[test]
    fn only_what_changes_for_pods_is_told() {
        let bad = Health::Bad("é".repeat(2000));
        let told = event_of_health(&Health::Good, &bad).unwrap();
        assert!(told.note.unwrap().len() <= 1024);
        assert_eq!(told.reason, "SandboxesCannotStart");
        let again = event_of_health(&bad, &Health::Good).unwrap();
        assert_eq!(again.reason, "SandboxesCanStart");
        let unknown = Health::Unknown(String::new());
        assert!(event_of_health(&unknown, &Health::Good).is_none());
        assert!(event_of_state(&State::Installing).is_none());
    }
}
