// SPDX-License-Identifier: Apache-2.0

//! A network namespace to try a runtime out in.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    thread,
};

use nix::{
    libc,
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

nix::ioctl_readwrite_bad!(get_flags, libc::SIOCGIFFLAGS, libc::ifreq);
nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);

/// Makes a network namespace whose loopback is up and that has no other link. It lasts as long
/// as the descriptor. Blocks.
///
/// # Errors
/// What the kernel says; making one needs CAP_SYS_ADMIN.
pub(crate) fn with_loopback() -> io::Result<OwnedFd> {
    // A namespace is a thread's own, and this one is not to come back.
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        loopback_up()?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    });
    let panicked = |_| io::Error::other("the thread of the namespace panicked");
    made.join().map_err(panicked)?
}

fn loopback_up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // SAFETY: the request is a whole ifreq with a name, and outlives both calls; the kernel fills
    // the flags in the first, so that they are the active field in the second.
    unsafe {
        get_flags(fd, &raw mut request)?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        set_flags(fd, &raw const request)?;
    }
    Ok(())
}
