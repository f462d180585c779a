// SPDX-License-Identifier: Apache-2.0

//! Making warm sandboxes, trying out whether they can be adopted, and destroying them.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::AsFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kiln_agent_api::{Shape, naming_process};
use kiln_host::{reap::Tracked, timer_slack};
use rand::RngExt as _;
use runsc_wrapper::{
    ContainerId, CreateOpts, ExecOpts, Exit, InvalidId, RuntimeError, Slots, StartWay, Status,
    Stdio, WarmRuntime,
};
use tracing::warn;

use super::{
    bundle, cgroup, netns,
    store::{Note, Place, Store},
};

/// How late the timers of a sandbox may be that no Pod has: nobody waits for them. With more, who
/// adopts one finds it asleep for so long: 100 ms made adoptions 30 ms longer, 5 ms do not.
const REST: Duration = Duration::from_millis(5);

/// Why a sandbox could not be made, tried or destroyed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The runtime said no.
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

type Result<T, E = BootError> = std::result::Result<T, E>;

fn io_error(what: &str) -> impl FnOnce(io::Error) -> BootError + '_ {
    move |source| BootError::Io {
        what: what.to_owned(),
        source,
    }
}

/// A sandbox that can be handed out.
pub(crate) struct Warm {
    pub(crate) id: String,
    /// Its sentry.
    pub(crate) process: Tracked,
}

/// The gofers that were started with sandboxes, by these. They end when they are dropped.
#[derive(Clone, Default)]
pub(crate) struct Gofers(Arc<Mutex<HashMap<String, Slots>>>);

impl Gofers {
    fn map(&self) -> MutexGuard<'_, HashMap<String, Slots>> {
        // One that is half inserted is not there.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is one for the sandbox `id`.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.map().contains_key(id)
    }

    /// Takes that of the sandbox `id`.
    pub(crate) fn take(&self, id: &str) -> Option<Slots> {
        self.map().remove(id)
    }
}

/// The sandboxes that are being destroyed.
#[derive(Clone, Default)]
pub(crate) struct Ending(Arc<Mutex<HashSet<String>>>);

impl Ending {
    fn set(&self) -> MutexGuard<'_, HashSet<String>> {
        // Ids are in it or not, whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the sandbox `id` is being destroyed, until the result is dropped. `None` where
    /// somebody else does it.
    fn begin(&self, id: &str) -> Option<Destruction> {
        let is_first = self.set().insert(id.to_owned());
        is_first.then(|| Destruction {
            of: self.clone(),
            id: id.to_owned(),
        })
    }
}

/// One that goes on.
struct Destruction {
    of: Ending,
    id: String,
}

impl Drop for Destruction {
    fn drop(&mut self) {
        self.of.set().remove(&self.id);
    }
}

/// Makes and destroys warm sandboxes with one runtime.
#[derive(Clone)]
pub(crate) struct Booter {
    runtime: Arc<dyn WarmRuntime>,
    store: Store,
    /// Parent of the sandboxes' cgroups.
    cgroup: String,
    /// Whether sentries read their root file system from an image, without a gofer.
    from_image: bool,
    /// Whether a gofer is started with each sandbox.
    with_slots: bool,
    gofers: Gofers,
    ending: Ending,
}

impl Booter {
    pub(crate) fn new(
        runtime: Arc<dyn WarmRuntime>,
        store: Store,
        cgroup: String,
        gofers: Gofers,
        ending: Ending,
    ) -> Self {
        Self {
            runtime,
            store,
            cgroup,
            from_image: false,
            with_slots: false,
            gofers,
            ending,
        }
    }

    /// The same with sandboxes that have no gofer.
    pub(crate) fn with_image(mut self) -> Self {
        self.from_image = true;
        self
    }

    /// The same with a gofer for the first container of each sandbox.
    pub(crate) async fn with_slots(mut self) -> Result<Self> {
        let dir = self.store.slots();
        blocking("prepare slots", move || Slots::prepare(&dir)).await?;
        self.with_slots = true;
        Ok(self)
    }

    /// Boots a sandbox of `shape`, up to where it can be handed out.
    pub(crate) async fn boot(&self, shape: &Shape) -> Result<Warm> {
        let name = format!("warm-{:024x}", rand::rng().random::<u128>() >> 32);
        let id: ContainerId = name.parse()?;
        let made = self.make(&id, shape).await;
        if made.is_err() {
            self.doom(name, Place::Booting).await;
        }
        made
    }

    /// Boots a sandbox of `shape` that rests until it is handed out.
    pub(crate) async fn boot_ahead(&self, shape: &Shape) -> Result<Warm> {
        let warm = self.boot(shape).await?;
        self.rest(&warm).await;
        Ok(warm)
    }

    /// Lets a sandbox cost no more than it must. One that does not rest is as good.
    async fn rest(&self, warm: &Warm) {
        let pid = warm.process.pid();
        let set = blocking("let it rest", move || timer_slack::set(pid, REST));
        if let Err(e) = set.await {
            warn!("{}: {e}", warm.id);
        }
    }

    async fn make(&self, id: &ContainerId, shape: &Shape) -> Result<Warm> {
        let (store, rootfs, name) = (self.store.clone(), self.store.rootfs(), id.clone());
        let image = self.from_image.then(|| self.store.image());
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
        if self.with_slots {
            self.start_gofer(id).await?;
        }
        // Who adopts it deletes it.
        self.runtime.forget(id);
        let (store, name) = (self.store.clone(), id.to_string());
        let shape = shape.clone();
        blocking("note a warm sandbox", move || {
            store.is_ready(&name, &Note { shape, pid })
        })
        .await?;
        // runsc has made it.
        let cgroup = self.cgroup.clone();
        blocking("let Pods go before warm sandboxes", move || {
            cgroup::yield_cpu(&cgroup)
        })
        .await?;
        let id = id.to_string();
        Ok(Warm { id, process })
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
    async fn start_gofer(&self, id: &ContainerId) -> Result<()> {
        let cgroup = cgroup::cgroup_of(&self.cgroup, id.as_str());
        let place = Box::new(move |pid| cgroup::join_cgroup(&cgroup, pid));
        let slots = self
            .runtime
            .new_slots(&self.store.slots(), id, place)
            .await?;
        let gofer = Tracked::new(slots.pid()).map_err(io_error("watch a gofer"))?;
        // It is a child, whoever uses it, and is to be no zombie.
        tokio::spawn(async move { gofer.ended().await });
        self.gofers.map().insert(id.to_string(), slots);
        Ok(())
    }

    /// What the runtime says of its version.
    pub(crate) async fn version(&self) -> Result<String> {
        let features = self.runtime.features().await?;
        let version = &features["annotations"]["dev.gvisor.version"];
        Ok(version.as_str().unwrap_or("unknown").to_owned())
    }

    /// Does to a sandbox of `shape` what its adoption in this `way` would, and destroys it.
    pub(crate) async fn trial(&self, shape: &Shape, way: StartWay) -> Result<()> {
        let warm = self.boot(shape).await?;
        let tried = self.try_out(&warm, way).await;
        self.doom(warm.id, Place::Ready).await;
        tried
    }

    async fn try_out(&self, warm: &Warm, way: StartWay) -> Result<()> {
        let id: ContainerId = warm.id.parse()?;
        let netns = netns::with_link().await;
        let netns = netns.map_err(io_error("make a network namespace"))?;
        self.runtime
            .start_on_network(&id, netns.as_fd(), way)
            .await?;
        let scratch = self.store.bundle(id.as_str()).join("exec");
        let dir = scratch.clone();
        blocking("make a directory", move || std::fs::create_dir(dir)).await?;
        let exec = self
            .runtime
            .exec(&ExecOpts {
                container: id.clone(),
                process: naming_process("trial"),
                stdio: Stdio::default(),
                console_socket: None,
                scratch,
            })
            .await?;
        let Exit { code, .. } = exec.exit.await?;
        if code != 0 {
            let words = format!("its host name cannot be changed (error {code})");
            return Err(BootError::Unfit(words));
        }
        // The namespace that the sandbox was booted in has no link that is up.
        let links = self.runtime.stats(&id).await?.network;
        if !["lo", netns::LINK]
            .iter()
            .all(|name| links.iter().any(|link| link.name == *name))
        {
            let words = "it does not take the network that it is shown".to_owned();
            return Err(BootError::Unfit(words));
        }
        Ok(())
    }

    /// Starts a container in the slots of a sandbox of `shape`, which starts in this `way`, and
    /// destroys both.
    pub(crate) async fn trial_of_slots(&self, shape: &Shape, way: StartWay) -> Result<()> {
        let warm = self.boot(shape).await?;
        let tried = self.try_slots(&warm, way).await;
        self.doom(warm.id, Place::Ready).await;
        tried
    }

    async fn try_slots(&self, warm: &Warm, way: StartWay) -> Result<()> {
        let unfit = |words: &str| BootError::Unfit(words.to_owned());
        let sandbox: ContainerId = warm.id.parse()?;
        let id: ContainerId = format!("slots-{sandbox}").parse()?;
        let slots = self.gofers.take(&warm.id);
        let slots = slots.ok_or_else(|| unfit("it has no gofer"))?;
        let netns = netns::with_link().await;
        let netns = netns.map_err(io_error("make a network namespace"))?;
        self.runtime
            .start_on_network(&sandbox, netns.as_fd(), way)
            .await?;
        let bundle = self.store.bundle(sandbox.as_str()).join("slots");
        let (dir, rootfs, of) = (bundle.clone(), self.store.rootfs(), sandbox.clone());
        blocking("make the bundle of a container", move || {
            bundle::write_trial(&dir, &rootfs, &of)
        })
        .await?;
        let opts = CreateOpts {
            id: id.clone(),
            sandbox,
            bundle,
            stdio: Stdio::default(),
            console_socket: None,
            log_dir: None,
        };
        let made = self.runtime.create_in_slots(&opts, slots).await?;
        made.ok_or_else(|| unfit("no container can be made in its slots"))?;
        let exit = self.runtime.watch(&id).await?;
        let started = self.runtime.start(&id, &opts.stdio).await;
        let ended = match started {
            Ok(()) => exit.await,
            Err(e) => Err(e),
        };
        self.runtime.delete(&id).await?;
        match ended?.code {
            0 => Ok(()),
            code => Err(unfit(&format!(
                "a container in its slots ended with {code}"
            ))),
        }
    }

    /// Takes up a sandbox that an agent before this one has left ready.
    pub(crate) async fn recover(&self, id: &str, note: &Note) -> Result<Warm> {
        let id: ContainerId = id.parse()?;
        let status = self.status(&id).await?;
        if status != Status::Created {
            return Err(BootError::Unfit(format!("it is {status:?}")));
        }
        let process = Tracked::new(note.pid).map_err(io_error("watch a warm sandbox"))?;
        // The one that it had was a child of that agent, and has ended with it.
        if self.with_slots
            && let Err(e) = self.start_gofer(&id).await
        {
            warn!("{id} has no gofer: {e}");
        }
        let id = id.to_string();
        let warm = Warm { id, process };
        self.rest(&warm).await;
        Ok(warm)
    }

    /// Whether the sandbox `id` answers.
    pub(crate) async fn answers(&self, id: &str) -> bool {
        let Ok(id) = id.parse() else { return false };
        matches!(self.status(&id).await, Ok(Status::Created))
    }

    /// What a sandbox does that nobody has adopted yet.
    async fn status(&self, id: &ContainerId) -> Result<Status> {
        let status = self.runtime.status(id).await;
        self.runtime.forget(id);
        Ok(status?)
    }

    /// Takes the sandbox `id` from `place` and destroys it. Nothing happens where it is not there
    /// any more.
    pub(crate) async fn doom(&self, id: String, place: Place) {
        let (store, name) = (self.store.clone(), id.clone());
        let moved = blocking("take a sandbox", move || {
            store.advance(&name, place, Place::Doomed)
        });
        match moved.await {
            Ok(()) => self.destroy(id).await,
            Err(BootError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(e) => warn!("{id}: {e}"),
        }
    }

    /// Removes the cgroup in which the sandbox `id` was booted, if it is still there and empty.
    pub(crate) async fn remove_cgroup(&self, id: &str) {
        let cgroup = cgroup::cgroup_of(&self.cgroup, id);
        let removed = blocking("remove a cgroup", move || {
            cgroup::remove_cgroup(&cgroup, cgroup::END_TIME);
            Ok(())
        });
        if let Err(e) = removed.await {
            warn!("{id}: {e}");
        }
    }

    /// Tries again to destroy what is doomed and still there: the runtime may have been too slow.
    pub(crate) async fn destroy_doomed(&self) {
        let store = self.store.clone();
        match blocking("list doomed sandboxes", move || store.ids(Place::Doomed)).await {
            Ok(left) => {
                for id in left {
                    self.destroy(id).await;
                }
            }
            Err(e) => warn!("{e}"),
        }
    }

    /// Destroys a doomed sandbox, unless somebody is about it. What fails is for
    /// [`destroy_doomed`](Self::destroy_doomed) to try again.
    pub(crate) async fn destroy(&self, id: String) {
        let Some(_destruction) = self.ending.begin(&id) else {
            return;
        };
        drop(self.gofers.take(&id));
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
            Gofers::default(),
            Ending::default(),
        );
        store.make("a").unwrap();
        runtime.fail_next(
            "delete",
            RuntimeError::Unsupported {
                op: "delete",
                id: "a".to_owned(),
            },
        );
        booter.doom("a".to_owned(), Place::Booting).await;
        assert_eq!(store.list(Place::Doomed).unwrap().len(), 1);
        let hold = runtime.hold("delete");
        let release = async {
            // It has nothing to wait for: the other is at it.
            booter.destroy_doomed().await;
            assert_eq!(runtime.ops("a"), ["delete"; 2]);
            drop(hold);
        };
        tokio::join!(biased; booter.destroy("a".to_owned()), release);
        assert!(store.list(Place::Doomed).unwrap().is_empty());
        assert!(!store.bundle("a").exists());
        assert_eq!(runtime.ops("a"), ["delete"; 2]);
    }
}
