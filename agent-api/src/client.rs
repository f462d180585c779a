// SPDX-License-Identifier: Apache-2.0

//! The agent as a shim sees it.

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::Path,
    time::{Duration, Instant},
};

use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

use crate::{
    Shape,
    api::{
        AcquireRequest, AdoptedRequest, AgentClient, GuardedRequest, Image, ReleaseRequest,
        ReportRequest, ReportResponse, RestoreRequest, RestoredRequest, Warm,
    },
};

/// How long a Pod waits for the agent before it starts cold: less than a cold start takes of an idle
/// node. On a busy one the agent may be late by some tens of milliseconds, and to start cold would
/// make that node busier.
const BUDGET: Duration = Duration::from_millis(200);

/// How long a Pod waits for its snapshot: the agent reads all of it first.
const RESTORE: Duration = Duration::from_secs(60);

/// How long other calls may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why the agent gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// There is no agent on this node.
    #[error("no agent listens: {0}")]
    Absent(#[source] io::Error),
    /// Whoever listens is not root.
    #[error("the agent's socket is served by user {0}")]
    Stranger(u32),
    /// It did not answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// It answered with an error.
    #[error("{0}")]
    Refused(String),
    /// It has no warm sandbox of the shape, for this reason.
    #[error("no warm sandbox: {0}")]
    None(String),
}

/// A connection to the agent of this node.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
}

impl Agent {
    /// Connects to the agent at `socket`.
    ///
    /// # Errors
    /// [`AgentError::Absent`], and [`AgentError::Stranger`] when its peer is not root.
    pub async fn connect(socket: &Path) -> Result<Self, AgentError> {
        let kind = std::fs::symlink_metadata(socket).map_err(AgentError::Absent)?;
        if !kind.file_type().is_socket() {
            return Err(AgentError::Absent(io::Error::other("not a socket")));
        }
        let connect = timeout(BUDGET, UnixStream::connect(socket)).await;
        let stream = connect.map_err(|_| AgentError::Timeout(BUDGET))?;
        let stream = stream.map_err(AgentError::Absent)?;
        let peer = stream.peer_cred().map_err(AgentError::Absent)?;
        if peer.uid() != 0 {
            return Err(AgentError::Stranger(peer.uid()));
        }
        let client = AgentClient::new(Client::new(Socket::new(stream)));
        Ok(Self { client })
    }

    /// Asks for a warm sandbox of `shape` for the Pod sandbox `sandbox_id`. It is handed out by
    /// the answer: the caller takes it by its file, or it will be destroyed.
    ///
    /// # Errors
    /// [`AgentError`], after 200 ms at most.
    pub async fn acquire(&self, shape: &Shape, sandbox_id: &str) -> Result<Warm, AgentError> {
        let request = AcquireRequest {
            shape: shape.to_json(),
            sandbox_id: sandbox_id.to_owned(),
            ..AcquireRequest::default()
        };
        let answer = within(BUDGET, self.client.acquire(context(BUDGET), &request)).await?;
        let miss = answer.miss;
        answer.warm.into_option().ok_or(AgentError::None(miss))
    }

    /// Tells that the sandbox `id` has become the Pod sandbox `sandbox_id`, `took` after that
    /// was asked for.
    ///
    /// # Errors
    /// [`AgentError`]; the sandbox is adopted all the same.
    pub async fn adopted(
        &self,
        id: &str,
        sandbox_id: &str,
        took: Duration,
    ) -> Result<(), AgentError> {
        let request = AdoptedRequest {
            id: id.to_owned(),
            sandbox_id: sandbox_id.to_owned(),
            microseconds: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            ..AdoptedRequest::default()
        };
        within(PATIENCE, self.client.adopted(context(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Tells that the sandbox `id` was handed out in vain.
    ///
    /// # Errors
    /// [`AgentError`]; the agent notices by itself too.
    pub async fn release(&self, id: &str, reason: &str) -> Result<(), AgentError> {
        let request = ReleaseRequest {
            id: id.to_owned(),
            reason: reason.to_owned(),
            ..ReleaseRequest::default()
        };
        within(PATIENCE, self.client.release(context(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Tells that `dropped` packets of the Pod sandbox `sandbox_id` to link-local and metadata
    /// addresses were dropped since this was last told, or by `failure` why they are not.
    ///
    /// # Errors
    /// [`AgentError`]; the agent's count lacks them then.
    pub async fn guarded(
        &self,
        sandbox_id: &str,
        dropped: u64,
        failure: &str,
    ) -> Result<(), AgentError> {
        let request = GuardedRequest {
            sandbox_id: sandbox_id.to_owned(),
            dropped,
            failure: failure.to_owned(),
            ..GuardedRequest::default()
        };
        within(PATIENCE, self.client.guarded(context(PATIENCE), &request)).await?;
        Ok(())
    }

    /// Asks for the image that a Pod is to be restored from. The agent waits for the controller to
    /// name the Pod, and reads all of the image.
    ///
    /// # Errors
    /// [`AgentError`], after a minute at most; the Pod starts cold then.
    pub async fn restore(&self, request: &RestoreRequest) -> Result<Image, AgentError> {
        let answer = within(RESTORE, self.client.restore(context(RESTORE), request)).await?;
        let refusal = answer.refusal;
        answer
            .image
            .into_option()
            .ok_or(AgentError::Refused(refusal))
    }

    /// Tells what came of a restore.
    ///
    /// # Errors
    /// [`AgentError`]; the agent notices by itself too.
    pub async fn restored(&self, request: &RestoredRequest) -> Result<(), AgentError> {
        within(PATIENCE, self.client.restored(context(PATIENCE), request)).await?;
        Ok(())
    }

    /// What the agent holds.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn report(&self) -> Result<ReportResponse, AgentError> {
        let request = ReportRequest::new();
        within(PATIENCE, self.client.report(context(PATIENCE), &request)).await
    }
}

fn context(limit: Duration) -> context::Context {
    context::with_duration(limit)
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T, AgentError> {
    let asked = Instant::now();
    match timeout(limit, call).await {
        Ok(Ok(answer)) => Ok(answer),
        // ttrpc counts too, and has no error of its own for it.
        Ok(Err(_)) if asked.elapsed() >= limit => Err(AgentError::Timeout(limit)),
        Ok(Err(e)) => Err(AgentError::Refused(e.to_string())),
        Err(_) => Err(AgentError::Timeout(limit)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{BufRead as _, BufReader},
        os::unix::{fs::PermissionsExt, process::CommandExt as _},
        process::{Command, Stdio},
    };

    use super::*;

    /// Listens where it is told until its input ends.
    const LISTENER: &str = "import socket, sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
print('listens', flush=True)
sys.stdin.read()";

    /// What comes of a connection to a socket that is served by user `uid`.
    fn connect(uid: u32) -> Result<Agent, AgentError> {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let socket = dir.path().join("s");
        let mut listener = Command::new("python3")
            .args(["-c", LISTENER])
            .arg(&socket)
            .uid(uid)
            .gid(uid)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut words = BufReader::new(listener.stdout.take().unwrap());
        words.read_line(&mut said).unwrap();
        assert_eq!(said, "listens\n");
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        let connected = runtime.block_on(Agent::connect(&socket));
        drop(listener.stdin.take());
        listener.wait().unwrap();
        connected
    }

    #[test]
    #[ignore = "needs root, and python3"]
    fn only_root_is_asked() {
        assert!(connect(0).is_ok());
        let stranger = connect(65534).err();
        assert!(matches!(stranger, Some(AgentError::Stranger(65534))));
    }
}
