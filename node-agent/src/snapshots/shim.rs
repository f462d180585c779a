// SPDX-License-Identifier: Apache-2.0

//! Client of the shim of a Pod.

use std::{io, path::Path, time::Duration};

use kiln_agent_api::{
    api::{CheckpointRequest, CheckpointResponse, FinishRequest, SnapshotsClient},
    find_socket,
};
use kiln_host::blocking;
use tokio::net::UnixStream;
use ttrpc::{r#async::Client, r#async::transport::Socket, context};

/// How long a checkpoint may take. The shim ends one of a runtime that hangs before.
const CHECKPOINT: Duration = Duration::from_secs(300);

/// How long a Pod may stay paused after its checkpoint: its emptyDirs are copied then.
const HOLD: Duration = Duration::from_secs(120);

/// How long other calls may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Failure to have a shim do something.
#[derive(Debug, thiserror::Error)]
pub(super) enum ShimError {
    /// No shim serves the Pod.
    #[error("find the shim of the Pod: {0}")]
    Absent(#[from] io::Error),
    /// The shim answered with an error.
    #[error("{0}")]
    Refused(String),
}

/// The shim of a Pod.
pub(super) struct Shim {
    client: SnapshotsClient,
    pod_uid: String,
}

impl Shim {
    /// Connects to the shim of the Pod `pod_uid`, which has left a link below `shims`.
    ///
    /// # Errors
    /// [`ShimError::Absent`].
    pub(super) async fn connect(shims: &Path, pod_uid: &str) -> Result<Self, ShimError> {
        let (shims, uid) = (shims.to_owned(), pod_uid.to_owned());
        let socket = blocking(move || find_socket(&shims, &uid)).await?;
        let stream = UnixStream::connect(&socket).await?;
        let uid = stream.peer_cred()?.uid();
        if uid != 0 {
            let message = format!("its socket is served by user {uid}");
            return Err(io::Error::other(message).into());
        }
        Ok(Self {
            client: SnapshotsClient::new(Client::new(Socket::new(stream))),
            pod_uid: pod_uid.to_owned(),
        })
    }

    /// Pauses the Pod and writes an image of it into `dir`, unless it uses more memory than `room`
    /// bytes. The Pod stays paused for two minutes
    /// at most.
    ///
    /// # Errors
    /// [`ShimError::Refused`]; the Pod goes on then.
    pub(super) async fn checkpoint(
        &self,
        dir: &Path,
        room: u64,
    ) -> Result<CheckpointResponse, ShimError> {
        let request = CheckpointRequest {
            pod_uid: self.pod_uid.clone(),
            dir: dir.to_string_lossy().into_owned(),
            room_bytes: room,
            hold_milliseconds: u64::try_from(HOLD.as_millis()).unwrap_or(u64::MAX),
            ..CheckpointRequest::default()
        };
        let context = context::with_duration(CHECKPOINT);
        let done = self.client.checkpoint(context, &request).await;
        done.map_err(refused)
    }

    /// Stops the Pod after its checkpoint, or lets it go on.
    ///
    /// # Errors
    /// [`ShimError::Refused`] if the Pod is not paused by a checkpoint, or goes on already.
    pub(super) async fn finish(&self, stop: bool) -> Result<(), ShimError> {
        let request = FinishRequest {
            pod_uid: self.pod_uid.clone(),
            stop,
            ..FinishRequest::default()
        };
        let context = context::with_duration(PATIENCE);
        let done = self.client.finish(context, &request).await;
        done.map(drop).map_err(refused)
    }
}

fn refused(error: ttrpc::Error) -> ShimError {
    ShimError::Refused(match error {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => other.to_string(),
    })
}
