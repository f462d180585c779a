// SPDX-License-Identifier: Apache-2.0

//! Learning how processes in a sandbox end.
//!
//! Whoever waits asks the sentry, which answers when the process has ended, and watches the
//! sandbox at the same time: when that goes away there is no answer, but an exit all the same.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde::Deserialize;

use super::{Container, SANDBOX_END, no_answer};
use kiln_host::reap::End;

use crate::{
    Exit, Result, RuntimeError, Status,
    cli::{self, Cli},
    command::{Cause, Running},
    sandbox::Answer,
};

/// How long after the end of a sandbox its last reply may still be read from the socket.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// First and longest pause between looks at a container that was made but not started through
/// this object.
const START_POLL: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));

/// Waits for the end of a container's first process.
pub(super) async fn wait_for_container(cli: Arc<Cli>, container: Arc<Container>) -> Result<Exit> {
    let told = pin!(ask_for_exit(&cli, &container));
    let exit = race_with_sandbox(&container, told, |end| match end {
        // The sentry ends with the exit code of its root container (gVisor `runsc/cmd/boot.go`);
        // what it was killed by is the container's end too.
        End::Reaped(exit) if container.is_root() => exit,
        End::Reaped(_) | End::Gone => Exit::now(Exit::KILLED),
    })
    .await;
    if exit.is_ok() {
        container.exited.store(true, Ordering::Relaxed);
    }
    exit
}

/// Waits for the end of a process that was started over the control socket.
pub(super) async fn wait_for_process(
    cli: Arc<Cli>,
    container: Arc<Container>,
    pid: u32,
) -> Result<Exit> {
    let told = pin!(async {
        let Some(client) = container.sandbox.client().await else {
            return wait_by_command(&cli, &container, Some(pid)).await;
        };
        match client.wait_pid(container.id.as_str(), pid).await {
            Ok(status) => Ok(Some(Exit::from_wait_status(status))),
            Err(error) => match container.sandbox.judge::<()>(error).await {
                Answer::Gone => Ok(None),
                Answer::NotAsked | Answer::Lost(_) => {
                    wait_by_command(&cli, &container, Some(pid)).await
                }
                other => Err(no_answer("wait", &container, other)),
            },
        }
    });
    race_with_sandbox(&container, told, |_| Exit::now(Exit::KILLED)).await
}

/// Waits for the end of a `runsc exec` and the process that it stands for.
pub(super) async fn wait_for_companion(
    container: Arc<Container>,
    mut running: Running,
) -> Result<Exit> {
    let output = running.output().await;
    let output = output.map_err(|e| cli::command_error("exec", container.id.as_str(), e))?;
    if output.status.success() || output.message().is_empty() {
        return Ok(output.exit());
    }
    // It lost sight of the process: most likely because the sandbox is gone.
    match cli::failure("exec", container.id.as_str(), &output) {
        _ if container.sandbox.ends_within(SANDBOX_END).await => Ok(Exit::now(Exit::KILLED)),
        error => Err(error),
    }
}

/// Takes what `told` says, or makes an exit of the sandbox's end if that says more.
async fn race_with_sandbox(
    container: &Container,
    mut told: Pin<&mut impl Future<Output = Result<Option<Exit>>>>,
    exit_of: impl FnOnce(End) -> Exit,
) -> Result<Exit> {
    tokio::select! {
        biased;
        told = &mut told => {
            if let Some(exit) = told? {
                return Ok(exit);
            }
        }
        _ = container.sandbox.ended() => {
            // A reply sent just before the end is still in the socket.
            if let Ok(Ok(Some(exit))) = tokio::time::timeout(LAST_WORDS, told).await {
                return Ok(exit);
            }
        }
    }
    Ok(exit_of(container.sandbox.ended().await))
}

/// Asks the sandbox for the end of a container. `None` when the sandbox ends without a word.
async fn ask_for_exit(cli: &Cli, container: &Container) -> Result<Option<Exit>> {
    let mut started = container.started.subscribe();
    let mut pause = START_POLL.0;
    loop {
        // It may also have been started by somebody else: look now and then. The sender lives
        // in the container, so `wait_for` cannot fail.
        let _ = tokio::time::timeout(pause, started.wait_for(|started| *started)).await;
        pause = (pause * 2).min(START_POLL.1);
        let known_started = *container.started.borrow();
        let Some(client) = container.sandbox.client().await else {
            if known_started {
                return wait_by_command(cli, container, None).await;
            }
            if container.sandbox.has_ended() {
                return Ok(None);
            }
            if cli.state(&container.id).await?.status(&container.id)? != Status::Created {
                container.started.send_replace(true);
            }
            continue;
        };
        let error = match client.wait(container.id.as_str()).await {
            Ok(status) => return Ok(Some(Exit::from_wait_status(status))),
            Err(error) => error,
        };
        match container.sandbox.judge::<()>(error).await {
            Answer::Gone => return Ok(None),
            Answer::Refused(message)
                if !known_started && Cause::of(&message) == Cause::NotRunning => {}
            Answer::NotAsked | Answer::Lost(_) => {}
            other => return Err(no_answer("wait", container, other)),
        }
    }
}

/// Lets a `runsc wait` wait. It dies with this future.
async fn wait_by_command(
    cli: &Cli,
    container: &Container,
    pid: Option<u32>,
) -> Result<Option<Exit>> {
    #[derive(Deserialize)]
    struct Waited {
        #[serde(rename = "exitStatus")]
        status: u32,
    }
    struct KillOnDrop(Running);
    impl Drop for KillOnDrop {
        fn drop(&mut self) {
            self.0.kill();
        }
    }
    if container.sandbox.has_ended() {
        return Ok(None);
    }
    let (op, id) = ("wait", container.id.as_str());
    let call = cli
        .call(op, id)?
        .option("--pid", pid.map(|pid| pid.to_string()))
        .id();
    let mut waiter = KillOnDrop(call.start()?);
    let output = waiter
        .0
        .output()
        .await
        .map_err(|e| cli::command_error(op, id, e))?;
    if output.status.success() {
        let waited: Waited =
            serde_json::from_slice(&output.stdout).map_err(|e| RuntimeError::BadAnswer {
                op,
                id: id.to_owned(),
                message: e.to_string(),
            })?;
        return Ok(Some(Exit::now(waited.status)));
    }
    let error = cli::failure(op, id, &output);
    // The sandbox went away under it.
    if container.sandbox.ends_within(SANDBOX_END).await {
        Ok(None)
    } else {
        Err(error)
    }
}
