// SPDX-License-Identifier: Apache-2.0

//! Calls that signals interrupt.

use std::io;

/// Makes a call again for as long as a signal interrupts it.
///
/// A socket that has a timeout needs this: the kernel does not go on by itself there, not even
/// under `SA_RESTART` (signal(7), "Interruption of system calls"), and the end of a child is a
/// signal to any thread of a process that waits for its children.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
