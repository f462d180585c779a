// SPDX-License-Identifier: Apache-2.0

//! Questions to the kernel about one network namespace (rtnetlink(7)).

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage, address::AddressMessage, link::LinkMessage, neighbour::NeighbourMessage,
    route::RouteMessage,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// An address as the kernel lists it.
pub(super) type Address = AddressMessage;

/// A socket in the namespace that the thread was in when it was made.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // Only the kernel is listened to.
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    pub(super) fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump(request, |answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        })
    }

    pub(super) fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(request, |answer| match answer {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        })
    }

    pub(super) fn routes(&mut self) -> io::Result<Vec<RouteMessage>> {
        let request = RouteNetlinkMessage::GetRoute(RouteMessage::default());
        self.dump(request, |answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
    }

    pub(super) fn neighbours(&mut self) -> io::Result<Vec<NeighbourMessage>> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.dump(request, |answer| match answer {
            RouteNetlinkMessage::NewNeighbour(neighbour) => Some(neighbour),
            _ => None,
        })
    }

    /// Removes an address. That it is not there is as good: the removal of the first address of
    /// a network removes others of it.
    pub(super) fn remove(&mut self, address: Address) -> io::Result<()> {
        let request = RouteNetlinkMessage::DelAddress(address);
        self.ask(request, NLM_F_ACK)?;
        match self.answers(|_| None::<()>) {
            Err(e) if e.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other.map(drop),
        }
    }

    fn dump<T>(
        &mut self,
        request: RouteNetlinkMessage,
        want: impl Fn(RouteNetlinkMessage) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        self.ask(request, NLM_F_DUMP)?;
        self.answers(want)
    }

    fn ask(&mut self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// Reads up to the end of a dump, or to an acknowledgement.
    fn answers<T>(&self, want: impl Fn(RouteNetlinkMessage) -> Option<T>) -> io::Result<Vec<T>> {
        let mut found = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(io::Error::other)?;
                // Messages are padded to four bytes (netlink(7)).
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue; // what is left of a request that failed
                }
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => found.extend(want(inner)),
                    NetlinkPayload::Done(_) => return Ok(found),
                    NetlinkPayload::Error(e) => {
                        return match e.code {
                            Some(_) => Err(e.to_io()),
                            None => Ok(found),
                        };
                    }
                    _ => {}
                }
            }
        }
    }
}
