// SPDX-License-Identifier: Apache-2.0
//! Attempts by way of sockets.

use std::{
    io::Read,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream},
    },
    time::Duration,
};

use nix::errno::Errno;

use crate::{Failure, Tried};

/// How long to wait for somebody who may not be there, or may not be let through.
const PATIENCE: Duration = Duration::from_secs(3);

fn unix_address(path: &str) -> Result<UnixAddr, Failure> {
    Ok(match path.strip_prefix('@') {
        Some(name) => UnixAddr::from_abstract_name(name)?,
        None => UnixAddr::from_pathname(path)?,
    })
}

/// `dial PATH`; finds what is said there.
pub(crate) fn dial(path: &str) -> Tried {
    let mut stream = UnixStream::connect_addr(&unix_address(path)?)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    first_words(&mut stream)
}

/// `offer PATH`: somebody else may connect there.
pub(crate) fn offer(path: &str) -> Tried {
    // It stays as a file, and its listener for as long as the probe runs.
    Box::leak(Box::new(UnixListener::bind_addr(&unix_address(path)?)?));
    Ok(String::new())
}

/// `socket FAMILY TYPE`.
pub(crate) fn socket(family: &str, kind: &str) -> Tried {
    let family = match family {
        "inet" => libc::AF_INET,
        "inet6" => libc::AF_INET6,
        "packet" => libc::AF_PACKET,
        "vsock" => libc::AF_VSOCK,
        "alg" => libc::AF_ALG,
        "bluetooth" => libc::AF_BLUETOOTH,
        "can" => libc::AF_CAN,
        "xdp" => libc::AF_XDP,
        _ => return Err(Failure::Usage),
    };
    let (kind, protocol) = match kind {
        "raw" if family == libc::AF_PACKET => (libc::SOCK_RAW, i32::from(0x0300u16)),
        "raw" => (libc::SOCK_RAW, libc::IPPROTO_ICMP),
        "dgram" => (libc::SOCK_DGRAM, 0),
        "stream" => (libc::SOCK_STREAM, 0),
        "seqpacket" => (libc::SOCK_SEQPACKET, 0),
        _ => return Err(Failure::Usage),
    };
    open(family, kind, protocol).map(|_| String::new())
}

fn open(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Failure> {
    // SAFETY: socket(2) takes numbers only.
    let fd = Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `option NAME` of a TCP socket: to speak for addresses of others, or to pick the way out.
pub(crate) fn option(name: &str) -> Tried {
    let (level, option, value): (_, _, &[u8]) = match name {
        "transparent" => (libc::IPPROTO_IP, libc::IP_TRANSPARENT, &[1, 0, 0, 0]),
        "mark" => (libc::SOL_SOCKET, libc::SO_MARK, &[1, 0, 0, 0]),
        _ => return Err(Failure::Usage),
    };
    let socket = open(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let size = libc::socklen_t::try_from(value.len()).map_err(|_| Failure::Usage)?;
    // SAFETY: the value is valid for `size` bytes.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            size,
        )
    };
    Errno::result(done)?;
    Ok(String::new())
}

/// `connect ADDRESS:PORT` by TCP; finds what is said there.
pub(crate) fn connect(address: &str) -> Tried {
    let address: SocketAddr = crate::number(address)?;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    first_words(&mut stream)
}

/// `send ADDRESS:PORT` by UDP; what is sent is the argument.
pub(crate) fn send(address: &str) -> Tried {
    let to: SocketAddr = crate::number(address)?;
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.send_to(address.as_bytes(), to)?;
    Ok(String::new())
}

fn first_words(stream: &mut impl Read) -> Tried {
    let mut buffer = [0; 256];
    let read = stream.read(&mut buffer).unwrap_or_default();
    Ok(String::from_utf8_lossy(&buffer[..read]).into_owned())
}

/// `bind ADDRESS`.
pub(crate) fn bind(address: &str) -> Tried {
    let address: IpAddr = crate::number(address)?;
    UdpSocket::bind((address, 0))?;
    Ok(String::new())
}

/// `address IF IP` (netdevice(7)).
pub(crate) fn address(interface: &str, ip: &str) -> Tried {
    let ip: std::net::Ipv4Addr = crate::number(ip)?;
    let [a, b, c, d] = ip.octets();
    // A sockaddr_in: family, port, address.
    let family = u16::try_from(libc::AF_INET).map_err(|_| Failure::Usage)?;
    let [low, high] = family.to_ne_bytes();
    change(interface, libc::SIOCSIFADDR, &[low, high, 0, 0, a, b, c, d])
}

/// `hwaddr IF` (netdevice(7)).
pub(crate) fn hwaddr(interface: &str) -> Tried {
    let [low, high] = libc::ARPHRD_ETHER.to_ne_bytes();
    change(
        interface,
        libc::SIOCSIFHWADDR,
        &[low, high, 2, 0, 0, 0, 0, 1],
    )
}

fn change(interface: &str, request: libc::c_ulong, value: &[u8]) -> Tried {
    let socket = open(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // An ifreq: a name of 16 bytes, and a union of 24.
    let mut ifreq = [0u8; 40];
    let name = interface.as_bytes();
    ifreq
        .get_mut(..name.len().min(15))
        .ok_or(Failure::Usage)?
        .copy_from_slice(&name[..name.len().min(15)]);
    ifreq
        .get_mut(16..16 + value.len())
        .ok_or(Failure::Usage)?
        .copy_from_slice(value);
    // SAFETY: the kernel reads an ifreq, 40 bytes, from a pointer that is valid for them.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), request as _, ifreq.as_ptr()) };
    Errno::result(done)?;
    Ok(String::new())
}
