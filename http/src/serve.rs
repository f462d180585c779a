// SPDX-License-Identifier: Apache-2.0

//! A listener, and its connections.

use std::{error::Error, future::poll_fn, net::SocketAddr, sync::Arc, task::Poll, time::Duration};

use hyper::{
    Request, Response,
    body::{Body, Incoming},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use crate::{
    bounds::Bounds,
    client::{Caller, Client},
    connection::Connection,
    places::{Counts, GRACE, Places, Refused},
    tls::Tls,
};

/// Pause when there are no descriptors left: some will be free again.
const EXHAUSTED: Duration = Duration::from_millis(100);
/// Clients at a time that are told why they have no place; others find their connection closed.
const REFUSALS: usize = 64;

/// An address to listen on.
pub struct Listener {
    /// Its socket.
    pub socket: TcpListener,
    /// Its TLS, if it has some.
    pub tls: Option<Arc<Tls>>,
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

/// Has `answer` answer what comes on `listeners`, within `bounds`, until `stop`; requests that have
/// begun by then are still answered.
///
/// Who comes while there is no place waits for one. Those for whom there is none in time are told
/// so by status 503, and those whose address has too many by 429. Connections of HTTP/2 need a
/// place for each request that they have at the same time; without one, a request is refused in
/// the way of that protocol (REFUSED_STREAM).
pub fn serve<F, A, B>(
    listeners: Vec<Listener>,
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
        let refusals = Refusals::new(tracker.clone());
        loop {
            let next = async {
                let (stream, from, tls) = accept(&listeners).await;
                // A listener of IPv6 writes IPv4 in its own way, which sandboxes need not read.
                let address = from.ip().to_canonical();
                (stream, address, tls, places.take(address).await)
            };
            let (stream, address, tls, place) = tokio::select! {
                next = next => next,
                () = stop.cancelled() => return,
            };
            let has_tls = tls.is_some();
            match place {
                Ok(place) => {
                    let connection = Connection {
                        caller: Caller { address, has_tls },
                        place,
                        bounds,
                        stop: stop.clone(),
                        answer: answer.clone(),
                    };
                    tracker.spawn(connection.serve(stream, tls));
                }
                Err(refused) => {
                    debug!("{address}: {refused:?}");
                    // A client of TLS could not read it.
                    if !has_tls {
                        refusals.tell(stream, refused);
                    }
                }
            }
        }
    });
    Serving { connections }
}

async fn accept(listeners: &[Listener]) -> (TcpStream, SocketAddr, Option<Arc<Tls>>) {
    loop {
        let accepted = poll_fn(|cx| {
            for listener in listeners {
                if let Poll::Ready(accepted) = listener.socket.poll_accept(cx) {
                    return Poll::Ready((accepted, listener.tls.clone()));
                }
            }
            Poll::Pending
        });
        match accepted.await {
            (Ok((stream, from)), tls) => return (stream, from, tls),
            (Err(e), _) => {
                debug!("accept: {e}");
                sleep(EXHAUSTED).await;
            }
        }
    }
}

/// Clients that are told why they have no place.
struct Refusals {
    room: Arc<Semaphore>,
    tracker: TaskTracker,
}

impl Refusals {
    fn new(tracker: TaskTracker) -> Self {
        let room = Arc::new(Semaphore::new(REFUSALS));
        Self { room, tracker }
    }

    fn tell(&self, stream: TcpStream, refused: Refused) {
        if let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() {
            self.tracker.spawn(async move {
                refuse(stream, refused).await;
                drop(permit);
            });
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
