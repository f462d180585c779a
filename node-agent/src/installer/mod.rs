// SPDX-License-Identifier: Apache-2.0

//! What Pods of the class need on the node: the agent checks whether it is there. An agent with
//! `[install]` also installs it, and puts back what is taken away or changed later.

pub mod process;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tracing::{error, info, warn};

use crate::{warm::Metrics, warm::WarmManager};
use kiln_node_install::{Check, Health, Outcome, run_on_node};

/// How long a node is left alone after it was changed, at first and at most.
const CHANGE_BACKOFF: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// How often the node is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// How long something has to be wrong: somebody may be changing the node by hand right now.
const CONFIRM_AFTER: Duration = Duration::from_secs(2);

/// How often an uninstallation that Pods are in the way of is tried again.
const IN_USE_INTERVAL: Duration = Duration::from_secs(5);

/// How often draining is tried, a second after the other, before that is a failure: a sandbox may
/// be booting.
const DRAIN_ATTEMPTS: u32 = 20;

/// State of what the agent installs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Others install it, or not.
    Unmanaged,
    /// It is being installed.
    Installing,
    /// It is installed, and sandboxes run.
    Installed(String),
    /// It was not installed.
    InstallFailed {
        /// Why.
        why: String,
        /// Whether an earlier one is there.
        is_installed: bool,
    },
    /// It is being uninstalled.
    Removing,
    /// It is uninstalled when the Pods have ended that need it.
    InUse(String),
    /// It is uninstalled.
    Removed(String),
    /// It was not uninstalled.
    RemoveFailed(String),
}

/// Owner of what is installed on the node, and of what is known of it.
#[derive(Debug, Clone)]
pub struct Installer {
    config: PathBuf,
    installs: bool,
    state: Arc<watch::Sender<State>>,
    health: Arc<watch::Sender<Health>>,
    wanted: Arc<watch::Sender<bool>>,
}

impl Installer {
    /// Makes one with the configuration in the file `config`; `installs` says whether that has
    /// `[install]`.
    #[must_use]
    pub fn new(config: PathBuf, installs: bool) -> Self {
        let state = match installs {
            true => State::Installing,
            false => State::Unmanaged,
        };
        let unseen = "nobody has looked yet".to_owned();
        Self {
            config,
            installs,
            state: Arc::new(watch::Sender::new(state)),
            health: Arc::new(watch::Sender::new(Health::Unknown(unseen))),
            wanted: Arc::new(watch::Sender::new(true)),
        }
    }

    /// Watches the state.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Watches whether Pods of the class can start.
    pub(crate) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// Notes whether Pods of the class can start. What was seen last holds while it cannot be seen.
    fn set_health(&self, metrics: &Metrics, health: Health) {
        let before = self.health.borrow().clone();
        let was_seen = !matches!(before, Health::Unknown(_));
        if health == before || (was_seen && matches!(health, Health::Unknown(_))) {
            return;
        }
        match &health {
            Health::Bad(why) => error!("Pods of the class cannot start: {why}"),
            other => info!("whether Pods of the class can start: {other:?}"),
        }
        metrics.served.set((health == Health::Good).into());
        self.health.send_replace(health);
    }

    /// Has it installed or uninstalled. Does nothing if others install it.
    pub(crate) fn set_wanted(&self, wanted: bool) {
        if self.installs {
            self.wanted.send_replace(wanted);
        }
    }

    async fn until_wanted_is(&self, wanted: bool) {
        // The sender lives as long as `self`.
        self.wanted
            .subscribe()
            .wait_for(|w| *w == wanted)
            .await
            .ok();
    }

    async fn until_usable(&self) {
        let usable = |state: &State| match state {
            State::Unmanaged | State::Installed(_) => true,
            State::InstallFailed { is_installed, .. } => *is_installed,
            _ => false,
        };
        self.state.subscribe().wait_for(usable).await.ok();
    }

    /// Installs, has `manager` hold sandboxes as soon as they run on the node, and uninstalls when
    /// that is no longer wanted. Returns when it then is wanted again, which is for a new process
    /// to begin with.
    pub async fn run(&self, manager: &Arc<WarmManager>) {
        let hold = async {
            self.until_usable().await;
            manager.clone().run().await;
        };
        let hold = async {
            tokio::select! {
                () = hold => {}
                () = self.until_wanted_is(false) => {}
            }
        };
        tokio::join!(self.uphold(manager), hold);
        self.remove(manager).await;
        self.until_wanted_is(true).await;
        info!("wanted again");
    }

    /// Installs, checks and repairs, until that is no longer wanted.
    async fn uphold(&self, manager: &WarmManager) {
        let install = manager.config.install.as_ref();
        let repairs = install.is_some_and(|install| install.repair);
        let mut check = Check::new(manager.config.clone());
        let mut brake = Brake::new(Instant::now());
        let mut is_due = self.installs;
        loop {
            if is_due && brake.allows(Instant::now()) {
                let is_first = *self.state.borrow() == State::Installing;
                if !self.install(manager).await || !is_first {
                    brake.hold(Instant::now());
                }
            }
            let health = confirmed(&mut check).await;
            if health == Health::Good {
                brake.ease(Instant::now());
            }
            let is_bad = matches!(health, Health::Bad(_));
            self.set_health(&manager.metrics, health);
            let has_failed = matches!(*self.state.borrow(), State::InstallFailed { .. });
            is_due = self.installs && (has_failed || (is_bad && repairs));
            tokio::select! {
                () = sleep(CHECK_INTERVAL) => {}
                () = self.until_wanted_is(false) => return,
            }
        }
    }

    /// Installs, or repairs. Returns whether that has worked.
    async fn install(&self, manager: &WarmManager) -> bool {
        self.state.send_replace(State::Installing);
        let state = match run_on_node("install", &self.config).await {
            Outcome::Done(done) => {
                info!(done.changed, done.restarted, "installed: {}", done.words);
                State::Installed(done.words)
            }
            Outcome::Failed { why, is_installed } => {
                warn!("not installed, to be tried again: {why}");
                State::InstallFailed { why, is_installed }
            }
        };
        let is_done = matches!(state, State::Installed(_));
        manager.metrics.installed(is_done);
        self.state.send_replace(state);
        is_done
    }

    /// Destroys the sandboxes that are no Pods', and uninstalls when the last Pod has ended that
    /// needs what is installed; unless that is wanted again before.
    async fn remove(&self, manager: &WarmManager) {
        self.state.send_replace(State::Removing);
        info!("uninstalling, as the cluster asks");
        if !self.drain(manager).await {
            return;
        }
        loop {
            let state = match run_on_node("uninstall", &self.config).await {
                Outcome::Done(done) if done.in_use > 0 => State::InUse(done.words),
                Outcome::Done(done) => State::Removed(done.words),
                Outcome::Failed { why, .. } => State::RemoveFailed(why),
            };
            if *self.state.borrow() != state {
                info!("{state:?}");
            }
            let waits = matches!(state, State::InUse(_));
            self.state.send_replace(state);
            if !waits {
                return;
            }
            tokio::select! {
                () = sleep(IN_USE_INTERVAL) => {}
                () = self.until_wanted_is(true) => return,
            }
        }
    }

    /// Destroys the sandboxes that are no Pods', without which nobody would know of them any more.
    /// Returns whether that was done before all was wanted again.
    async fn drain(&self, manager: &WarmManager) -> bool {
        let mut tries = 0;
        loop {
            match manager.drain().await {
                Ok(()) => return true,
                Err(e) => {
                    info!("drain: {e:#}");
                    tries += 1;
                    if tries >= DRAIN_ATTEMPTS {
                        let why = format!("its warm sandboxes cannot be destroyed: {e:#}");
                        self.state.send_replace(State::RemoveFailed(why));
                    }
                }
            }
            tokio::select! {
                () = sleep(Duration::from_secs(1)) => {}
                () = self.until_wanted_is(true) => return false,
            }
        }
    }
}

/// Checks the node, and once more when something is wrong.
async fn confirmed(check: &mut Check) -> Health {
    let health = check.look().await;
    if !matches!(health, Health::Bad(_)) {
        return health;
    }
    sleep(CONFIRM_AFTER).await;
    check.look().await
}

/// Keeps a node from being changed, and its containerd from being started anew, all the time: by
/// what fails, or by somebody who takes away again and again what was put there.
#[derive(Debug)]
struct Brake {
    next: Instant,
    /// How long the node is left alone after the next time.
    pause: Duration,
}

impl Brake {
    fn new(now: Instant) -> Self {
        Self {
            next: now,
            pause: CHANGE_BACKOFF.0,
        }
    }

    fn allows(&self, now: Instant) -> bool {
        now >= self.next
    }

    /// The node has just been changed.
    fn hold(&mut self, now: Instant) {
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(CHANGE_BACKOFF.1);
    }

    /// All is well: after some time of that, the next trouble is the first again.
    fn ease(&mut self, now: Instant) {
        if now >= self.next + self.pause {
            self.pause = CHANGE_BACKOFF.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds at which a node is repaired that is broken `after` seconds from each repair on.
    fn repairs(after: u64) -> Vec<u64> {
        let start = Instant::now();
        let mut brake = Brake::new(start);
        let (mut times, mut well_until) = (Vec::new(), 0);
        for second in 0..20_000 {
            let now = start + Duration::from_secs(second);
            if second < well_until {
                brake.ease(now);
            } else if brake.allows(now) {
                times.push(second);
                brake.hold(now);
                well_until = second + after;
            }
        }
        times
    }

    #[tokio::test]
    async fn who_breaks_a_node_again_and_again_is_not_followed_at_once() {
        let at_once = repairs(0);
        assert_eq!(at_once[..4], [0, 60, 180, 420]);
        let mut gaps = at_once.windows(2).map(|w| w[1] - w[0]);
        assert!(
            gaps.clone().all(|gap| (60..=3600).contains(&gap)),
            "{at_once:?}"
        );
        assert_eq!(gaps.next_back(), Some(3600));
        // One that breaks now and then is repaired at once.
        assert_eq!(repairs(600)[..4], [0, 600, 1200, 1800]);
    }
}
