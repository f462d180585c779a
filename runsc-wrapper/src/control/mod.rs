// SPDX-License-Identifier: Apache-2.0

//! A client of the sentry's control socket, for the calls whose wire form has stayed the same
//! in runsc's releases since 2023 (gVisor `runsc/boot/controller.go`).
//!
//! What sets up containers or networks changes from release to release, and the command line is
//! its stable face; the modules `network` and `gofer` know some
//! releases better. See `wire.rs` for how a call is made and
//! why its peer is not trusted.

mod wire;

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};

use wire::Peer;

/// Most bytes of a reply that lists processes. One takes some 200 bytes.
const LIST_LIMIT: usize = 8 << 20;

/// Most bytes of any other reply.
const REPLY_LIMIT: usize = 64 << 10;

/// Why a call gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There was nobody to ask: the call has had no effect.
    #[error("connect: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke: the call may have had its effect.
    #[error("broken connection: {0}")]
    Broken(#[source] io::Error),
    /// No answer in time: the call may have had its effect.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The answer is not one.
    #[error("bad reply: {0}")]
    Protocol(String),
    /// The sentry understood and said no, in these words.
    #[error("{0}")]
    Refused(String),
}

type Result<T, E = ControlError> = std::result::Result<T, E>;

/// Whom a signal is for (`boot.SignalDeliveryMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// One process; 0 is the container's first.
    Process(u32),
    /// Every process of the container.
    All,
    /// The foreground process group of the terminal of one process.
    ForegroundGroup(u32),
}

/// What the sentry says a container is doing (`boot.ContainerRuntimeState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuntimeState {
    /// Made, not started.
    Creating,
    /// Its first process runs.
    Running,
    /// It has ended, or was never there.
    Stopped,
}

/// One process of the sandbox (`control.Process`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ProcessInfo {
    /// Pid in the sandbox's root pid namespace.
    pub pid: u32,
    /// Command name.
    #[serde(default)]
    pub cmd: String,
}

/// The counters of a container (`boot.EventOut`).
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Event {
    /// The counters as the command line prints them.
    pub event: EventBody,
    /// CPU time of each container of the sandbox, nanoseconds.
    #[serde(rename = "containerUsage", default)]
    pub container_usage: Option<BTreeMap<String, u64>>,
}

/// The part of [`Event`] that `runsc events` prints (`boot.Event`).
#[derive(Debug, Clone, Default, Deserialize)]
pub struct EventBody {
    /// The counters.
    pub data: EventData,
}

/// Counters of one container (`boot.Stats`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct EventData {
    pub cpu: EventCpu,
    pub memory: EventMemory,
    pub pids: EventPids,
    pub network_interfaces: Option<Vec<EventInterface>>,
}

/// CPU counters.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct EventCpu {
    pub usage: EventCpuUsage,
}

/// CPU time.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct EventCpuUsage {
    /// Nanoseconds; zero over the control socket.
    pub total: u64,
}

/// Memory counters.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct EventMemory {
    pub usage: EventMemoryUsage,
}

/// Memory in use.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct EventMemoryUsage {
    /// Bytes.
    pub usage: u64,
}

/// Process counters.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
#[allow(missing_docs)]
pub struct EventPids {
    pub current: u64,
}

/// Counters of one network interface (`boot.NetworkInterface`).
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
#[allow(missing_docs)]
pub struct EventInterface {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}

/// What a process is to be (`control.ExecArgs`); fields that are not here are zero in Go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct ExecArgs {
    pub argv: Vec<String>,
    pub envv: Vec<String>,
    #[serde(rename = "wd")]
    pub cwd: String,
    #[serde(rename = "KUID")]
    pub uid: u32,
    #[serde(rename = "KGID")]
    pub gid: u32,
    #[serde(rename = "ExtraKGIDs")]
    pub extra_gids: Vec<u32>,
    #[serde(rename = "NoNewPrivileges")]
    pub no_new_privileges: bool,
    #[serde(rename = "Capabilities")]
    pub capabilities: TaskCapabilities,
    #[serde(rename = "StdioIsPty")]
    pub stdio_is_pty: bool,
    #[serde(rename = "GuestFDs")]
    pub guest_fds: [u32; 3],
    #[serde(rename = "ContainerID")]
    pub container: String,
}

/// Capability sets as bit masks (`auth.TaskCapabilities`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
#[allow(missing_docs)]
pub struct TaskCapabilities {
    pub permitted_caps: u64,
    pub inheritable_caps: u64,
    pub effective_caps: u64,
    pub bounding_caps: u64,
    pub ambient_caps: u64,
}

/// A way to one sandbox's control socket. Holds no connection.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    peer: Peer,
    deadline: Duration,
}

impl Client {
    /// Names the socket at `socket`, on which process `pid` must listen. Every call but the
    /// waits ends within `deadline`.
    pub fn new(socket: &Path, pid: u32, deadline: Duration) -> Self {
        Self {
            socket: socket.to_owned(),
            peer: Peer(pid),
            deadline,
        }
    }

    /// Waits for the end of the container's first process and returns its wait status.
    /// A container that is not started is refused, one that has ended answers at once.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn wait(&self, container: &str) -> Result<i32> {
        self.wait_call("containerManager.Wait", &container).await
    }

    /// Waits for the end of a process that [`exec`](Self::exec) has started and returns its
    /// wait status. It can be asked for once.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn wait_pid(&self, container: &str, pid: u32) -> Result<i32> {
        #[derive(Serialize)]
        struct Args<'a> {
            #[serde(rename = "PID")]
            pid: u32,
            #[serde(rename = "CID")]
            container: &'a str,
        }
        self.wait_call("containerManager.WaitPID", &Args { pid, container })
            .await
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn signal(&self, container: &str, target: Target, signal: i32) -> Result<()> {
        #[derive(Serialize)]
        struct Args<'a> {
            #[serde(rename = "CID")]
            container: &'a str,
            #[serde(rename = "Signo")]
            signal: i32,
            #[serde(rename = "PID")]
            pid: u32,
            #[serde(rename = "Mode")]
            mode: u32,
        }
        let (mode, pid) = match target {
            Target::Process(pid) => (0, pid),
            Target::All => (1, 0),
            Target::ForegroundGroup(pid) => (2, pid),
        };
        self.order(
            "containerManager.Signal",
            &Args {
                container,
                signal,
                pid,
                mode,
            },
            &[],
        )
        .await
    }

    /// The counters of a container.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn event(&self, container: &str) -> Result<Event> {
        self.call("containerManager.Event", &container, &[], REPLY_LIMIT)
            .await
    }

    /// The processes of a container.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>> {
        let method = "containerManager.Processes";
        let list: Option<_> = self.call(method, &container, &[], LIST_LIMIT).await?;
        Ok(list.unwrap_or_default())
    }

    /// What a container is doing.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn runtime_state(&self, container: &str) -> Result<RuntimeState> {
        let method = "containerManager.ContainerRuntimeState";
        match self
            .call::<_, u64>(method, &container, &[], REPLY_LIMIT)
            .await?
        {
            1 => Ok(RuntimeState::Creating),
            2 => Ok(RuntimeState::Running),
            3 => Ok(RuntimeState::Stopped),
            other => Err(ControlError::Protocol(format!(
                "unknown container state {other}"
            ))),
        }
    }

    /// Starts a process and returns its pid.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn exec(&self, args: &ExecArgs, stdio: [BorrowedFd<'_>; 3]) -> Result<u32> {
        let method = "containerManager.ExecuteAsync";
        match self.call(method, args, &stdio, REPLY_LIMIT).await? {
            0 => Err(ControlError::Protocol("a process with pid 0".to_owned())),
            pid => Ok(pid),
        }
    }

    /// Stops the whole sandbox. Pauses add up: each needs its own [`resume`](Self::resume).
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn pause(&self) -> Result<()> {
        self.order("containerManager.Pause", &(), &[]).await
    }

    /// Undoes one [`pause`](Self::pause). The sentry panics when there was none.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn resume(&self) -> Result<()> {
        self.order("containerManager.Resume", &(), &[]).await
    }

    /// Connects `stream`, a UNIX stream socket, to a TCP port of the sandbox's loopback.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn port_forward(&self, container: &str, port: u16, stream: OwnedFd) -> Result<()> {
        #[derive(Serialize)]
        struct Args<'a> {
            #[serde(rename = "ContainerID")]
            container: &'a str,
            #[serde(rename = "Port")]
            port: u16,
        }
        let args = Args { container, port };
        self.order("containerManager.PortForward", &args, &[stream.as_fd()])
            .await
    }

    /// Starts the root container, whose sandbox has its network.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn start_root(&self, container: &str) -> Result<()> {
        self.order("containerManager.StartRoot", &container, &[])
            .await
    }

    /// Makes a container that is not the first of its sandbox.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub(crate) async fn create_subcontainer(&self, container: &str) -> Result<()> {
        let args = serde_json::json!({"CID": container});
        self.order("containerManager.CreateSubcontainer", &args, &[])
            .await
    }

    /// Starts a container that was made. `args` and what `files` are belong to the release.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub(crate) async fn start_subcontainer(
        &self,
        args: &serde_json::Value,
        files: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<()> {
        let patient = Self {
            deadline,
            ..self.clone()
        };
        patient
            .order("containerManager.StartSubcontainer", args, files)
            .await
    }

    /// Removes a container that is not the first of its sandbox.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub(crate) async fn destroy_subcontainer(&self, container: &str) -> Result<()> {
        self.order("containerManager.DestroySubcontainer", &container, &[])
            .await
    }

    /// A call without a result.
    pub(crate) async fn order<A: Serialize>(
        &self,
        method: &str,
        arg: &A,
        fds: &[BorrowedFd<'_>],
    ) -> Result<()> {
        self.call::<A, IgnoredAny>(method, arg, fds, REPLY_LIMIT)
            .await?;
        Ok(())
    }

    async fn call<A: Serialize, R: DeserializeOwned>(
        &self,
        method: &str,
        arg: &A,
        fds: &[BorrowedFd<'_>],
        limit: usize,
    ) -> Result<R> {
        self.timely(async {
            let stream = wire::connect(&self.socket, self.peer).await?;
            wire::call(&stream, method, arg, fds, limit).await
        })
        .await
    }

    /// A call that is answered when a process ends, whenever that is.
    async fn wait_call<A: Serialize>(&self, method: &str, arg: &A) -> Result<i32> {
        let stream = self.timely(wire::connect(&self.socket, self.peer)).await?;
        let status: u32 = wire::call(&stream, method, arg, &[], REPLY_LIMIT).await?;
        Ok(status.cast_signed())
    }

    async fn timely<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        match tokio::time::timeout(self.deadline, call).await {
            Ok(result) => result,
            Err(_) => Err(ControlError::Timeout(self.deadline)),
        }
    }
}

#[cfg(test)]
mod tests;
