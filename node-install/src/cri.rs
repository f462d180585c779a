// SPDX-License-Identifier: Apache-2.0

//! Handlers of Pods, as the containerd that runs has them: it says so over CRI.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use tonic::{
    Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

/// How long containerd may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// `Status` of CRI's service `runtime.v1.RuntimeService`.
const STATUS: PathAndQuery = PathAndQuery::from_static("/runtime.v1.RuntimeService/Status");

/// The part of an answer that has containerd's configuration, which is JSON.
const CONFIG: &str = "config";

/// Largest answer that is read, in bytes.
const ANSWER_LIMIT: usize = 16 << 20;

/// `runtime.v1.StatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {
    #[prost(bool, tag = "1")]
    verbose: bool,
}

/// `runtime.v1.StatusResponse`, as far as it is looked at.
#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(map = "string, string", tag = "2")]
    info: std::collections::HashMap<String, String>,
}

/// Why containerd does not say which handlers it has.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    /// It cannot be asked there.
    #[error("{} is no socket that can be asked: {source}", path.display())]
    Socket {
        /// Where it was to be asked.
        path: PathBuf,
        /// Why not.
        source: tonic::transport::Error,
    },
    /// It does not answer, or with an error.
    #[error("containerd does not answer over CRI: {0}")]
    Call(#[from] Box<Status>),
    /// Its answer has no configuration.
    #[error("containerd does not say over CRI how it is configured")]
    Silent,
    /// Its answer is in another form.
    #[error("containerd says over CRI how it is configured, in another form: {0}")]
    Form(#[from] serde_json::Error),
}

/// A handler of Pods.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Runtime {
    /// What runs the Pods, as containerd names it.
    pub(crate) runtime_type: String,
    /// The shim; empty where containerd looks for one by `runtime_type`.
    pub(crate) runtime_path: PathBuf,
    pub(crate) options: Option<Options>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Options {
    #[serde(rename = "ConfigPath")]
    config_path: PathBuf,
}

impl Runtime {
    /// The runtime's configuration that the handler names; empty where it names none.
    pub(crate) fn config(&self) -> &Path {
        self.options
            .as_ref()
            .map_or(Path::new(""), |o| &o.config_path)
    }
}

/// containerd's handlers by name.
pub(crate) type Runtimes = BTreeMap<String, Runtime>;

#[derive(Deserialize)]
struct Configuration {
    containerd: Containerd,
}

#[derive(Deserialize)]
struct Containerd {
    #[serde(default)]
    runtimes: Runtimes,
}

/// CRI of the containerd that listens at a socket. It connects when it is asked, and again when
/// containerd was started anew.
#[derive(Debug, Clone)]
pub(crate) struct Cri {
    channel: Channel,
}

impl Cri {
    /// Of the one at `socket`. To be called on a runtime.
    pub(crate) fn new(socket: &Path) -> Result<Self, CriError> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
        let endpoint = endpoint.map_err(|source| CriError::Socket {
            path: socket.to_owned(),
            source,
        })?;
        Ok(Self {
            channel: endpoint
                .timeout(ANSWER)
                .connect_timeout(ANSWER)
                .connect_lazy(),
        })
    }

    /// The handlers that containerd has now.
    pub(crate) async fn runtimes(&self) -> Result<Runtimes, CriError> {
        let mut client = Grpc::new(self.channel.clone()).max_decoding_message_size(ANSWER_LIMIT);
        let unavailable = |e: tonic::transport::Error| Box::new(Status::from_error(e.into()));
        client.ready().await.map_err(unavailable)?;
        let request = Request::new(StatusRequest { verbose: true });
        let codec = ProstCodec::<StatusRequest, StatusResponse>::default();
        let answer = client.unary(request, STATUS, codec).await;
        let mut info = answer.map_err(Box::new)?.into_inner().info;
        parse(&info.remove(CONFIG).ok_or(CriError::Silent)?)
    }
}

/// The handlers in a configuration as containerd writes it in an answer.
fn parse(config: &str) -> Result<Runtimes, CriError> {
    let config: Configuration = serde_json::from_str(config)?;
    Ok(config.containerd.runtimes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handlers_are_read_as_containerd_writes_them() {
        let text = r#"{"containerd": {"defaultRuntimeName": "runc", "runtimes": {
            "runc": {"runtimeType": "io.containerd.runc.v2", "runtimePath": "", "options": null},
            "gvisor": {"runtimeType": "io.containerd.kiln.v2", "runtimePath": "/opt/kiln/bin/shim",
                "options": {"TypeUrl": "t", "ConfigPath": "/etc/kiln/runsc.toml"}}}}}"#;
        let found = parse(text).unwrap();
        assert_eq!(found["runc"].config(), Path::new(""));
        let ours = &found["gvisor"];
        assert_eq!(ours.runtime_path, Path::new("/opt/kiln/bin/shim"));
        assert_eq!(ours.config(), Path::new("/etc/kiln/runsc.toml"));
        assert!(parse("{}").is_err());
    }

    #[tokio::test]
    async fn nobody_at_the_socket_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let cri = Cri::new(&dir.path().join("c.sock")).unwrap();
        assert!(matches!(cri.runtimes().await, Err(CriError::Call(_))));
    }
}
