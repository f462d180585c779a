// SPDX-License-Identifier: Apache-2.0

//! Snapshots of the Pod, which the node's agent asks for.
//!
//! ```text
//!       checkpoint                it is whole             finish: stop
//! Runs ───────────► Checkpointing ───────────► Paused ─────────────────► Stopped ─► Ended
//!   ▲                     │ it failed            │ finish: go on, or its time is over
//!   └─────────────────────┴──────────────────────┘
//! ```
//!
//! In `Stopped` the sentry is gone, and containerd is told that the containers run: a kubelet that
//! saw them end would start them again. When containerd asks for the end of one, or a minute is
//! over, all of them have ended, with exit code 0. No process of the Pod sees a signal.

use std::{path::PathBuf, sync::Arc, time::Duration};

use kiln_agent_api::api::CheckpointResponse;
use log::{info, warn};
use runsc_wrapper::CheckpointOpts;

use super::Pod;
use crate::{
    bundle::{Network, Role},
    error::{Error, Result},
    sandbox::{Origin, Sandbox, restore},
    state::State,
};

/// How long a Pod that was stopped may wait for its end.
const STOPPED: Duration = Duration::from_secs(60);

/// State of the Pod as far as a snapshot has changed it; see the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Suspension {
    #[default]
    Runs,
    Checkpointing,
    Paused,
    Stopped,
    Ended,
}

/// Place for an image that is to be written.
pub(crate) struct Image {
    /// An empty directory.
    pub(crate) dir: PathBuf,
    /// How many bytes it may have.
    pub(crate) room: u64,
}

impl Pod {
    /// Pauses the Pod `uid` and writes an image of it. It goes on after `hold` unless [`finish`](Self::finish) comes before.
    ///
    /// # Errors
    /// When no image can be taken of it; it goes on then.
    pub(crate) async fn snapshot(
        self: &Arc<Self>,
        uid: &str,
        image: Image,
        hold: Duration,
    ) -> Result<CheckpointResponse> {
        let sandbox = self.sandbox_of(uid)?;
        self.shift(&[Suspension::Runs], Suspension::Checkpointing)?;
        match self.write_image(&sandbox, image).await {
            Ok(answer) => {
                self.shift(&[Suspension::Checkpointing], Suspension::Paused)?;
                let pod = Arc::clone(self);
                tokio::spawn(async move {
                    tokio::time::sleep(hold).await;
                    if pod.shift(&[Suspension::Paused], Suspension::Runs).is_ok() {
                        warn!("nobody has finished the snapshot, the Pod goes on");
                        pod.go_on(&sandbox).await.ok();
                    }
                });
                Ok(answer)
            }
            Err(e) => {
                self.suspension.send_replace(Suspension::Runs);
                Err(e)
            }
        }
    }

    /// Stops the Pod `uid` after a snapshot, or lets it go on.
    ///
    /// # Errors
    /// When it is not paused by one.
    pub(crate) async fn finish(self: &Arc<Self>, uid: &str, stop: bool) -> Result<()> {
        let sandbox = self.sandbox_of(uid)?;
        if !stop {
            self.shift(&[Suspension::Paused], Suspension::Runs)?;
            return self.go_on(&sandbox).await;
        }
        let is_stopped = |s: Suspension| matches!(s, Suspension::Stopped | Suspension::Ended);
        if is_stopped(*self.suspension.borrow()) {
            return Ok(());
        }
        self.shift(&[Suspension::Paused], Suspension::Stopped)?;
        if let Err(e) = sandbox.runtime.kill_sandbox(sandbox.runtime_id()).await {
            self.shift(&[Suspension::Stopped], Suspension::Runs)?;
            self.go_on(&sandbox).await?;
            return Err(e.into());
        }
        info!("stopped, with a snapshot");
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(STOPPED).await;
            pod.end_suspended();
        });
        Ok(())
    }

    /// Refuses `op` on a Pod that was stopped.
    pub(super) fn require_running(&self, op: &'static str) -> Result<()> {
        match *self.suspension.borrow() {
            Suspension::Runs | Suspension::Checkpointing | Suspension::Paused => Ok(()),
            state @ (Suspension::Stopped | Suspension::Ended) => Err(wrong(op, state)),
        }
    }

    /// Has the containers of a Pod that was stopped end. Returns whether it was stopped.
    pub(super) fn end_suspended(&self) -> bool {
        self.shift(&[Suspension::Stopped], Suspension::Ended)
            .is_ok()
    }

    /// Waits until the containers of a Pod that was stopped are to end. Returns whether it was.
    pub(super) async fn ended_suspended(&self) -> bool {
        let mut suspension = self.suspension.subscribe();
        let settled = suspension.wait_for(|s| *s != Suspension::Stopped).await;
        // The sender lives in `self`, so that this cannot fail.
        settled.is_ok_and(|s| *s == Suspension::Ended)
    }

    fn sandbox_of(&self, uid: &str) -> Result<Arc<Sandbox>> {
        let sandbox = self.sandbox();
        let sandbox = sandbox.filter(|s| s.pod_uid.as_deref() == Some(uid));
        sandbox.ok_or_else(|| Error::NotFound {
            kind: "Pod",
            id: uid.to_owned(),
        })
    }

    fn shift(&self, from: &[Suspension], to: Suspension) -> Result<()> {
        let mut found = None;
        self.suspension.send_if_modified(|now| {
            let fits = from.contains(now);
            if fits {
                *now = to;
            } else {
                found = Some(*now);
            }
            fits
        });
        found.map_or(Ok(()), |state| Err(wrong("snapshot", state)))
    }

    async fn go_on(&self, sandbox: &Sandbox) -> Result<()> {
        let resumed = sandbox.runtime.resume(sandbox.runtime_id()).await;
        resumed.inspect_err(|e| warn!("resume after a snapshot: {e}"))?;
        Ok(())
    }

    async fn write_image(&self, sandbox: &Sandbox, image: Image) -> Result<CheckpointResponse> {
        let (containers, execs) = self.check_restorable(sandbox)?;
        let used = sandbox.cgroup.usage().memory;
        if used > image.room {
            let Image { room, .. } = image;
            let message =
                format!("the Pod uses {used} bytes of memory, and there is room for {room}");
            return Err(Error::InvalidArgument(message));
        }
        let record = &sandbox.runtime_record;
        let runtime = restore::describe(record.binary.clone(), record.flags.clone()).await?;
        let id = sandbox.runtime_id();
        sandbox.runtime.pause(id).await?;
        let opts = CheckpointOpts {
            image: image.dir,
            // A checkpoint that fails would else end the sandbox all the same.
            leave_running: true,
        };
        if let Err(e) = sandbox.runtime.checkpoint(id, &opts).await {
            self.go_on(sandbox).await?;
            return Err(e.into());
        }
        Ok(CheckpointResponse {
            adopted: matches!(sandbox.origin, Origin::Adopted(_)),
            containers,
            execs,
            runtime,
            ..CheckpointResponse::default()
        })
    }

    /// Returns the names of the containers and the number of execs, if there is nothing that could
    /// not be restored.
    fn check_restorable(&self, sandbox: &Sandbox) -> Result<(Vec<String>, u32)> {
        let refuse = |why: String| Err(Error::InvalidArgument(why));
        if sandbox.network == Network::Host {
            return refuse("the Pod is on the host's network".to_owned());
        }
        let (mut names, mut execs) = (Vec::new(), 0);
        for container in self.containers() {
            let state = container.init.state();
            if state != State::Running {
                return refuse(format!("container {} is {}", container.id, state.name()));
            }
            for exec in container.all_execs() {
                let is_running = exec.process.state() == State::Running;
                if is_running && exec.process.io_spec.terminal {
                    return refuse(format!("an exec of {} has a terminal", container.id));
                }
                execs += u32::from(is_running);
            }
            if container.role != Role::Sandbox {
                let name = container.name.clone();
                let unnamed = || Error::InvalidArgument("a container has no name".to_owned());
                names.push(name.ok_or_else(unnamed)?);
            }
        }
        Ok((names, execs))
    }
}

fn wrong(op: &'static str, state: Suspension) -> Error {
    Error::WrongState {
        op,
        id: "the Pod".to_owned(),
        state: match state {
            Suspension::Runs => "running",
            Suspension::Checkpointing => "being checkpointed",
            Suspension::Paused => "paused for a snapshot",
            Suspension::Stopped | Suspension::Ended => "suspended with a snapshot",
        },
    }
}
