// SPDX-License-Identifier: Apache-2.0

//! One process that containerd knows: the first of a container, or an exec.

use std::sync::{
    Mutex, OnceLock, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use runsc_wrapper::{ContainerId, Exit, Stdio};
use tokio::sync::{Mutex as AsyncMutex, watch};

use crate::{
    error::{Error, Result},
    io::{IoSpec, SharedIo},
    state::{Event, State},
};

/// A process and what the shim holds for it.
pub(crate) struct Process {
    /// The exec id, or that of the container for its first process.
    pub(crate) id: ContainerId,
    /// The stdio that containerd asked for.
    pub(crate) io_spec: IoSpec,
    /// Orders create, start and delete, and holds what start gives to the runtime. State and wait
    /// do not take it, and kill only where the process has not started. It is held while the
    /// runtime works, which is its purpose.
    pub(crate) lifecycle: AsyncMutex<Stdio>,
    state: watch::Sender<State>,
    pid: AtomicU32,
    io: OnceLock<SharedIo>,
    /// Whether CloseIO came, also before there was stdio.
    stdin_closed: Mutex<bool>,
}

impl Process {
    pub(crate) fn new(id: ContainerId, io_spec: IoSpec) -> Self {
        Self {
            id,
            io_spec,
            lifecycle: AsyncMutex::default(),
            state: watch::Sender::new(State::Created),
            pid: AtomicU32::new(0),
            io: OnceLock::new(),
            stdin_closed: Mutex::new(false),
        }
    }

    pub(crate) fn state(&self) -> State {
        *self.state.borrow()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Relaxed);
    }

    /// Gives the process its stdio, once.
    pub(crate) fn set_io(&self, io: SharedIo) {
        let closed = self
            .stdin_closed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *closed {
            io.close_stdin();
        }
        // Start runs once per process, under the lifecycle lock.
        self.io.set(io).ok();
    }

    pub(crate) fn io(&self) -> Option<&SharedIo> {
        self.io.get()
    }

    /// CloseIO, which may come before there is anything to close.
    pub(crate) fn close_stdin(&self) {
        let mut closed = self
            .stdin_closed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *closed = true;
        if let Some(io) = self.io() {
            io.close_stdin();
        }
    }

    /// Changes the state as `event` has it.
    ///
    /// # Errors
    /// [`Error::WrongState`] where it cannot happen; `op` says what was tried.
    pub(crate) fn apply(&self, op: &'static str, event: Event) -> Result<()> {
        let mut result = Ok(());
        self.state
            .send_if_modified(|state| match state.next(event) {
                Some(next) => {
                    *state = next;
                    true
                }
                None => {
                    result = Err(self.wrong_state(op, *state));
                    false
                }
            });
        result
    }

    /// Fails unless the process is in one of the states that `wanted` accepts.
    pub(crate) fn require(&self, op: &'static str, wanted: fn(State) -> bool) -> Result<()> {
        let state = self.state();
        if wanted(state) {
            Ok(())
        } else {
            Err(self.wrong_state(op, state))
        }
    }

    /// Waits for the end of the process.
    pub(crate) async fn exited(&self) -> Exit {
        let mut states = self.state.subscribe();
        loop {
            if let Some(exit) = states.borrow_and_update().exit() {
                return exit;
            }
            // The sender lives in `self`, so that this cannot fail.
            states.changed().await.ok();
        }
    }

    fn wrong_state(&self, op: &'static str, state: State) -> Error {
        Error::WrongState {
            op,
            id: self.id.to_string(),
            state: state.name(),
        }
    }
}
