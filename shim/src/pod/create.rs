// SPDX-License-Identifier: Apache-2.0

//! Create: of a sandbox, which is booted with its first container, and of a member of it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim_protos::{events::task as events, protobuf::MessageField};
use log::{info, warn};
use runsc_wrapper::ContainerId;
use tokio::time::timeout;

use super::{Pod, phase::Reservation};
use kiln_host::{
    blocking,
    cgroup::{Cgroup, Limits},
};

use crate::{
    bundle::{Role, Spec},
    config::from_options,
    container::{Container, Said},
    error::{Error, Result},
    events::publish,
    process::Process,
    request::CreateRequest,
    sandbox::{
        Origin, Sandbox,
        boot::{self, Booted},
        make::{Made, NewContainer},
        plan::{BootPlan, First},
        restore::Restore,
        start_queue::StartPermit,
    },
};

/// How long after it was made a sandbox keeps others from starting. containerd's CRI plugin starts
/// it at once.
const UNSTARTED: Duration = Duration::from_secs(10);

impl Pod {
    /// Makes a container and returns the host pid that stands for it.
    pub async fn create(&self, request: CreateRequest) -> Result<u32> {
        let id: ContainerId = request.id.parse()?;
        if !request.bundle.is_absolute() {
            return Err(Error::InvalidArgument(format!(
                "bundle {} is not absolute",
                request.bundle.display()
            )));
        }
        let bundle = request.bundle.clone();
        let spec = blocking(move || Spec::load(&bundle)).await?;
        if spec.terminal() != request.io.terminal {
            let message = "process.terminal and the request disagree".to_owned();
            return Err(Error::InvalidArgument(message));
        }
        let made = match spec.role()? {
            Role::Sandbox => self.create_sandbox(&id, spec, &request).await,
            Role::Member(of) => self.create_member(&id, &of, spec, &request).await,
        };
        let pid = made.inspect_err(|e| warn!("create {id}: {e}"))?;
        self.limit_sandbox();
        publish(
            &*self.events,
            &events::TaskCreate {
                container_id: id.to_string(),
                bundle: request.bundle.display().to_string(),
                rootfs: request.rootfs,
                io: MessageField::some(events::TaskIO {
                    stdin: request.io.stdin,
                    stdout: request.io.stdout,
                    stderr: request.io.stderr,
                    terminal: request.io.terminal,
                    ..events::TaskIO::default()
                }),
                checkpoint: request.checkpoint,
                pid,
                ..events::TaskCreate::default()
            },
        );
        info!("created {id}, pid {pid}");
        Ok(pid)
    }

    async fn create_sandbox(
        &self,
        id: &ContainerId,
        spec: Spec,
        request: &CreateRequest,
    ) -> Result<u32> {
        let reservation = Reservation::of_sandbox(self, id)?;
        let (network, options) = (spec.network(), request.options.clone());
        let config = blocking(move || {
            network.check()?;
            from_options(options.as_ref())
        })
        .await?;
        let restore = restore_image(&config.policy.restore_dirs, &spec, &request.checkpoint)?;
        let snapshot = match restore {
            Some(_) => None,
            None => Restore::ask(&spec, &config, id).await,
        };
        let is_cold = snapshot.as_ref().is_some_and(|snapshot| !snapshot.adopted);
        let first = if request.io.is_empty() && restore.is_none() && !is_cold {
            First::Plain
        } else {
            First::Special
        };
        let mut facts = Facts::of(&spec, restore);
        let (namespace, cgroups) = (&self.namespace, &self.host.cgroups);
        let plan = BootPlan::new(id.clone(), spec, first, config, namespace, cgroups)?;
        let runtime = (self.runtime)(&plan.config, namespace)?;
        let Booted {
            sandbox,
            made,
            gofer,
            permit,
        } = boot::boot(plan, snapshot, request, runtime, &self.host, &self.socket).await?;
        let sandbox = Arc::new(sandbox);
        if let (Some(snapshot), Origin::Booted) = (&sandbox.restore, &sandbox.origin) {
            facts.restore = Some(snapshot.image.clone());
        }
        let own_cgroup = Some(sandbox.cgroup.clone());
        let container = facts.container(id, Role::Sandbox, sandbox, own_cgroup, made, request);
        hold_until_started(permit, &container.init);
        let pid = container.init.pid();
        reservation.fill_sandbox(Arc::new(container), gofer);
        Ok(pid)
    }

    async fn create_member(
        &self,
        id: &ContainerId,
        of: &ContainerId,
        mut spec: Spec,
        request: &CreateRequest,
    ) -> Result<u32> {
        let (reservation, sandbox) = Reservation::of_member(self, id, of)?;
        spec.check(&sandbox.policy, Some(sandbox.pid))?;
        sandbox.shared.check(&spec)?;
        let path = spec.cgroups_path();
        let own_cgroup = path.map(|path| Cgroup::new(&self.host.cgroups, path));
        let own_cgroup = own_cgroup.transpose()?;
        let dirs = &sandbox.policy.restore_dirs;
        let restore = restore_image(dirs, &spec, &request.checkpoint)?;
        let snapshot = sandbox.restore.as_ref();
        let restore = restore.or_else(|| snapshot?.image_of(spec.container_name()));
        let (log_dir, facts) = (spec.log_dir(), Facts::of(&spec, restore));
        spec.rewrite(own_cgroup.as_ref().unwrap_or(&sandbox.cgroup), None);
        spec.set_sandbox(sandbox.runtime_id());
        sandbox.shared.write_into(&mut spec, false);
        let new = NewContainer {
            id,
            sandbox: sandbox.runtime_id(),
            own_cgroup: own_cgroup.as_ref(),
            request,
            runtime: &*sandbox.runtime,
            scratch: &sandbox.scratch,
        };
        let cgroup = own_cgroup.as_ref().map(Cgroup::spec_path);
        let record = sandbox.record(cgroup.unwrap_or_default());
        let made = async {
            new.prepare(spec, record).await?;
            let gofer = self.take_gofer().filter(|_| facts.restore.is_none());
            new.make(log_dir, gofer).await
        };
        let made = match made.await {
            Ok(made) => made,
            Err(e) => {
                new.undo(&e).await;
                return Err(e);
            }
        };
        let (role, of) = (Role::Member(of.clone()), Arc::clone(&sandbox));
        let container = facts.container(id, role, of, own_cgroup, made, request);
        let pid = container.init.pid();
        reservation.fill(Arc::new(container));
        Ok(pid)
    }
}

/// What a container keeps of its spec.
struct Facts {
    name: Option<String>,
    limits: Option<Limits>,
    shares_pids: bool,
    restore: Option<PathBuf>,
}

impl Facts {
    fn of(spec: &Spec, restore: Option<PathBuf>) -> Self {
        Self {
            name: spec.container_name().map(str::to_owned),
            limits: spec.limits(),
            shares_pids: spec.shares_pids(),
            restore,
        }
    }

    fn container(
        self,
        id: &ContainerId,
        role: Role,
        sandbox: Arc<Sandbox>,
        own_cgroup: Option<Cgroup>,
        made: Made,
        request: &CreateRequest,
    ) -> Container {
        Container {
            id: id.clone(),
            sandbox,
            role,
            name: self.name,
            bundle: request.bundle.clone(),
            init: Process::new(id.clone(), request.io.clone(), made),
            own_cgroup,
            shares_pids: self.shares_pids,
            restore: self.restore,
            limits: Mutex::new(self.limits),
            said: Said::default(),
            execs: Mutex::default(),
        }
    }
}

/// Keeps others from starting until the sandbox with this first process has started, for
/// [`UNSTARTED`] at most: nobody need start what was made.
fn hold_until_started(permit: Option<StartPermit>, init: &Process) {
    let Some(permit) = permit else { return };
    let started = init.started_or_gone();
    tokio::spawn(async move {
        timeout(UNSTARTED, started).await.ok();
        drop(permit);
    });
}

/// The checkpoint that a container starts from: what containerd unpacked, or what the Pod names
/// below a directory that the node allows.
fn restore_image(allowed: &[PathBuf], spec: &Spec, checkpoint: &str) -> Result<Option<PathBuf>> {
    if !checkpoint.is_empty() {
        return Ok(Some(checkpoint.into()));
    }
    let Some(named) = spec.restore_image() else {
        return Ok(None);
    };
    // Where it really is; what is not there is refused in the same words, so that nobody is told.
    let image = Path::new(named).canonicalize().ok();
    let image = image.filter(|image| allowed.iter().any(|dir| image.starts_with(dir)));
    image.map(Some).ok_or_else(|| {
        Error::Denied(format!(
            "restoring from {named:?} is not allowed on this node (restore_dirs)"
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use serde_json::json;

    use super::*;

    #[test]
    fn a_checkpoint_comes_from_a_directory_that_the_node_names() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().canonicalize().unwrap().join(name);
        let (allowed, image) = (at("allowed"), at("allowed/image"));
        fs::create_dir_all(&image).unwrap();
        fs::create_dir_all(at("allowed-not")).unwrap();
        symlink(dir.path(), at("allowed/out")).unwrap();
        symlink(&image, at("in")).unwrap();
        let restored = |allowed: &[PathBuf], named: PathBuf, checkpoint: &str| {
            let spec = json!({"annotations": {"kiln.dev/restore-image": named}});
            let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
            restore_image(allowed, &spec, checkpoint)
        };
        let dirs = [at("other"), allowed.clone()];
        for named in [&image, &at("in"), &at("allowed/out/allowed/image")] {
            let found = restored(&dirs, named.clone(), "").unwrap();
            assert_eq!(found.as_ref(), Some(&image));
        }
        for outside in [
            at("allowed-not"),
            at("allowed/out"),
            at("allowed/../allowed-not"),
            at("allowed/nothing"),
            PathBuf::from("image"),
        ] {
            let denied = restored(&dirs, outside, "").unwrap_err();
            assert!(denied.to_string().contains("restore_dirs"), "{denied}");
        }
        assert!(restored(&[], image.clone(), "").is_err());
        // containerd's own is none of the Pod's.
        let unpacked = restored(&[], image, "/unpacked").unwrap();
        assert_eq!(unpacked, Some(PathBuf::from("/unpacked")));
    }
}
