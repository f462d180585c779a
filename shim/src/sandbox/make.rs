// SPDX-License-Identifier: Apache-2.0

//! One container on its way into the runtime: prepare the bundle, have the runtime make it, and
//! take everything back when a step fails.

use std::path::{Path, PathBuf};

use kiln_host::{blocking, cgroup::Cgroup};
use log::{info, warn};
use runsc_wrapper::{ContainerId, CreateOpts, PrestartedGofer, RuntimeError, Stdio, WarmRuntime};

use crate::{
    bundle::Spec,
    error::{Error, Result},
    io::{ConsoleSocket, IoSpec, ProcessIo, SharedIo},
    request::CreateRequest,
    rootfs,
    sandbox::{record::Record, scratch::Scratch},
};

/// A container that is to be made.
pub(crate) struct NewContainer<'a> {
    pub(crate) id: &'a ContainerId,
    /// The id that the runtime knows its sandbox by.
    pub(crate) sandbox: &'a ContainerId,
    /// The host cgroup that goes with the container, if one does.
    pub(crate) own_cgroup: Option<&'a Cgroup>,
    pub(crate) request: &'a CreateRequest,
    pub(crate) runtime: &'a dyn WarmRuntime,
    pub(crate) scratch: &'a Scratch,
}

/// A container that was made.
#[derive(Default)]
pub(crate) struct Made {
    /// The host process that stands for it.
    pub(crate) pid: u32,
    /// The shim's ends of its stdio, `None` when it has none.
    pub(crate) io: Option<SharedIo>,
    /// The container's ends, for its start.
    pub(crate) stdio: Stdio,
}

impl NewContainer<'_> {
    /// Leaves `record` for a later clean-up, mounts the root file system, and writes the bundle
    /// that the runtime reads.
    pub(crate) async fn prepare(&self, mut spec: Spec, record: Record) -> Result<()> {
        let (bundle, mounts) = (self.request.bundle.clone(), self.request.rootfs.clone());
        blocking(move || {
            let rootfs = bundle.join("rootfs");
            record.save(&bundle)?;
            rootfs::mount(&mounts, &rootfs)?;
            spec.mount_masks(&rootfs)?;
            // Without mounts it is not ours to write to.
            if !mounts.is_empty()
                && let Err(e) = spec.make_working_dir(&rootfs)
            {
                // What is wrong with it is the runtime's to say.
                info!("the working directory is left to the runtime: {e}");
            }
            spec.save(&bundle)
        })
        .await
    }

    /// Has the runtime make it, with its stdio or terminal connected. In `gofer`, if it can, where
    /// its cgroup is ours to make.
    pub(crate) async fn make(
        &self,
        log_dir: Option<PathBuf>,
        gofer: Option<PrestartedGofer>,
    ) -> Result<Made> {
        let mut opts = CreateOpts {
            id: self.id.clone(),
            sandbox: self.sandbox.clone(),
            bundle: self.request.bundle.clone(),
            stdio: Stdio::default(),
            console_socket: None,
            log_dir,
        };
        if self.request.io.terminal {
            let dir = self.scratch.subdir()?;
            let made = self.make_with_terminal(opts, &dir).await;
            Scratch::remove_dir(&dir)?;
            return made;
        }
        let (io, stdio) = ProcessIo::open(&self.request.io)?;
        opts.stdio = stdio;
        let made = match gofer.zip(self.own_cgroup) {
            Some((gofer, cgroup)) => self.make_in(gofer, cgroup, &opts).await?,
            None => None,
        };
        let pid = match made {
            Some(pid) => pid,
            None => self.runtime.create(&opts).await?,
        };
        Ok(Made {
            pid,
            io: Some(io.into()),
            stdio: opts.stdio,
        })
    }

    async fn make_in(
        &self,
        gofer: PrestartedGofer,
        cgroup: &Cgroup,
        opts: &CreateOpts,
    ) -> Result<Option<u32>> {
        let cgroup = cgroup.clone();
        blocking(move || cgroup.make()).await?;
        let made = self.runtime.create_with_gofer(opts, gofer).await?;
        if made.is_some() {
            info!("{} is made in slots", self.id);
        }
        Ok(made)
    }

    async fn make_with_terminal(&self, mut opts: CreateOpts, dir: &Path) -> Result<Made> {
        let console = ConsoleSocket::bind(dir, "tty")?;
        opts.console_socket = Some(console.path().to_owned());
        let pid = self.runtime.create(&opts).await?;
        Ok(Made {
            pid,
            io: Some(attach(&self.request.io, &console).await?),
            stdio: Stdio::default(),
        })
    }

    /// Takes away what a create that failed with `error` may have left.
    pub(crate) async fn undo(&self, error: &Error) {
        let id = self.id;
        // A container of this name that was there before is not ours to delete.
        let theirs = matches!(error, Error::Runtime(RuntimeError::AlreadyExists { .. }));
        if !theirs && let Err(e) = self.runtime.delete(id).await {
            warn!("undo create {id}: {e}");
        }
        let cgroup = self.own_cgroup.filter(|_| !theirs).cloned();
        if let Err(e) = clean_up(self.request.bundle.clone(), cgroup).await {
            warn!("undo create {id}: {e}");
        }
    }
}

/// Connects the terminal that the runtime has made.
pub(crate) async fn attach(spec: &IoSpec, console: &ConsoleSocket) -> Result<SharedIo> {
    let io = ProcessIo::default();
    io.attach_terminal(spec, console.receive().await?)?;
    Ok(io.into())
}

/// Takes away what the runtime leaves to its caller.
pub(crate) async fn clean_up(bundle: PathBuf, cgroup: Option<Cgroup>) -> Result<()> {
    blocking(move || {
        let unmounted = rootfs::unmount(&bundle.join("rootfs"));
        cgroup
            .map_or(Ok(()), |c| c.remove())
            .map_err(Error::from)
            .and(unmounted)?;
        // containerd runs `delete` also after a shim that ended well; without a record it knows
        // that nothing is left to do.
        Record::remove(&bundle)
    })
    .await
}
