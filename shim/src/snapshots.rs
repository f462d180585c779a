// SPDX-License-Identifier: Apache-2.0

//! The service for the node's agent (`kiln.shim.v1.Snapshots`): requests in, calls of [`Pod`],
//! replies out.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::{Result as RpcResult, r#async::TtrpcContext};
use kiln_agent_api::api::{
    CheckpointRequest, CheckpointResponse, FinishRequest, FinishResponse, Snapshots,
};

use crate::{
    error::{Error, Result},
    pod::{Image, Pod},
};

/// The service of one Pod.
pub(crate) struct SnapshotService {
    pod: Arc<Pod>,
}

impl SnapshotService {
    /// Serves `pod`.
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

/// Runs `work` to its end, whatever becomes of the client.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> RpcResult<T> {
    let done = tokio::spawn(work).await;
    let lost = |e: tokio::task::JoinError| Error::Io {
        what: "run the call".to_owned(),
        source: e.into(),
    };
    Ok(done.map_err(lost)??)
}

#[async_trait]
impl Snapshots for SnapshotService {
    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointRequest,
    ) -> RpcResult<CheckpointResponse> {
        let pod = Arc::clone(&self.pod);
        detached(async move {
            let hold = Duration::from_millis(request.hold_milliseconds);
            let image = Image {
                dir: request.dir.into(),
                room: request.room_bytes,
            };
            pod.snapshot(&request.pod_uid, image, hold).await
        })
        .await
    }

    async fn finish(&self, _: &TtrpcContext, request: FinishRequest) -> RpcResult<FinishResponse> {
        let pod = Arc::clone(&self.pod);
        detached(async move {
            pod.finish(&request.pod_uid, request.stop).await?;
            Ok(FinishResponse::new())
        })
        .await
    }
}
