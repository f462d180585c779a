// SPDX-License-Identifier: Apache-2.0

//! The body of an answer: the router's own words, or a sandbox's as they come.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::{connection::Open, metrics::InFlight};

/// What is sent to a client.
pub struct Body {
    source: Source,
    /// Ends with the body, however that ends.
    in_flight: Option<InFlight>,
}

enum Source {
    Text(Full<Bytes>),
    Sandbox(Box<Stream>),
}

/// A sandbox's answer.
struct Stream {
    incoming: Incoming,
    /// How long nothing may come, and when that is over.
    patience: Duration,
    over: Pin<Box<Sleep>>,
    /// Closes the connection to the sandbox when the client has gone.
    _connection: Open,
}

impl Body {
    pub(crate) fn text(text: impl Into<Bytes>) -> Self {
        Self {
            source: Source::Text(Full::new(text.into())),
            in_flight: None,
        }
    }

    /// What comes over `connection`, as long as something comes within `patience`.
    pub(crate) fn stream(incoming: Incoming, connection: Open, patience: Duration) -> Self {
        let stream = Stream {
            incoming,
            patience,
            over: Box::pin(tokio::time::sleep(patience)),
            _connection: connection,
        };
        Self {
            source: Source::Sandbox(Box::new(stream)),
            in_flight: None,
        }
    }

    pub(crate) fn counted(mut self, in_flight: InFlight) -> Self {
        self.in_flight = Some(in_flight);
        self
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match &mut self.get_mut().source {
            Source::Text(text) => Pin::new(text)
                .poll_frame(cx)
                .map_err(|never| match never {}),
            Source::Sandbox(stream) => stream.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Text(text) => text.is_end_stream(),
            Source::Sandbox(stream) => stream.incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Text(text) => text.size_hint(),
            Source::Sandbox(stream) => stream.incoming.size_hint(),
        }
    }
}

impl Stream {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.incoming).poll_frame(cx) {
            self.over.as_mut().reset(Instant::now() + self.patience);
            return Poll::Ready(frame.map(|f| f.map_err(io::Error::other)));
        }
        ready!(self.over.as_mut().poll(cx));
        Poll::Ready(Some(Err(io::ErrorKind::TimedOut.into())))
    }
}
