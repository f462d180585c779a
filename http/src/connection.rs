// SPDX-License-Identifier: Apache-2.0

//! One connection of a client: HTTP/1.1, or HTTP/2.

use std::{
    convert::Infallible,
    error::Error,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use h2::Reason;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    bounds::{BUFFER, Bounds},
    client::{Caller, Client},
    opening::{Reread, Version, version},
    places::{Activity, GRACE, Hold, Place},
    streams::Streams,
    timed::Timed,
    tls::Tls,
};

/// Most headers of a request of HTTP/1.1.
const HEADERS: usize = 100;

/// Requests that a connection of HTTP/2 may have at the same time.
pub const STREAMS: u32 = 100;

/// How much of a request's body may come over HTTP/2 before it is read, in bytes. As much as over
/// HTTP/1.1, where it is the socket's buffer.
pub const WINDOW: u32 = 64 << 10;

/// Requests of HTTP/2 that may be given up before they were looked at.
const RESETS: usize = 20;

/// Bytes that compress the heads of HTTP/2, for each direction.
const HEADER_TABLE: u32 = 4 << 10;

/// A connection that was accepted, and all that is to be known to serve it.
pub(crate) struct Connection<F> {
    pub(crate) caller: Caller,
    pub(crate) place: Arc<Place>,
    pub(crate) bounds: Bounds,
    pub(crate) stop: CancellationToken,
    pub(crate) answer: F,
}

type Fault = Box<dyn Error + Send + Sync>;

impl<F, A, B> Connection<F>
where
    F: Fn(Request<Incoming>, Client) -> A + Send + Sync + 'static,
    A: Future<Output = Response<B>> + Send + 'static,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Fault>,
{
    /// Serves the connection on `stream` until it ends.
    pub(crate) async fn serve(self, stream: TcpStream, tls: Option<Arc<Tls>>) {
        // Small answers are not held back for larger ones; without it all still works.
        stream.set_nodelay(true).ok();
        let address = self.caller.address;
        let activity = Activity::new(&self.place);
        let stream = Timed::new(stream, self.bounds.idle);
        let served = match tls {
            None => self.open(activity, version(stream)).await,
            Some(tls) => {
                let accept = tls.accept(stream);
                let opening = async move { version(accept.await?).await };
                self.open(activity, opening).await
            }
        };
        if let Err(e) = served {
            debug!("{address}: {e}");
        }
    }

    /// Waits for the first bytes, and serves what version they are of.
    async fn open<S>(
        self,
        activity: Arc<Activity>,
        opening: impl Future<Output = std::io::Result<(Version, Reread<S>)>>,
    ) -> Result<(), Fault>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let opened = tokio::select! {
            opened = timeout(self.bounds.head, opening) => opened,
            () = activity.gives_way() => return Ok(()),
            () = self.stop.clone().cancelled_owned() => return Ok(()),
        };
        match opened?? {
            (Version::One, stream) => self.one(activity, stream).await,
            (Version::Two, stream) => self.two(activity, stream).await,
        }
    }

    async fn one<S>(self, activity: Arc<Activity>, stream: Reread<S>) -> Result<(), Fault>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (head, stop, busy) = (self.bounds.head, self.stop.clone(), Arc::clone(&activity));
        let service = service_fn(move |request| {
            let hold = Hold::new(&busy, Arc::clone(&self.place));
            let client = Client::new(self.caller, &hold);
            let response = (self.answer)(request, client);
            async move { Ok::<_, Infallible>(response.await.map(|body| Held { body, _hold: hold })) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(head)
            .max_headers(HEADERS)
            .max_buf_size(BUFFER)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let finish = http1::UpgradeableConnection::graceful_shutdown;
        let ends = activity.gives_way();
        drive(connection, finish, activity, ends, stop).await?;
        Ok(())
    }

    async fn two<S>(self, activity: Arc<Activity>, stream: Reread<S>) -> Result<(), Fault>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let streams = Streams::new(self.bounds.idle);
        let (bounds, stop) = (self.bounds, self.stop.clone());
        let (begun, busy) = (streams.clone(), Arc::clone(&activity));
        let service = service_fn(move |request| {
            let unanswered = begun.begin();
            let place = Place::for_request(&self.place);
            let response = place.map(|place| {
                let hold = Hold::new(&busy, place);
                let client = Client::new(self.caller, &hold);
                (hold, (self.answer)(request, client))
            });
            async move {
                // The client may send it again, and knows that nothing was done.
                let Ok((hold, response)) = response else {
                    unanswered.refused();
                    return Err(h2::Error::from(Reason::REFUSED_STREAM));
                };
                let response = response.await;
                unanswered.answered();
                Ok(response.map(|body| Held { body, _hold: hold }))
            }
        });
        let connection = http2::Builder::new(streams.clone())
            .timer(TokioTimer::new())
            .enable_connect_protocol()
            .max_concurrent_streams(STREAMS)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW * STREAMS)
            .max_header_list_size(BUFFER as u32)
            .header_table_size(HEADER_TABLE)
            .max_send_buf_size(BUFFER)
            .max_pending_accept_reset_streams(RESETS)
            .max_local_error_reset_streams(RESETS)
            .serve_connection(TokioIo::new(stream), service);
        let (gives_way, idle) = (
            activity.gives_way(),
            Arc::clone(&activity).idle(bounds.head),
        );
        let ends = async move {
            tokio::select! {
                () = gives_way => {}
                () = idle => {}
            }
        };
        let finish = http2::Connection::graceful_shutdown;
        tokio::select! {
            ended = drive(connection, finish, activity, ends, stop) => Ok(ended?),
            () = streams.flooded() => Err("gives up too many requests".into()),
        }
    }
}

/// Serves a connection until it ends, or has it `finish` when `ends` or `stop` says so. A request
/// that has come by then is still answered, but half of a head is not waited for.
async fn drive<C: Future<Output = hyper::Result<()>>>(
    connection: C,
    finish: impl FnOnce(Pin<&mut C>),
    activity: Arc<Activity>,
    ends: impl Future<Output = ()>,
    stop: CancellationToken,
) -> hyper::Result<()> {
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = &mut connection => return ended,
        () = ends => {}
        () = stop.cancelled_owned() => {}
    }
    finish(connection.as_mut());
    tokio::select! {
        ended = connection => ended,
        () = waits(activity) => Ok(()),
    }
}

/// Returns when a connection that should end has had no request for a moment.
async fn waits(activity: Arc<Activity>) {
    sleep(GRACE).await;
    activity.idle(GRACE).await;
}

/// An answer's body. Its connection has a request until it ends.
struct Held<B> {
    body: B,
    _hold: Arc<Hold>,
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
