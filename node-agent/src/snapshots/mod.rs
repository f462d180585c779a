// SPDX-License-Identifier: Apache-2.0

//! Snapshots of Pods on this node: takes them, keeps them, and gives them to the shims of Pods that
//! are restored.
//!
//! ```text
//!        the shim pauses the Pod        the shim stops it,
//!        and writes an image            or lets it go on
//! begun ─────────────────────► sealed ──────────────────► kept ─► restored, perhaps again ─► removed
//!   └──────── the Pod goes on ───┴──► removed
//! ```
//!
//! The agent does what a PodSnapshot asks for once, and reports it there ([`crate::cluster`]). Nothing of
//! a Pod is lost by a step that fails: it is stopped when its snapshot is sealed, and not before. An agent
//! that ends between the two asks the shim when it is back.

mod metrics;
mod shim;
mod store;
mod tree;

use std::{collections::BTreeMap, io, path::PathBuf, time::Duration};

use kiln_agent_api::{
    SHIMS,
    api::{Image, RestoreRequest},
};
use kiln_crds::{PodSnapshot, PostCheckpoint, keys};
use kiln_host::blocking;
use kube::ResourceExt as _;
use tokio::{
    sync::{Mutex, watch},
    time::{Instant, timeout},
};
use tracing::{info, warn};

use self::{
    metrics::Metrics,
    shim::{Shim, ShimError},
    store::{Store, Taken, Unusable, cpu_features},
};
use kiln_node_install::config;

/// How long a Pod that is to be restored waits for the controller to say so.
const AUTHORIZATION: Duration = Duration::from_secs(3);

/// A PodSnapshot of this node, by namespace and name.
pub(crate) type Known = BTreeMap<(String, String), PodSnapshot>;

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeError {
    /// The store has no room for it.
    #[error("the node has no room for the snapshot: {0}")]
    Full(String),
    /// The shim could not write it.
    #[error("checkpoint the Pod: {0}")]
    Checkpoint(String),
    /// The Pod could not be stopped after it was written.
    #[error("stop the Pod after its checkpoint: {0}")]
    Stop(String),
    /// The store failed.
    #[error("keep the snapshot: {0}")]
    Store(#[source] io::Error),
}

impl TakeError {
    /// All that [`reason`](Self::reason) may be.
    const REASONS: [&str; 4] = ["StoreFull", "CheckpointFailed", "StopFailed", "StoreFailed"];

    /// The reason in conditions and metrics, in one word.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Full(_) => Self::REASONS[0],
            Self::Checkpoint(_) => Self::REASONS[1],
            Self::Stop(_) => Self::REASONS[2],
            Self::Store(_) => Self::REASONS[3],
        }
    }
}

/// A snapshot that was taken.
#[derive(Debug, Clone)]
pub(crate) struct Snapshot {
    pub(crate) bytes: u64,
    pub(crate) paused: Duration,
    pub(crate) lost_execs: u32,
}

/// The snapshots of this node.
pub struct Snapshots {
    store: Store,
    shims: PathBuf,
    pub(crate) metrics: Metrics,
    known: watch::Sender<Known>,
    /// Held while one is taken: the room for it is known before, and two at a time would both be
    /// paused for longer.
    taking: Mutex<()>,
}

impl Snapshots {
    /// Opens the store that `config` names. Blocks.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(config: config::Snapshots) -> io::Result<Self> {
        Ok(Self {
            store: Store::open(config)?,
            shims: SHIMS.into(),
            metrics: Metrics::new(),
            known: watch::Sender::default(),
            taking: Mutex::default(),
        })
    }

    /// Changes what is known of the PodSnapshots of this node.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Known)) {
        self.known.send_modify(change);
    }

    /// Whether the files of the snapshot `uid` are here.
    pub(crate) async fn has(&self, uid: &str) -> bool {
        let (store, uid) = (self.store.clone(), uid.to_owned());
        blocking(move || store.has(&uid)).await
    }

    /// Takes the snapshot that `of` asks for. Nothing is left of one that fails, and its Pod goes
    /// on.
    ///
    /// # Errors
    /// [`TakeError`].
    pub(crate) async fn take(&self, of: &PodSnapshot) -> Result<Snapshot, TakeError> {
        let _taking = self.taking.lock().await;
        let uid = of.uid().unwrap_or_default();
        let taken = self.try_take(of, &uid).await;
        match &taken {
            Ok(taken) => self.metrics.taken(taken.paused),
            Err(e) => {
                let (name, pod) = (of.name_any(), &of.spec.pod.name);
                warn!("snapshot {name} of Pod {pod}: {e}");
                self.metrics.failed(e);
                self.remove(&uid).await.ok();
            }
        }
        taken
    }

    /// Counts what the store holds. Blocks.
    pub fn measure(&self) {
        if let Ok((count, bytes)) = self.store.usage() {
            self.metrics.store_holds(count, bytes);
        }
    }

    async fn try_take(&self, of: &PodSnapshot, uid: &str) -> Result<Snapshot, TakeError> {
        let (store, new) = (self.store.clone(), uid.to_owned());
        let begun = blocking(move || Ok((store.room()?, store.begin(&new)?)));
        let (room, image) = begun.await.map_err(TakeError::Store)?;
        if room == 0 {
            let why = "its limit is reached, or its file system is full".to_owned();
            return Err(TakeError::Full(why));
        }
        let failed = |e: ShimError| TakeError::Checkpoint(e.to_string());
        let pod_uid = &of.spec.pod.uid;
        let shim = Shim::connect(&self.shims, pod_uid).await.map_err(failed)?;
        let asked = Instant::now();
        let answer = shim.checkpoint(&image, room).await.map_err(failed)?;
        let is_stopped = of.spec.post_checkpoint == PostCheckpoint::Stop;
        let taken = Taken {
            pod_uid: pod_uid.clone(),
            sandbox_uid: of.spec.sandbox.uid.clone(),
            is_stopped,
            adopted: answer.adopted,
            containers: answer.containers,
            runtime: answer.runtime,
        };
        let (store, new) = (self.store.clone(), uid.to_owned());
        let record = match blocking(move || store.seal(&new, taken, room)).await {
            Ok(record) => record,
            Err(e) => {
                if let Err(e) = shim.finish(false).await {
                    warn!("Pod {pod_uid} stays paused for a while: {e}");
                }
                return Err(match e.kind() {
                    io::ErrorKind::FileTooLarge | io::ErrorKind::StorageFull => {
                        TakeError::Full(e.to_string())
                    }
                    _ => TakeError::Store(e),
                });
            }
        };
        match shim.finish(is_stopped).await {
            // What ran on has made the snapshot one of another moment than was asked for.
            Err(e) if is_stopped => return Err(TakeError::Stop(e.to_string())),
            Err(e) => warn!("Pod {pod_uid} stays paused for a while: {e}"),
            Ok(()) => {}
        }
        let paused = asked.elapsed();
        self.keep(uid).await.map_err(TakeError::Store)?;
        info!("snapshot {} of Pod {pod_uid} is kept", of.name_any());
        Ok(Snapshot {
            bytes: record.bytes(),
            paused,
            lost_execs: answer.execs,
        })
    }

    async fn keep(&self, uid: &str) -> io::Result<()> {
        let (store, uid) = (self.store.clone(), uid.to_owned());
        blocking(move || store.keep(&uid)).await
    }

    /// Removes the files of the snapshot `uid`.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn remove(&self, uid: &str) -> io::Result<()> {
        let (store, uid) = (self.store.clone(), uid.to_owned());
        blocking(move || store.remove(&uid)).await
    }

    /// Finishes or removes what an agent before this one has begun.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn recover(&self) -> io::Result<()> {
        let store = self.store.clone();
        let (_, begun) = blocking(move || store.list()).await?;
        for uid in begun {
            let (store, new) = (self.store.clone(), uid.clone());
            let sealed = blocking(move || store.sealed(&new)).await;
            let is_whole = match sealed {
                // Whether it was stopped then, its shim knows.
                Some(record) if record.is_stopped => {
                    match Shim::connect(&self.shims, &record.pod_uid).await {
                        Ok(shim) => shim.finish(true).await.is_ok(),
                        Err(_) => false,
                    }
                }
                Some(_) => true,
                None => false,
            };
            match is_whole {
                true => self.keep(&uid).await?,
                false => self.remove(&uid).await?,
            }
        }
        Ok(())
    }

    /// Removes the files of snapshots whose PodSnapshot is gone. All that there are must be known.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn remove_unknown(&self) -> io::Result<()> {
        let known: Vec<String> = self
            .known
            .borrow()
            .values()
            .filter_map(|s| s.uid())
            .collect();
        let store = self.store.clone();
        let (whole, _) = blocking(move || store.list()).await?;
        for uid in whole.iter().filter(|uid| !known.contains(*uid)) {
            info!("snapshot {uid} has no PodSnapshot any more");
            self.remove(uid).await?;
        }
        Ok(())
    }

    /// Gives a snapshot to the Pod that the controller has named in it, once.
    ///
    /// # Errors
    /// The snapshot, if there is one that the Pod may have, and why it cannot be restored.
    pub(crate) async fn restore(
        &self,
        request: &RestoreRequest,
    ) -> Result<Image, (Option<PodSnapshot>, String)> {
        let Some(snapshot) = self.authorized(request).await else {
            let why = format!("no controller has named this Pod in it within {AUTHORIZATION:?}");
            return Err((None, why));
        };
        match self.serve(&snapshot, request).await {
            Ok(image) => Ok(image),
            Err(why) => Err((Some(snapshot), why)),
        }
    }

    /// Waits for the controller to name the Pod in the snapshot.
    async fn authorized(&self, request: &RestoreRequest) -> Option<PodSnapshot> {
        let key = (request.namespace.clone(), request.snapshot.clone());
        let mut known = self.known.subscribe();
        let named = |known: &Known| {
            let snapshot = known.get(&key)?;
            let restore = snapshot.spec.restore.as_ref()?;
            let is_whole = snapshot.metadata.deletion_timestamp.is_none();
            (restore.pod_uid == request.pod_uid && is_whole).then(|| snapshot.clone())
        };
        let seen = known.wait_for(|known| named(known).is_some());
        let known = timeout(AUTHORIZATION, seen).await.ok()?.ok()?;
        named(&known)
    }

    async fn serve(&self, of: &PodSnapshot, request: &RestoreRequest) -> Result<Image, String> {
        let uid = of.uid().unwrap_or_default();
        let (store, asked) = (self.store.clone(), uid.clone());
        let record = blocking(move || store.look(&asked)).await;
        let record = record.map_err(|e| e.to_string())?;
        if record.sandbox_uid != of.spec.sandbox.uid {
            return Err("it is of another Sandbox".to_owned());
        }
        if record.runtime != request.runtime {
            return Err("the node has another runtime or other flags of it by now".to_owned());
        }
        if record.cpu != cpu_features() {
            return Err("the node has other CPUs by now".to_owned());
        }
        let (store, pod) = (self.store.clone(), request.pod_uid.clone());
        let served = blocking(move || store.serve(&uid, &pod)).await;
        let dir = served.map_err(|e: Unusable| e.to_string())?;
        info!(
            "Pod {} is restored from {}",
            request.pod_uid, request.snapshot
        );
        Ok(Image {
            dir: dir.to_string_lossy().into_owned(),
            adopted: record.adopted,
            containers: record.containers,
            ..Image::default()
        })
    }

    /// The PodSnapshot of a namespace and name, if it is of this node.
    pub(crate) fn find(&self, namespace: &str, name: &str) -> Option<PodSnapshot> {
        let key = (namespace.to_owned(), name.to_owned());
        self.known.borrow().get(&key).cloned()
    }
}

/// Next step for a PodSnapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The snapshot is to be taken.
    Take,
    /// Its files are to be removed.
    Remove,
    /// The object says that it can be restored: the files must be here.
    Check,
    /// Nothing.
    None,
}

impl Step {
    /// Decides by what the object says.
    pub(crate) fn of(snapshot: &PodSnapshot) -> Self {
        let status = snapshot.status.clone().unwrap_or_default();
        let ready = status.conditions.iter().find(|c| c.type_ == "Ready");
        if snapshot.metadata.deletion_timestamp.is_some() {
            let is_held = snapshot
                .finalizers()
                .iter()
                .any(|f| f == keys::SNAPSHOT_FILES);
            return if is_held && !status.files_removed {
                Self::Remove
            } else {
                Self::None
            };
        }
        match ready {
            None => Self::Take,
            Some(ready) if ready.status == "True" => Self::Check,
            Some(_) => Self::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn snapshot(change: impl FnOnce(&mut Value)) -> PodSnapshot {
        let mut value = json!({
            "apiVersion": "podsnapshot.gke.io/v1", "kind": "PodSnapshot",
            "metadata": {
                "name": "s", "namespace": "ns", "uid": "u", "finalizers": [keys::SNAPSHOT_FILES],
            },
            "spec": {
                "nodeName": "n", "podSpecDigest": "d",
                "pod": {"name": "p", "uid": "p1"}, "sandbox": {"name": "b", "uid": "b1"},
            },
        });
        change(&mut value);
        serde_json::from_value(value).unwrap()
    }

    fn ready(status: &str) -> Value {
        json!({"conditions": [{
            "type": "Ready", "status": status, "reason": "R", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }]})
    }

    #[test]
    fn each_snapshot_is_taken_once_and_removed_once() {
        let gone =
            |v: &mut Value| v["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        assert_eq!(Step::of(&snapshot(|_| {})), Step::Take);
        for (status, step) in [("True", Step::Check), ("False", Step::None)] {
            let reported = snapshot(|v| v["status"] = ready(status));
            assert_eq!(Step::of(&reported), step, "{status}");
        }
        assert_eq!(Step::of(&snapshot(gone)), Step::Remove);
        let removed = snapshot(|v| {
            gone(v);
            v["status"] = json!({"filesRemoved": true});
        });
        assert_eq!(Step::of(&removed), Step::None);
        let not_held = snapshot(|v| {
            gone(v);
            v["metadata"]["finalizers"] = json!([]);
        });
        assert_eq!(Step::of(&not_held), Step::None);
    }

    /// A store with a snapshot of Sandbox `b1` that is called `s`.
    fn stored(dir: &tempfile::TempDir) -> Snapshots {
        let snapshots = Snapshots::open(config::Snapshots {
            dir: dir.path().join("store"),
            kubelet_pods: dir.path().join("pods"),
            free: 0,
            ..config::Snapshots::default()
        });
        let snapshots = snapshots.unwrap();
        let image = snapshots.store.begin("u").unwrap();
        std::fs::write(image.join("pages.img"), "memory").unwrap();
        let taken = Taken {
            sandbox_uid: "b1".to_owned(),
            runtime: "runsc".to_owned(),
            ..Taken::default()
        };
        snapshots.store.seal("u", taken, 100).unwrap();
        snapshots.store.keep("u").unwrap();
        snapshots
    }

    fn ask(pod_uid: &str) -> RestoreRequest {
        RestoreRequest {
            pod_uid: pod_uid.to_owned(),
            namespace: "ns".to_owned(),
            snapshot: "s".to_owned(),
            runtime: "runsc".to_owned(),
            ..RestoreRequest::default()
        }
    }

    fn name(snapshots: &Snapshots, of: PodSnapshot) {
        snapshots.update(|known| {
            known.insert(("ns".to_owned(), "s".to_owned()), of);
        });
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_pod_that_the_controller_has_named_gets_a_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = stored(&dir);
        name(&snapshots, snapshot(|_| {}));
        let (none, why) = snapshots.restore(&ask("p2")).await.unwrap_err();
        assert!(none.is_none() && why.contains("no controller"), "{why}");
        let restore = |v: &mut Value| v["spec"]["restore"] = json!({"podUID": "p2"});
        name(&snapshots, snapshot(restore));
        let (none, _) = snapshots.restore(&ask("p3")).await.unwrap_err();
        assert!(none.is_none());
        assert!(snapshots.restore(&ask("p2")).await.is_ok());
        let (of, why) = snapshots.restore(&ask("p2")).await.unwrap_err();
        assert!(of.is_some() && why.contains("before"), "{why}");
    }

    #[tokio::test]
    async fn another_sandbox_or_runtime_gets_none() {
        let restore = |v: &mut Value| v["spec"]["restore"] = json!({"podUID": "p2"});
        let dir = tempfile::tempdir().unwrap();
        let snapshots = stored(&dir);
        name(
            &snapshots,
            snapshot(|v| {
                restore(v);
                v["spec"]["sandbox"]["uid"] = "b2".into();
            }),
        );
        let (_, why) = snapshots.restore(&ask("p2")).await.unwrap_err();
        assert!(why.contains("another Sandbox"), "{why}");
        name(&snapshots, snapshot(restore));
        let other = RestoreRequest {
            runtime: "runsc of today".to_owned(),
            ..ask("p2")
        };
        let (_, why) = snapshots.restore(&other).await.unwrap_err();
        assert!(why.contains("another runtime"), "{why}");
    }

    #[tokio::test]
    async fn what_was_begun_and_what_nobody_knows_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = stored(&dir);
        snapshots.store.begin("begun").unwrap();
        snapshots.recover().await.unwrap();
        let (whole, begun) = snapshots.store.list().unwrap();
        assert_eq!((whole.len(), begun.len()), (1, 0));
        snapshots.remove_unknown().await.unwrap();
        assert!(!snapshots.has("u").await);
    }
}
