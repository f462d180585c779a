// SPDX-License-Identifier: Apache-2.0

//! What the calls in a node's containerd took, by its own account: it sends a span for each to
//! an OpenTelemetry collector (containerd `docs/tracing.md`), which is played here.

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use http_body_util::{BodyExt, Empty};
use hyper::{
    Request, Response,
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::task::{JoinHandle, JoinSet};

use crate::netns::Netns;

/// How long a span takes to get here after its end, at most.
pub const DELAY: Duration = Duration::from_secs(1);

/// A call within containerd, or of containerd to a shim.
#[derive(Debug, Clone)]
pub struct Span {
    /// What was called, such as `containerd.task.v3.Task/Create`.
    pub name: String,
    /// When.
    pub start: SystemTime,
    /// For how long.
    pub took: Duration,
}

/// The spans that a containerd has sent.
#[derive(Debug)]
pub struct Spans {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Span>>>,
    server: JoinHandle<()>,
}

impl Spans {
    /// Receives them on the loopback of `netns`.
    pub(crate) fn receive(netns: &Netns) -> Result<Self> {
        let listener = netns.run(|| {
            let listener = TcpListener::bind("127.0.0.1:0").context("listen for spans")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let address = listener.local_addr()?;
        let seen = Arc::default();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        Ok(Self {
            address,
            seen: Arc::clone(&seen),
            server: tokio::spawn(serve(listener, seen)),
        })
    }

    /// What makes a containerd send them here.
    pub(crate) fn environment(&self) -> [(&'static str, String); 3] {
        [
            (
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                format!("http://{}", self.address),
            ),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf".to_owned()),
            (
                "OTEL_BSP_SCHEDULE_DELAY",
                (DELAY.as_millis() / 4).to_string(),
            ),
        ]
    }

    /// Those that began between two times. They are complete [`DELAY`] after the last has ended.
    pub fn between(&self, from: SystemTime, until: SystemTime) -> Vec<Span> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let within = seen.iter().filter(|s| from <= s.start && s.start < until);
        within.cloned().collect()
    }
}

impl Drop for Spans {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve(listener: tokio::net::TcpListener, seen: Arc<Mutex<Vec<Span>>>) {
    // Owns the connections: they end with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let seen = Arc::clone(&seen);
        let service = service_fn(move |request: Request<Incoming>| {
            let seen = Arc::clone(&seen);
            async move {
                if let Ok(body) = request.into_body().collect().await
                    && let Ok(export) = Export::decode(body.to_bytes())
                {
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.extend(export.spans());
                }
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        connections.spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

/// `ExportTraceServiceRequest` of OpenTelemetry's protocol 1.0
/// (`opentelemetry/proto/collector/trace/v1/trace_service.proto` and `trace/v1/trace.proto`), as far
/// as it is needed.
#[derive(Clone, PartialEq, Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resource_spans: Vec<ResourceSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, repeated, tag = "2")]
    spans: Vec<WireSpan>,
}

#[derive(Clone, PartialEq, Message)]
struct WireSpan {
    #[prost(string, tag = "5")]
    name: String,
    #[prost(fixed64, tag = "7")]
    start_unix_nanoseconds: u64,
    #[prost(fixed64, tag = "8")]
    end_unix_nanoseconds: u64,
}

impl Export {
    fn spans(self) -> impl Iterator<Item = Span> {
        let scopes = self.resource_spans.into_iter().flat_map(|r| r.scope_spans);
        scopes.flat_map(|s| s.spans).map(|span| {
            let (start, end) = (span.start_unix_nanoseconds, span.end_unix_nanoseconds);
            Span {
                name: span.name,
                start: UNIX_EPOCH + Duration::from_nanos(start),
                took: Duration::from_nanos(end.saturating_sub(start)),
            }
        })
    }
}
