// SPDX-License-Identifier: Apache-2.0

//! A network namespace that has no name: it lives as long as something of it is held, so that
//! links, addresses and firewall rules in it vanish however a test ends.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    thread,
};

use anyhow::{Context, Result, anyhow};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// A network namespace.
#[derive(Debug, Clone)]
pub struct Netns(Arc<OwnedFd>);

impl Netns {
    /// Makes a namespace in which only the loopback interface is, and up.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> Result<Self> {
        let make = || -> Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
            loopback_up().context("bring lo up")?;
            Ok(File::open("/proc/thread-self/ns/net")
                .context("open the namespace")?
                .into())
        };
        on_a_thread(make)
            .context("make a network namespace")
            .map(|fd| Self(Arc::new(fd)))
    }

    /// The namespace that was kept at `path`.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self(Arc::new(file.into())))
    }

    /// Mounts it at `path`, which keeps it until that is unmounted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn keep_at(&self, path: &Path) -> Result<()> {
        File::create(path).with_context(|| format!("make {}", path.display()))?;
        let from = format!("/proc/self/fd/{}", self.0.as_raw_fd());
        let none = None::<&str>;
        mount(Some(from.as_str()), path, none, MsFlags::MS_BIND, none)
            .with_context(|| format!("mount the network namespace at {}", path.display()))
    }

    /// Runs `work` in the namespace. Sockets that it makes stay in it.
    ///
    /// # Errors
    /// The error of `work`, or the kernel's.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let fd = self.as_fd();
        on_a_thread(move || {
            setns(fd, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        })
    }

    /// The names of the interfaces in it.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn links(&self) -> Result<Vec<String>> {
        let table = self
            .run(|| std::fs::read_to_string("/proc/thread-self/net/dev").context("read net/dev"))?;
        Ok(table
            .lines()
            .skip(2)
            .filter_map(|l| Some(l.split_once(':')?.0.trim().to_owned()))
            .collect())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A thread keeps the namespace that it has entered, so that none but a new one may.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let done = thread::scope(|scope| scope.spawn(work).join());
    done.unwrap_or_else(|_| Err(anyhow!("the thread in the network namespace panicked")))
}

fn loopback_up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the ifreq that the pointer is valid for (netdevice(7)).
    let rc = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(rc).map(drop)?;
    Ok(())
}
