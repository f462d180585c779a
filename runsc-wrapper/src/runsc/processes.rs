// SPDX-License-Identifier: Apache-2.0

//! Starting further processes in a container, by control socket or by `runsc exec`.

use kiln_host::fs::remove_file_if_there;
use std::{fs, io, path::Path, sync::Arc, time::Duration};

use super::{Container, NO_STATUS, Runsc, clone, exits, no_answer};

use crate::{
    Exec, ExecOpts, Result, RuntimeError, cli,
    command::Running,
    exec::{self, Descriptors, RawSockets},
    sandbox::Answer,
};

/// Pauses between looks at the file in which `exec` leaves a pid: it takes some 30 ms.
const PID_FILE_POLL: Duration = Duration::from_millis(5);

impl Runsc {
    /// Starts a process over the control socket. `None` when the command line must do it.
    pub(super) async fn exec_by_socket(
        &self,
        container: &Arc<Container>,
        opts: &ExecOpts,
    ) -> Result<Option<Exec>> {
        let (op, id) = ("exec", container.id.to_string());
        // Asked first, so that nothing is prepared in vain.
        if container.sandbox.client().await.is_none() && !container.sandbox.has_ended() {
            return Ok(None);
        }
        let raw = if self.cli.config.is_on("net-raw") {
            RawSockets::Allowed
        } else {
            RawSockets::Denied
        };
        let args = exec::exec_args(&id, &opts.process, container.capabilities.as_ref(), raw)
            .map_err(|message| RuntimeError::Failed {
                op,
                id: id.clone(),
                status: NO_STATUS,
                message,
            })?;
        let streams =
            Descriptors::of(&opts.stdio).map_err(|e| cli::io_error("open a null device", e))?;
        streams
            .give_to(container.sandbox.owner)
            .map_err(|e| cli::io_error("give the streams to the sandbox", e.into()))?;
        let answer = container
            .sandbox
            .ask(async |client| client.exec(&args, streams.all()).await)
            .await;
        let pid = match answer {
            Answer::Done(pid) => pid,
            Answer::NotAsked => return Ok(None),
            other => return Err(no_answer(op, container, other)),
        };
        let exit = Box::pin(exits::wait_for_process(
            self.cli.clone(),
            container.clone(),
            pid,
        ));
        Ok(Some(Exec { pid, exit }))
    }

    /// Starts a process by `runsc exec`, which stays as long as the process does.
    pub(super) async fn exec_by_command(
        &self,
        container: &Arc<Container>,
        opts: &ExecOpts,
    ) -> Result<Exec> {
        let mut process = opts.process.clone();
        if let Some(process) = process.as_object_mut() {
            process.insert("terminal".to_owned(), opts.console_socket.is_some().into());
        }
        let process_file = cli::write_process(&opts.scratch, &process)?;
        let pid_file = opts.scratch.join("internal-pid");
        // Left over from an earlier exec, it would be taken for the new one.
        remove_file_if_there(&pid_file).map_err(removing(&pid_file))?;
        let started = self
            .start_exec(container, opts, &process_file, &pid_file)
            .await;
        for file in [&process_file, &pid_file] {
            if let Err(e) = remove_file_if_there(file) {
                log::warn!("{}", removing(file)(e));
            }
        }
        let (running, pid) = started?;
        Ok(Exec {
            pid,
            exit: Box::pin(exits::wait_for_companion(container.clone(), running)),
        })
    }

    async fn start_exec(
        &self,
        container: &Container,
        opts: &ExecOpts,
        process_file: &Path,
        pid_file: &Path,
    ) -> Result<(Running, u32)> {
        let call = self.cli.call("exec", container.id.as_str())?;
        let call = call
            .arg("--process")
            .arg(process_file)
            .arg("--internal-pid-file")
            .arg(pid_file)
            .id();
        let call = match &opts.console_socket {
            // Not left to `--console-socket`: that works with `--detach` only, which starts
            // runsc twice and at times takes a process that ends at once for one that failed.
            Some(console) => call.terminal(exec::open_terminal(console).await.map_err(|e| {
                cli::io_error(&format!("open a terminal for {}", console.display()), e)
            })?),
            None => call.stdio(clone(&opts.stdio)?),
        };
        let mut running = call.start()?;
        let deadline = tokio::time::Instant::now() + self.cli.config.deadlines.exec;
        loop {
            if let Some(pid) = read_pid(pid_file) {
                return Ok((running, pid));
            }
            let look_again = tokio::time::timeout(PID_FILE_POLL, running.output()).await;
            if let Ok(output) = look_again {
                let output =
                    output.map_err(|e| cli::command_error("exec", container.id.as_str(), e))?;
                return match read_pid(pid_file) {
                    // It ended between two looks.
                    Some(pid) => Ok((Running::ended(output), pid)),
                    None => Err(cli::failure("exec", container.id.as_str(), &output)),
                };
            }
            if tokio::time::Instant::now() > deadline {
                running.kill();
                return Err(RuntimeError::Timeout {
                    op: "exec",
                    id: container.id.to_string(),
                    deadline: self.cli.config.deadlines.exec,
                });
            }
        }
    }
}

fn read_pid(file: &Path) -> Option<u32> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn removing(file: &Path) -> impl FnOnce(io::Error) -> RuntimeError {
    move |e| cli::io_error(&format!("remove {}", file.display()), e)
}
