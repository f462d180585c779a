// SPDX-License-Identifier: Apache-2.0

//! Taking up the runtime of the node: it is read again and again, and tried out when it has
//! changed.

use std::{collections::BTreeMap, fmt, io, os::fd::AsFd, sync::Arc};

use kiln_host::egress::{Guard, LinkLocal, Mode};
use runsc_wrapper::{Release, check_no_xdp};
use tracing::{error, info, warn};

use super::{
    boot::{BootError, Booter, blocking},
    manager::WarmManager,
    netns, rlimits, rootfs,
    runtime::{Runtime, SetupError},
    trial,
};
use kiln_node_install::{
    config::{Class, default_sysctl},
    exec_dir::{self, ExecDirError},
    listener,
};

/// The runtime that makes sandboxes now.
#[derive(Clone)]
pub(crate) struct Active {
    pub(super) runtime: Runtime,
    pub(super) booter: Booter,
    pub(crate) version: String,
}

impl Active {
    /// How its sandboxes are made and started.
    pub(crate) fn ways(&self) -> trial::Ways {
        self.booter.ways
    }
}

/// Whether the node's runtime makes sandboxes that can be adopted.
#[derive(Clone)]
pub(crate) enum Health {
    /// It has not been tried yet.
    Untried,
    /// It has passed its trial.
    Works(Arc<Active>),
    /// It does not, for this reason.
    Broken(String),
}

impl Health {
    /// The runtime, if it works.
    pub(crate) fn active(&self) -> Option<&Arc<Active>> {
        match self {
            Self::Works(active) => Some(active),
            _ => None,
        }
    }

    /// Why there are no warm sandboxes, for people.
    pub(crate) fn problem(&self) -> Option<&str> {
        match self {
            Self::Untried => Some("the runtime has not been tried yet"),
            Self::Works(_) => None,
            Self::Broken(why) => Some(why),
        }
    }
}

/// Whether packets of Pods to link-local and metadata addresses are dropped on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Guarding {
    /// It has not been tried yet.
    Unknown,
    /// They are.
    Works,
    /// The node's configuration lets them pass.
    Off,
    /// They should be and cannot, for this reason.
    Fails(String),
}

/// Why a runtime was not taken up.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    ExecDir(#[from] ExecDirError),
    #[error(transparent)]
    Task(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Setup(#[from] SetupError),
}

impl WarmManager {
    /// Takes up the runtime if it has changed since the last time, after a trial, and returns it
    /// if so.
    pub(super) async fn reload(&self) -> Option<Arc<Active>> {
        let reloaded = self.try_reload().await;
        reloaded.unwrap_or_else(|e| {
            self.set_broken(&e);
            None
        })
    }

    async fn try_reload(&self) -> Result<Option<Arc<Active>>, ReloadError> {
        let runtime = self.read_runtime().await??;
        let same = |active: &Arc<Active>| active.runtime == runtime;
        if self.state().health.active().is_some_and(same) {
            return Ok(None);
        }
        self.try_guard(&runtime).await;
        let active = self.take_up(runtime).await?;
        info!("sandboxes can be adopted, way: {:?}", active.ways());
        self.metrics.usable.set(1);
        self.metrics.set_runtime(&active.version, active.ways());
        Ok(Some(active))
    }

    /// Reads which runtime the node has.
    pub(super) async fn read_runtime(
        &self,
    ) -> Result<Result<Runtime, SetupError>, tokio::task::JoinError> {
        let file = self.config.runtime_config.clone();
        let namespace = self.config.namespace.clone();
        tokio::task::spawn_blocking(move || Runtime::look(&file, &namespace)).await
    }

    async fn take_up(&self, runtime: Runtime) -> Result<Arc<Active>, ReloadError> {
        self.take_limits().await;
        let state = self.config.state.clone();
        tokio::task::spawn_blocking(move || exec_dir::prepare(&state)).await??;
        let (rootfs, image) = (self.store.rootfs(), self.store.image());
        let pause = self.config.pause.clone();
        let what = format!("install {}", pause.display());
        blocking(&what, move || rootfs::write_rootfs(&rootfs, &image, &pause)).await?;
        let booter = self.booter(&runtime);
        let blank = Class {
            name: "trial".to_owned(),
            warm: 0,
            memory: None,
            cpu: None,
            sysctl: default_sysctl(),
        };
        let version = booter.version().await?;
        let shape = runtime.shape(&blank)?;
        let release = Release::of(&version, &runtime.config.flags);
        if !release.is_known {
            info!("{version} is not among the releases of runsc that are known");
        }
        let active = Arc::new(Active {
            booter: trial::find(&booter, &shape, &release).await?,
            runtime,
            version,
        });
        self.state().take_up(&active)?;
        Ok(active)
    }

    fn set_broken(&self, why: &dyn fmt::Display) {
        let why = why.to_string();
        let mut state = self.state();
        if state.health.problem() != Some(&why) {
            error!("no warm sandboxes: {why}");
        }
        state.health = Health::Broken(why);
        self.metrics.usable.set(0);
        self.metrics.no_runtime();
    }

    /// Takes containerd's limits, which a sandbox that starts cold has.
    async fn take_limits(&self) {
        let socket = self.config.containerd_socket().to_owned();
        let took = blocking("take containerd's limits", move || {
            rlimits::take_from(listener(&socket).map_err(io::Error::other)?)
        });
        if let Err(e) = took.await {
            warn!("limits on files may differ between warm and cold sandboxes: {e}");
        }
    }

    /// Tries out whether packets to link-local addresses can be dropped, in a network of its own.
    async fn try_guard(&self, runtime: &Runtime) {
        let policy = runtime.link_local.clone();
        let guard = if policy.mode == Mode::Allow {
            Guarding::Off
        } else {
            match guard_new_netns(policy, runtime.config.flags.clone()).await {
                Ok(()) => Guarding::Works,
                Err(e) => Guarding::Fails(e.to_string()),
            }
        };
        let mut state = self.state();
        if state.guard != guard {
            match &guard {
                Guarding::Fails(why) => error!("Pods may send to link-local addresses: {why}"),
                other => info!("packets of Pods to link-local addresses: {other:?}"),
            }
        }
        let works = guard == Guarding::Works;
        self.metrics.guards.set(works.into());
        state.guard = guard;
    }
}

/// Sets the rules of `policy` in a namespace made for it, for a runtime with these flags.
async fn guard_new_netns(
    policy: LinkLocal,
    flags: BTreeMap<String, String>,
) -> Result<(), BootError> {
    let netns = netns::with_link().await;
    blocking("guard a network namespace", move || {
        Guard::set(netns?.as_fd(), &policy).map_err(io::Error::other)?;
        check_no_xdp(&flags).map_err(io::Error::other)
    })
    .await
}
