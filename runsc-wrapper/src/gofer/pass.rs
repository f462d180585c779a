// SPDX-License-Identifier: Apache-2.0

//! Hands a prestarted gofer from the process that has started it to the one that uses it.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg},
};

use super::PrestartedGofer;
use kiln_host::uninterrupted;

impl PrestartedGofer {
    /// Sends it over `to`, in one message. Blocks.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn send(&self, to: &UnixStream) -> io::Result<()> {
        let all = [&self.process].into_iter().chain(&self.connections);
        let raw: Vec<RawFd> = all.map(AsRawFd::as_raw_fd).collect();
        let pid = self.pid.to_le_bytes();
        uninterrupted(|| {
            sendmsg::<UnixAddr>(
                to.as_raw_fd(),
                &[IoSlice::new(&pid)],
                &[ControlMessage::ScmRights(&raw)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            )?;
            Ok(())
        })
    }

    /// Receives one over `from`, from somebody who is trusted. Blocks.
    ///
    /// # Errors
    /// What the kernel says, and when something else comes or nothing.
    pub fn receive(from: &UnixStream) -> io::Result<Self> {
        uninterrupted(|| Self::receive_once(from))
    }

    fn receive_once(from: &UnixStream) -> io::Result<Self> {
        let mut pid = [0; 4];
        let mut buffer = [IoSliceMut::new(&mut pid)];
        let mut space = cmsg_space!([RawFd; PrestartedGofer::COUNT + 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<UnixAddr>(from.as_raw_fd(), &mut buffer, Some(&mut space), flags)?;
        let (bytes, mut fds) = (message.bytes, Vec::new());
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made them for this process.
                fds.extend(
                    raw.into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        if bytes != pid.len() || fds.len() != Self::COUNT + 1 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        let connections = fds.split_off(1);
        let process = fds.pop().ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Self {
            pid: u32::from_le_bytes(pid),
            process,
            connections,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File, io::Write as _, os::unix::thread::JoinHandleExt as _, thread, time::Duration,
    };

    use nix::sys::{
        pthread::pthread_kill,
        signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
    };

    use super::*;

    fn gofer() -> PrestartedGofer {
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        PrestartedGofer {
            pid: 70_000,
            process: null(),
            connections: (0..PrestartedGofer::COUNT).map(|_| null()).collect(),
        }
    }

    #[test]
    fn a_gofer_is_received_as_it_was_sent_or_not_at_all() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        gofer().send(&ours).unwrap();
        let received = PrestartedGofer::receive(&theirs).unwrap();
        assert_eq!(received.pid(), 70_000);
        assert_eq!(received.connections.len(), PrestartedGofer::COUNT);
        (&ours).write_all(b"none").unwrap();
        assert!(PrestartedGofer::receive(&theirs).is_err());
        drop(ours);
        assert!(PrestartedGofer::receive(&theirs).is_err());
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a thread of its own may sleep")]
    fn signals_do_not_end_the_wait() {
        extern "C" fn nothing(_: i32) {}
        let action = SigAction::new(
            SigHandler::Handler(nothing),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        // SAFETY: the handler does nothing.
        unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let receiver = thread::spawn(move || PrestartedGofer::receive(&theirs));
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(5));
            pthread_kill(receiver.as_pthread_t(), Signal::SIGUSR1).unwrap();
        }
        gofer().send(&ours).unwrap();
        assert_eq!(receiver.join().unwrap().unwrap().pid(), 70_000);
    }
}
