// SPDX-License-Identifier: Apache-2.0

//! One process that containerd knows: the first of a container, or an exec.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use runsc_wrapper::{ContainerId, Exit, Stdio};
use tokio::sync::{Mutex as AsyncMutex, watch};

use crate::{
    error::{Error, Result},
    io::{IoSpec, SharedIo},
    sandbox::make::Made,
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
    /// 0 until an exec has started.
    pid: AtomicU32,
    streams: Mutex<Streams>,
}

/// Stdio of a process, as far as the shim has it.
enum Streams {
    /// There is none yet.
    None,
    /// There is none yet, and CloseIO came.
    Closed,
    Connected(SharedIo),
}

impl Process {
    /// An exec that was not started.
    pub(crate) fn exec(id: ContainerId, io_spec: IoSpec) -> Self {
        Self::new(id, io_spec, Made::default())
    }

    /// The first process of a container that the runtime has made.
    pub(crate) fn new(id: ContainerId, io_spec: IoSpec, made: Made) -> Self {
        Self {
            id,
            io_spec,
            lifecycle: AsyncMutex::new(made.stdio),
            state: watch::Sender::new(State::Created),
            pid: AtomicU32::new(made.pid),
            streams: Mutex::new(made.io.map_or(Streams::None, Streams::Connected)),
        }
    }

    pub(crate) fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Resolves when the process has started or ended, or is gone.
    pub(crate) fn started_or_gone(&self) -> impl Future<Output = ()> + use<> {
        let mut states = self.state.subscribe();
        async move {
            // An error means that the process is gone.
            states.wait_for(|s| *s != State::Created).await.ok();
        }
    }

    /// The host pid that stands for it, or the pid inside of an exec, 0 before its start.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Connects an exec that the runtime has started with its stdio.
    pub(crate) fn connect(&self, pid: u32, io: SharedIo) {
        self.pid.store(pid, Ordering::Relaxed);
        let mut streams = self.streams();
        if let Streams::Closed = *streams {
            io.close_stdin();
        }
        *streams = Streams::Connected(io);
    }

    /// Its stdio, if it has any.
    pub(crate) fn io(&self) -> Option<SharedIo> {
        match &*self.streams() {
            Streams::Connected(io) => Some(io.clone()),
            Streams::None | Streams::Closed => None,
        }
    }

    /// CloseIO, which may come before there is anything to close.
    pub(crate) fn close_stdin(&self) {
        let mut streams = self.streams();
        match &*streams {
            Streams::Connected(io) => io.close_stdin(),
            Streams::None | Streams::Closed => *streams = Streams::Closed,
        }
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        // No panic elsewhere could leave it half changed.
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
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
