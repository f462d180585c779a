// SPDX-License-Identifier: Apache-2.0

//! A client of containerd's CRI service (`runtime.v1`) on its UNIX socket.

use std::{path::Path, time::Duration};

use anyhow::Result;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// The messages and clients that `build.rs` generates.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

use v1::{image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient};

/// Longest a single call may take: as long as a kubelet waits for its longest.
const DEADLINE: Duration = Duration::from_secs(240);

/// Both CRI services of one containerd. It connects when it is used, and again when containerd
/// comes back.
#[derive(Debug, Clone)]
pub struct Cri {
    channel: Channel,
}

impl Cri {
    /// A client of the containerd that listens, or will, at `socket`.
    ///
    /// # Errors
    /// When the deadline cannot be set.
    pub fn new(socket: &Path) -> Result<Self> {
        let socket = socket.to_owned();
        let connector = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // HTTP wants a name; the connector does not look at it.
        let channel = Endpoint::try_from("http://containerd")?
            .timeout(DEADLINE)
            .connect_with_connector_lazy(connector);
        Ok(Self { channel })
    }

    /// Pods and containers.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// Images.
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }
}
