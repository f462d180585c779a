// SPDX-License-Identifier: Apache-2.0

//! The command line of runsc.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::OpenOptionsExt, unix::process::ExitStatusExt},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use crate::{
    CheckpointOpts, Config, ContainerId, Result, RuntimeError, Stats, Status, Stdio,
    command::{Cause, Command, CommandError, Log, NetnsOverlay, Output, Running},
    control::EventBody,
};

/// Runs commands as the configuration says.
#[derive(Debug)]
pub(crate) struct Cli {
    pub(crate) config: Config,
}

/// One command on one container, not yet run.
#[derive(Debug)]
pub(crate) struct Call {
    op: &'static str,
    id: String,
    command: Command,
    deadline: Duration,
}

impl Cli {
    pub(crate) fn new(config: Config) -> Self {
        Self { config }
    }

    /// Begins `<program> --root=… --log=… <flags> <op>`; what follows is the caller's.
    pub(crate) fn call(&self, op: &'static str, id: &str) -> Result<Call> {
        self.call_with_flags(op, id, &[])
    }

    /// As [`call`](Self::call), with further global flags.
    pub(crate) fn call_with_flags(
        &self,
        op: &'static str,
        id: &str,
        flags: &[String],
    ) -> Result<Call> {
        let log = Log::new().map_err(|e| io_error("make a log for the runtime", e))?;
        let command = Command::new(&self.config.binary)
            .arg(format!("--root={}", self.config.root.display()))
            .arg(format!("--log={}", log.path()))
            .arg("--log-format=json")
            .args(self.config.flag_args(id))
            .args(flags)
            .arg(op)
            .log(log);
        Ok(Call {
            op,
            id: id.to_owned(),
            command,
            deadline: self.config.deadlines.query,
        })
    }

    pub(crate) async fn start(&self, id: &ContainerId, stdio: Stdio) -> Result<()> {
        let call = self
            .call("start", id.as_str())?
            .deadline(self.config.deadlines.start);
        call.stdio(stdio).id().run().await?;
        Ok(())
    }

    /// Signals the first process or all.
    pub(crate) async fn kill(&self, id: &ContainerId, all: bool, signal: i32) -> Result<()> {
        let all = all.then_some("--all");
        self.call("kill", id.as_str())?
            .args(all)
            .id()
            .arg(signal.to_string())
            .run()
            .await?;
        Ok(())
    }

    /// Signals one process of a sandbox.
    pub(crate) async fn kill_pid(&self, id: &ContainerId, pid: u32, signal: i32) -> Result<()> {
        let call = self
            .call("kill", id.as_str())?
            .arg("--pid")
            .arg(pid.to_string());
        call.id().arg(signal.to_string()).run().await?;
        Ok(())
    }

    pub(crate) async fn delete(&self, id: &ContainerId) -> Result<()> {
        let call = self
            .call("delete", id.as_str())?
            .deadline(self.config.deadlines.delete);
        call.arg("--force").id().run().await?;
        Ok(())
    }

    pub(crate) async fn state(&self, id: &ContainerId) -> Result<OciState> {
        self.call("state", id.as_str())?
            .looks_only()
            .id()
            .json()
            .await
    }

    /// The pids of the container's processes.
    pub(crate) async fn pids(&self, id: &ContainerId) -> Result<Vec<u32>> {
        let call = self
            .call("ps", id.as_str())?
            .looks_only()
            .args(["--format", "json"]);
        // Go writes null for an empty list.
        Ok(call
            .id()
            .json::<Option<Vec<u32>>>()
            .await?
            .unwrap_or_default())
    }

    pub(crate) async fn pause(&self, id: &ContainerId) -> Result<()> {
        self.call("pause", id.as_str())?.id().run().await?;
        Ok(())
    }

    pub(crate) async fn resume(&self, id: &ContainerId) -> Result<()> {
        self.call("resume", id.as_str())?.id().run().await?;
        Ok(())
    }

    pub(crate) async fn stats(&self, id: &ContainerId) -> Result<Stats> {
        let call = self
            .call("events", id.as_str())?
            .looks_only()
            .arg("--stats")
            .id();
        let event: EventBody = call.json().await?;
        Ok(stats_of(event))
    }

    pub(crate) async fn checkpoint(&self, id: &ContainerId, opts: &CheckpointOpts) -> Result<()> {
        let leave_running = opts.leave_running.then_some("--leave-running");
        let call = self
            .call("checkpoint", id.as_str())?
            .deadline(self.config.deadlines.checkpoint);
        call.arg("--image-path")
            .arg(&opts.image)
            // Releases of February compress unless they are told, which takes several times as long
            // and keeps a restore from loading pages on demand.
            .arg("--compression=none")
            .args(leave_running)
            .id()
            .run()
            .await?;
        Ok(())
    }

    /// Restores a created container from the checkpoint in `image`, by a command that sees `overlay`
    /// as the sandbox's own network namespace.
    pub(crate) async fn restore(
        &self,
        id: &ContainerId,
        image: &Path,
        stdio: Stdio,
        overlay: Option<NetnsOverlay>,
    ) -> Result<()> {
        let mut call = self
            .call("restore", id.as_str())?
            .deadline(self.config.deadlines.checkpoint)
            .stdio(stdio);
        if let Some(overlay) = overlay {
            call = call.cover(overlay);
        }
        let call = call.arg("--image-path").arg(image);
        call.arg("--detach").id().run().await?;
        Ok(())
    }

    /// Finds words for a command of runsc that has failed without any: a wrong global flag is
    /// complained of on the standard error alone, which may be a container's.
    pub(crate) async fn explain(&self, error: RuntimeError, flags: &[String]) -> RuntimeError {
        match error {
            RuntimeError::Failed {
                op,
                id,
                status,
                message,
            } if message.is_empty() => {
                let command = Command::new(&self.config.binary)
                    .args(self.config.flag_args(&id))
                    .args(flags)
                    // Does nothing but after it has looked at the flags.
                    .arg("flags")
                    .dies_with_us()
                    .deadline(self.config.deadlines.query);
                let message = match command.run().await {
                    Ok(output) if !output.status.success() => output.first_complaint(),
                    _ => "it did not say why".to_owned(),
                };
                RuntimeError::Failed {
                    op,
                    id,
                    status,
                    message,
                }
            }
            other => other,
        }
    }

    /// What `--version` prints.
    pub(crate) async fn version(&self) -> Result<String> {
        let command = Command::new(&self.config.binary)
            .arg("--version")
            .dies_with_us();
        let output = command
            .deadline(self.config.deadlines.query)
            .run()
            .await
            .map_err(|e| command_error("--version", "", e))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub(crate) async fn features(&self) -> Result<serde_json::Value> {
        self.call("features", "")?.looks_only().json().await
    }
}

impl Call {
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command = self.command.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command = self.command.args(args);
        self
    }

    /// Adds an option with its value, if there is one.
    pub(crate) fn option(self, name: &str, value: Option<impl AsRef<OsStr>>) -> Self {
        match value {
            Some(value) => self.arg(name).arg(value),
            None => self,
        }
    }

    /// Adds the container's id.
    pub(crate) fn id(self) -> Self {
        let id = self.id.clone();
        self.arg(id)
    }

    pub(crate) fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    pub(crate) fn stdio(mut self, stdio: Stdio) -> Self {
        self.command = self.command.stdio(stdio);
        self
    }

    pub(crate) fn terminal(mut self, replica: OwnedFd) -> Self {
        self.command = self.command.terminal(replica);
        self
    }

    pub(crate) fn cover(mut self, cover: NetnsOverlay) -> Self {
        self.command = self.command.cover(cover);
        self
    }

    pub(crate) fn kill_tree(mut self) -> Self {
        self.command = self.command.kill_tree();
        self
    }

    /// Says that it changes nothing, so that it may die with this process.
    pub(crate) fn looks_only(mut self) -> Self {
        self.command = self.command.dies_with_us();
        self
    }

    /// Runs it; a failure is an error with its cause.
    pub(crate) async fn run(self) -> Result<Output> {
        let (op, id) = (self.op, self.id);
        let command = self.command.deadline(self.deadline);
        let output = command.run().await.map_err(|e| command_error(op, &id, e))?;
        if output.status.success() {
            return Ok(output);
        }
        Err(failure(op, &id, &output))
    }

    /// Runs it and reads its output.
    pub(crate) async fn json<T: for<'de> Deserialize<'de>>(self) -> Result<T> {
        let (op, id) = (self.op, self.id.clone());
        let output = self.run().await?;
        serde_json::from_slice(&output.stdout).map_err(|e| RuntimeError::BadAnswer {
            op,
            id,
            message: e.to_string(),
        })
    }

    /// Starts it as a companion of a process that it stands for, without deadline.
    pub(crate) fn start(self) -> Result<Running> {
        let (op, id) = (self.op, self.id);
        self.command
            .dies_with_us()
            .start()
            .map_err(|e| command_error(op, &id, e))
    }
}

/// What `state` prints (OCI runtime specification, "State").
#[derive(Debug, Deserialize)]
pub(crate) struct OciState {
    status: String,
}

impl OciState {
    pub(crate) fn status(&self, id: &ContainerId) -> Result<Status> {
        match self.status.as_str() {
            "creating" | "created" => Ok(Status::Created),
            "running" => Ok(Status::Running),
            "paused" | "pausing" => Ok(Status::Paused),
            "stopped" => Ok(Status::Stopped),
            other => Err(RuntimeError::BadAnswer {
                op: "state",
                id: id.to_string(),
                message: format!("unknown status {other:?}"),
            }),
        }
    }
}

/// Counters as the trait gives them.
pub(crate) fn stats_of(event: EventBody) -> Stats {
    let network = event.data.network_interfaces.unwrap_or_default();
    Stats {
        cpu_ns: event.data.cpu.usage.total,
        sandbox_cpu_ns: Vec::new(),
        memory_bytes: event.data.memory.usage.usage,
        pids: event.data.pids.current,
        network: network
            .into_iter()
            .map(|i| crate::NetworkInterface {
                name: i.name,
                rx_bytes: i.rx_bytes,
                rx_packets: i.rx_packets,
                rx_errors: i.rx_errors,
                rx_dropped: i.rx_dropped,
                tx_bytes: i.tx_bytes,
                tx_packets: i.tx_packets,
                tx_errors: i.tx_errors,
                tx_dropped: i.tx_dropped,
            })
            .collect(),
    }
}

/// Writes the file that `exec --process` reads.
pub(crate) fn write_process(scratch: &Path, process: &serde_json::Value) -> Result<PathBuf> {
    let path = scratch.join("process.json");
    // Its environment may hold secrets.
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path);
    let written = file.and_then(|mut file| file.write_all(process.to_string().as_bytes()));
    written.map_err(|e| io_error(&format!("write {}", path.display()), e))?;
    Ok(path)
}

/// What a command says that was killed before it could say anything.
const KILLED: &str = "it was killed, as the kernel does when the Pod's memory limit is reached";

/// The typed error of a failed command.
pub(crate) fn failure(op: &'static str, id: &str, output: &Output) -> RuntimeError {
    let status = output.exit().code.cast_signed();
    let message = match (output.message(), output.status.signal()) {
        (said, Some(libc::SIGKILL)) if said.is_empty() => KILLED.to_owned(),
        (said, _) => said,
    };
    // A usage text goes to either stream, depending on the runtime.
    let usage = String::from_utf8_lossy(&output.stdout);
    if Cause::of(&message) == Cause::Unsupported || Cause::of(&usage) == Cause::Unsupported {
        return RuntimeError::Unsupported {
            op,
            id: id.to_owned(),
        };
    }
    refusal(op, id, status, message)
}

/// The typed error of a runtime's words.
pub(crate) fn refusal(op: &'static str, id: &str, status: i32, message: String) -> RuntimeError {
    let id = id.to_owned();
    match Cause::of(&message) {
        Cause::NotFound => RuntimeError::NotFound { op, id, message },
        Cause::AlreadyExists => RuntimeError::AlreadyExists { op, id, message },
        Cause::NotRunning => RuntimeError::NotRunning { op, id, message },
        // Who is to be killed is dead; anything else cannot be done there any more.
        Cause::SandboxGone if op == "kill" => RuntimeError::NotFound { op, id, message },
        Cause::SandboxGone => RuntimeError::NotRunning { op, id, message },
        Cause::Unsupported => RuntimeError::Unsupported { op, id },
        Cause::Other => RuntimeError::Failed {
            op,
            id,
            status,
            message,
        },
    }
}

pub(crate) fn command_error(op: &'static str, id: &str, error: CommandError) -> RuntimeError {
    match error {
        CommandError::Spawn { program, source } => RuntimeError::Spawn { program, source },
        CommandError::Timeout { deadline } => RuntimeError::Timeout {
            op,
            id: id.to_owned(),
            deadline,
        },
        CommandError::Wait(source) => io_error(&format!("wait for {op} of {id}"), source),
    }
}

pub(crate) fn io_error(what: &str, source: io::Error) -> RuntimeError {
    RuntimeError::Io {
        what: what.to_owned(),
        source,
    }
}
