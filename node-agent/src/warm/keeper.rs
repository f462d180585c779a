// SPDX-License-Identifier: Apache-2.0

//! The one who acts: recovers what an agent before has left, tries the runtime out, boots what is
//! lacking, destroys what is too much, and hands out.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use kiln_agent_api::Shape;
use kiln_host::{
    egress::{Guard, LinkLocal, Mode},
    timer_slack,
};
use runsc_wrapper::{Release, Runsc, StartWay, check_no_xdp};
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};
use tracing::{error, info, warn};

use super::{
    boot::{BootError, Booter, Ending, Gofers, Warm, blocking},
    cgroup, memory, netns,
    pool::{Miss, Pool},
    rlimits, rootfs,
    store::{Place, Store},
    ways::{self, Ways},
};
use crate::{
    config::{Class, Config},
    exec_dir::{self, ExecDirError},
    install::{Health, listener},
    metrics::Metrics,
    setup::{Runtime, SetupError},
};

/// How long a shim may take from the answer to taking what it got.
const TAKE: Duration = Duration::from_secs(10);

/// How often the runtime, its configuration and the health of the ready are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// How often a ready sandbox is asked whether it answers.
const HEALTH: Duration = Duration::from_secs(60);

/// After so many adoptions in a row that failed, none is tried for a while: Pods are better off
/// cold than with an agent that another shim does not understand.
const FAILURES: u32 = 3;

/// That while.
const REST: Duration = Duration::from_secs(300);

/// How many sandboxes are destroyed at a time when all are: for the most part that is waiting.
const DRAINED: usize = 8;

/// How long nothing is booted after a boot that failed, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the agent holds and why it perhaps holds nothing.
pub struct Keeper {
    config: Config,
    store: Store,
    pub(crate) metrics: Metrics,
    pub(crate) gofers: Gofers,
    ending: Ending,
    /// Whether it was told to leave nothing behind.
    drained: AtomicBool,
    state: Mutex<State>,
    changed: Notify,
    health: watch::Sender<Health>,
}

struct State {
    pool: Pool,
    classes: Vec<Class>,
    active: Option<Active>,
    /// Whether what an agent before this one has left was taken up.
    recovered: bool,
    problem: String,
    guard: Guarding,
    /// Adoptions that failed since the last that did not.
    failures: u32,
    /// Nothing is handed out before.
    next_handout: Instant,
    /// Nothing is booted before.
    next_boot: Instant,
    /// How long nothing will be booted after the next boot that fails.
    backoff: Duration,
}

/// The runtime that makes sandboxes now.
#[derive(Clone)]
struct Active {
    runtime: Runtime,
    booter: Booter,
    version: String,
    ways: Ways,
}

/// Whether packets of Pods to link-local and metadata addresses are dropped on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Guarding {
    /// It has not been tried yet.
    Unknown,
    /// They are.
    Works,
    /// The node's configuration lets them pass.
    Off,
    /// They should be and cannot, for this reason.
    Fails(String),
}

/// What one look at the pool says should be done.
enum Step {
    Boot(Active, Shape),
    Destroy(Active, Vec<String>),
    /// Look again after this time, or when something has changed.
    Wait(Duration),
}

impl Keeper {
    /// A keeper with `config`; nothing happens before [`run`](Self::run). Blocks.
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn new(config: Config) -> std::io::Result<Arc<Self>> {
        let store = Store::open(&config.state)?;
        let state = State {
            pool: Pool::new(config.limits),
            classes: config.class.clone(),
            active: None,
            recovered: false,
            problem: "the runtime has not been tried yet".to_owned(),
            guard: Guarding::Unknown,
            failures: 0,
            next_handout: Instant::now(),
            next_boot: Instant::now(),
            backoff: BACKOFF.0,
        };
        Ok(Arc::new(Self {
            store,
            metrics: Metrics::new(),
            gofers: Gofers::default(),
            ending: Ending::default(),
            drained: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Notify::new(),
            health: watch::Sender::new(Health::Unknown("nobody has looked yet".to_owned())),
            config,
        }))
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Whether Pods of the class can start, now and from now on.
    pub(crate) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Notes whether Pods of the class can start. What was seen last holds while it cannot be seen.
    pub(crate) fn set_health(&self, health: Health) {
        let before = self.health.borrow().clone();
        let was_seen = !matches!(before, Health::Unknown(_));
        if health == before || (was_seen && matches!(health, Health::Unknown(_))) {
            return;
        }
        match &health {
            Health::Bad(why) => error!("Pods of the class cannot start: {why}"),
            other => info!("whether Pods of the class can start: {other:?}"),
        }
        self.metrics.served.set((health == Health::Good).into());
        self.health.send_replace(health);
    }

    /// Has sandboxes outlive the container that this process may be in. Blocks.
    pub fn outlive_container(&self) {
        if let Err(e) = cgroup::leave_own_cgroup(&self.config.cgroup) {
            warn!("sandboxes, also those of Pods, may end with this agent: leave its cgroup: {e}");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counts that a panic left half-way are still counts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file that stands for the handed out sandbox `id`.
    pub(crate) fn file(&self, id: &str) -> std::path::PathBuf {
        self.store.file(Place::Handed, id)
    }

    /// `cgroupsPath` of sandbox `id`.
    pub(crate) fn cgroup_of(&self, id: &str) -> String {
        cgroup::cgroup_of(&self.config.cgroup, id)
    }

    /// Looks at the pool.
    pub(crate) fn look<T>(&self, at: impl FnOnce(&Pool, &str) -> T) -> T {
        let state = self.state();
        at(&state.pool, &state.problem)
    }

    /// Hands out a sandbox of `shape`, and returns its id and the pid of its sentry. If nobody takes its file within
    /// ten seconds, it is destroyed.
    pub(crate) async fn acquire(self: &Arc<Self>, shape: &Shape) -> Result<(String, u32), Miss> {
        loop {
            let (id, booter) = self
                .choose(shape)
                .inspect_err(|miss| self.metrics.missed(*miss, 1))?;
            let (store, name) = (self.store.clone(), id.clone());
            let handed = blocking("hand out a sandbox", move || {
                let note = store.hand_out(&name)?;
                timer_slack::set(note.pid, timer_slack::DEFAULT)?;
                Ok(note)
            });
            let note = match handed.await {
                Ok(note) => note,
                Err(e) => {
                    // Its end was noticed just now.
                    warn!("{id}: {e}");
                    booter.doom(id, Place::Handed).await;
                    continue;
                }
            };
            self.metrics.handed.inc();
            self.changed.notify_one();
            let doomed = id.clone();
            let gofers = self.gofers.clone();
            tokio::spawn(async move {
                sleep(TAKE).await;
                drop(gofers.take(&doomed));
                booter.doom(doomed.clone(), Place::Handed).await;
                // A shim that died while it took the sandbox has left it.
                booter.remove_cgroup(&doomed).await;
            });
            return Ok((id, note.pid));
        }
    }

    fn choose(&self, shape: &Shape) -> Result<(String, Booter), Miss> {
        let mut state = self.state();
        let active = state.active.clone().ok_or(Miss::Broken)?;
        if Instant::now() < state.next_handout {
            return Err(Miss::Broken);
        }
        if !active.runtime.makes(shape) {
            return Err(Miss::Stale);
        }
        let chosen = state.pool.acquire(shape, Instant::now());
        if chosen.is_err() {
            self.changed.notify_one();
        }
        Ok((chosen?, active.booter))
    }

    /// Notes that a Pod of `shape` runs in the sandbox `id`, which was handed out.
    pub(crate) async fn adopted(&self, id: String, shape: &Shape, took: Duration) {
        info!("{id} is adopted after {} us", took.as_micros());
        self.metrics.adopted(took);
        self.note_adoption(shape);
        let store = self.store.clone();
        let removed = blocking("remove a bundle", move || store.remove_bundle(&id));
        if let Err(e) = removed.await {
            warn!("{e}");
        }
    }

    /// Destroys the handed out sandbox `id`, if the shim has not done so.
    pub(crate) async fn release(&self, id: String, reason: &str) {
        warn!("{id} was not adopted: {reason}");
        self.metrics.released.inc();
        let booter = self.note_failure();
        if let Some(booter) = booter {
            booter.doom(id, Place::Handed).await;
        }
    }

    fn note_adoption(&self, shape: &Shape) {
        let mut state = self.state();
        state.pool.adopted(shape);
        state.failures = 0;
    }

    fn note_failure(&self) -> Option<Booter> {
        let mut state = self.state();
        state.failures += 1;
        if state.failures >= FAILURES {
            let rest = REST.as_secs();
            error!("{FAILURES} adoptions failed in a row: none for {rest} s");
            state.failures = 0;
            state.next_handout = Instant::now() + REST;
        }
        state.active.as_ref().map(|a| a.booter.clone())
    }

    /// Holds `wished` beside what the configuration names.
    pub(crate) fn wish(&self, wished: Vec<Class>) {
        let classes = [self.config.class.clone(), wished].concat();
        let mut state = self.state();
        if state.classes == classes {
            return;
        }
        state.classes = classes;
        if let Err(e) = state.want() {
            warn!("{e}");
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Name of the RuntimeClass whose Pods the sandboxes are for.
    pub(crate) fn class(&self) -> &str {
        &self.config.runtime_class
    }

    /// Bytes of memory that a kubelet adds to the limit of a Pod of that class.
    pub(crate) fn overhead(&self) -> u64 {
        self.config.overhead
    }

    /// Bytes of memory that warm sandboxes held at the last look.
    pub(crate) fn held(&self) -> u64 {
        u64::try_from(self.metrics.held.get()).unwrap_or_default()
    }

    /// Version of the runtime and how its sandboxes are made, where it is in use.
    pub(crate) fn runtime(&self) -> Option<(String, Ways)> {
        let state = self.state();
        state.active.as_ref().map(|a| (a.version.clone(), a.ways))
    }

    /// Keeps the node's warm sandboxes, for ever.
    pub async fn run(self: Arc<Self>) {
        let (mut looked, mut asked) = (None::<Instant>, Instant::now());
        loop {
            if looked.is_none_or(|at| at.elapsed() > LOOK) {
                self.look_at_runtime().await;
                looked = Some(Instant::now());
            }
            if asked.elapsed() > HEALTH {
                self.ask_all().await;
                self.destroy_doomed();
                self.sweep().await;
                asked = Instant::now();
            }
            match self.next_step().await {
                Step::Boot(active, shape) => {
                    tokio::spawn(Arc::clone(&self).boot(active, shape));
                }
                Step::Destroy(active, ids) => {
                    for id in ids {
                        active.booter.doom(id, Place::Ready).await;
                    }
                }
                Step::Wait(time) => {
                    let change = self.changed.notified();
                    tokio::time::timeout(time, change).await.ok(); // either is a reason to look
                }
            }
        }
    }

    async fn next_step(&self) -> Step {
        let (store, cgroup) = (self.store.clone(), self.config.cgroup.clone());
        let memory = blocking("look at the node's memory", move || {
            Ok((memory::available_memory(), held_memory(&store, &cgroup)))
        });
        let (available, held) = memory.await.unwrap_or_default();
        self.metrics
            .held
            .set(i64::try_from(held).unwrap_or(i64::MAX));
        let mut state = self.state();
        let Some(active) = state.active.clone() else {
            return Step::Wait(LOOK);
        };
        state
            .pool
            .forget(Instant::now(), |shape| active.runtime.makes(shape));
        let surplus = state.pool.surplus();
        if !surplus.is_empty() {
            for id in &surplus {
                state.pool.lost(id);
            }
            return Step::Destroy(active, surplus);
        }
        let now = Instant::now();
        if now < state.next_boot {
            return Step::Wait(state.next_boot - now);
        }
        match state.pool.next_boot() {
            Some(shape) if available >= self.config.limits.memory_floor => {
                state.pool.booting(&shape);
                state.next_boot = now + self.config.limits.pause();
                Step::Boot(active, shape)
            }
            _ => Step::Wait(LOOK),
        }
    }

    async fn boot(self: Arc<Self>, active: Active, shape: Shape) {
        let begun = Instant::now();
        let booted = active.booter.boot_ahead(&shape).await;
        let took = begun.elapsed();
        match booted {
            Ok(warm) => {
                info!("{} is ready after {} ms", warm.id, took.as_millis());
                self.metrics.boot.observe(took.as_secs_f64());
                let mut state = self.state();
                state.pool.booted(&shape, Some(&warm.id), took);
                state.backoff = BACKOFF.0;
                drop(state);
                self.watch(active.booter, warm);
            }
            Err(e) => {
                error!("boot: {e}");
                self.metrics.boot_failures.inc();
                let mut state = self.state();
                state.pool.booted(&shape, None, took);
                state.next_boot = Instant::now() + state.backoff;
                state.backoff = (state.backoff * 2).min(BACKOFF.1);
            }
        }
        self.changed.notify_one();
    }

    /// Notices when a sandbox ends that nobody has taken.
    fn watch(self: &Arc<Self>, booter: Booter, warm: Warm) {
        let keeper = Arc::clone(self);
        tokio::spawn(async move {
            warm.process.ended().await;
            if keeper.state().pool.lost(&warm.id) {
                warn!("{} ended by itself", warm.id);
                keeper.metrics.lost.inc();
                keeper.changed.notify_one();
                booter.doom(warm.id, Place::Ready).await;
            }
        });
    }

    async fn sweep(&self) {
        let store = self.store.clone();
        if let Err(e) = blocking("sweep bundles", move || store.sweep()).await {
            warn!("{e}");
        }
    }

    /// Tries to destroy what could not be destroyed before. Nothing else waits for that.
    fn destroy_doomed(&self) {
        let active = self.state().active.clone();
        if let Some(Active { booter, .. }) = active {
            tokio::spawn(async move { booter.destroy_doomed().await });
        }
    }

    /// Destroys ready sandboxes that do not answer.
    async fn ask_all(&self) {
        let (ids, active) = {
            let state = self.state();
            (state.pool.ids(), state.active.clone())
        };
        let Some(active) = active else { return };
        for id in ids {
            if !active.booter.answers(&id).await && self.state().pool.lost(&id) {
                warn!("{id} does not answer");
                self.metrics.lost.inc();
                active.booter.doom(id, Place::Ready).await;
            }
        }
    }

    /// Takes up the runtime if it has changed since the last look, after a trial.
    async fn look_at_runtime(self: &Arc<Self>) {
        let (file, namespace) = (
            self.config.runtime_config.clone(),
            self.config.namespace.clone(),
        );
        let found = tokio::task::spawn_blocking(move || Runtime::look(&file, &namespace)).await;
        let runtime = match found {
            Ok(Ok(runtime)) => runtime,
            Ok(Err(e)) => return self.stop(&e),
            Err(e) => return self.stop(&e),
        };
        let same = |active: &Active| active.runtime == runtime;
        if self.state().active.as_ref().is_some_and(same) {
            return;
        }
        self.try_guard(&runtime).await;
        match self.take_up(runtime).await {
            Ok(active) => {
                info!("sandboxes can be adopted, way: {:?}", active.ways);
                self.metrics.usable.set(1);
                self.metrics.set_runtime(&active.version, active.ways);
                // Once only: after a runtime that did not work for a while, those are its own.
                if !std::mem::replace(&mut self.state().recovered, true) {
                    self.recover(&active).await;
                }
            }
            Err(e) => self.stop(&e),
        }
    }

    /// Tries out whether packets to link-local addresses can be dropped, in a network of its own.
    async fn try_guard(&self, runtime: &Runtime) {
        let policy = runtime.link_local.clone();
        let guard = if policy.mode == Mode::Allow {
            Guarding::Off
        } else {
            match guard_new_netns(policy, runtime.config.flags.clone()).await {
                Ok(()) => Guarding::Works,
                Err(e) => Guarding::Fails(e.to_string()),
            }
        };
        let mut state = self.state();
        if state.guard != guard {
            match &guard {
                Guarding::Fails(why) => error!("Pods may send to link-local addresses: {why}"),
                other => info!("packets of Pods to link-local addresses: {other:?}"),
            }
        }
        let works = guard == Guarding::Works;
        self.metrics.guards.set(works.into());
        state.guard = guard;
    }

    /// Whether packets of Pods to link-local addresses are dropped.
    pub(crate) fn guarding(&self) -> Guarding {
        self.state().guard.clone()
    }

    fn stop(&self, why: &dyn std::fmt::Display) {
        let mut state = self.state();
        let words = why.to_string();
        if state.problem != words {
            error!("no warm sandboxes: {words}");
        }
        state.problem = words;
        state.active = None;
        self.metrics.usable.set(0);
        self.metrics.no_runtime();
    }

    /// Takes containerd's limits, which a sandbox that starts cold has.
    async fn take_limits(&self) {
        let socket = self.config.containerd_socket().to_owned();
        let took = blocking("take containerd's limits", move || {
            rlimits::take_from(listener(&socket).map_err(std::io::Error::other)?)
        });
        if let Err(e) = took.await {
            warn!("limits on files may differ between warm and cold sandboxes: {e}");
        }
    }

    async fn take_up(&self, runtime: Runtime) -> Result<Active, TakeUp> {
        self.take_limits().await;
        let state = self.config.state.clone();
        tokio::task::spawn_blocking(move || exec_dir::prepare(&state)).await??;
        let (rootfs, image) = (self.store.rootfs(), self.store.image());
        let pause = self.config.pause.clone();
        let what = format!("install {}", pause.display());
        blocking(&what, move || rootfs::write_rootfs(&rootfs, &image, &pause)).await?;
        let booter = self.booter(&runtime);
        let blank = Class {
            name: "trial".to_owned(),
            warm: 0,
            memory: None,
            cpu: None,
            sysctl: crate::config::default_sysctl(),
        };
        let version = booter.version().await?;
        let shape = runtime.shape(&blank)?;
        let release = Release::of(&version, &runtime.config.flags);
        if !release.is_known {
            info!("{version} is not among the releases of runsc that are known");
        }
        let (booter, ways) = ways::find(booter, &shape, &release).await?;
        let active = Active {
            runtime,
            booter,
            version,
            ways,
        };
        let mut state = self.state();
        state.active = Some(active.clone());
        state.problem.clear();
        state.want()?;
        Ok(active)
    }

    /// How sandboxes that are handed out now are to be started.
    pub(crate) fn start_way(&self) -> StartWay {
        let state = self.state();
        let ways = state.active.as_ref().map(|active| active.ways);
        ways.map_or(StartWay::Command, |ways| ways.start)
    }

    fn booter(&self, runtime: &Runtime) -> Booter {
        let runsc = Arc::new(Runsc::new(runtime.config.clone()));
        Booter::new(
            runsc,
            self.store.clone(),
            self.config.cgroup.clone(),
            self.gofers.clone(),
            self.ending.clone(),
        )
    }

    /// Destroys every sandbox that nobody has taken, and removes the agent's directories. No
    /// agent may run.
    ///
    /// # Errors
    /// When the runtime cannot be used, or something stays.
    pub async fn drain(&self) -> anyhow::Result<()> {
        self.drained.store(true, Ordering::Relaxed);
        let mut left = Vec::new();
        for place in Place::ALL {
            let store = self.store.clone();
            let there = blocking("list sandboxes", move || store.list(place)).await?;
            left.extend(there.into_iter().map(|(id, _)| (id, place)));
        }
        // A node on which nothing was booted may have no runtime either.
        if !left.is_empty() {
            self.destroy_all(left).await?;
        }
        let (store, state) = (self.store.clone(), self.config.state.clone());
        blocking("look whether all are gone", move || store.check_empty()).await?;
        blocking("unmount what sandboxes execute", move || {
            exec_dir::unmount(&state)
        })
        .await?;
        let (state, cgroup) = (self.config.state.clone(), self.config.cgroup.clone());
        blocking("remove the agent's directories", move || {
            use std::io::ErrorKind::{ReadOnlyFilesystem, ResourceBusy};
            cgroup::remove_cgroups_below(&cgroup, cgroup::END_TIME);
            cgroup::remove_cgroup(&cgroup, cgroup::END_TIME);
            match std::fs::remove_dir_all(state) {
                // It is empty, and the node has given it to this container.
                Err(e) if matches!(e.kind(), ResourceBusy | ReadOnlyFilesystem) => Ok(()),
                done => done,
            }
        })
        .await?;
        Ok(())
    }

    /// Whether [`drain`](Self::drain) was called: no file is to be made any more.
    pub(crate) fn is_drained(&self) -> bool {
        self.drained.load(Ordering::Relaxed)
    }

    async fn destroy_all(&self, sandboxes: Vec<(String, Place)>) -> anyhow::Result<()> {
        let config = &self.config;
        let (file, namespace) = (config.runtime_config.clone(), config.namespace.clone());
        let runtime =
            tokio::task::spawn_blocking(move || Runtime::look(&file, &namespace)).await??;
        let booter = &self.booter(&runtime);
        let destroy = async |(id, place)| match place {
            Place::Doomed => booter.destroy(id).await,
            place => booter.doom(id, place).await,
        };
        stream::iter(sandboxes)
            .for_each_concurrent(DRAINED, destroy)
            .await;
        Ok(())
    }

    /// Takes up what an agent before this one has left, and destroys what cannot be used.
    async fn recover(self: &Arc<Self>, active: &Active) {
        for place in [Place::Booting, Place::Handed, Place::Doomed, Place::Ready] {
            let store = self.store.clone();
            let left = match blocking("list sandboxes", move || store.list(place)).await {
                Ok(left) => left,
                Err(e) => return error!("recover: {e}"),
            };
            for (id, note) in left {
                let usable =
                    note.filter(|n| place == Place::Ready && active.runtime.makes(&n.shape));
                let kept = match &usable {
                    Some(note) => active
                        .booter
                        .recover(&id, note)
                        .await
                        .ok()
                        .zip(usable.as_ref()),
                    None => None,
                };
                match kept {
                    Some((warm, note)) => {
                        info!("{id} is ready from before");
                        self.state().pool.recovered(&note.shape, &id);
                        self.watch(active.booter.clone(), warm);
                    }
                    None if place == Place::Doomed => active.booter.destroy(id).await,
                    None => active.booter.doom(id, place).await,
                }
            }
        }
        // Of shims that died while they took a sandbox, and nobody was there to see it.
        let cgroup = self.config.cgroup.clone();
        let swept = blocking("remove cgroups", move || {
            cgroup::remove_cgroups_below(&cgroup, Duration::ZERO);
            Ok(())
        });
        if let Err(e) = swept.await {
            warn!("{e}");
        }
    }
}

impl State {
    fn want(&mut self) -> Result<(), SetupError> {
        if let Some(active) = &self.active {
            let wanted = active.runtime.wanted(&self.classes)?;
            self.pool.want(wanted);
        }
        Ok(())
    }
}

/// Bytes of memory that sandboxes hold which are ready or boot, in cgroups below `cgroup`. In that
/// one itself is also what sandboxes took before they were adopted. Blocks.
fn held_memory(store: &Store, cgroup: &str) -> u64 {
    // What cannot be looked at counts as nothing: booting goes on without that number.
    let held = [Place::Booting, Place::Ready].map(|place| store.ids(place).unwrap_or_default());
    let of = |id: &String| cgroup::held_memory(&cgroup::cgroup_of(cgroup, id));
    held.iter().flatten().map(of).sum()
}

/// Sets the rules of `policy` in a namespace made for it, for a runtime with these flags.
async fn guard_new_netns(
    policy: LinkLocal,
    flags: BTreeMap<String, String>,
) -> Result<(), BootError> {
    let netns = netns::with_link().await;
    blocking("guard a network namespace", move || {
        Guard::set(netns?.as_fd(), &policy).map_err(io::Error::other)?;
        check_no_xdp(&flags).map_err(io::Error::other)
    })
    .await
}

/// Why a runtime was not taken up.
#[derive(Debug, thiserror::Error)]
enum TakeUp {
    #[error(transparent)]
    ExecDir(#[from] ExecDirError),
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Setup(#[from] SetupError),
}
