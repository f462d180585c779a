// SPDX-License-Identifier: Apache-2.0

//! What the containers of one Pod share: the runtime that drives them, the node's policy, the
//! host cgroup, and a directory for what a call needs on disk. [`crate::sandbox::boot`] makes it, and
//! nothing of it changes afterwards.

pub(crate) mod adopt;
pub(crate) mod boot;
pub(crate) mod egress;
pub(crate) mod make;
pub(crate) mod plan;
pub(crate) mod record;
pub(crate) mod restore;
pub(crate) mod scratch;
pub(crate) mod start_queue;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use kiln_agent_api::Policy;
use kiln_host::{
    blocking,
    cgroup::{Cgroup, Limits},
    timer_slack,
};
use log::warn;
use runsc_wrapper::{ContainerId, WarmRuntime};

use crate::{
    bundle::Network,
    error::Error,
    hints::Shared,
    sandbox::{
        egress::Egress,
        record::{Record, RuntimeRecord},
        restore::Restore,
        scratch::Scratch,
    },
};

/// Memory for a container's gofer and what the sentry keeps for it, in bytes: 5 MiB measured.
const GOFER_ROOM: u64 = 8 << 20;

/// A sandbox that is there.
pub(crate) struct Sandbox {
    /// The Pod's id.
    pub(crate) id: ContainerId,
    pub(crate) origin: Origin,
    /// The Pod's UID, if a kubelet made it.
    pub(crate) pod_uid: Option<String>,
    /// The snapshot that it is restored from.
    pub(crate) restore: Option<Restore>,
    /// The host process that stands for the sandbox: its sentry.
    pub(crate) pid: u32,
    pub(crate) runtime: Arc<dyn WarmRuntime>,
    /// How a `delete` finds the runtime again.
    pub(crate) runtime_record: RuntimeRecord,
    pub(crate) policy: Policy,
    pub(crate) network: Network,
    /// Packets of the sandbox that are dropped.
    pub(crate) egress: Egress,
    pub(crate) cgroup: Cgroup,
    /// The limits that CRI named for the Pod.
    pub(crate) pod_limits: Limits,
    pub(crate) scratch: Scratch,
    /// What the containers share beside the network.
    pub(crate) shared: Shared,
    /// Bytes of memory that the sandbox used before its first container, measured when its limits
    /// are first set.
    pub(crate) empty: OnceLock<u64>,
}

/// Where a sandbox has come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The shim booted it.
    Booted,
    /// The node's agent booted it, under this id.
    Adopted(ContainerId),
}

impl Sandbox {
    /// The id that the runtime knows the sandbox by.
    pub(crate) fn runtime_id(&self) -> &ContainerId {
        match &self.origin {
            Origin::Booted => &self.id,
            Origin::Adopted(id) => id,
        }
    }

    /// The record of a container with the cgroup `cgroup`.
    pub(crate) fn record(&self, cgroup: String) -> Record {
        Record::new(&self.id, &self.origin, &self.runtime_record, cgroup)
    }

    /// Lets the timers of a sandbox that runs be as late as the node allows. One whose timers are
    /// in time costs more CPU, and is as good.
    pub(crate) async fn slacken(&self) {
        let (pid, by) = (self.pid, Duration::from_micros(self.policy.timer_slack_us));
        if by.is_zero() {
            return;
        }
        let failed = move |source| Error::Io {
            what: format!("slacken the timers of sentry {pid}"),
            source,
        };
        if let Err(e) = blocking(move || timer_slack::set(pid, by).map_err(failed)).await {
            warn!("sandbox {}: {e}", self.id);
        }
    }

    /// Brings the limits of the sandbox's cgroup up to date with those of its containers, or
    /// with those that a kubelet gave the Pod around it.
    pub(crate) fn limit(&self, containers: &[Limits]) {
        if containers.is_empty() {
            return;
        }
        let limits = if self.cgroup.in_kubepods() {
            self.cgroup.parent_limits()
        } else {
            let limits = self.pod_limits.or(&Limits::sum(containers));
            let own = self.overhead(containers.len());
            Limits {
                memory: limits.memory.map(|m| m.saturating_add(own)),
                ..limits
            }
        };
        if let Err(e) = self.cgroup.apply(&limits) {
            warn!("limit sandbox {}: {e}", self.id);
        }
    }

    /// Bytes that the sandbox needs for itself: what it used before its first container, and a
    /// gofer for each. A kubelet gets this figure from the RuntimeClass.
    fn overhead(&self, containers: usize) -> i64 {
        let empty = *self.empty.get_or_init(|| self.cgroup.usage().memory);
        let bytes = empty.saturating_add(GOFER_ROOM.saturating_mul(containers as u64));
        i64::try_from(bytes).unwrap_or(i64::MAX)
    }
}
