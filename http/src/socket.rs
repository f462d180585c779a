// SPDX-License-Identifier: Apache-2.0

//! Sockets whose buffers in the kernel have a fixed size.
//!
//! Left to itself, Linux lets the buffers of a TCP socket grow to several MiB each
//! (`net.ipv4.tcp_rmem`, `tcp_wmem`), and counts them as memory of the socket's cgroup.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::net::{TcpListener, TcpSocket};

/// Size of a socket's buffer for each direction, in bytes. The kernel takes up to twice as much
/// (socket(7), `SO_RCVBUF`).
pub const SOCKET_BUFFER: u32 = 64 << 10;

/// Connections that wait in the kernel until they are accepted.
const BACKLOG: u32 = 1024;

/// A socket for `address`, whose buffers do not grow.
///
/// # Errors
/// When the kernel gives none.
pub fn socket(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    Ok(socket)
}

/// Listens on an address. Any address of IPv6 takes in IPv4 as well, and is any of IPv4 where the
/// machine has no IPv6.
///
/// # Errors
/// When it is not the machine's, or taken.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match listen(address) {
        Err(e) if address.ip() == Ipv6Addr::UNSPECIFIED && e.kind() != io::ErrorKind::AddrInUse => {
            listen((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        bound => bound,
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    // Connections that are accepted inherit the buffers' sizes.
    let socket = socket(address)?;
    // A port can be taken while connections of the last process end.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}
