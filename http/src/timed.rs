// SPDX-License-Identifier: Apache-2.0

//! A stream that fails when nothing has moved on it for too long.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// A stream whose reads and writes fail with `TimedOut` when neither has moved a byte for some
/// time. It has to be used by one task at a time.
pub struct Timed<S> {
    stream: S,
    most: Duration,
    last: Instant,
    over: Pin<Box<Sleep>>,
}

impl<S> Timed<S> {
    /// `stream`, on which nothing may move for `most` at most.
    pub fn new(stream: S, most: Duration) -> Self {
        Self {
            stream,
            most,
            last: Instant::now(),
            over: Box::pin(sleep(most)),
        }
    }

    /// The outcome of a read or write, or an error when it is too long since the last one.
    fn look<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.last = Instant::now();
            return done;
        }
        // The timer is set again when it fires only, and not for every read and write.
        while self.over.as_mut().poll(cx).is_ready() {
            let until = self.last + self.most;
            if until <= Instant::now() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            self.over.as_mut().reset(until);
        }
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        this.look(cx, read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        this.look(cx, written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, slices);
        this.look(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::{advance, timeout},
    };

    use super::*;

    const MOST: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_stream_lasts_as_long_as_either_side_sends() {
        let (mut other, stream) = duplex(64);
        let mut stream = Timed::new(stream, MOST);
        for _ in 0..5 {
            advance(MOST * 2 / 3).await;
            other.write_all(b"in").await.unwrap();
            assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 2);
            advance(MOST * 2 / 3).await;
            stream.write_all(b"out").await.unwrap();
        }
        let start = Instant::now();
        let error = stream.read(&mut [0; 8]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() >= MOST && start.elapsed() < MOST * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_is_given_up() {
        let (_other, stream) = duplex(4);
        let mut stream = Timed::new(stream, MOST);
        let written = timeout(MOST * 2, stream.write_all(b"too much")).await;
        let error = written.expect("no end").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
