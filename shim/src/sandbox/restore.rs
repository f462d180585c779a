// SPDX-License-Identifier: Apache-2.0

//! A Pod that is restored from a snapshot: which image, which of its containers are still to be
//! restored, and what the agent is told of it.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kiln_agent_api::{
    Agent, NodeConfig, RuntimeFile,
    api::{RestoreRequest, RestoredRequest},
};
use kiln_host::blocking;
use log::{debug, info, warn};
use runsc_wrapper::ContainerId;
use serde_json::json;

use crate::{
    bundle::Spec,
    error::{Error, Result},
};

/// A snapshot that the agent has given to this Pod.
#[derive(Debug)]
pub(crate) struct Restore {
    /// The directory of the image.
    pub(crate) image: PathBuf,
    /// Whether it was taken of a sandbox that the agent had booted.
    pub(crate) adopted: bool,
    /// Names of containers that are not restored yet.
    left: Mutex<BTreeSet<String>>,
    agent: PathBuf,
    outcome: RestoredRequest,
}

impl Restore {
    /// Asks the agent for the snapshot that `spec`, that of the sandbox `id`, names. `None` when
    /// the Pod does not name one or starts without it.
    pub(crate) async fn ask(spec: &Spec, config: &NodeConfig, id: &ContainerId) -> Option<Self> {
        let snapshot = spec.restore_snapshot().filter(|_| spec.is_pod())?;
        let socket = &config.policy.agent;
        if socket.as_os_str().is_empty() {
            return None;
        }
        let outcome = RestoredRequest {
            pod_uid: spec.pod_uid()?.to_owned(),
            namespace: spec.pod_namespace()?.to_owned(),
            snapshot: snapshot.to_owned(),
            ..RestoredRequest::default()
        };
        match Self::request(outcome, socket, config, id).await {
            Ok(restore) => Some(restore),
            Err(e) => {
                info!("starts without snapshot {snapshot}: {e}");
                None
            }
        }
    }

    async fn request(
        outcome: RestoredRequest,
        socket: &Path,
        config: &NodeConfig,
        id: &ContainerId,
    ) -> Result<Self> {
        let request = RestoreRequest {
            pod_uid: outcome.pod_uid.clone(),
            namespace: outcome.namespace.clone(),
            snapshot: outcome.snapshot.clone(),
            sandbox_id: id.to_string(),
            runtime: runtime(config).await?,
            ..RestoreRequest::default()
        };
        let refused = |e: kiln_agent_api::AgentError| Error::Denied(e.to_string());
        let agent = Agent::connect(socket).await.map_err(refused)?;
        let image = agent.restore(&request).await.map_err(refused)?;
        Ok(Self {
            image: image.dir.into(),
            adopted: image.adopted,
            left: Mutex::new(image.containers.into_iter().collect()),
            agent: socket.to_owned(),
            outcome,
        })
    }

    /// The image, if the container `name` is still to be restored from it: one that is started
    /// another time is not.
    pub(crate) fn image_of(&self, name: Option<&str>) -> Option<PathBuf> {
        let is_left = name.is_some_and(|name| self.left().contains(name));
        is_left.then(|| self.image.clone())
    }

    /// Notes that the container `name` is restored. The agent is told after the last one.
    pub(crate) fn restored(&self, name: &str) {
        let mut left = self.left();
        if left.remove(name) && left.is_empty() {
            info!("restored from snapshot {}", self.outcome.snapshot);
            self.tell(String::new());
        }
    }

    /// Notes that the Pod is not restored.
    pub(crate) fn failed(&self, why: &str) {
        warn!("not restored from {}: {why}", self.outcome.snapshot);
        self.left().clear();
        self.tell(why.to_owned());
    }

    fn tell(&self, failure: String) {
        let socket = self.agent.clone();
        let outcome = RestoredRequest {
            failure,
            ..self.outcome.clone()
        };
        tokio::spawn(async move {
            let told = async { Agent::connect(&socket).await?.restored(&outcome).await };
            if let Err(e) = told.await {
                debug!("tell the agent: {e}");
            }
        });
    }

    fn left(&self) -> MutexGuard<'_, BTreeSet<String>> {
        // A set has no invariant that a panic elsewhere could break.
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Describes the runtime as far as an image depends on it.
///
/// # Errors
/// When its program is not there.
pub(crate) async fn runtime(config: &NodeConfig) -> Result<String> {
    let (binary, flags) = (config.runtime.binary.clone(), config.runtime.flags.clone());
    describe(binary, flags.into_iter().collect()).await
}

/// Describes the runtime that is `binary` with `flags`.
///
/// # Errors
/// When the program is not there.
pub(crate) async fn describe(
    binary: PathBuf,
    flags: std::collections::BTreeMap<String, String>,
) -> Result<String> {
    let program = blocking(move || RuntimeFile::of(&binary).map_err(Error::io("look at", &binary)));
    Ok(json!({"program": program.await?, "flags": flags}).to_string())
}
