// SPDX-License-Identifier: Apache-2.0

//! Making a container: check, prepare the bundle, have the runtime make it, and take everything
//! back when a step fails.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use containerd_shim_protos::{
    api::Mount,
    events::task as events,
    protobuf::{MessageField, well_known_types::any::Any},
};
use log::{info, warn};
use runsc_wrapper::{ContainerId, CreateOpts, RuntimeError, Slots, Stdio};

use super::{CreateRequest, Pod, attach, clean_up};
use kiln_host::{
    blocking,
    cgroup::{Cgroup, Limits},
};

use crate::{
    adopt::{Adopter, Adoption},
    bundle::{Network, Role, Spec},
    config::from_options,
    container::{Container, Said},
    egress::Egress,
    error::{Error, Result},
    events::publish,
    hints::Shared,
    io::{ConsoleSocket, ProcessIo},
    process::Process,
    rootfs,
    sandbox::{Record, Sandbox, Scratch},
    systemd::{self, Held},
    turn::Turn,
};

impl Pod {
    /// Makes a container and returns the host pid that stands for it.
    pub async fn create(&self, request: CreateRequest) -> Result<u32> {
        let id: ContainerId = request.id.parse()?;
        let slot = Slot::reserve(self, &id)?;
        let bundle = checked_bundle(&request.bundle)?;
        let spec = blocking({
            let bundle = bundle.clone();
            move || Spec::load(&bundle)
        })
        .await?;
        if spec.terminal() != request.io.terminal {
            let words = "process.terminal and the request disagree".to_owned();
            return Err(Error::InvalidArgument(words));
        }
        let role = spec.role()?;
        let sandbox = self
            .sandbox_for(&id, &role, &spec, request.options.as_ref())
            .await?;
        let first = role == Role::Sandbox;
        if first {
            let places = sandbox.policy.parallel_starts;
            let turn = Turn::wait(&self.host.run, places, &id).await;
            sandbox.begin_turn(turn);
        }
        let result = self
            .create_in(&sandbox, &id, role, spec, bundle, request)
            .await;
        match result {
            Ok(container) => {
                let pid = container.init.pid();
                slot.fill(container);
                if first {
                    sandbox.end_turn_unstarted();
                }
                self.limit_sandbox();
                Ok(pid)
            }
            Err(e) => {
                warn!("create {id}: {e}");
                if first {
                    self.forget_sandbox(&sandbox);
                }
                Err(e)
            }
        }
    }

    /// The Pod's sandbox; the first container brings it with it.
    async fn sandbox_for(
        &self,
        id: &ContainerId,
        role: &Role,
        spec: &Spec,
        options: Option<&Any>,
    ) -> Result<Arc<Sandbox>> {
        match (role, self.sandbox().ok()) {
            (Role::Member(of), Some(sandbox)) if *of == sandbox.id => {
                spec.check(&sandbox.policy, sandbox.pid())?;
                sandbox.shared.check(spec)?;
                Ok(sandbox)
            }
            (Role::Member(of), _) => {
                let words = format!("sandbox {of} is not in this shim");
                Err(Error::InvalidArgument(words))
            }
            (Role::Sandbox, Some(sandbox)) => Err(second_sandbox(&sandbox.id, id)),
            (Role::Sandbox, None) => {
                let sandbox = Arc::new(self.new_sandbox(id, spec, options).await?);
                let mut slot = self.sandbox_slot();
                if let Some(first) = &*slot {
                    sandbox.scratch.remove()?;
                    return Err(second_sandbox(&first.id, id));
                }
                *slot = Some(Arc::clone(&sandbox));
                Ok(sandbox)
            }
        }
    }

    /// Forgets the sandbox of a first container that could not be made, so that another may try.
    fn forget_sandbox(&self, sandbox: &Sandbox) {
        self.sandbox_slot().take();
        if let Err(e) = sandbox.scratch.remove() {
            warn!("{e}");
        }
    }

    async fn new_sandbox(
        &self,
        id: &ContainerId,
        spec: &Spec,
        options: Option<&Any>,
    ) -> Result<Sandbox> {
        let (options, network) = (options.cloned(), spec.network());
        let looked = network.clone();
        let mut config = blocking(move || {
            looked.check()?;
            from_options(options.as_ref())
        })
        .await?;
        spec.check(&config.policy, None)?;
        if network == Network::Host {
            config
                .runtime
                .flags
                .insert("network".to_owned(), "host".to_owned());
        }
        let egress = Egress::guard(&network, &config, id).await?;
        let fallback = format!("/{}/{id}", self.namespace);
        let path = spec.cgroups_path().unwrap_or(&fallback);
        let cgroup = Cgroup::new(&self.host.cgroups, path)?;
        let adopter = Adopter::new(&config, &self.namespace);
        let runtime = (self.runtime)(&config, &self.namespace)?;
        let (host, owner) = (self.host.clone(), id.clone());
        let (first, pods) = (spec.clone(), config.policy.shared_empty_dirs.clone());
        let (scratch, shared) = blocking(move || {
            let shared = Shared::of(&first, &pods)?;
            Ok::<_, Error>((Scratch::new(&host.run, &owner, &host.socket)?, shared))
        })
        .await?;
        Ok(Sandbox {
            id: id.clone(),
            runtime,
            policy: config.policy,
            config_file: config.file,
            network,
            egress,
            cgroup,
            pod_limits: spec.pod_limits(),
            scratch,
            shared,
            turn: Mutex::default(),
            adopter: Mutex::new(adopter),
            adopted: OnceLock::new(),
            slots: Mutex::default(),
            pid: 0.into(),
            empty: OnceLock::new(),
        })
    }

    async fn create_in(
        &self,
        sandbox: &Sandbox,
        id: &ContainerId,
        role: Role,
        spec: Spec,
        bundle: PathBuf,
        request: CreateRequest,
    ) -> Result<Arc<Container>> {
        let own_cgroup = match (&role, spec.cgroups_path()) {
            (Role::Member(_), Some(path)) => Some(Cgroup::new(&self.host.cgroups, path)?),
            (Role::Member(_), None) => None,
            (Role::Sandbox, _) => Some(sandbox.cgroup.clone()),
        };
        let cgroup = own_cgroup.clone().unwrap_or_else(|| sandbox.cgroup.clone());
        let restore = restore_image(&sandbox.policy.restore_dirs, &spec, &request.checkpoint)?;
        let limits = spec.limits();
        let shares_pids = spec.shares_pids();
        let log_dir = spec.log_dir();
        let init = Process::new(id.clone(), request.io.clone());
        let opts = CreateOpts {
            id: id.clone(),
            sandbox: sandbox.runtime_id().clone(),
            bundle: bundle.clone(),
            stdio: Stdio::default(),
            console_socket: None,
            log_dir,
        };
        let spec = rewritten(sandbox, &role, spec, &cgroup);
        let plain = request.io.is_empty() && restore.is_none();
        let made = match adopt(sandbox, &role, plain, &spec, &bundle).await {
            Ok(Some(pid)) => {
                init.set_pid(pid);
                Ok(())
            }
            Ok(None) => {
                match prepare(sandbox, spec, own_cgroup.as_ref(), &bundle, &request.rootfs).await {
                    Ok(()) => {
                        let _held = hold_scope(sandbox, &role, limits).await;
                        let slots = sandbox.take_slots().filter(|_| restore.is_none());
                        let place = slots.zip(own_cgroup.clone());
                        make(sandbox, &init, opts, place).await
                    }
                    Err(e) => Err(e),
                }
            }
            Err(e) => Err(e),
        };
        if let Err(e) = made {
            undo_create(sandbox, id, own_cgroup, &bundle, &e).await;
            return Err(e);
        }
        if role == Role::Sandbox {
            sandbox.set_pid(init.pid());
        }
        let runtime_id = match role {
            Role::Sandbox => sandbox.runtime_id(),
            Role::Member(_) => id,
        };
        let container = Arc::new(Container {
            id: id.clone(),
            runtime_id: runtime_id.clone(),
            role,
            bundle,
            init,
            cgroup: sandbox.cgroup.clone(),
            own_cgroup,
            shares_pids,
            restore,
            limits: Mutex::new(limits),
            said: Said::default(),
            execs: Mutex::default(),
        });
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
                pid: container.init.pid(),
                ..events::TaskCreate::default()
            },
        );
        info!("created {id}, pid {}", container.init.pid());
        Ok(container)
    }
}

/// An id that is taken while its container is being made, and free again if that fails.
struct Slot<'a> {
    pod: &'a Pod,
    id: ContainerId,
    filled: bool,
}

impl<'a> Slot<'a> {
    fn reserve(pod: &'a Pod, id: &ContainerId) -> Result<Self> {
        let mut map = pod.map();
        if map.contains_key(id) {
            return Err(Error::AlreadyExists {
                kind: "container",
                id: id.to_string(),
            });
        }
        map.insert(id.clone(), None);
        Ok(Self {
            pod,
            id: id.clone(),
            filled: false,
        })
    }

    fn fill(mut self, container: Arc<Container>) {
        self.pod.map().insert(self.id.clone(), Some(container));
        self.filled = true;
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if !self.filled {
            self.pod.map().remove(&self.id);
        }
    }
}

fn second_sandbox(first: &ContainerId, second: &ContainerId) -> Error {
    Error::InvalidArgument(format!(
        "this shim serves sandbox {first}, and {second} is a sandbox of its own"
    ))
}

fn checked_bundle(bundle: &Path) -> Result<PathBuf> {
    if bundle.is_absolute() {
        return Ok(bundle.to_owned());
    }
    Err(Error::InvalidArgument(format!(
        "bundle {} is not absolute",
        bundle.display()
    )))
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

/// The spec as the runtime must see it.
fn rewritten(sandbox: &Sandbox, role: &Role, mut spec: Spec, cgroup: &Cgroup) -> Spec {
    let boots = *role == Role::Sandbox;
    let limits = boots.then(|| sandbox.boot_limits(spec.limits()));
    spec.rewrite(cgroup, limits.as_ref());
    if !boots {
        spec.set_sandbox(sandbox.runtime_id());
    }
    sandbox.shared.write_into(&mut spec, boots);
    spec
}

/// Adopts a sandbox that is booted already, and returns the pid of its sentry. `None` where there
/// is none, or where this container is nothing for one: then it starts cold.
async fn adopt(
    sandbox: &Sandbox,
    role: &Role,
    plain: bool,
    spec: &Spec,
    bundle: &Path,
) -> Result<Option<u32>> {
    if *role != Role::Sandbox || !plain || !spec.is_pod() || spec.terminal() {
        return Ok(None);
    }
    let Some(adopter) = sandbox.take_adopter() else {
        return Ok(None);
    };
    match adopter.adopt(sandbox, spec, bundle).await? {
        Adoption::Done(pid) => Ok(Some(pid)),
        Adoption::Cold => Ok(None),
    }
}

/// Leaves the record for a later clean-up, mounts the root file system, and writes the bundle
/// that the runtime reads.
async fn prepare(
    sandbox: &Sandbox,
    mut spec: Spec,
    own_cgroup: Option<&Cgroup>,
    bundle: &Path,
    mounts: &[Mount],
) -> Result<()> {
    let own_cgroup = own_cgroup.map(Cgroup::spec_path).unwrap_or_default();
    let record = Record::new(&sandbox.id, sandbox.config_file.clone(), own_cgroup)
        .known_as(sandbox.runtime_id());
    let (bundle, mounts) = (bundle.to_owned(), mounts.to_vec());
    blocking(move || {
        let rootfs = bundle.join("rootfs");
        record.save(&bundle)?;
        rootfs::mount(&mounts, &rootfs)?;
        spec.mount_masks(&rootfs)?;
        // Without mounts it is not ours to write to.
        if !mounts.is_empty() {
            // What is wrong with it is the runtime's to say.
            if let Err(e) = spec.make_working_dir(&rootfs) {
                info!("the working directory is left to the runtime: {e}");
            }
        }
        spec.save(&bundle)
    })
    .await
}

/// Has systemd make the cgroup that a sandbox is about to be booted in, limited as it is to be: the
/// runtime does not touch one that is there. `None` where it is the runtime's to make.
async fn hold_scope(sandbox: &Sandbox, role: &Role, own: Option<Limits>) -> Option<Held> {
    let scope = sandbox.cgroup.scope()?;
    if *role != Role::Sandbox {
        return None;
    }
    let held = match systemd::start_scope(&scope, &[]).await {
        Ok(held) => held,
        Err(e) => {
            warn!("systemd may take away what limits this sandbox: {e}");
            return None;
        }
    };
    if let Err(e) = sandbox.cgroup.apply(&sandbox.boot_limits(own)) {
        warn!("limit sandbox {}: {e}", sandbox.id);
    }
    Some(held)
}

/// Has the runtime make a container, with its stdio or terminal connected. In `slots`, if it can,
/// where its cgroup is ours to make.
async fn make(
    sandbox: &Sandbox,
    init: &Process,
    mut opts: CreateOpts,
    slots: Option<(Slots, Cgroup)>,
) -> Result<()> {
    if !init.io_spec.terminal {
        let (io, stdio) = ProcessIo::open(&init.io_spec)?;
        opts.stdio = stdio;
        let made = match slots {
            Some((slots, cgroup)) => make_in_slots(sandbox, &opts, slots, cgroup).await?,
            None => None,
        };
        let pid = match made {
            Some(pid) => pid,
            None => sandbox.runtime.create(&opts).await?,
        };
        init.set_pid(pid);
        init.set_io(io.into());
        *init.lifecycle.lock().await = opts.stdio;
        return Ok(());
    }
    let dir = sandbox.scratch.subdir()?;
    let made = make_with_terminal(sandbox, init, opts, &dir).await;
    Scratch::remove_subdir(&dir)?;
    made
}

async fn make_in_slots(
    sandbox: &Sandbox,
    opts: &CreateOpts,
    slots: Slots,
    cgroup: Cgroup,
) -> Result<Option<u32>> {
    blocking(move || cgroup.make()).await?;
    let made = sandbox.runtime.create_in_slots(opts, slots).await?;
    if made.is_some() {
        info!("{} is made in slots", opts.id);
    }
    Ok(made)
}

async fn make_with_terminal(
    sandbox: &Sandbox,
    init: &Process,
    mut opts: CreateOpts,
    dir: &Path,
) -> Result<()> {
    let console = ConsoleSocket::bind(dir, "tty")?;
    opts.console_socket = Some(console.path().to_owned());
    init.set_pid(sandbox.runtime.create(&opts).await?);
    attach(init, &console).await
}

/// Takes away what a create that failed with `error` may have left.
async fn undo_create(
    sandbox: &Sandbox,
    id: &ContainerId,
    own_cgroup: Option<Cgroup>,
    bundle: &Path,
    error: &Error,
) {
    // A container of this name that was there before is not ours to delete.
    let theirs = matches!(error, Error::Runtime(RuntimeError::AlreadyExists { .. }));
    if !theirs && let Err(e) = sandbox.runtime.delete(id).await {
        warn!("undo create {id}: {e}");
    }
    let cgroup = own_cgroup.filter(|_| !theirs);
    if let Err(e) = clean_up(bundle.to_owned(), cgroup).await {
        warn!("undo create {id}: {e}");
    }
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
