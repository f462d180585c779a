// SPDX-License-Identifier: Apache-2.0

//! Both ends of the protocol by which a shim gets the gofer that the agent has started with a
//! sandbox. It has a socket of its own, because ttrpc passes no descriptors:
//!
//! ```text
//! shim ──► agent   the sandbox's id and a line feed
//! shim ◄── agent   one message with the gofer's descriptors, or the end of the stream
//! ```
//!
//! The runtime's driver sends and receives that message.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

/// Longest request that is read, in bytes.
const MAX_REQUEST: u64 = 128;

/// Names the socket for gofers of an agent that listens at `agent`.
#[must_use]
pub fn gofer_socket(agent: &Path) -> PathBuf {
    agent.with_extension("slots")
}

/// Asks at `socket` for the gofer of the sandbox `id`. The message with the gofer can be received
/// from the stream, on which nothing takes longer than `limit`. Blocks.
///
/// # Errors
/// The kernel's, and `PermissionDenied` when the peer is not root.
pub fn request(socket: &Path, id: &str, limit: Duration) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    let peer = getsockopt(&stream, PeerCredentials)?;
    if peer.uid() != 0 {
        let message = format!("its peer is uid {}, not root", peer.uid());
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
    }
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    (&stream).write_all(format!("{id}\n").as_bytes())?;
    Ok(stream)
}

/// Reads from `stream` of which sandbox the gofer is asked for. Nothing on the stream takes longer
/// than `limit` from then on. Blocks.
///
/// # Errors
/// The kernel's.
pub fn read_request(stream: &UnixStream, limit: Duration) -> io::Result<String> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut id = String::new();
    BufReader::new(stream.take(MAX_REQUEST)).read_line(&mut id)?;
    id.truncate(id.trim_end().len());
    Ok(id)
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn the_agent_reads_what_the_shim_asks_for() {
        let dir = tempfile::tempdir().unwrap();
        let socket = gofer_socket(&dir.path().join("agent.sock"));
        assert_eq!(socket, dir.path().join("agent.slots"));
        let listener = UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            read_request(&stream, LIMIT).unwrap()
        });
        let asked = request(&socket, "warm-1", LIMIT);
        assert_eq!(agent.join().unwrap(), "warm-1");
        // Tests may run as another user, whom no shim trusts.
        let is_root = nix::unistd::geteuid().is_root();
        assert_eq!(asked.is_ok(), is_root);
    }

    #[test]
    fn a_request_without_end_is_cut_off() {
        let (mut shim, agent) = UnixStream::pair().unwrap();
        shim.write_all(&[b'a'; 1000]).unwrap();
        let read = read_request(&agent, LIMIT).unwrap();
        assert_eq!(read.len(), usize::try_from(MAX_REQUEST).unwrap());
    }
}
