// SPDX-License-Identifier: Apache-2.0

//! The first bytes of a connection, which say what version of HTTP it has.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

/// What a client of HTTP/2 sends first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A version of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    One,
    Two,
}

/// A stream from which some bytes were read already; they are read again.
pub(crate) struct Reread<S> {
    read: Bytes,
    stream: S,
}

/// Reads as much of `stream` as says what version it has.
pub(crate) async fn version<S>(mut stream: S) -> io::Result<(Version, Reread<S>)>
where
    S: AsyncRead + Unpin,
{
    let mut read = [0; PREFACE.len()];
    let mut length = 0;
    while length < PREFACE.len() && PREFACE.starts_with(&read[..length]) {
        match stream.read(&mut read[length..]).await? {
            0 => break,
            more => length += more,
        }
    }
    let version = match read[..length] == *PREFACE {
        true => Version::Two,
        false => Version::One,
    };
    let read = Bytes::copy_from_slice(&read[..length]);
    Ok((version, Reread { read, stream }))
}

impl<S: AsyncRead + Unpin> AsyncRead for Reread<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.read.has_remaining() {
            let count = this.read.len().min(buffer.remaining());
            buffer.put_slice(&this.read.split_to(count));
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Reread<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, slices)
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
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    async fn opened(pieces: &[&[u8]]) -> (Version, Vec<u8>) {
        let (mut client, stream) = duplex(1024);
        let sends = async {
            for piece in pieces {
                client.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        let reads = async {
            let (version, mut stream) = version(stream).await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            (version, all)
        };
        tokio::join!(sends, reads).1
    }

    #[tokio::test]
    async fn the_first_bytes_say_the_version_and_are_read_again() {
        for (pieces, wanted) in [
            (&[PREFACE, b"frames"][..], Version::Two),
            (&[b"PRI * HT", b"TP/2.0\r\n\r\nSM\r\n\r\n"], Version::Two),
            (&[b"GET / HTTP/1.1\r\n\r\n"], Version::One),
            (&[b"PRO", b"PFIND / HTTP/1.1\r\n\r\n"], Version::One),
            (&[b"PRI * HTTP/2.0\r\n\r\nGET / "], Version::One),
            (&[b"PR"], Version::One),
            (&[], Version::One),
        ] {
            let (version, all) = opened(pieces).await;
            assert_eq!(version, wanted, "{pieces:?}");
            assert_eq!(all, pieces.concat());
        }
    }
}
