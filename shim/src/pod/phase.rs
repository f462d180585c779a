// SPDX-License-Identifier: Apache-2.0

//! The phase of the Pod's life and what the Pod has in it; see [`super`] for the picture.

use std::{
    collections::BTreeMap,
    sync::{Arc, MutexGuard, PoisonError},
};

use runsc_wrapper::{ContainerId, PrestartedGofer};

use super::Pod;
use crate::{
    container::Container,
    error::{Error, Result},
    sandbox::Sandbox,
};

/// Where the Pod is in its life.
#[derive(Default)]
pub(super) enum Phase {
    /// It has no sandbox.
    #[default]
    Empty,
    /// Its sandbox, of this id, is being booted.
    Booting(ContainerId),
    /// It has a sandbox.
    Up(Up),
}

/// What a Pod with a sandbox has.
pub(super) struct Up {
    pub(super) sandbox: Arc<Sandbox>,
    /// A gofer for the first container that can be made in one.
    gofer: Option<PrestartedGofer>,
    containers: BTreeMap<ContainerId, Entry>,
}

enum Entry {
    /// The container is being made.
    Reserved,
    Made(Arc<Container>),
}

impl Entry {
    fn made(&self) -> Option<&Arc<Container>> {
        match self {
            Self::Reserved => None,
            Self::Made(container) => Some(container),
        }
    }
}

impl Phase {
    /// Whether there is no container, and none is being made.
    pub(super) fn is_idle(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Booting(_) => false,
            Self::Up(up) => up.containers.is_empty(),
        }
    }

    fn up(&mut self) -> Option<&mut Up> {
        match self {
            Self::Up(up) => Some(up),
            Self::Empty | Self::Booting(_) => None,
        }
    }

    fn has(&mut self, id: &ContainerId) -> bool {
        match self {
            Self::Empty => false,
            Self::Booting(sandbox) => sandbox == id,
            Self::Up(up) => up.containers.contains_key(id),
        }
    }
}

impl Pod {
    pub(super) fn phase(&self) -> MutexGuard<'_, Phase> {
        // No panic elsewhere could leave it half changed.
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn sandbox(&self) -> Option<Arc<Sandbox>> {
        self.phase().up().map(|up| Arc::clone(&up.sandbox))
    }

    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>> {
        let id: ContainerId = id.parse()?;
        let mut phase = self.phase();
        let entry = phase.up().and_then(|up| up.containers.get(&id));
        let container = entry.and_then(Entry::made).cloned();
        container.ok_or_else(|| Error::NotFound {
            kind: "container",
            id: id.to_string(),
        })
    }

    /// The containers that are made.
    pub(super) fn containers(&self) -> Vec<Arc<Container>> {
        let mut phase = self.phase();
        let entries = phase.up().into_iter().flat_map(|up| up.containers.values());
        entries.filter_map(Entry::made).cloned().collect()
    }

    /// Takes the gofer that no container has taken yet.
    pub(super) fn take_gofer(&self) -> Option<PrestartedGofer> {
        self.phase().up()?.gofer.take()
    }

    /// Forgets a container.
    pub(super) fn forget(&self, id: &ContainerId) {
        if let Some(up) = self.phase().up() {
            up.containers.remove(id);
        }
    }
}

/// An id that is taken while its container is being made, and free again when this is dropped
/// before that.
pub(super) struct Reservation<'a> {
    pod: &'a Pod,
    id: ContainerId,
}

impl<'a> Reservation<'a> {
    /// Reserves the Pod for the sandbox `id`.
    ///
    /// # Errors
    /// When it has a sandbox, or is about to.
    pub(super) fn of_sandbox(pod: &'a Pod, id: &ContainerId) -> Result<Self> {
        let mut phase = pod.phase();
        if phase.has(id) {
            return Err(exists(id));
        }
        let first = match &*phase {
            Phase::Empty => None,
            Phase::Booting(first) => Some(first),
            Phase::Up(up) => Some(&up.sandbox.id),
        };
        if let Some(first) = first {
            return Err(Error::InvalidArgument(format!(
                "this shim serves sandbox {first}, and {id} is a sandbox of its own"
            )));
        }
        *phase = Phase::Booting(id.clone());
        drop(phase);
        Ok(Self::new(pod, id))
    }

    /// Reserves `id` for a member of the sandbox `of`.
    ///
    /// # Errors
    /// When the id is taken, or the Pod does not have that sandbox.
    pub(super) fn of_member(
        pod: &'a Pod,
        id: &ContainerId,
        of: &ContainerId,
    ) -> Result<(Self, Arc<Sandbox>)> {
        let mut phase = pod.phase();
        if phase.has(id) {
            return Err(exists(id));
        }
        let Some(up) = phase.up().filter(|up| up.sandbox.id == *of) else {
            let message = format!("sandbox {of} is not in this shim");
            return Err(Error::InvalidArgument(message));
        };
        up.containers.insert(id.clone(), Entry::Reserved);
        let sandbox = Arc::clone(&up.sandbox);
        drop(phase);
        Ok((Self::new(pod, id), sandbox))
    }

    fn new(pod: &'a Pod, id: &ContainerId) -> Self {
        let id = id.clone();
        Self { pod, id }
    }

    /// The Pod has its sandbox, with its first container and a gofer for another.
    pub(super) fn fill_sandbox(self, container: Arc<Container>, gofer: Option<PrestartedGofer>) {
        *self.pod.phase() = Phase::Up(Up {
            sandbox: Arc::clone(&container.sandbox),
            gofer,
            containers: [(self.id.clone(), Entry::Made(container))].into(),
        });
    }

    /// The Pod has the member.
    pub(super) fn fill(self, container: Arc<Container>) {
        if let Some(up) = self.pod.phase().up() {
            up.containers
                .insert(self.id.clone(), Entry::Made(container));
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut phase = self.pod.phase();
        match &mut *phase {
            Phase::Booting(_) => *phase = Phase::Empty,
            Phase::Up(up) => {
                if let Some(Entry::Reserved) = up.containers.get(&self.id) {
                    up.containers.remove(&self.id);
                }
            }
            Phase::Empty => {}
        }
    }
}

fn exists(id: &ContainerId) -> Error {
    Error::AlreadyExists {
        kind: "container",
        id: id.to_string(),
    }
}
