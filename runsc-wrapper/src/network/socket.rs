// SPDX-License-Identifier: Apache-2.0

//! The packet sockets that a sentry sends and receives on (packet(7)).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    setsockopt_impl, sockopt_impl,
    sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt},
};

/// Bytes that may wait in each direction, as runsc has it.
const BUFFER: usize = 4 << 20;

sockopt_impl!(
    /// Packets come with a header that says what is left to segment and to sum.
    PacketVnetHdr,
    SetOnly,
    libc::SOL_PACKET,
    libc::PACKET_VNET_HDR,
    libc::c_int
);

nix::ioctl_readwrite_bad!(ethtool, libc::SIOCETHTOOL, libc::ifreq);

/// `ETHTOOL_GGSO` of linux/ethtool.h: whether the device segments for its senders.
const GET_GSO: u32 = 0x23;

/// `struct ethtool_value` of linux/ethtool.h.
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Opens a socket for all packets of a link in the thread's network namespace. Returns it, and
/// whether the host segments what is sent on it.
pub(super) fn open(name: &str, index: u32) -> io::Result<(OwnedFd, bool)> {
    // Without a protocol it receives nothing until it is bound.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(&socket, index)?;
    let has_gso = has_gso(&socket, name)?;
    if has_gso {
        setsockopt(&socket, PacketVnetHdr, &1)?;
    }
    setsockopt(&socket, sockopt::RcvBufForce, &BUFFER)?;
    setsockopt(&socket, sockopt::SndBufForce, &BUFFER)?;
    Ok((socket, has_gso))
}

fn bind(socket: &OwnedFd, index: u32) -> io::Result<()> {
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let narrow = |_| io::Error::other("a constant of packet(7) is too large");
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(narrow)?;
    address.sll_protocol = u16::try_from(libc::ETH_P_ALL).map_err(narrow)?.to_be();
    address.sll_ifindex = index.cast_signed();
    let length = u32::try_from(size_of_val(&address)).map_err(narrow)?;
    // SAFETY: the pointer is to a whole sockaddr_ll of that length.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

fn has_gso(socket: &OwnedFd, name: &str) -> io::Result<bool> {
    let mut value = EthtoolValue {
        command: GET_GSO,
        data: 0,
    };
    // SAFETY: all zeroes is a value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::other("the name of a link is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the request names a link and points to a whole ethtool_value; both outlive the call.
    unsafe { ethtool(socket.as_raw_fd(), &raw mut request) }?;
    Ok(value.data != 0)
}
