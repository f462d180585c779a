// SPDX-License-Identifier: Apache-2.0

//! Trials of a runtime: how its sandboxes are made and started at the least cost.

use std::os::fd::AsFd;

use kiln_agent_api::{Shape, naming_process};
use runsc_wrapper::{
    ContainerId, CreateOpts, ExecOpts, Exit, Forms, PrestartedGofer, Release, StartWay, Stdio,
};
use tracing::warn;

use super::{
    boot::{BootError, Booter, Result, blocking, io_error},
    bundle, netns,
    sandbox::WarmSandbox,
};

/// How sandboxes are made and started, by what has passed its trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ways {
    /// Whether the runtime's release is in the table of those that were tested.
    pub(crate) is_known: bool,
    /// How a sandbox that was booted ahead is started.
    pub(crate) start: StartWay,
    /// Whether sandboxes read their root file system from an image, without a gofer.
    pub(crate) image: bool,
    /// Whether a gofer for the first container is made ahead with each sandbox.
    pub(crate) gofers: bool,
}

impl Ways {
    /// Commands, which every release has.
    pub(super) const COMMANDS: Self = Self {
        is_known: false,
        start: StartWay::Command,
        image: false,
        gofers: false,
    };

    /// Names the way of the start: `ControlSocket` or `Command`.
    pub(crate) fn start_name(self) -> &'static str {
        match self.start {
            StartWay::Command => "Command",
            StartWay::Control(_) => "ControlSocket",
        }
    }
}

/// What is tried last: every release has commands.
const COMMANDS: Forms = Forms {
    start: StartWay::Command,
    gofers: false,
};

/// Finds the best ways that work with sandboxes of `shape`, and returns a booter with them.
///
/// # Errors
/// When none works.
pub(super) async fn find(booter: &Booter, shape: &Shape, release: &Release) -> Result<Booter> {
    let plain = Ways {
        is_known: release.is_known,
        ..Ways::COMMANDS
    };
    for forms in release.forms.iter().copied().chain([COMMANDS]) {
        let image = booter.with(Ways {
            start: forms.start,
            image: true,
            ..plain
        });
        match image.trial(shape).await {
            Ok(()) if forms.gofers => return Ok(with_gofers(image, shape).await),
            Ok(()) => return Ok(image),
            Err(e) => warn!("adoption from an image, way {:?}: {e}", forms.start),
        }
    }
    let booter = booter.with(plain);
    booter.trial(shape).await?;
    Ok(booter)
}

/// Adds prestarted gofers, if they work.
async fn with_gofers(booter: Booter, shape: &Shape) -> Booter {
    let with = booter.with(Ways {
        gofers: true,
        ..booter.ways
    });
    match with.trial_of_gofer(shape).await {
        Ok(()) => with,
        Err(e) => {
            warn!("containers are made by command: {e}");
            booter
        }
    }
}

impl Booter {
    /// Does to a sandbox of `shape` what its adoption would, and retires it.
    async fn trial(&self, shape: &Shape) -> Result<()> {
        let sandbox = self.boot(shape).await?;
        let tried = self.try_adoption(&sandbox).await;
        self.retire_ready(sandbox).await;
        tried
    }

    async fn try_adoption(&self, sandbox: &WarmSandbox) -> Result<()> {
        let id = self.start_on_new_network(sandbox).await?;
        let scratch = self.store.bundle(id.as_str()).join("exec");
        let dir = scratch.clone();
        blocking("make a directory", move || std::fs::create_dir(dir)).await?;
        let exec = self
            .runtime
            .exec(&ExecOpts {
                container: id.clone(),
                process: naming_process("trial"),
                stdio: Stdio::default(),
                console_socket: None,
                scratch,
            })
            .await?;
        let Exit { code, .. } = exec.exit.await?;
        if code != 0 {
            return Err(unfit(&format!(
                "its host name cannot be changed (error {code})"
            )));
        }
        // The namespace that the sandbox was booted in has no link that is up.
        let links = self.runtime.stats(&id).await?.network;
        let has = |name: &str| links.iter().any(|link| link.name == name);
        match ["lo", netns::LINK].into_iter().all(has) {
            true => Ok(()),
            false => Err(unfit("it does not take the network that it is shown")),
        }
    }

    /// Starts a sandbox on a network made for it, and returns its id.
    async fn start_on_new_network(&self, sandbox: &WarmSandbox) -> Result<ContainerId> {
        let id: ContainerId = sandbox.id.parse()?;
        let netns = netns::with_link().await;
        let netns = netns.map_err(io_error("make a network namespace"))?;
        let started = self
            .runtime
            .start_on_network(&id, netns.as_fd(), sandbox.way);
        started.await?;
        Ok(id)
    }

    /// Starts a container with the prestarted gofer of a sandbox of `shape`, and retires both.
    async fn trial_of_gofer(&self, shape: &Shape) -> Result<()> {
        let dir = self.store.gofer_dir();
        blocking("prepare gofers", move || PrestartedGofer::prepare(&dir)).await?;
        let mut sandbox = self.boot(shape).await?;
        let tried = self.try_gofer(&mut sandbox).await;
        self.retire_ready(sandbox).await;
        tried
    }

    async fn try_gofer(&self, sandbox: &mut WarmSandbox) -> Result<()> {
        let gofer = sandbox.gofer.take();
        let gofer = gofer.ok_or_else(|| unfit("it has no gofer"))?;
        let sandbox = self.start_on_new_network(sandbox).await?;
        let id: ContainerId = format!("slots-{sandbox}").parse()?;
        let bundle = self.store.bundle(sandbox.as_str()).join("slots");
        let (dir, rootfs, of) = (bundle.clone(), self.store.rootfs(), sandbox.clone());
        blocking("make the bundle of a container", move || {
            bundle::write_trial(&dir, &rootfs, &of)
        })
        .await?;
        let opts = CreateOpts {
            id: id.clone(),
            sandbox,
            bundle,
            stdio: Stdio::default(),
            console_socket: None,
            log_dir: None,
        };
        let made = self.runtime.create_with_gofer(&opts, gofer).await?;
        made.ok_or_else(|| unfit("no container can be made with its gofer"))?;
        let exit = self.runtime.watch(&id).await?;
        let started = self.runtime.start(&id, &opts.stdio).await;
        let ended = match started {
            Ok(()) => exit.await,
            Err(e) => Err(e),
        };
        self.runtime.delete(&id).await?;
        match ended?.code {
            0 => Ok(()),
            code => Err(unfit(&format!(
                "a container with its gofer ended with {code}"
            ))),
        }
    }
}

fn unfit(message: &str) -> BootError {
    BootError::Unfit(message.to_owned())
}
