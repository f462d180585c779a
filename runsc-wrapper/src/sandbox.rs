// SPDX-License-Identifier: Apache-2.0

//! One runsc sandbox as [`Runsc`](crate::Runsc) knows it: its process, the way to its control
//! socket, and whether that way is still open.
//!
//! ```text
//!            first use             any unexpected answer
//!  Untried ───────────▶ Open ──────────────────────────▶ Closed
//!     └───────────── probe fails, or not allowed ─────────▲
//! ```
//! `Closed` is for good: a sandbox that has once answered strangely is driven by command line,
//! which asks the same questions in the way its release was tested with.

use kiln_host::reap::{End, Tracked};
use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{
    ContainerId,
    command::Cause,
    config::Config,
    control::{Client, ControlError},
    state::SandboxState,
};

/// How long a broken connection may come before the end of the sandbox that broke it. The
/// sentry stops listening before it tears its kernel down.
const DYING: Duration = Duration::from_secs(2);

/// A running sandbox, or one that has ended.
#[derive(Debug)]
pub(crate) struct Sandbox {
    id: String,
    process: Tracked,
    /// Whether its pid is that of another process by now.
    reused: bool,
    /// The user and group of the sentry on the host.
    pub(crate) owner: (u32, u32),
    paused: AtomicBool,
    /// Who has stopped it; locked while that changes.
    pausing: tokio::sync::Mutex<Paused>,
    way: Mutex<Way>,
    /// Orders the probe, so that two first calls make one.
    probe: tokio::sync::Mutex<()>,
    fallbacks: Arc<AtomicU64>,
}

#[derive(Debug, Clone)]
enum Way {
    Untried(Client),
    Open(Client),
    Closed,
}

/// How a sandbox was paused, which is how it must be resumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Paused {
    /// It runs, as far as this process knows.
    No,
    /// Over its control socket.
    BySocket,
    /// By the command line, in the name of this container.
    ByCommand(ContainerId),
}

/// What came of a call over the control socket.
#[derive(Debug)]
pub(crate) enum Answer<T> {
    /// The result.
    Done(T),
    /// The sentry said no.
    Refused(String),
    /// The sandbox has ended.
    Gone,
    /// The call was not made, or had no effect: the command line may be asked.
    NotAsked,
    /// The call may have had its effect, but its answer is lost.
    Lost(ControlError),
}

impl Sandbox {
    /// Takes up a sandbox by what runsc says of it, and watches its process from now on.
    pub(crate) fn new(
        config: &Config,
        state: &SandboxState,
        fallbacks: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let process = Tracked::new(state.pid)?;
        // Looked at when the pidfd is open: whoever has the pid now is who is held.
        let reused = !process.has_ended() && belongs_to_another(state.pid, &state.id);
        let process = if reused {
            log::warn!(
                "sandbox {} is gone, and its pid {} reused",
                state.id,
                state.pid
            );
            Tracked::gone(state.pid)
        } else {
            process
        };
        let socket = find_socket(config, state);
        let way = match socket {
            Some(socket) if config.control_socket => {
                Way::Untried(Client::new(&socket, state.pid, config.deadlines.control))
            }
            _ => Way::Closed,
        };
        Ok(Self {
            id: state.id.clone(),
            process,
            reused,
            owner: (state.uid, state.gid),
            paused: AtomicBool::new(false),
            pausing: tokio::sync::Mutex::new(Paused::No),
            way: Mutex::new(way),
            probe: tokio::sync::Mutex::new(()),
            fallbacks,
        })
    }

    /// The id of its root container.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// Its process on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Resolves when the sandbox has ended.
    pub(crate) async fn ended(&self) -> End {
        self.process.ended().await
    }

    /// Whether the sandbox has ended, or does so within `grace`.
    pub(crate) async fn ends_within(&self, grace: Duration) -> bool {
        self.process.ends_within(grace).await
    }

    /// Whether the sandbox has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.process.has_ended()
    }

    /// Whether its pid is that of another process by now, so that runsc, which knows only the
    /// pid, must not be let near it.
    pub(crate) fn is_reused(&self) -> bool {
        self.reused
    }

    /// Kills the sentry. One that is gone already is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match self.process.signal(libc::SIGKILL) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }

    /// Who has paused it, for changing that.
    pub(crate) async fn pausing(&self) -> tokio::sync::MutexGuard<'_, Paused> {
        self.pausing.lock().await
    }

    /// Whether this process has paused it.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Notes that it was paused or resumed.
    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }

    /// The control socket, if it may be used. Probes it at first use.
    pub(crate) async fn client(&self) -> Option<Client> {
        if let Way::Untried(_) = self.way() {
            let _one = self.probe.lock().await;
            if let Way::Untried(client) = self.way() {
                self.try_out(client).await;
            }
        }
        match self.way() {
            Way::Open(client) => Some(client),
            Way::Untried(_) | Way::Closed => None,
        }
    }

    /// Makes one call over the control socket, and closes that way when it goes wrong.
    pub(crate) async fn ask<T>(
        &self,
        call: impl AsyncFnOnce(&Client) -> Result<T, ControlError>,
    ) -> Answer<T> {
        let Some(client) = self.client().await else {
            return if self.has_ended() {
                Answer::Gone
            } else {
                Answer::NotAsked
            };
        };
        let error = match call(&client).await {
            Ok(result) => return Answer::Done(result),
            Err(error) => error,
        };
        self.judge(error).await
    }

    /// Says what a failed call means. Used directly where a call is too long to be [`ask`]ed.
    ///
    /// [`ask`]: Self::ask
    pub(crate) async fn judge<T>(&self, error: ControlError) -> Answer<T> {
        match error {
            // A method that is not there has had no effect.
            ControlError::Refused(message) if Cause::of(&message) == Cause::Unsupported => {
                self.close(&message);
                Answer::NotAsked
            }
            ControlError::Refused(message) => Answer::Refused(message),
            ControlError::Connect(_) | ControlError::Broken(_) if self.ends_within(DYING).await => {
                Answer::Gone
            }
            ControlError::Connect(_) => {
                self.close(&error);
                Answer::NotAsked
            }
            ControlError::Broken(_) | ControlError::Timeout(_) | ControlError::Protocol(_) => {
                self.close(&error);
                Answer::Lost(error)
            }
        }
    }

    async fn try_out(&self, client: Client) {
        match client.runtime_state(&self.id).await {
            Ok(_) => self.set_way(Way::Open(client)),
            Err(ControlError::Connect(_) | ControlError::Broken(_))
                if self.ends_within(DYING).await => {}
            Err(error) => self.close(&error),
        }
    }

    fn close(&self, why: &dyn std::fmt::Display) {
        let mut way = self.way.lock().unwrap_or_else(PoisonError::into_inner);
        if !matches!(*way, Way::Closed) {
            *way = Way::Closed;
            self.fallbacks.fetch_add(1, Ordering::Relaxed);
            log::warn!("sandbox {}: command line only from now on: {why}", self.id);
        }
    }

    fn way(&self) -> Way {
        self.way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set_way(&self, to: Way) {
        *self.way.lock().unwrap_or_else(PoisonError::into_inner) = to;
    }
}

/// Whether process `pid` cannot be the sentry of sandbox `id`, whose arguments name it.
fn belongs_to_another(pid: u32, id: &str) -> bool {
    match std::fs::read(format!("/proc/{pid}/cmdline")) {
        Ok(args) if !args.is_empty() => !String::from_utf8_lossy(&args).contains(id),
        // Gone, or about to be.
        _ => false,
    }
}

/// Where the control socket is: at its recorded place, or in the root if that was moved
/// (gVisor `Sandbox.getControlSocketPath`).
fn find_socket(config: &Config, state: &SandboxState) -> Option<PathBuf> {
    let recorded = state.control_socket.as_path();
    let in_root = config.root.join(format!("runsc-{}.sock", state.id));
    let places: [&Path; 2] = [recorded, &in_root];
    places
        .into_iter()
        .find(|path| path.is_absolute() && path.exists())
        .map(Path::to_owned)
}
