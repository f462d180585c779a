// SPDX-License-Identifier: Apache-2.0

//! Work in another network namespace.

use std::{io, os::fd::BorrowedFd};

use nix::sched::{CloneFlags, setns};

/// Does `work` in the network namespace `netns`. Blocks.
///
/// # Errors
/// What the work says, and the kernel when the namespace cannot be joined.
pub fn in_netns<T: Send>(
    netns: BorrowedFd<'_>,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    // A namespace is a thread's own, and this one's is not to change.
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            work()
        });
        let panicked = |_| io::Error::other("the thread in the namespace panicked");
        there.join().map_err(panicked)?
    })
}
