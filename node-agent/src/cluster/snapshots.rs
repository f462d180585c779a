// SPDX-License-Identifier: Apache-2.0

//! PodSnapshots of this node: what they ask for is done, and what came of it is written there.

use std::{collections::BTreeSet, pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kiln_crds::PodSnapshot;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
    runtime::watcher::{self, Error as WatchError, Event},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use super::{MANAGER, RETRY};
use crate::snapshots::{Known, Snapshots, Step, TakeError};

/// How long a cluster without PodSnapshots is left alone.
const NO_SUCH_KIND: Duration = Duration::from_secs(60);

/// How long a shim may take to tell what came of a restore.
const OUTCOME: Duration = Duration::from_secs(120);

/// Outcome of a restore, as a shim or the agent says.
pub(crate) struct Restored {
    pub(crate) namespace: String,
    pub(crate) snapshot: String,
    pub(crate) pod_uid: String,
    /// Why the Pod starts cold.
    pub(crate) failure: Option<String>,
}

/// The agent's side of PodSnapshots.
#[derive(Clone)]
pub struct SnapshotReporter {
    client: Client,
    node: String,
    snapshots: Arc<Snapshots>,
}

/// Tells of restores to whoever writes them down.
#[derive(Clone)]
pub struct Outcomes(mpsc::UnboundedSender<Restored>);

impl Outcomes {
    /// Makes both ends.
    #[must_use]
    pub fn channel() -> (Self, OutcomesReceiver) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), OutcomesReceiver(receiver))
    }

    pub(crate) fn tell(&self, restored: Restored) {
        // Without a cluster nobody wants to know.
        self.0.send(restored).ok();
    }
}

/// The end of [`Outcomes`] at which they arrive.
pub struct OutcomesReceiver(mpsc::UnboundedReceiver<Restored>);

impl SnapshotReporter {
    /// Makes one for the node of this name.
    pub fn new(client: Client, node: String, snapshots: Arc<Snapshots>) -> Self {
        Self {
            client,
            node,
            snapshots,
        }
    }

    /// Does and reports what PodSnapshots ask for, for ever.
    pub async fn run(self, outcomes: OutcomesReceiver) {
        if let Err(e) = self.snapshots.recover().await {
            warn!("snapshots of before: {e}");
        }
        tokio::join!(self.follow(), self.report_outcomes(outcomes));
    }

    async fn follow(&self) {
        let fields = format!("spec.nodeName={}", self.node);
        let config = watcher::Config::default().fields(&fields);
        let api: Api<PodSnapshot> = Api::all(self.client.clone());
        let mut events = pin!(watcher::watcher(api, config));
        let mut listed = Known::new();
        // Those that something is done about: a status that is written is a change as well.
        let mut begun = BTreeSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::InitApply(of)) => {
                    listed.insert(key(&of), of.clone());
                    self.act(of, &mut begun);
                }
                Ok(Event::InitDone) => {
                    let all = std::mem::take(&mut listed);
                    self.snapshots.update(|known| *known = all);
                    if let Err(e) = self.snapshots.remove_unknown().await {
                        warn!("remove snapshots that are no longer wanted: {e}");
                    }
                }
                Ok(Event::Apply(of)) => {
                    self.snapshots.update(|known| {
                        known.insert(key(&of), of.clone());
                    });
                    self.act(of, &mut begun);
                }
                Ok(Event::Delete(of)) => self.forget(&of, &mut begun).await,
                Err(e) => wait_after(&e).await,
            }
        }
    }

    async fn forget(&self, of: &PodSnapshot, begun: &mut BTreeSet<(String, &'static str)>) {
        let uid = of.uid().unwrap_or_default();
        self.snapshots.update(|known| {
            known.remove(&key(of));
        });
        begun.retain(|(begun, _)| *begun != uid);
        // Somebody may have taken the finalizer away.
        if let Err(e) = self.snapshots.remove(&uid).await {
            warn!("remove snapshot {uid}: {e}");
        }
    }

    /// Begins what `of` asks for, unless that is under way.
    fn act(&self, of: PodSnapshot, begun: &mut BTreeSet<(String, &'static str)>) {
        let name = match Step::of(&of) {
            Step::Take => "take",
            Step::Remove => "remove",
            Step::Check => "check",
            Step::None => return,
        };
        if begun.insert((of.uid().unwrap_or_default(), name)) {
            let this = self.clone();
            tokio::spawn(async move { this.work(&of).await });
        }
    }

    async fn work(&self, of: &PodSnapshot) {
        let uid = of.uid().unwrap_or_default();
        let status = match Step::of(of) {
            Step::Take => {
                let taken_at = Timestamp::now();
                match self.snapshots.take(of).await {
                    Ok(taken) => json!({
                        "conditions": [ready("True", "AllSnapshotsAvailable", "")],
                        "takenAt": Time(taken_at),
                        "pausedMilliseconds": taken.paused.as_millis(),
                        "sizeBytes": taken.bytes,
                        "lostExecs": taken.lost_execs,
                    }),
                    Err(e) => failed(&e),
                }
            }
            Step::Remove => match self.snapshots.remove(&uid).await {
                Ok(()) => json!({"filesRemoved": true}),
                Err(e) => {
                    let message = format!("remove its files: {e}");
                    json!({"conditions": [ready("False", "RemoveFailed", &message)]})
                }
            },
            Step::Check if !self.snapshots.has(&uid).await => {
                let message = "this node does not have its files any more";
                json!({"conditions": [ready("False", "ImageLost", message)]})
            }
            Step::Check | Step::None => return,
        };
        self.write(&key(of), &status).await;
    }

    /// Writes a status until that is done, or the object is gone.
    async fn write(&self, (namespace, name): &(String, String), status: &Value) {
        let api: Api<PodSnapshot> = Api::namespaced(self.client.clone(), namespace);
        let patch = Patch::Merge(json!({ "status": status }));
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        loop {
            match api.patch_status(name, &params, &patch).await {
                Ok(_) => return,
                Err(kube::Error::Api(e)) if e.is_not_found() => return,
                Err(e) => warn!("write PodSnapshot {namespace}/{name}: {e}"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    async fn report_outcomes(&self, mut outcomes: OutcomesReceiver) {
        while let Some(of) = outcomes.0.recv().await {
            let this = self.clone();
            tokio::spawn(async move { this.report_outcome(of).await });
        }
    }

    async fn report_outcome(&self, of: Restored) {
        let named = self.snapshots.find(&of.namespace, &of.snapshot);
        let named = named.and_then(|s| s.spec.restore);
        if named.is_none_or(|restore| restore.pod_uid != of.pod_uid) {
            debug!("Pod {} is not the one to be restored", of.pod_uid);
            return;
        }
        self.snapshots.metrics.ended(of.failure.is_none());
        match &of.failure {
            None => info!("Pod {} runs from {}", of.pod_uid, of.snapshot),
            Some(why) => warn!("Pod {} starts cold: {why}", of.pod_uid),
        }
        let restored = json!({"podUID": of.pod_uid, "failure": of.failure});
        let status = json!({"restored": restored});
        self.write(&(of.namespace, of.snapshot), &status).await;
    }
}

impl Outcomes {
    /// Tells of a failure unless the shim has told what came of the restore within two minutes.
    pub(crate) fn expect(&self, snapshots: Arc<Snapshots>, of: Restored) {
        let this = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(OUTCOME).await;
            let status = snapshots.find(&of.namespace, &of.snapshot);
            let restored = status.and_then(|s| s.status).and_then(|s| s.restored);
            if restored.is_none_or(|restored| restored.pod_uid != of.pod_uid) {
                let why = "the shim has not told what came of the restore".to_owned();
                this.tell(Restored {
                    failure: Some(why),
                    ..of
                });
            }
        });
    }
}

fn key(of: &PodSnapshot) -> (String, String) {
    (of.namespace().unwrap_or_default(), of.name_any())
}

fn failed(why: &TakeError) -> Value {
    json!({"conditions": [ready("False", why.reason(), &why.to_string())]})
}

fn ready(status: &str, reason: &str, message: &str) -> Value {
    json!({
        "type": "Ready", "status": status, "reason": reason,
        "message": message.chars().take(1024).collect::<String>(),
        "lastTransitionTime": Time(Timestamp::now()),
    })
}

/// Leaves the apiserver alone after a watch has failed.
async fn wait_after(error: &WatchError) {
    let is_not_there = matches!(
        error,
        WatchError::InitialListFailed(kube::Error::Api(e)) if e.is_not_found()
    );
    if is_not_there {
        debug!("this cluster has no PodSnapshots");
        tokio::time::sleep(NO_SUCH_KIND).await;
    } else {
        warn!("watch PodSnapshots: {error}");
        tokio::time::sleep(RETRY).await;
    }
}
