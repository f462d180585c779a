// SPDX-License-Identifier: Apache-2.0

//! Whether what Pods of the class need is on the node, where the agent is the one to put it
//! there.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use crate::{
    install::{Outcome, run_on_node},
    keeper::Keeper,
};

/// How long a node is left alone after something failed on it, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// How often it is looked whether Pods still run that need what is installed.
const LOOK: Duration = Duration::from_secs(5);

/// How often draining is tried, a second after the other: a sandbox may be booting.
const DRAINS: u32 = 20;

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It is others who see to it.
    Others,
    /// It is being put there.
    Installing,
    /// It is there, and sandboxes run.
    Installed(String),
    /// It could not be put there.
    InstallFailed {
        /// Why.
        why: String,
        /// Whether an earlier one is there and works.
        is_installed: bool,
    },
    /// It is being taken away.
    Removing,
    /// It is to be taken away when the Pods have ended that need it.
    InUse(String),
    /// It was taken away.
    Removed(String),
    /// It could not be taken away.
    RemoveFailed(String),
}

/// Sees to it.
#[derive(Debug, Clone)]
pub struct Presence {
    config: PathBuf,
    installs: bool,
    state: Arc<watch::Sender<State>>,
    wanted: Arc<watch::Sender<bool>>,
}

impl Presence {
    /// By the configuration in the file `config`; `installs` is whether that has `[install]`.
    #[must_use]
    pub fn new(config: PathBuf, installs: bool) -> Self {
        let state = match installs {
            true => State::Installing,
            false => State::Others,
        };
        Self {
            config,
            installs,
            state: Arc::new(watch::Sender::new(state)),
            wanted: Arc::new(watch::Sender::new(true)),
        }
    }

    /// How it stands, now and from now on.
    pub(crate) fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Has it put there, or taken away. Without effect where others see to it.
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
            State::Others | State::Installed(_) => true,
            State::InstallFailed { is_installed, .. } => *is_installed,
            _ => false,
        };
        self.state.subscribe().wait_for(usable).await.ok();
    }

    /// Puts everything on the node, has `keeper` hold sandboxes as soon as they run there, and
    /// takes everything away when it is no longer wanted. Returns when it then is wanted again,
    /// which is for a new process to begin with.
    pub async fn run(&self, keeper: &Arc<Keeper>) {
        let hold = async {
            self.until_usable().await;
            keeper.clone().run().await;
        };
        let hold = async {
            tokio::select! {
                () = hold => {}
                () = self.until_wanted_is(false) => {}
            }
        };
        tokio::join!(self.install(), hold);
        self.remove(keeper).await;
        self.until_wanted_is(true).await;
        info!("wanted again");
    }

    /// Puts everything on the node; until that works, or is no longer wanted.
    async fn install(&self) {
        if !self.installs {
            return;
        }
        let mut backoff = BACKOFF.0;
        loop {
            match run_on_node("install", &self.config).await {
                Outcome::Done(done) => {
                    info!(done.changed, done.restarted, "installed: {}", done.words);
                    self.state.send_replace(State::Installed(done.words));
                    return;
                }
                Outcome::Failed { why, is_installed } => {
                    warn!("not installed: {why}; tried again in {backoff:?}");
                    self.state
                        .send_replace(State::InstallFailed { why, is_installed });
                }
            }
            tokio::select! {
                () = sleep(backoff) => backoff = (backoff * 2).min(BACKOFF.1),
                () = self.until_wanted_is(false) => return,
            }
        }
    }

    /// Takes everything away, the sandboxes that are no Pods' first, and the rest when the last Pod
    /// that needs it has ended; unless it is wanted again before.
    async fn remove(&self, keeper: &Keeper) {
        self.state.send_replace(State::Removing);
        info!("told to take away what was installed");
        if !self.drain(keeper).await {
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
                () = sleep(LOOK) => {}
                () = self.until_wanted_is(true) => return,
            }
        }
    }

    /// Destroys the sandboxes that are no Pods', without which nobody would know of them any more.
    /// Returns whether that was done before all was wanted again.
    async fn drain(&self, keeper: &Keeper) -> bool {
        let mut tries = 0;
        loop {
            match keeper.drain().await {
                Ok(()) => return true,
                Err(e) => {
                    info!("drain: {e:#}");
                    tries += 1;
                    if tries >= DRAINS {
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
