// SPDX-License-Identifier: Apache-2.0

//! Connections of clients.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use crate::body::Body;

/// How long a client may take for the head of a request, and between two of them.
const HEAD: Duration = Duration::from_secs(30);
/// Largest head, and most headers, of a request.
const HEAD_BYTES: usize = 32 << 10;
const HEADERS: usize = 100;
/// Most bytes of a request that wait for the sandbox.
const BUFFER: usize = 64 << 10;
/// Pause when there are no descriptors left: some will be free again.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// A listener and its connections.
pub struct Serving {
    connections: TaskTracker,
}

impl Serving {
    /// Waits until all connections have ended, for `most` at most. Says whether they have.
    pub async fn ended(&self, most: Duration) -> bool {
        self.connections.close();
        timeout(most, self.connections.wait()).await.is_ok()
    }
}

/// Has `answer` answer what comes on `listener`, on `most` connections at the same time, until
/// `stop`; requests that have begun by then are still answered.
pub fn serve<F, A>(
    listener: TcpListener,
    most: usize,
    stop: CancellationToken,
    answer: F,
) -> Serving
where
    F: Fn(Request<Incoming>, IpAddr) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<Body>> + Send + 'static,
{
    let connections = TaskTracker::new();
    let tracker = connections.clone();
    connections.spawn(async move {
        let room = Arc::new(Semaphore::new(most));
        loop {
            // Who finds no room waits in the kernel's queue. Never closed, so that it is no error.
            let Ok(place) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            let (stream, from) = tokio::select! {
                accepted = accept(&listener) => accepted,
                () = stop.cancelled() => return,
            };
            // A listener of IPv6 writes IPv4 in its own way, which sandboxes need not read.
            let from = from.ip().to_canonical();
            let connection = connection(stream, from, stop.clone(), answer.clone());
            tracker.spawn(async move {
                connection.await;
                drop(place);
            });
        }
    });
    Serving { connections }
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(e) => {
                debug!("accept: {e}");
                sleep(EXHAUSTED).await;
            }
        }
    }
}

async fn connection<F, A>(stream: TcpStream, from: IpAddr, stop: CancellationToken, answer: F)
where
    F: Fn(Request<Incoming>, IpAddr) -> A,
    A: Future<Output = Response<Body>>,
{
    // Small answers are not held back for larger ones; without it all still works.
    stream.set_nodelay(true).ok();
    let service = service_fn(|request| {
        let response = answer(request, from);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_headers(HEADERS)
        .max_header_size(HEAD_BYTES)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        debug!("{from}: {e}");
    }
}
