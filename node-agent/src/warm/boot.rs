// SPDX-License-Identifier: Apache-2.0

//! Booting warm sandboxes, and retiring those that will be nobody's.

use std::{
    collections::HashSet,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kiln_agent_api::Shape;
use kiln_host::{reap::Tracked, timer_slack};
use rand::RngExt as _;
use runsc_wrapper::{
    ContainerId, CreateOpts, InvalidId, PrestartedGofer, RuntimeError, Status, Stdio, WarmRuntime,
};
use tracing::warn;

use super::{
    bundle, cgroup,
    sandbox::WarmSandbox,
    store::{Note, Place, Store},
    trial::Ways,
};

/// How late the timers of a sandbox may be that no Pod has: nobody waits for them. With more, who
/// adopts one finds it asleep for so long: 100 ms made adoptions 30 ms longer, 5 ms do not.
const WARM_TIMER_SLACK: Duration = Duration::from_millis(5);

/// Why a sandbox could not be made, tried or destroyed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The runtime refused.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Something on the node went wrong.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The name of a directory is no id.
    #[error(transparent)]
    Id(#[from] InvalidId),
    /// The runtime makes sandboxes, but not such that can be adopted.
    #[error("this runtime's sandboxes cannot be adopted: {0}")]
    Unfit(String),
}

pub(super) type Result<T, E = BootError> = std::result::Result<T, E>;

pub(super) fn io_error(what: &str) -> impl FnOnce(io::Error) -> BootError + '_ {
    move |source| BootError::Io {
        what: what.to_owned(),
        source,
    }
}

/// Ids of the sandboxes that are being destroyed now.
#[derive(Clone, Default)]
pub(super) struct InProgress(Arc<Mutex<HashSet<String>>>);

impl InProgress {
    fn ids(&self) -> MutexGuard<'_, HashSet<String>> {
        // Ids are in it or not, whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the sandbox `id` is being destroyed, until the result is dropped. Returns `None`
    /// if another task destroys it.
    fn begin(&self, id: &str) -> Option<Destroying> {
        let is_first = self.ids().insert(id.to_owned());
        is_first.then(|| Destroying {
            all: self.clone(),
            id: id.to_owned(),
        })
    }
}

/// A sandbox that is being destroyed.
struct Destroying {
    all: InProgress,
    id: String,
}

impl Drop for Destroying {
    fn drop(&mut self) {
        self.all.ids().remove(&self.id);
    }
}

/// Boots and retires warm sandboxes with one runtime.
#[derive(Clone)]
pub(crate) struct Booter {
    pub(super) runtime: Arc<dyn WarmRuntime>,
    pub(super) store: Store,
    /// Parent of the sandboxes' cgroups.
    cgroup: String,
    /// How sandboxes are made and started.
    pub(super) ways: Ways,
    in_progress: InProgress,
}

impl Booter {
    /// Makes one that uses only commands of `runtime`.
    pub(super) fn new(
        runtime: Arc<dyn WarmRuntime>,
        store: Store,
        cgroup: String,
        in_progress: InProgress,
    ) -> Self {
        Self {
            runtime,
            store,
            cgroup,
            ways: Ways::COMMANDS,
            in_progress,
        }
    }

    /// Makes the same booter with other ways.
    pub(super) fn with(&self, ways: Ways) -> Self {
        Self {
            ways,
            ..self.clone()
        }
    }

    /// Boots a sandbox of `shape`, up to where it can be handed out.
    pub(super) async fn boot(&self, shape: &Shape) -> Result<WarmSandbox> {
        let name = format!("warm-{:024x}", rand::rng().random::<u128>() >> 32);
        let id: ContainerId = name.parse()?;
        let made = self.make(&id, shape).await;
        if made.is_err() {
            self.retire(name, Place::Booting).await;
        }
        made
    }

    /// Boots a sandbox of `shape` that costs as little as it can until it is handed out.
    pub(super) async fn boot_ahead(&self, shape: &Shape) -> Result<WarmSandbox> {
        let sandbox = self.boot(shape).await?;
        self.relax_timers(&sandbox).await;
        Ok(sandbox)
    }

    /// Lets the timers of a sandbox be late. One with timers that are not is as good.
    async fn relax_timers(&self, sandbox: &WarmSandbox) {
        let pid = sandbox.process.pid();
        let set = blocking("relax timers", move || {
            timer_slack::set(pid, WARM_TIMER_SLACK)
        });
        if let Err(e) = set.await {
            warn!("{}: {e}", sandbox.id);
        }
    }

    async fn make(&self, id: &ContainerId, shape: &Shape) -> Result<WarmSandbox> {
        let (store, rootfs, name) = (self.store.clone(), self.store.rootfs(), id.clone());
        let image = self.ways.image.then(|| self.store.image());
        let (wanted, cgroup) = (shape.clone(), cgroup::cgroup_of(&self.cgroup, id.as_str()));
        let bundle = blocking("make the bundle of a warm sandbox", move || {
            let bundle = store.make(name.as_str())?;
            let root = (rootfs.as_path(), image.as_deref());
            bundle::write(&bundle, &name, &wanted, root, &cgroup)?;
            Ok(bundle)
        })
        .await?;
        let pid = self.create(id, bundle).await?;
        let process = Tracked::new(pid).map_err(io_error("watch a warm sandbox"))?;
        let gofer = match self.ways.gofers {
            true => Some(self.start_gofer(id).await?),
            false => None,
        };
        // Who adopts it deletes it.
        self.runtime.forget(id);
        let (store, name, of) = (self.store.clone(), id.to_string(), shape.clone());
        blocking("note a warm sandbox", move || {
            store.is_ready(&name, &Note { shape: of, pid })
        })
        .await?;
        // runsc has made it.
        let cgroup = self.cgroup.clone();
        blocking("let Pods go before warm sandboxes", move || {
            cgroup::yield_cpu(&cgroup)
        })
        .await?;
        Ok(self.sandbox(id, shape.clone(), process, gofer))
    }

    fn sandbox(
        &self,
        id: &ContainerId,
        shape: Shape,
        process: Tracked,
        gofer: Option<PrestartedGofer>,
    ) -> WarmSandbox {
        WarmSandbox {
            id: id.to_string(),
            shape,
            process: Arc::new(process),
            gofer,
            way: self.ways.start,
        }
    }

    async fn create(&self, id: &ContainerId, bundle: PathBuf) -> Result<u32> {
        let opts = CreateOpts {
            id: id.clone(),
            sandbox: id.clone(),
            log_dir: Some(bundle.clone()),
            bundle,
            stdio: Stdio::default(),
            console_socket: None,
        };
        Ok(self.runtime.create(&opts).await?)
    }

    /// Starts the gofer for the first container of the sandbox `id`, in the sandbox's cgroup.
    async fn start_gofer(&self, id: &ContainerId) -> Result<PrestartedGofer> {
        let cgroup = cgroup::cgroup_of(&self.cgroup, id.as_str());
        let place = Box::new(move |pid| cgroup::join_cgroup(&cgroup, pid));
        let gofer = self
            .runtime
            .start_gofer(&self.store.gofer_dir(), id, place)
            .await?;
        let process = Tracked::new(gofer.pid()).map_err(io_error("watch a gofer"))?;
        // It is a child, whoever uses it, and is to be no zombie.
        tokio::spawn(async move { process.ended().await });
        Ok(gofer)
    }

    /// Asks the runtime for its version.
    pub(super) async fn version(&self) -> Result<String> {
        let features = self.runtime.features().await?;
        let version = &features["annotations"]["dev.gvisor.version"];
        Ok(version.as_str().unwrap_or("unknown").to_owned())
    }

    /// Takes up a sandbox that an earlier agent has left ready.
    pub(super) async fn recover(&self, id: &str, note: Note) -> Result<WarmSandbox> {
        let id: ContainerId = id.parse()?;
        let status = self.status(&id).await?;
        if status != Status::Created {
            return Err(BootError::Unfit(format!("it is {status:?}")));
        }
        let process = Tracked::new(note.pid).map_err(io_error("watch a warm sandbox"))?;
        // The one that it had was a child of that agent, and has ended with it.
        let gofer = match self.ways.gofers {
            true => {
                let gofer = self.start_gofer(&id).await;
                gofer.inspect_err(|e| warn!("{id} has no gofer: {e}")).ok()
            }
            false => None,
        };
        let sandbox = self.sandbox(&id, note.shape, process, gofer);
        self.relax_timers(&sandbox).await;
        Ok(sandbox)
    }

    /// Asks whether the sandbox `id` is as it was booted.
    pub(super) async fn answers(&self, id: &str) -> bool {
        let Ok(id) = id.parse() else { return false };
        matches!(self.status(&id).await, Ok(Status::Created))
    }

    /// Asks for the status of a sandbox that nobody has adopted.
    async fn status(&self, id: &ContainerId) -> Result<Status> {
        let status = self.runtime.status(id).await;
        self.runtime.forget(id);
        Ok(status?)
    }

    /// Retires a sandbox that was not handed out.
    pub(super) async fn retire_ready(&self, sandbox: WarmSandbox) {
        self.retire(sandbox.into_id(), Place::Ready).await;
    }

    /// Takes the sandbox `id` from `place` and destroys it. Does nothing if it is not there any
    /// more.
    pub(super) async fn retire(&self, id: String, place: Place) {
        let (store, name) = (self.store.clone(), id.clone());
        let moved = blocking("take a sandbox", move || {
            store.advance(&name, place, Place::Retired)
        });
        match moved.await {
            Ok(()) => self.destroy(id).await,
            Err(BootError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(e) => warn!("{id}: {e}"),
        }
    }

    /// Removes the cgroup in which the sandbox `id` was booted, if it is still there and empty.
    pub(super) async fn remove_cgroup(&self, id: &str) {
        let cgroup = cgroup::cgroup_of(&self.cgroup, id);
        let removed = blocking("remove a cgroup", move || {
            cgroup::remove_cgroup(&cgroup, cgroup::END_TIME);
            Ok(())
        });
        if let Err(e) = removed.await {
            warn!("{id}: {e}");
        }
    }

    /// Tries again to destroy what is retired and still there: the runtime may have been too slow.
    pub(super) async fn destroy_retired(&self) {
        let store = self.store.clone();
        let left = blocking("list retired sandboxes", move || store.ids(Place::Retired));
        match left.await {
            Ok(left) => {
                for id in left {
                    self.destroy(id).await;
                }
            }
            Err(e) => warn!("{e}"),
        }
    }

    /// Destroys a retired sandbox, unless another task does. What fails is for
    /// [`destroy_retired`](Self::destroy_retired) to try again.
    pub(super) async fn destroy(&self, id: String) {
        let Some(_destroying) = self.in_progress.begin(&id) else {
            return;
        };
        if let Ok(known) = id.parse()
            && let Err(e) = self.runtime.delete(&known).await
        {
            warn!("{id}: {e}");
            return;
        }
        self.remove_cgroup(&id).await;
        let (store, name) = (self.store.clone(), id.clone());
        let removed = blocking("remove a sandbox", move || store.remove(&name));
        if let Err(e) = removed.await {
            warn!("{id}: {e}");
        }
    }
}

/// Runs `work`, which blocks, on a thread for that. `what` names it in errors.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| io_error(what)(io::Error::other(e)))?
        .map_err(io_error(what))
}

#[cfg(test)]
mod tests {
    use runsc_wrapper::fake::FakeRuntime;

    use super::*;

    #[tokio::test]
    async fn what_could_not_be_destroyed_is_tried_again_by_one_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let runtime = Arc::new(FakeRuntime::new());
        let booter = Booter::new(
            runtime.clone(),
            store.clone(),
            "/kiln-no-such-cgroup".to_owned(),
            InProgress::default(),
        );
        store.make("a").unwrap();
        runtime.fail_next(
            "delete",
            RuntimeError::Unsupported {
                op: "delete",
                id: "a".to_owned(),
            },
        );
        booter.retire("a".to_owned(), Place::Booting).await;
        assert_eq!(store.list(Place::Retired).unwrap().len(), 1);
        let hold = runtime.hold("delete");
        let release = async {
            // It has nothing to wait for: the other is at it.
            booter.destroy_retired().await;
            assert_eq!(runtime.ops("a"), ["delete"; 2]);
            drop(hold);
        };
        tokio::join!(biased; booter.destroy("a".to_owned()), release);
        assert!(store.list(Place::Retired).unwrap().is_empty());
        assert!(!store.bundle("a").exists());
        assert_eq!(runtime.ops("a"), ["delete"; 2]);
    }
}
