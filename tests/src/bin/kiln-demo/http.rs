// SPDX-License-Identifier: Apache-2.0

//! One GET, from inside of a network namespace.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kiln_tests::netns::Netns;

/// How long connecting, and each read and write, may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 10;

/// Gets `/` from `address` in `netns`, and returns head and body. The body ends where its
/// `Content-Length` says, because containerd closes a forwarded connection a second late.
///
/// # Errors
/// When there is no answer.
pub(crate) async fn get(netns: &Netns, address: SocketAddr) -> Result<String> {
    let netns = netns.clone();
    // Blocking, because a socket belongs to the namespace of the thread that makes it.
    let work = tokio::task::spawn_blocking(move || netns.run(|| blocking_get(address)));
    work.await.context("wait for the answer")?
}

fn blocking_get(address: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream
        .write_all(request.as_bytes())
        .context("send the request")?;
    let mut answer = BufReader::new(stream.take(MAX_ANSWER));
    let mut text = String::new();
    let mut length = 0;
    // An empty line ends the head.
    while !text.ends_with("\r\n\r\n") {
        let start = text.len();
        let read = answer
            .read_line(&mut text)
            .context("read the head of the answer")?;
        ensure!(read > 0, "the answer ends in its head");
        if let Some(value) = text[start..]
            .to_ascii_lowercase()
            .strip_prefix("content-length:")
        {
            length = value.trim().parse().context("parse Content-Length")?;
        }
    }
    answer
        .take(length)
        .read_to_string(&mut text)
        .context("read the body of the answer")?;
    Ok(text)
}
