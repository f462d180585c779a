// SPDX-License-Identifier: Apache-2.0

//! One container of the Pod, with its execs.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use kiln_host::cgroup::{Cgroup, Limits};
use runsc_wrapper::ContainerId;
use serde_json::Value;

use crate::{
    bundle::Role,
    error::{Error, Result},
    process::Process,
    sandbox::{Origin, Sandbox},
};

/// A container that the runtime has made.
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) role: Role,
    /// Its name in the Pod; none of the sandbox's own container, or outside of Kubernetes.
    pub(crate) name: Option<String>,
    pub(crate) bundle: PathBuf,
    pub(crate) init: Process,
    /// The host cgroup that goes with the container, if one does. What runs in it is charged to the
    /// cgroup of its sandbox.
    pub(crate) own_cgroup: Option<Cgroup>,
    /// Processes can outlive the first one, because its pid namespace is not its own.
    pub(crate) shares_pids: bool,
    /// Checkpoint to start from.
    pub(crate) restore: Option<PathBuf>,
    /// See [`crate::bundle::Spec::limits`].
    pub(crate) limits: Mutex<Option<Limits>>,
    pub(crate) said: Said,
    pub(crate) execs: Mutex<BTreeMap<ContainerId, Arc<Exec>>>,
}

/// What the runtime last said that a container uses; 0 before anybody asked.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// CPU time, nanoseconds.
    cpu: AtomicU64,
    /// Memory, bytes.
    memory: AtomicU64,
}

impl Said {
    pub(crate) fn note(&self, cpu: u64, memory: u64) {
        self.note_cpu(cpu);
        self.note_memory(memory);
    }

    pub(crate) fn note_cpu(&self, cpu: u64) {
        self.cpu.store(cpu, Ordering::Relaxed);
    }

    pub(crate) fn note_memory(&self, memory: u64) {
        self.memory.store(memory, Ordering::Relaxed);
    }

    pub(crate) fn cpu(&self) -> u64 {
        self.cpu.load(Ordering::Relaxed)
    }

    pub(crate) fn memory(&self) -> u64 {
        self.memory.load(Ordering::Relaxed)
    }
}

/// A further process of a container.
pub(crate) struct Exec {
    pub(crate) process: Process,
    /// OCI `process` object.
    pub(crate) spec: Value,
}

impl Container {
    /// The id that the runtime knows it by: another one for the first of an adopted sandbox.
    pub(crate) fn runtime_id(&self) -> &ContainerId {
        match self.role {
            Role::Sandbox => self.sandbox.runtime_id(),
            Role::Member(_) => &self.id,
        }
    }

    /// Whether it came with a sandbox that was booted ahead.
    pub(crate) fn was_adopted(&self) -> bool {
        self.role == Role::Sandbox && matches!(self.sandbox.origin, Origin::Adopted(_))
    }

    pub(crate) fn limits(&self) -> Option<Limits> {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes those limits that `new` has.
    pub(crate) fn update_limits(&self, new: Limits) {
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        *limits = limits.map(|old| new.or(&old));
    }

    pub(crate) fn add_exec(&self, exec: Exec) -> Result<()> {
        let id = exec.process.id.clone();
        let mut execs = self.execs();
        if execs.contains_key(&id) {
            return Err(Error::AlreadyExists {
                kind: "exec",
                id: id.to_string(),
            });
        }
        execs.insert(id, Arc::new(exec));
        Ok(())
    }

    pub(crate) fn exec(&self, id: &ContainerId) -> Result<Arc<Exec>> {
        let exec = self.execs().get(id).cloned();
        exec.ok_or_else(|| Error::NotFound {
            kind: "exec",
            id: id.to_string(),
        })
    }

    pub(crate) fn remove_exec(&self, id: &ContainerId) {
        self.execs().remove(id);
    }

    pub(crate) fn all_execs(&self) -> Vec<Arc<Exec>> {
        self.execs().values().cloned().collect()
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<ContainerId, Arc<Exec>>> {
        // A map has no invariant that a panic elsewhere could break.
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
