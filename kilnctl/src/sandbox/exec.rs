// SPDX-License-Identifier: Apache-2.0

//! A command in a sandbox, by the apiserver's `exec`.

use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, bail};
use futures_util::{Sink, SinkExt as _};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use kube::api::{AttachParams, TerminalSize};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, copy, stderr, stdin, stdout},
    signal::unix::{Signal, SignalKind, signal},
};

use super::{Space, find::Target, terminal};
use crate::{args::users::Process, output::tell};

/// Bytes that are under way in one direction.
pub(crate) const BUFFER: usize = 64 << 10;

/// Runs a command in a container with this program's input, output and terminal, and returns its
/// exit code.
///
/// # Errors
/// When the command cannot be run, or the connection is lost.
pub(crate) async fn run(space: &Space, target: &Target, process: &Process) -> Result<ExitCode> {
    let tty = process.tty && terminal::is_one();
    if process.tty && !tty {
        tell("standard input is not a terminal; the command runs without one");
    }
    let params = AttachParams {
        container: target.container.clone(),
        stdin: process.stdin,
        stdout: true,
        // A terminal has one output.
        stderr: !tty,
        tty,
        max_stdin_buf_size: Some(BUFFER),
        max_stdout_buf_size: Some(BUFFER),
        max_stderr_buf_size: Some(BUFFER),
    };
    let (pods, command) = (space.pods(), &process.command);
    let attached = pods.exec(&target.pod, command, &params).await;
    let mut attached = attached.map_err(|e| space.explain(e))?;
    let status = attached.take_status().context("no status")?;
    let (input, sizes) = (attached.stdin(), attached.terminal_size());
    let (output, errors) = (attached.stdout(), attached.stderr());
    let raw = (tty && process.stdin)
        .then(terminal::Raw::enter)
        .transpose()?;
    let resized = signal(SignalKind::window_change()).context("listen for signals")?;
    let printed = async {
        tokio::try_join!(print(output, stdout()), print(errors, stderr())).context("print")
    };
    tokio::select! {
        printed = printed => drop(printed?),
        never = feed(input) => match never {},
        never = resize(sizes, resized) => match never {},
    }
    let status = status.await;
    drop(raw);
    match status {
        Some(status) => status_of(&status).map(ExitCode::from),
        None => {
            attached.join().await.context("the connection is lost")?;
            bail!("the connection was closed before the command ended")
        }
    }
}

/// Prints what comes, to the end.
async fn print(
    from: Option<impl AsyncRead + Unpin>,
    mut to: impl AsyncWrite + Unpin,
) -> std::io::Result<()> {
    if let Some(mut from) = from {
        copy(&mut from, &mut to).await?;
        to.flush().await?;
    }
    Ok(())
}

/// Passes standard input on, and its end. A command that reads no more does not end by that.
async fn feed(to: Option<impl AsyncWrite + Unpin>) -> std::convert::Infallible {
    if let Some(mut to) = to {
        copy(&mut stdin(), &mut to).await.ok();
        to.shutdown().await.ok();
    }
    std::future::pending().await
}

/// Passes the terminal's size on, and each change of it.
async fn resize(
    sizes: Option<impl Sink<TerminalSize> + Unpin>,
    mut resized: Signal,
) -> std::convert::Infallible {
    if let Some(mut sizes) = sizes {
        while let Some(size) = terminal::size() {
            if sizes.send(size).await.is_err() || resized.recv().await.is_none() {
                break;
            }
        }
    }
    std::future::pending().await
}

/// The exit code of a command that has ended.
///
/// # Errors
/// When it did not run; with the reason.
pub(crate) fn status_of(status: &Status) -> Result<u8> {
    if status.status.as_deref() == Some("Success") {
        return Ok(0);
    }
    let details = status.details.as_ref();
    let causes = details
        .and_then(|d| d.causes.as_deref())
        .unwrap_or_default();
    let code = causes
        .iter()
        .find(|c| c.reason.as_deref() == Some("ExitCode"))
        .and_then(|c| c.message.as_deref()?.parse::<u8>().ok());
    match code {
        Some(code) => Ok(code),
        None => Err(anyhow!(
            "{}",
            status.message.as_deref().unwrap_or("the command failed")
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of(status: Value) -> Result<u8> {
        status_of(&serde_json::from_value(status).unwrap())
    }

    #[test]
    fn the_exit_code_is_the_commands() {
        assert_eq!(of(json!({"status": "Success"})).unwrap(), 0);
        let failed = json!({"status": "Failure", "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": "7"}]}});
        assert_eq!(of(failed).unwrap(), 7);
        let lost = of(json!({"status": "Failure", "message": "no such program"}));
        assert_eq!(lost.unwrap_err().to_string(), "no such program");
    }
}
