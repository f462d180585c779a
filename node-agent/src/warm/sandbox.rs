// SPDX-License-Identifier: Apache-2.0

//! A warm sandbox as one value that moves from owner to owner.

use std::{collections::VecDeque, path::PathBuf, sync::Arc};

use kiln_agent_api::Shape;
use kiln_host::reap::Tracked;
use runsc_wrapper::{PrestartedGofer, StartWay};

/// Sandboxes of which it is remembered that they were handed out. Shims that die say nothing, and
/// must not fill the memory.
const REMEMBERED: usize = 1024;

/// A sandbox that is booted and that nobody has yet.
#[derive(Debug)]
pub(crate) struct WarmSandbox {
    pub(crate) id: String,
    pub(crate) shape: Shape,
    /// Its sentry.
    pub(crate) process: Arc<Tracked>,
    /// The prestarted gofer of its first container, which ends when this is dropped.
    pub(crate) gofer: Option<PrestartedGofer>,
    /// How it is to be started: the way that passed the trial of the runtime that booted it.
    pub(crate) way: StartWay,
}

impl WarmSandbox {
    /// Ends its gofer, which would keep the sandbox's cgroup, and returns its id.
    pub(crate) fn into_id(self) -> String {
        self.id
    }
}

/// Everything that a shim needs to adopt a sandbox, as of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Handout {
    pub(crate) id: String,
    /// Its sentry.
    pub(crate) pid: u32,
    /// The file that stands for it.
    pub(crate) file: PathBuf,
    /// Its `cgroupsPath`.
    pub(crate) cgroup: String,
    pub(crate) way: StartWay,
    pub(crate) has_gofer: bool,
}

/// A sandbox that was handed out, until its shim says what became of it.
#[derive(Debug)]
pub(crate) struct HandedOut {
    pub(crate) id: String,
    pub(crate) shape: Shape,
    pub(crate) gofer: Option<PrestartedGofer>,
}

/// The sandboxes that were handed out last, the oldest first.
#[derive(Debug, Default)]
pub(crate) struct Handed(VecDeque<HandedOut>);

impl Handed {
    /// Remembers one. The oldest is forgotten when there are too many.
    pub(crate) fn insert(&mut self, sandbox: HandedOut) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(sandbox);
    }

    /// Forgets the sandbox `id`, and returns what was remembered of it.
    pub(crate) fn remove(&mut self, id: &str) -> Option<HandedOut> {
        let at = self.0.iter().position(|handed| handed.id == id)?;
        self.0.remove(at)
    }

    /// Takes the gofer of the sandbox `id`.
    pub(crate) fn take_gofer(&mut self, id: &str) -> Option<PrestartedGofer> {
        let mut handed = self.0.iter_mut();
        handed.find(|handed| handed.id == id)?.gofer.take()
    }

    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}
