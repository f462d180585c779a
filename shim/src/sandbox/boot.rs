// SPDX-License-Identifier: Apache-2.0

//! Boot of a Pod's sandbox with its first container, as a [`BootPlan`] has it: adopted from the
//! node's agent, or by the runtime. It is all there afterwards, or nothing of it is.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use kiln_host::{
    blocking,
    cgroup::{Cgroup, Limits},
};
use log::warn;
use runsc_wrapper::{PrestartedGofer, WarmRuntime};

use crate::{
    error::{Error, Result},
    hints::Shared,
    host_dirs::HostDirs,
    request::CreateRequest,
    sandbox::{
        Origin, Sandbox,
        adopt::{self, Adopted},
        egress::Egress,
        make::{Made, NewContainer},
        plan::{BootPlan, Source},
        record::Record,
        restore::Restore,
        scratch::Scratch,
        start_queue::StartPermit,
    },
    systemd::{self, Held},
};

/// More memory than a sentry needs to boot, in bytes.
const BOOT_ROOM: i64 = 64 << 20;

/// A sandbox that is being booted.
pub(crate) struct Boot {
    pub(crate) plan: BootPlan,
    pub(crate) runtime: Arc<dyn WarmRuntime>,
    pub(crate) scratch: Scratch,
    shared: Shared,
}

/// A sandbox that was booted.
pub(crate) struct Booted {
    pub(crate) sandbox: Sandbox,
    /// Its first container.
    pub(crate) made: Made,
    /// A gofer for another container, if one was started ahead.
    pub(crate) gofer: Option<PrestartedGofer>,
    /// Keeps others from starting. `None` when none could be had.
    pub(crate) permit: Option<StartPermit>,
}

/// Boots a sandbox, for a Pod that is restored from `snapshot` if there is one. Its shim serves
/// `socket`.
///
/// # Errors
/// When it cannot be booted; nothing of it is left then.
pub(crate) async fn boot(
    plan: BootPlan,
    snapshot: Option<Restore>,
    request: &CreateRequest,
    runtime: Arc<dyn WarmRuntime>,
    host: &HostDirs,
    socket: &Path,
) -> Result<Booted> {
    let egress = Egress::guard(&plan.network, &plan.config, &plan.id).await?;
    let (id, spec, pods) = (
        plan.id.clone(),
        plan.spec.clone(),
        plan.config.policy.shared_empty_dirs.clone(),
    );
    let (dirs, served) = (host.clone(), socket.to_owned());
    let (shared, scratch) = blocking(move || {
        let shared = Shared::of(&spec, &pods)?;
        Ok::<_, Error>((shared, Scratch::new(&dirs, &id, &served)?))
    })
    .await?;
    let places = plan.config.policy.parallel_starts;
    let permit = StartPermit::wait(&host.run, places, &plan.id).await;
    let boot = Boot {
        plan,
        runtime,
        scratch,
        shared,
    };
    match boot.run(request, snapshot.as_ref()).await {
        Ok((origin, made, gofer)) => {
            let is_fit = |s: &Restore| s.adopted == matches!(origin, Origin::Adopted(_));
            let snapshot = snapshot.filter(is_fit);
            boot.publish_socket(socket);
            Ok(Booted {
                sandbox: boot.finish(origin, made.pid, egress, snapshot),
                made,
                gofer,
                permit,
            })
        }
        Err(e) => {
            if let Some(snapshot) = snapshot {
                snapshot.failed(&e.to_string());
            }
            boot.new_container(request).undo(&e).await;
            if let Err(e) = boot.scratch.remove() {
                warn!("{e}");
            }
            Err(e)
        }
    }
}

impl Boot {
    /// The record of the first container, of a sandbox that comes from `origin`.
    pub(crate) fn record(&self, origin: &Origin) -> Record {
        let plan = &self.plan;
        let cgroup = plan.cgroup.spec_path();
        Record::new(&plan.id, origin, &plan.runtime_record(), cgroup)
    }

    async fn run(
        &self,
        request: &CreateRequest,
        snapshot: Option<&Restore>,
    ) -> Result<(Origin, Made, Option<PrestartedGofer>)> {
        let plan = &self.plan;
        let mut spec = plan.spec.clone();
        let limits = boot_limits(&plan.cgroup, &plan.pod_limits, spec.limits());
        spec.rewrite(&plan.cgroup, Some(&limits));
        self.shared.write_into(&mut spec, true);
        if let Source::Warm(agent) = &plan.from
            && let Some(adopted) =
                adopt::adopt(self, agent, &spec, &request.bundle, snapshot).await?
        {
            let Adopted { id, pid, gofer } = adopted;
            let made = Made {
                pid,
                ..Made::default()
            };
            return Ok((Origin::Adopted(id), made, gofer));
        }
        if let Some(snapshot) = snapshot.filter(|s| s.adopted) {
            snapshot.failed("the agent has no sandbox that could be restored to it");
        }
        let new = self.new_container(request);
        new.prepare(spec, self.record(&Origin::Booted)).await?;
        let _held = self.hold_scope(&limits).await;
        let made = new.make(plan.spec.log_dir(), None).await?;
        Ok((Origin::Booted, made, None))
    }

    fn new_container<'a>(&'a self, request: &'a CreateRequest) -> NewContainer<'a> {
        NewContainer {
            id: &self.plan.id,
            sandbox: &self.plan.id,
            own_cgroup: Some(&self.plan.cgroup),
            request,
            runtime: &*self.runtime,
            scratch: &self.scratch,
        }
    }

    /// Has systemd make the cgroup that a sandbox is about to be booted in, limited as it is to
    /// be: the runtime does not touch one that is there. `None` where it is the runtime's to make.
    async fn hold_scope(&self, limits: &Limits) -> Option<Held> {
        let (id, cgroup) = (&self.plan.id, &self.plan.cgroup);
        let held = match systemd::start_scope(&cgroup.scope()?, &[]).await {
            Ok(held) => held,
            Err(e) => {
                warn!("systemd may take away what limits this sandbox: {e}");
                return None;
            }
        };
        if let Err(e) = cgroup.apply(limits) {
            warn!("limit sandbox {id}: {e}");
        }
        Some(held)
    }

    /// Leaves a link by which the agent finds this shim. Without it there are no snapshots.
    fn publish_socket(&self, socket: &Path) {
        let Some(uid) = self.plan.spec.pod_uid() else {
            return;
        };
        let dir = self.scratch.dir();
        if let Err(e) = kiln_agent_api::publish_socket(dir, uid, socket) {
            warn!("no snapshot can be taken of this Pod: {e}");
        }
    }

    fn finish(self, origin: Origin, pid: u32, egress: Egress, restore: Option<Restore>) -> Sandbox {
        let runtime_record = self.plan.runtime_record();
        Sandbox {
            id: self.plan.id,
            origin,
            pod_uid: self.plan.spec.pod_uid().map(str::to_owned),
            restore,
            pid,
            runtime: self.runtime,
            runtime_record,
            policy: self.plan.config.policy,
            network: self.plan.network,
            egress,
            cgroup: self.plan.cgroup,
            pod_limits: self.plan.pod_limits,
            scratch: self.scratch,
            shared: self.shared,
            empty: OnceLock::new(),
        }
    }
}

/// The limits that a sandbox is booted with, and by which its sentry says how much memory and how
/// many CPUs there are; `own` are those of its first container.
fn boot_limits(cgroup: &Cgroup, pod_limits: &Limits, own: Option<Limits>) -> Limits {
    if cgroup.in_kubepods() {
        return cgroup.parent_limits();
    }
    let limits = pod_limits.or(&own.unwrap_or_default());
    Limits {
        memory: limits.memory.map(|m| m.saturating_add(BOOT_ROOM)),
        ..limits
    }
}
