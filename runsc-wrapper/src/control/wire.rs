// SPDX-License-Identifier: Apache-2.0

//! One call over a control socket: JSON over a UNIX stream, as gVisor's `pkg/urpc` speaks it.
//!
//! A request is `{"method":…,"arg":…}`, with descriptors as `SCM_RIGHTS` on its first byte. The
//! reply is `{"success":…,"err":…,"result":…}`. Nothing marks where either ends but the JSON
//! itself. One call per connection: an idle connection would hold up the end of the sandbox,
//! which waits for its clients.
//!
//! The other side is the sandbox: what it sends is bounded in size, depth and time, its
//! descriptors are never taken, and it must be the process it is expected to be.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::socket::{
    ControlMessage, MsgFlags, UnixAddr, getsockopt, recvmsg, sendmsg, sockopt::PeerCredentials,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{io::Interest, net::UnixStream};

use super::ControlError;

/// Longest path that fits into a `sockaddr_un`, in bytes, without its final zero.
const SOCKET_PATH_LIMIT: usize = 107;

/// Bytes read at a time.
const CHUNK: usize = 16 << 10;

/// Deepest nesting of a reply. serde_json stops at the same depth.
const DEPTH_LIMIT: usize = 128;

/// Pause before connecting again to a socket whose queue is full.
const CONNECT_RETRY: Duration = Duration::from_millis(10);

/// Which process must be at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer(pub(super) u32);

#[derive(Serialize)]
struct Request<'a, A> {
    method: &'a str,
    arg: &'a A,
}

#[derive(Deserialize)]
struct Reply<R> {
    success: bool,
    #[serde(default)]
    err: String,
    result: Option<R>,
}

/// Makes a connection. Fails with [`ControlError::Connect`]: nothing was asked yet.
pub(super) async fn connect(path: &Path, peer: Peer) -> Result<UnixStream, ControlError> {
    let (short, _kept) = short_path(path).map_err(ControlError::Connect)?;
    let stream = loop {
        match UnixStream::connect(&short).await {
            // The queue of the listener is full, which is no reason to give up before the
            // deadline of the call.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                tokio::time::sleep(CONNECT_RETRY).await;
            }
            other => break other.map_err(ControlError::Connect)?,
        }
    };
    let credentials =
        getsockopt(&stream, PeerCredentials).map_err(|e| ControlError::Connect(e.into()))?;
    if credentials.pid().cast_unsigned() != peer.0 {
        let message = format!(
            "process {} listens, not the sandbox {}",
            credentials.pid(),
            peer.0
        );
        return Err(ControlError::Connect(io::Error::other(message)));
    }
    Ok(stream)
}

/// A path that fits into a socket address, and what must stay open for it.
fn short_path(path: &Path) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if path.as_os_str().len() <= SOCKET_PATH_LIMIT {
        return Ok((path.to_owned(), None));
    }
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    let fd = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())?;
    Ok((format!("/proc/self/fd/{}", fd.as_raw_fd()).into(), Some(fd)))
}

/// Sends one request on a fresh connection and reads the reply, of at most `limit` bytes.
pub(super) async fn call<A: Serialize, R: DeserializeOwned>(
    stream: &UnixStream,
    method: &str,
    arg: &A,
    fds: &[BorrowedFd<'_>],
    limit: usize,
) -> Result<R, ControlError> {
    let request = serde_json::to_vec(&Request { method, arg })
        .map_err(|e| ControlError::Protocol(format!("cannot be asked: {e}")))?;
    send(stream, &request, fds)
        .await
        .map_err(ControlError::Broken)?;
    let reply = receive(stream, limit).await?;
    let reply: Reply<R> = serde_json::from_slice(&reply)
        .map_err(|e| ControlError::Protocol(format!("{method}: {e}")))?;
    match reply.result {
        _ if !reply.success => Err(ControlError::Refused(crate::command::clean(&reply.err))),
        Some(result) => Ok(result),
        // Go writes null for an empty list; what cannot be null has no result.
        None => serde_json::from_str("null")
            .map_err(|_| ControlError::Protocol(format!("{method}: success without a result"))),
    }
}

async fn send(stream: &UnixStream, request: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let mut sent = 0;
    while sent < request.len() {
        // The descriptors go with whatever part is sent first.
        let rights = [ControlMessage::ScmRights(&raw)];
        let messages: &[ControlMessage<'_>] = if sent == 0 && !raw.is_empty() {
            &rights
        } else {
            &[]
        };
        let rest = [IoSlice::new(&request[sent..])];
        sent += stream
            .async_io(Interest::WRITABLE, || {
                let flags = MsgFlags::MSG_NOSIGNAL;
                Ok(sendmsg::<UnixAddr>(
                    stream.as_raw_fd(),
                    &rest,
                    messages,
                    flags,
                    None,
                )?)
            })
            .await?;
    }
    Ok(())
}

async fn receive(stream: &UnixStream, limit: usize) -> Result<Vec<u8>, ControlError> {
    let mut reply = Vec::new();
    let mut scanner = Scanner::default();
    loop {
        let mut chunk = [0; CHUNK];
        let read = stream
            .async_io(Interest::READABLE, || {
                receive_some(stream.as_raw_fd(), &mut chunk)
            })
            .await
            .map_err(ControlError::Broken)?;
        if read == 0 {
            return Err(ControlError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let chunk = &chunk[..read];
        if reply.len() + read > limit {
            return Err(ControlError::Protocol(format!(
                "reply of more than {limit} bytes"
            )));
        }
        reply.extend_from_slice(chunk);
        match scanner.scan(chunk)? {
            None => {}
            Some(end) if end == chunk.len() => return Ok(reply),
            Some(_) => return Err(ControlError::Protocol("more than one reply".to_owned())),
        }
    }
}

/// Reads without room for descriptors: the kernel closes any that come and says so.
fn receive_some(fd: RawFd, chunk: &mut [u8]) -> io::Result<usize> {
    let mut parts = [IoSliceMut::new(chunk)];
    let message = recvmsg::<UnixAddr>(fd, &mut parts, None, MsgFlags::MSG_CMSG_CLOEXEC)?;
    if message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::other("the reply came with descriptors"));
    }
    Ok(message.bytes)
}

/// Finds the end of a JSON object that comes in pieces, looking at each byte once.
#[derive(Debug, Default)]
struct Scanner {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scanner {
    /// Looks at the next piece. Returns the offset in it behind the object's last byte.
    fn scan(&mut self, piece: &[u8]) -> Result<Option<usize>, ControlError> {
        let garbage = |problem: &str| Err(ControlError::Protocol(problem.to_owned()));
        for (at, byte) in piece.iter().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' if self.depth > 0 => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' if self.depth == DEPTH_LIMIT => {
                    return garbage("reply is nested too deep");
                }
                b'{' => self.depth += 1,
                _ if self.depth == 0 => return garbage("reply is no object"),
                b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Ok(Some(at + 1));
                    }
                }
                _ => {}
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end_of(pieces: &[&str]) -> Result<Option<usize>, ControlError> {
        let mut scanner = Scanner::default();
        let mut last = Ok(None);
        for piece in pieces {
            last = scanner.scan(piece.as_bytes());
        }
        last
    }

    #[test]
    fn any_reply_in_any_pieces_ends_at_the_same_byte() {
        bolero::check!()
            .with_type::<(Vec<u8>, u8)>()
            .for_each(|(reply, cut)| {
                let cut = usize::from(*cut).min(reply.len());
                let whole = Scanner::default().scan(reply).ok();
                let mut scanner = Scanner::default();
                let first = scanner.scan(&reply[..cut]).ok();
                let pieces = match first {
                    Some(None) => match scanner.scan(&reply[cut..]) {
                        Ok(end) => Some(end.map(|end| end + cut)),
                        Err(_) => None,
                    },
                    other => other,
                };
                assert_eq!(pieces, whole);
                // Whatever it is, reading it ends in a reply or an error.
                let _ = serde_json::from_slice::<Reply<super::super::Event>>(reply);
                let _ = serde_json::from_slice::<Reply<Vec<super::super::ProcessInfo>>>(reply);
            });
    }

    #[test]
    fn the_end_of_a_reply_is_found_in_pieces() {
        assert_eq!(end_of(&["{}"]).unwrap(), Some(2));
        assert_eq!(end_of(&[r#"{"a":[1,{}"#, r#"]}x"#]).unwrap(), Some(2));
        assert_eq!(
            end_of(&[r#"{"a":"}\"#, r#""}"#, r#"}"}"#]).unwrap(),
            Some(3)
        );
        assert_eq!(end_of(&[r#"{"a":"\\"}"#]).unwrap(), Some(10));
        assert_eq!(end_of(&[r#"{"a":"#]).unwrap(), None);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in ["[", "\"", "null", " {}", "}", "7", "\0"] {
            assert!(end_of(&[text]).is_err(), "{text}");
        }
        assert!(end_of(&[&format!("{{{}", "[".repeat(128))]).is_err());
        assert!(end_of(&[&format!("{{{}", "[".repeat(127))]).is_ok());
    }

    #[test]
    fn long_paths_are_made_short() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(120));
        std::fs::write(&long, "").unwrap();
        let (short, kept) = short_path(&long).unwrap();
        assert!(short.starts_with("/proc/self/fd") && kept.is_some());
        let (same, kept) = short_path(dir.path()).unwrap();
        assert!(same == dir.path() && kept.is_none());
    }
}
