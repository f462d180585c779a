// SPDX-License-Identifier: Apache-2.0

//! A connection to a sandbox: HTTP/1.1, or HTTP/2 for gRPC, which needs its trailers.

use hyper::{
    Request, Response, Uri, Version,
    body::Incoming,
    client::conn::{http1, http2},
    header::{self, HeaderMap},
    http::uri::{PathAndQuery, Scheme},
    rt::Executor,
};
use hyper_util::rt::TokioIo;
use kiln_http::{BUFFER, Timed, WINDOW};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;

/// What is spoken to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    One,
    Two,
}

impl Protocol {
    /// What a request needs. A sandbox's server need not know HTTP/2, which a client cannot know,
    /// so that it gets HTTP/1.1 unless it is asked for gRPC. gRPC-Web goes by HTTP/1.1.
    pub(crate) fn of(version: Version, headers: &HeaderMap) -> Self {
        let kind = headers.get(header::CONTENT_TYPE).map(|v| v.as_bytes());
        let rest = kind.and_then(|k| k.strip_prefix(b"application/grpc"));
        let is_grpc = matches!(rest, Some([] | [b'+' | b';', ..]));
        match version == Version::HTTP_2 && is_grpc {
            true => Self::Two,
            false => Self::One,
        }
    }

    /// Gives a request the form that the protocol wants. Its `Host` is set.
    pub(crate) fn form(self, request: &mut Request<Incoming>) {
        let path = request.uri().path_and_query().cloned();
        let path = path.unwrap_or_else(|| PathAndQuery::from_static("/"));
        let (uri, version) = match self {
            Self::One => (Uri::from(path), Version::HTTP_11),
            Self::Two => {
                let host = request.headers_mut().remove(header::HOST);
                let mut parts = hyper::http::uri::Parts::default();
                parts.scheme = Some(Scheme::HTTP);
                parts.authority = host.and_then(|h| h.as_bytes().try_into().ok());
                parts.path_and_query = Some(path);
                (Uri::from_parts(parts).unwrap_or_default(), Version::HTTP_2)
            }
        };
        *request.uri_mut() = uri;
        *request.version_mut() = version;
    }
}

/// A connection to a sandbox.
pub(crate) struct Connection {
    sender: Sender,
    open: Open,
}

/// A connection lasts until this is dropped, whatever a sandbox does not read.
pub(crate) type Open = DropGuard;

enum Sender {
    One(http1::SendRequest<Incoming>),
    Two(http2::SendRequest<Incoming>),
}

impl Connection {
    pub(crate) async fn new(stream: Timed<TcpStream>, protocol: Protocol) -> hyper::Result<Self> {
        match protocol {
            Protocol::One => Self::one(stream).await,
            Protocol::Two => Self::two(stream).await,
        }
    }

    async fn one(stream: Timed<TcpStream>) -> hyper::Result<Self> {
        let handshake = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await?;
        Ok(Self {
            sender: Sender::One(sender),
            open: run(connection.with_upgrades(), CancellationToken::new()),
        })
    }

    async fn two(stream: Timed<TcpStream>) -> hyper::Result<Self> {
        let end = CancellationToken::new();
        let handshake = http2::Builder::new(Tasks(end.clone()))
            .initial_max_send_streams(1)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_header_list_size(BUFFER as u32)
            .max_send_buf_size(BUFFER)
            .handshake(TokioIo::new(stream));
        let (sender, connection) = handshake.await?;
        Ok(Self {
            sender: Sender::Two(sender),
            open: run(connection, end),
        })
    }

    /// Sends the connection's only request. The connection lasts as long as what is returned with
    /// the answer.
    pub(crate) async fn send(
        self,
        request: Request<Incoming>,
    ) -> hyper::Result<(Response<Incoming>, Open)> {
        let response = match self.sender {
            Sender::One(mut sender) => sender.send_request(request).await,
            Sender::Two(mut sender) => sender.send_request(request).await,
        };
        Ok((response?, self.open))
    }
}

/// Starts what a connection of HTTP/2 does beside itself.
#[derive(Clone)]
struct Tasks(CancellationToken);

impl<F> Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        tokio::spawn(self.0.clone().run_until_cancelled_owned(future));
    }
}

fn run(
    connection: impl Future<Output = hyper::Result<()>> + Send + 'static,
    end: CancellationToken,
) -> Open {
    let task = async move {
        if let Err(e) = connection.await {
            debug!("connection to a sandbox: {e}");
        }
    };
    Tasks(end.clone()).execute(task);
    end.drop_guard()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_grpc_goes_by_http2() {
        for (version, kind, wanted) in [
            (Version::HTTP_2, "application/grpc", Protocol::Two),
            (Version::HTTP_2, "application/grpc+proto", Protocol::Two),
            (Version::HTTP_2, "application/grpc;x=1", Protocol::Two),
            (Version::HTTP_11, "application/grpc", Protocol::One),
            (Version::HTTP_2, "application/grpc-web", Protocol::One),
            (Version::HTTP_2, "application/grpc-web+proto", Protocol::One),
            (Version::HTTP_2, "application/json", Protocol::One),
            (Version::HTTP_2, "", Protocol::One),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
            assert_eq!(Protocol::of(version, &headers), wanted, "{kind}");
        }
    }
}
