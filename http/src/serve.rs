// SPDX-License-Identifier: Apache-2.0

//! A listener, and its connections.

use std::{
    convert::Infallible,
    error::Error,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use crate::{
    places::{Activity, Busy, Counts, GRACE, Place, Places, Refused},
    timed::Timed,
};

/// Size of hyper's buffers, in bytes, and so of the largest head of a request. For each direction a
/// connection has up to four of them: what was read, what is handed over, and what is to be written
/// with the piece that made it too much.
pub const BUFFER: usize = 16 << 10;
/// Most headers of a request.
const HEADERS: usize = 100;
/// Pause when there are no descriptors left: some will be free again.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// Clients at a time that are told why they have no place; others find their connection closed.
const REFUSALS: usize = 64;

/// How many connections a listener has, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at the same time.
    pub connections: usize,
    /// Connections of one client address at the same time.
    pub per_client: usize,
    /// How long a client may take for the head of a request, and between two of them.
    pub head: Duration,
    /// How long nothing may come from a client nor go to it, also after an upgrade.
    pub idle: Duration,
}

/// Who has sent a request.
#[derive(Clone)]
pub struct Client {
    /// Its address; IPv4 if it is one that IPv6 has written in its own way.
    pub address: IpAddr,
    /// The place of its connection. Who upgrades the connection keeps this until the end of it.
    pub place: Arc<Place>,
}

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

/// Has `answer` answer what comes on `listener`, within `bounds`, until `stop`; requests that have
/// begun by then are still answered.
///
/// Who comes while there is no place waits for one. Those for whom there is none in time are told
/// so by status 503, and those whose address has too many by 429.
pub fn serve<F, A, B>(
    listener: TcpListener,
    bounds: Bounds,
    counts: Counts,
    stop: CancellationToken,
    answer: F,
) -> Serving
where
    F: Fn(Request<Incoming>, Client) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<B>> + Send + 'static,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let connections = TaskTracker::new();
    let tracker = connections.clone();
    connections.spawn(async move {
        let places = Places::new(bounds.connections, bounds.per_client, counts);
        let refusals = Arc::new(Semaphore::new(REFUSALS));
        loop {
            let next = async {
                let (stream, from) = accept(&listener).await;
                // A listener of IPv6 writes IPv4 in its own way, which sandboxes need not read.
                let address = from.ip().to_canonical();
                (stream, address, places.take(address).await)
            };
            let (stream, address, place) = tokio::select! {
                next = next => next,
                () = stop.cancelled() => return,
            };
            match place {
                Ok(place) => {
                    let client = Client { address, place };
                    let connection =
                        connection(stream, client, bounds, stop.clone(), answer.clone());
                    tracker.spawn(connection);
                }
                Err(refused) => {
                    debug!("{address}: {refused:?}");
                    if let Ok(permit) = Arc::clone(&refusals).try_acquire_owned() {
                        tracker.spawn(async move {
                            refuse(stream, refused).await;
                            drop(permit);
                        });
                    }
                }
            }
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

async fn connection<F, A, B>(
    stream: TcpStream,
    client: Client,
    bounds: Bounds,
    stop: CancellationToken,
    answer: F,
) where
    F: Fn(Request<Incoming>, Client) -> A,
    A: Future<Output = Response<B>>,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    // Small answers are not held back for larger ones; without it all still works.
    stream.set_nodelay(true).ok();
    let activity = Activity::new(&client.place);
    let service = service_fn(|request| {
        let busy = activity.begin();
        let response = answer(request, client.clone());
        async move {
            let response = response.await;
            Ok::<_, Infallible>(response.map(|body| Held { body, _busy: busy }))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.head)
        .max_headers(HEADERS)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(Timed::new(stream, bounds.idle)), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = activity.gives_way() => {
            // A request that has just come is still answered, but half of a head is not waited for.
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = waits(&activity) => Ok(()),
            }
        }
    };
    if let Err(e) = ended {
        debug!("{}: {e}", client.address);
    }
}

/// Returns when a connection that should give way has no request.
async fn waits(activity: &Activity) {
    loop {
        sleep(GRACE).await;
        if activity.is_waiting() {
            return;
        }
    }
}

/// Says why there is no place. The request is read as far as it comes in a moment, because the
/// answer is lost if a connection is closed with something unread.
async fn refuse(mut stream: TcpStream, refused: Refused) {
    let (status, detail) = match refused {
        Refused::Client => (
            "429 Too Many Requests",
            "Too many connections from this address.",
        ),
        Refused::Full => ("503 Service Unavailable", "Too many connections."),
    };
    let body = format!(r#"{{"detail":"{detail}"}}"#);
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Retry-After: 1\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    let told = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        let mut unread = [0; 1024];
        while stream.read(&mut unread).await? > 0 {}
        std::io::Result::Ok(())
    };
    if let Ok(Err(e)) = timeout(GRACE, told).await {
        debug!("refusal: {e}");
    }
}

/// An answer's body. Its connection has a request until it ends.
struct Held<B> {
    body: B,
    _busy: Busy,
}

impl<B: Body + Unpin> Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
