// SPDX-License-Identifier: Apache-2.0

//! WebSockets (RFC 6455): over HTTP/2 (RFC 8441) as over HTTP/1.1, and their end.
//!
//! A sandbox is always asked by HTTP/1.1. What goes through is copied as it comes. When the router
//! ends, both sides get a Close frame between two others.

use std::{io, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hyper::{
    Method, Request,
    ext::Protocol,
    header::{HeaderMap, HeaderName, HeaderValue},
    http::Extensions,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::headers;

/// Bytes that are copied at a time.
const PIECE: usize = 8 << 10;

/// How long a frame that has begun may take to end when the router does.
const REST: Duration = Duration::from_secs(3);

/// How long is waited for the other side's own Close.
const REPLY: Duration = Duration::from_secs(1);

/// A Close frame with status 1001, going away, for a client.
const TO_CLIENT: &[u8] = &[0x88, 2, 0x03, 0xe9];
/// The same for a server: masked, by zeros.
const TO_SERVER: &[u8] = &[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9];

const KEY: HeaderName = HeaderName::from_static("sec-websocket-key");
const ACCEPT: HeaderName = HeaderName::from_static("sec-websocket-accept");

/// Whether a request of HTTP/2 opens a WebSocket.
pub(crate) fn is_extended(method: &Method, extensions: &Extensions) -> bool {
    let protocol = extensions.get::<Protocol>();
    *method == Method::CONNECT && protocol.is_some_and(|p| p.as_ref() == b"websocket")
}

/// Makes a request of HTTP/2 that opens a WebSocket one of HTTP/1.1.
pub(crate) fn to_sandbox<B>(request: &mut Request<B>) {
    *request.method_mut() = Method::GET;
    let key = STANDARD.encode(rand::random::<[u8; 16]>());
    let headers = request.headers_mut();
    headers::upgrade(headers);
    if let Ok(key) = HeaderValue::from_str(&key) {
        headers.insert(KEY, key);
    }
}

/// Makes the headers of a sandbox's answer those of one of HTTP/2.
pub(crate) fn to_client(headers: &mut HeaderMap) {
    headers.remove(ACCEPT);
}

/// Copies between both sides of a WebSocket until one of them ends, or both have been told that
/// the router does.
pub(crate) async fn copy<C, S>(client: C, sandbox: S, stop: &CancellationToken) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (from_client, to_client) = split(client);
    let (from_sandbox, to_sandbox) = split(sandbox);
    let copied = async {
        tokio::try_join!(
            copy_one(from_client, to_sandbox, TO_SERVER, stop),
            copy_one(from_sandbox, to_client, TO_CLIENT, stop),
        )
    };
    let late = async {
        stop.cancelled().await;
        sleep(REST).await;
    };
    tokio::select! {
        copied = copied => copied.map(drop),
        () = late => Ok(()),
    }
}

async fn copy_one(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    close: &[u8],
    stop: &CancellationToken,
) -> io::Result<()> {
    let mut frames = Frames::default();
    let mut piece = vec![0; PIECE];
    loop {
        let count = tokio::select! {
            biased;
            () = stop.cancelled(), if frames.is_between() => break,
            count = from.read(&mut piece) => count?,
        };
        if count == 0 {
            return to.shutdown().await;
        }
        to.write_all(&piece[..count]).await?;
        frames.pass(&piece[..count]);
    }
    to.write_all(close).await?;
    to.shutdown().await?;
    // An end with something unread could take the Close frame along.
    let rest = async { while matches!(from.read(&mut piece).await, Ok(1..)) {} };
    timeout(REPLY, rest).await.ok();
    Ok(())
}

/// Where in its frames a direction of a WebSocket is.
#[derive(Default)]
struct Frames {
    head: Vec<u8>,
    /// What is still to come of a payload.
    rest: u64,
}

impl Frames {
    fn is_between(&self) -> bool {
        self.head.is_empty() && self.rest == 0
    }

    fn pass(&mut self, mut bytes: &[u8]) {
        while let Some((first, others)) = bytes.split_first() {
            if self.rest > 0 {
                let skipped = usize::try_from(self.rest).unwrap_or(usize::MAX);
                let skipped = skipped.min(bytes.len());
                self.rest -= skipped as u64;
                bytes = &bytes[skipped..];
                continue;
            }
            self.head.push(*first);
            bytes = others;
            if let Some(length) = payload(&self.head) {
                self.rest = length;
                self.head.clear();
            }
        }
    }
}

/// The length of a frame's payload, once its head has come as a whole.
fn payload(head: &[u8]) -> Option<u64> {
    let second = *head.get(1)?;
    let wide = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    let mask = if second & 0x80 == 0 { 0 } else { 4 };
    if head.len() < 2 + wide + mask {
        return None;
    }
    let length = head[2..2 + wide].iter();
    Some(match wide {
        0 => u64::from(second & 0x7f),
        _ => length.fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes `bytes` one by one, and says after how many it was between frames.
    fn ends(bytes: &[u8]) -> Vec<usize> {
        let mut frames = Frames::default();
        let passed = (1..=bytes.len()).filter(|count| {
            frames.pass(&bytes[count - 1..*count]);
            frames.is_between()
        });
        passed.collect()
    }

    #[test]
    fn frames_end_where_their_heads_say() {
        let text = [&[0x81, 2][..], b"ab"].concat();
        assert_eq!(ends(&text), [4]);
        let masked = [&[0x81, 0x82, 1, 2, 3, 4][..], b"ab"].concat();
        assert_eq!(ends(&masked), [8]);
        let wide = [&[0x82, 126, 1, 0][..], &[0; 256]].concat();
        assert_eq!(ends(&wide), [260]);
        let wider = [&[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0][..], &[0; 65536]].concat();
        assert_eq!(ends(&wider), [65546]);
        assert_eq!(ends(&[0x89, 0, 0x8a, 0]), [2, 4]);
        let mut frames = Frames::default();
        frames.pass(&[wide.as_slice(), &text, &text[..3]].concat());
        assert!(!frames.is_between());
    }

    #[test]
    fn close_frames_are_whole() {
        assert_eq!(ends(TO_CLIENT), [TO_CLIENT.len()]);
        assert_eq!(ends(TO_SERVER), [TO_SERVER.len()]);
    }

    #[test]
    fn any_bytes_are_passed_without_harm() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let mut frames = Frames::default();
            frames.pass(bytes);
            assert!(frames.head.len() < 14);
        });
    }
}
