// SPDX-License-Identifier: Apache-2.0

//! The loop that acts on what the pool decides, and the hand-out.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kiln_agent_api::Shape;
use kiln_host::timer_slack;
use runsc_wrapper::{PrestartedGofer, Runsc};
use tokio::{sync::Notify, time::sleep};
use tracing::{error, info, warn};

use super::{
    boot::{Booter, InProgress, blocking},
    cgroup, memory,
    metrics::Metrics,
    pool::{Miss, Pool, ShapeReport},
    reload::{Active, Guarding, Health},
    runtime::{Runtime, SetupError},
    sandbox::{Handed, HandedOut, Handout, WarmSandbox},
    store::{Place, Store},
};
use kiln_node_install::config::{Class, Config};

/// How long a shim may take from the answer to taking what it got.
const TAKE_LIMIT: Duration = Duration::from_secs(10);

/// How often the runtime and its configuration are read, and the longest time between two steps.
const RELOAD_INTERVAL: Duration = Duration::from_secs(5);

/// How often ready sandboxes are asked whether they answer, and leftovers are removed.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(60);

/// After so many adoptions in a row that failed, none is tried for a while: Pods are better off
/// cold than with an agent that another shim does not understand.
const MAX_FAILED_ADOPTIONS: u32 = 3;

/// How long nothing is handed out then.
const FAILED_ADOPTIONS_PAUSE: Duration = Duration::from_secs(300);

/// How long nothing is booted after a boot that failed, at first.
const BOOT_BACKOFF: Duration = Duration::from_secs(1);

/// How long nothing is booted after a boot that failed, at most.
const MAX_BOOT_BACKOFF: Duration = Duration::from_secs(60);

/// Owner of the node's warm sandboxes.
pub struct WarmManager {
    pub(crate) config: Config,
    pub(crate) metrics: Metrics,
    pub(super) store: Store,
    in_progress: InProgress,
    state: Mutex<State>,
    changed: Notify,
}

/// What the agent holds, and why it perhaps holds nothing.
pub(super) struct State {
    pub(super) pool: Pool,
    handed: Handed,
    classes: Vec<Class>,
    pub(super) health: Health,
    pub(super) guard: Guarding,
    /// Whether nothing is to be left behind.
    is_drained: bool,
    /// Adoptions that failed since the last that did not.
    failed_adoptions: u32,
    /// Nothing is handed out before.
    next_handout: Instant,
    /// Nothing is booted before.
    next_boot: Instant,
    /// How long nothing will be booted after the next boot that fails.
    boot_backoff: Duration,
}

/// What the agent holds at one moment, for reports.
pub(crate) struct Snapshot {
    pub(crate) health: Health,
    pub(crate) guard: Guarding,
    pub(crate) shapes: Vec<ShapeReport>,
    /// How many more sandboxes there is room for.
    pub(crate) room: u32,
    /// Bytes of memory that warm sandboxes held at the last step.
    pub(crate) held_bytes: u64,
}

/// What is to be done next.
enum Step {
    Boot(Arc<Active>, Shape),
    Retire(Arc<Active>, Vec<WarmSandbox>),
    /// Nothing for this time, or until something has changed.
    Wait(Duration),
}

impl WarmManager {
    /// Makes a manager with `config`; nothing happens before [`run`](Self::run). Blocks.
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn new(config: Config) -> io::Result<Arc<Self>> {
        let store = Store::open(&config.state)?;
        let state = State {
            pool: Pool::new(config.limits),
            handed: Handed::default(),
            classes: config.class.clone(),
            health: Health::Untried,
            guard: Guarding::Unknown,
            is_drained: false,
            failed_adoptions: 0,
            next_handout: Instant::now(),
            next_boot: Instant::now(),
            boot_backoff: BOOT_BACKOFF,
        };
        Ok(Arc::new(Self {
            store,
            metrics: Metrics::new(),
            in_progress: InProgress::default(),
            state: Mutex::new(state),
            changed: Notify::new(),
            config,
        }))
    }

    /// Has sandboxes outlive the container that this process may be in. Blocks.
    pub fn outlive_container(&self) {
        if let Err(e) = cgroup::leave_own_cgroup(&self.config.cgroup) {
            warn!("sandboxes, also those of Pods, may end with this agent: leave its cgroup: {e}");
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Counts that a panic left half-way are still counts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a booter that uses only commands of `runtime`.
    pub(super) fn booter(&self, runtime: &Runtime) -> Booter {
        Booter::new(
            Arc::new(Runsc::new(runtime.config.clone())),
            self.store.clone(),
            self.config.cgroup.clone(),
            self.in_progress.clone(),
        )
    }

    /// Copies what the agent holds now.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.state();
        Snapshot {
            health: state.health.clone(),
            guard: state.guard.clone(),
            shapes: state.pool.shapes(),
            room: state.pool.room(),
            held_bytes: u64::try_from(self.metrics.held.get()).unwrap_or_default(),
        }
    }

    /// Whether [`drain`](Self::drain) was called: no file is to be made any more.
    pub(crate) fn is_drained(&self) -> bool {
        self.state().is_drained
    }

    /// Hands out a sandbox of `shape`. If nobody takes its file within ten seconds, it is
    /// destroyed.
    ///
    /// # Errors
    /// The reason why there is none.
    pub(crate) async fn hand_out(self: &Arc<Self>, shape: &Shape) -> Result<Handout, Miss> {
        loop {
            let (handout, active) = self
                .choose(shape)
                .inspect_err(|miss| self.metrics.missed(*miss, 1))?;
            let (store, id, pid) = (self.store.clone(), handout.id.clone(), handout.pid);
            let handed = blocking("hand out a sandbox", move || {
                store.hand_out(&id)?;
                timer_slack::set(pid, timer_slack::DEFAULT)
            });
            if let Err(e) = handed.await {
                // Its end was noticed just now.
                warn!("{}: {e}", handout.id);
                self.state().handed.remove(&handout.id);
                active.booter.retire(handout.id, Place::Handed).await;
                continue;
            }
            self.metrics.handed.inc();
            self.changed.notify_one();
            let (manager, id) = (Arc::clone(self), handout.id.clone());
            tokio::spawn(async move {
                sleep(TAKE_LIMIT).await;
                drop(manager.take_gofer(&id));
                active.booter.retire(id.clone(), Place::Handed).await;
                // A shim that died while it took the sandbox has left it.
                active.booter.remove_cgroup(&id).await;
            });
            return Ok(handout);
        }
    }

    /// Takes a sandbox of `shape` from the pool, with all that its shim must know of it.
    fn choose(&self, shape: &Shape) -> Result<(Handout, Arc<Active>), Miss> {
        let mut state = self.state();
        let now = Instant::now();
        let Some(active) = state.health.active().cloned() else {
            // The next Pods of this shape find a sandbox when the runtime has passed its trial.
            state.pool.learn(shape, now);
            return Err(Miss::Broken);
        };
        if now < state.next_handout {
            return Err(Miss::Broken);
        }
        if !active.runtime.makes(shape) {
            return Err(Miss::Stale);
        }
        let chosen = state.pool.hand_out(shape, now);
        if chosen.is_err() {
            self.changed.notify_one();
        }
        let sandbox = chosen?;
        let handout = Handout {
            id: sandbox.id.clone(),
            pid: sandbox.process.pid(),
            file: self.store.file(Place::Handed, &sandbox.id),
            cgroup: cgroup::cgroup_of(&self.config.cgroup, &sandbox.id),
            way: sandbox.way,
            has_gofer: sandbox.gofer.is_some(),
        };
        state.handed.insert(HandedOut {
            id: sandbox.id,
            shape: sandbox.shape,
            gofer: sandbox.gofer,
        });
        Ok((handout, active))
    }

    /// Takes the gofer of the sandbox `id`, which was handed out.
    pub(crate) fn take_gofer(&self, id: &str) -> Option<PrestartedGofer> {
        self.state().handed.take_gofer(id)
    }

    /// Notes that a Pod runs in the sandbox `id`, `took` after that was asked for. Does nothing if
    /// it was not handed out.
    pub(crate) async fn adopted(&self, id: String, took: Duration) {
        if !self.state().adopted(&id) {
            return;
        }
        info!("{id} is adopted after {} us", took.as_micros());
        self.metrics.adopted(took);
        let store = self.store.clone();
        let removed = blocking("remove a bundle", move || store.remove_bundle(&id));
        if let Err(e) = removed.await {
            warn!("{e}");
        }
    }

    /// Destroys the sandbox `id`, if the shim has not done so. Does nothing if it was not handed
    /// out.
    pub(crate) async fn release(&self, id: String, reason: &str) {
        if self.state().handed.remove(&id).is_none() {
            return;
        }
        warn!("{id} was not adopted: {reason}");
        self.metrics.released.inc();
        let active = self.state().note_failed_adoption();
        if let Some(active) = active {
            active.booter.retire(id, Place::Handed).await;
        }
    }

    /// Holds `wished` beside what the configuration names.
    pub(crate) fn wish(&self, wished: Vec<Class>) {
        let classes = [self.config.class.clone(), wished].concat();
        let mut state = self.state();
        if state.classes == classes {
            return;
        }
        state.classes = classes;
        if let Some(active) = state.health.active().cloned()
            && let Err(e) = state.want(&active)
        {
            warn!("{e}");
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Keeps the node's warm sandboxes, for ever.
    pub async fn run(self: Arc<Self>) {
        let (mut next_reload, mut last_upkeep) = (Instant::now(), Instant::now());
        // Once only: after a runtime that did not work for a while, those are its own.
        let mut has_recovered = false;
        loop {
            if Instant::now() >= next_reload {
                if let Some(active) = self.reload().await
                    && !has_recovered
                {
                    has_recovered = true;
                    self.recover(&active).await;
                }
                next_reload = Instant::now() + RELOAD_INTERVAL;
            }
            if last_upkeep.elapsed() > UPKEEP_INTERVAL {
                self.keep_up().await;
                last_upkeep = Instant::now();
            }
            match self.next_step().await {
                Step::Boot(active, shape) => {
                    tokio::spawn(Arc::clone(&self).boot(active, shape));
                }
                Step::Retire(active, surplus) => {
                    for sandbox in surplus {
                        active.booter.retire_ready(sandbox).await;
                    }
                }
                Step::Wait(time) => {
                    let change = self.changed.notified();
                    // Either is a reason for the next step.
                    tokio::time::timeout(time, change).await.ok();
                }
            }
        }
    }

    async fn next_step(&self) -> Step {
        let (store, cgroup) = (self.store.clone(), self.config.cgroup.clone());
        let memory = blocking("read the node's memory", move || {
            Ok((memory::available(), memory::held(&store, &cgroup)))
        });
        let (available, held) = memory.await.unwrap_or_default();
        self.metrics
            .held
            .set(i64::try_from(held).unwrap_or(i64::MAX));
        let mut state = self.state();
        let Some(active) = state.health.active().cloned() else {
            return Step::Wait(RELOAD_INTERVAL);
        };
        let now = Instant::now();
        state.pool.forget(now, |shape| active.runtime.makes(shape));
        let surplus = state.pool.take_surplus();
        if !surplus.is_empty() {
            return Step::Retire(active, surplus);
        }
        if now < state.next_boot {
            return Step::Wait(state.next_boot - now);
        }
        match state.pool.next_boot() {
            Some(shape) if available >= self.config.limits.memory_floor => {
                state.pool.booting(&shape);
                state.next_boot = now + self.config.limits.pause();
                Step::Boot(active, shape)
            }
            _ => Step::Wait(RELOAD_INTERVAL),
        }
    }

    async fn boot(self: Arc<Self>, active: Arc<Active>, shape: Shape) {
        let begun = Instant::now();
        let booted = active.booter.boot_ahead(&shape).await;
        let took = begun.elapsed();
        let mut state = self.state();
        match booted {
            Ok(sandbox) => {
                info!("{} is ready after {} ms", sandbox.id, took.as_millis());
                self.metrics.boot.observe(took.as_secs_f64());
                state.pool.booted(&shape, Some(took));
                state.boot_backoff = BOOT_BACKOFF;
                self.hold(&mut state, active.booter.clone(), sandbox);
            }
            Err(e) => {
                error!("boot: {e}");
                self.metrics.boot_failures.inc();
                state.pool.booted(&shape, None);
                state.next_boot = Instant::now() + state.boot_backoff;
                state.boot_backoff = (state.boot_backoff * 2).min(MAX_BOOT_BACKOFF);
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Holds a sandbox, until it is handed out or ends.
    pub(super) fn hold(self: &Arc<Self>, state: &mut State, booter: Booter, sandbox: WarmSandbox) {
        let (id, process) = (sandbox.id.clone(), Arc::clone(&sandbox.process));
        state.pool.add(sandbox);
        let manager = Arc::clone(self);
        tokio::spawn(async move {
            process.ended().await;
            manager.lose(&booter, &id, "ended by itself").await;
        });
    }

    /// Retires the sandbox `id`, unless it was handed out.
    async fn lose(&self, booter: &Booter, id: &str, why: &str) {
        let lost = self.state().pool.take(id);
        if let Some(sandbox) = lost {
            warn!("{id} {why}");
            self.metrics.lost.inc();
            self.changed.notify_one();
            booter.retire_ready(sandbox).await;
        }
    }

    /// Retires ready sandboxes that do not answer, and removes what is left of others.
    async fn keep_up(&self) {
        let (ids, active) = {
            let state = self.state();
            (state.pool.ids(), state.health.active().cloned())
        };
        if let Some(active) = active {
            for id in ids {
                if !active.booter.answers(&id).await {
                    self.lose(&active.booter, &id, "does not answer").await;
                }
            }
            // Nothing else waits for that.
            tokio::spawn(async move { active.booter.destroy_retired().await });
        }
        let store = self.store.clone();
        if let Err(e) = blocking("sweep bundles", move || store.sweep()).await {
            warn!("{e}");
        }
    }
}

impl State {
    /// Uses `active` from now on.
    pub(super) fn take_up(&mut self, active: &Arc<Active>) -> Result<(), SetupError> {
        self.want(active)?;
        self.health = Health::Works(Arc::clone(active));
        Ok(())
    }

    fn want(&mut self, active: &Active) -> Result<(), SetupError> {
        self.pool.want(active.runtime.wanted(&self.classes)?);
        Ok(())
    }

    /// Notes that the sandbox `id` has become a Pod. Returns whether it was handed out.
    fn adopted(&mut self, id: &str) -> bool {
        let handed = self.handed.remove(id);
        if let Some(sandbox) = &handed {
            self.pool.adopted(&sandbox.shape);
            self.failed_adoptions = 0;
        }
        handed.is_some()
    }

    /// Notes that an adoption has failed, and returns the runtime if it works.
    fn note_failed_adoption(&mut self) -> Option<Arc<Active>> {
        self.failed_adoptions += 1;
        if self.failed_adoptions >= MAX_FAILED_ADOPTIONS {
            let pause = FAILED_ADOPTIONS_PAUSE.as_secs();
            error!("{MAX_FAILED_ADOPTIONS} adoptions failed in a row: none for {pause} s");
            self.failed_adoptions = 0;
            self.next_handout = Instant::now() + FAILED_ADOPTIONS_PAUSE;
        }
        self.health.active().cloned()
    }

    /// Lets go of every sandbox, which ends their gofers: all of them are to be destroyed.
    pub(super) fn let_go_of_all(&mut self) {
        self.is_drained = true;
        self.pool.clear();
        self.handed.clear();
    }
}

#[cfg(test)]
mod tests {
    use runsc_wrapper::{NetworkCall, StartWay, fake::FakeRuntime};

    use super::*;
    use crate::warm::trial::Ways;
    use kiln_node_install::config::default_sysctl;

    #[tokio::test]
    async fn a_shape_that_is_missed_before_the_runtime_was_tried_is_booted_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let manager = WarmManager::new(Config {
            state: dir.path().join("state"),
            ..Config::default()
        });
        let manager = manager.unwrap();
        let file = dir.path().join("runsc.toml");
        std::fs::write(&file, "binary_name = '/proc/self/exe'\n").unwrap();
        let runtime = Runtime::look(&file, "k8s.io").unwrap();
        let shape = runtime.shape(&Class {
            name: "gvisor".to_owned(),
            warm: 0,
            memory: None,
            cpu: None,
            sysctl: default_sysctl(),
        });
        let shape = shape.unwrap();
        assert_eq!(manager.choose(&shape).err(), Some(Miss::Broken));
        assert_eq!(manager.state().pool.next_boot(), Some(shape));
    }

    #[tokio::test]
    async fn a_sandbox_is_started_as_its_runtime_was_tried_whatever_is_taken_up_since() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runsc.toml");
        std::fs::write(&file, "binary_name = '/proc/self/exe'\n").unwrap();
        let runtime = Runtime::look(&file, "k8s.io").unwrap();
        let class = Class {
            name: "gvisor".to_owned(),
            warm: 1,
            memory: None,
            cpu: None,
            sysctl: default_sysctl(),
        };
        let manager = WarmManager::new(Config {
            state: dir.path().join("state"),
            cgroup: "/kiln-no-such-cgroup".to_owned(),
            class: vec![class.clone()],
            ..Config::default()
        });
        let manager = manager.unwrap();
        let active = |start| {
            let fake = Arc::new(FakeRuntime::new());
            let (store, cgroup) = (manager.store.clone(), manager.config.cgroup.clone());
            let booter = Booter::new(fake, store, cgroup, InProgress::default());
            Arc::new(Active {
                runtime: runtime.clone(),
                booter: booter.with(Ways {
                    start,
                    ..Ways::COMMANDS
                }),
                version: "release-1".to_owned(),
            })
        };
        let (shape, way) = (
            runtime.shape(&class).unwrap(),
            StartWay::Control(NetworkCall::SetArgs),
        );
        let first = active(way);
        manager.state().take_up(&first).unwrap();
        let sandbox = first.booter.boot(&shape).await.unwrap();
        let id = sandbox.id.clone();
        manager.state().pool.add(sandbox);
        let second = active(StartWay::Command);
        manager.state().take_up(&second).unwrap();
        let (handout, _) = manager.choose(&shape).unwrap();
        assert_eq!((&handout.id, handout.way), (&id, way));
        assert!(!handout.has_gofer);
        assert_eq!(manager.choose(&shape).err(), Some(Miss::Empty));
        // Its shim answers once.
        assert!(manager.state().adopted(&id));
        assert!(!manager.state().adopted(&id));
    }
}
