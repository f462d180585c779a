// SPDX-License-Identifier: Apache-2.0

//! Making and starting containers with a prestarted gofer: see [`crate::gofer`].

use kiln_host::blocking;
use std::{
    fs, io,
    os::fd::AsFd,
    path::Path,
    sync::{Arc, PoisonError},
};

use super::{Container, Runsc, no_answer};
use crate::{
    ContainerId, CreateOpts, PrestartedGofer, Result, Stdio, cli,
    exec::Descriptors,
    gofer::{PutInPlace, container::GoferContainer},
    sandbox::{Answer, Sandbox},
    state::members,
};

impl Runsc {
    /// Starts a gofer ahead.
    pub(super) async fn start_gofer(
        &self,
        dir: &Path,
        sandbox: &ContainerId,
        place: PutInPlace,
    ) -> Result<PrestartedGofer> {
        let (config, dir, of) = (self.cli.config.clone(), dir.to_owned(), sandbox.clone());
        blocking(move || PrestartedGofer::start(&config, &dir, &of, place))
            .await
            .map_err(|e| cli::io_error("start a gofer ahead", e))
    }

    /// Makes a container with a prestarted gofer. Returns `false` if that is impossible; nothing of it
    /// is left then.
    pub(super) async fn make_with_gofer(
        &self,
        opts: &CreateOpts,
        gofer: PrestartedGofer,
    ) -> Result<bool> {
        let sandbox = self.container("create", &opts.sandbox)?.sandbox.clone();
        let id = &opts.id;
        if sandbox.client().await.is_none() {
            return Ok(false);
        }
        let (config, bundle) = (self.cli.config.clone(), opts.bundle.clone());
        let of = opts.sandbox.clone();
        let prepared = blocking(move || {
            let root_container = members::root_container(&config.root, &of)?;
            let member = GoferContainer::new(&config, &bundle, &of, gofer)?;
            io::Result::Ok((member, root_container))
        });
        let (member, root_container) = match prepared.await {
            Ok(prepared) => prepared,
            Err(e) => {
                log::info!("{id} is made by command: {e}");
                return Ok(false);
            }
        };
        let state = member.state(id, &opts.bundle, &root_container);
        if let Err(e) = self.note_member(&sandbox, opts, state).await {
            log::info!("{id} is made by command: {e}");
            blocking(move || member.take_back()).await.map_err(|e| {
                cli::io_error(&format!("take {id} away from its prestarted gofer"), e)
            })?;
            return Ok(false);
        }
        self.known().remove(id);
        let container = self.container("create", id)?;
        *container.member() = Some(member);
        Ok(true)
    }

    /// Tells the sentry and runsc's state of a new container.
    async fn note_member(
        &self,
        sandbox: &Sandbox,
        opts: &CreateOpts,
        state: io::Result<serde_json::Value>,
    ) -> io::Result<()> {
        let (state, id) = (state?, opts.id.clone());
        let answer = sandbox
            .ask(async |client| client.create_subcontainer(id.as_str()).await)
            .await;
        match answer {
            Answer::Done(()) => {}
            Answer::Lost(e) => return Err(io::Error::other(e)),
            Answer::Refused(message) => return Err(io::Error::other(message)),
            Answer::Gone | Answer::NotAsked => return Err(io::ErrorKind::NotConnected.into()),
        }
        let (root, of) = (self.root().to_owned(), opts.sandbox.clone());
        let (added, name) = (id.clone(), id.clone());
        let written = blocking(move || members::add(&root, &added, &of, &state)).await;
        if written.is_err() {
            // So that the command can make it anew.
            let gone = sandbox
                .ask(async |client| client.destroy_subcontainer(name.as_str()).await)
                .await;
            if !matches!(gone, Answer::Done(())) {
                log::warn!("{id} stays in the sandbox: {gone:?}");
            }
        }
        written
    }

    /// Starts a container that has a prestarted gofer. Returns `false` if the command must do it.
    pub(super) async fn start_with_gofer(
        &self,
        container: &Arc<Container>,
        stdio: &Stdio,
    ) -> Result<bool> {
        let Some(member) = container.member().take() else {
            return Ok(false);
        };
        let (op, id, sandbox) = ("start", &container.id, &container.sandbox);
        let streams = Descriptors::of(stdio).map_err(|e| cli::io_error("open a null device", e))?;
        streams
            .give_to(sandbox.owner)
            .map_err(|e| cli::io_error("give the streams to the sandbox", e.into()))?;
        let args = member.start_args(id, sandbox.pid());
        let fds: Vec<_> = streams
            .all()
            .into_iter()
            .chain(member.files.iter().map(AsFd::as_fd))
            .collect();
        let deadline = self.cli.config.deadlines.start;
        let answer = sandbox
            .ask(async |client| client.start_subcontainer(&args, &fds, deadline).await)
            .await;
        match answer {
            Answer::Done(()) => {}
            Answer::NotAsked => {
                self.leave_gofer(id, member).await?;
                return Ok(false);
            }
            Answer::Refused(message) => return Err(cli::refusal(op, id.as_str(), 1, message)),
            other => return Err(no_answer(op, container, other)),
        }
        self.note_start(container, &member).await?;
        Ok(true)
    }

    /// Lets the command find a container as if it had made it.
    async fn leave_gofer(&self, id: &ContainerId, member: GoferContainer) -> Result<()> {
        let (root, noted) = (self.root().to_owned(), id.clone());
        blocking(move || {
            members::forget_gofer(&root, &noted)?;
            member.take_back()
        })
        .await
        .map_err(|e| cli::io_error(&format!("take {id} away from its prestarted gofer"), e))
    }

    async fn note_start(&self, container: &Container, member: &GoferContainer) -> Result<()> {
        let (root, id) = (self.root().to_owned(), container.id.clone());
        let sandbox: ContainerId = container.sandbox.id().parse().map_err(|e| {
            cli::io_error("note a start", io::Error::other(format!("sandbox: {e}")))
        })?;
        let (sentry, gofer) = (container.sandbox.pid(), member.gofer());
        let (confs, own) = (member.mount_confs(), member.oom_score());
        let noted = blocking(move || {
            members::set_started(&root, &id, confs)?;
            let scores = [
                (sentry, members::lowest_oom_score(&root, &sandbox)?),
                (gofer, own),
            ];
            for (pid, score) in scores {
                if let Some(score) = score
                    && let Err(e) =
                        fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
                {
                    log::warn!("oom_score_adj of {pid} stays as it is: {e}");
                }
            }
            Ok(())
        });
        noted
            .await
            .map_err(|e| cli::io_error(&format!("note that {} runs", container.id), e))
    }
}

impl Container {
    /// The container with its prestarted gofer, between create and start.
    pub(super) fn member(&self) -> std::sync::MutexGuard<'_, Option<GoferContainer>> {
        self.member.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
