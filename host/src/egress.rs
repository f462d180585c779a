// SPDX-License-Identifier: Apache-2.0

//! What a sandbox must not send, whatever its network lets through: packets to link-local
//! addresses, and to those at which clouds tell a node its credentials.
//!
//! A sentry sends through packet sockets in the Pod's network namespace. Such packets pass none of
//! the hooks of IP (`output`, `postrouting`), and what they pass on the host depends on the CNI
//! plugin. So the rules are where each frame passes on its way into a device: in an nftables chain
//! of family `netdev` at hook `egress` of every link of the namespace (kernel 5.16,
//! `CONFIG_NETFILTER_EGRESS`). They are made before the sandbox has its sockets, stay when whoever
//! made them ends, and go with the namespace.
//!
//! Frames that the rules cannot read are dropped too. Frames that the kernel does not show them
//! pass: those of AF_XDP sockets.

mod nft;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::BorrowedFd,
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::{
    ifaddrs::getifaddrs,
    net::if_::InterfaceFlags,
    sys::{
        socket::{setsockopt, sockopt::ReceiveTimeout},
        time::TimeVal,
    },
};
use serde::Deserialize;

use crate::{in_netns, uninterrupted};
use nft::{Batch, Verdict};

/// Why packets of a network namespace are not guarded, or not counted.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// Its links cannot be listed, or the kernel cannot be spoken to there.
    #[error("look into the network namespace: {0}")]
    Look(#[source] io::Error),
    /// The kernel does not take the rules: it is older than 5.16, or made without what they need.
    #[error("nftables at egress: {0}")]
    Refused(#[source] io::Error),
    /// These links have no Ethernet frames, which the rules are for. Others have their rules.
    #[error("no Ethernet frames on {}", .0.join(", "))]
    NotEthernet(Vec<String>),
    /// The counter cannot be read.
    #[error("read the counter: {0}")]
    Count(#[source] io::Error),
}

/// What to do about packets to forbidden addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Drop them. Where that cannot be done, the Pod runs, and it is said.
    #[default]
    Drop,
    /// Drop them. Where that cannot be done, the Pod is refused.
    Require,
    /// Let them pass.
    Allow,
}

/// Which packets a sandbox must not send: table `[kiln.link_local]` of a handler's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LinkLocal {
    /// What to do about packets to 169.254.0.0/16, fe80::/10 and `metadata`.
    pub mode: Mode,
    /// Further addresses at which clouds serve metadata.
    pub metadata: Vec<IpAddr>,
    /// Addresses that may be reached all the same, such as that of a DNS cache of the node.
    pub except: Vec<IpAddr>,
}

impl Default for LinkLocal {
    fn default() -> Self {
        Self {
            mode: Mode::Drop,
            metadata: vec![
                // Amazon EC2 and Google Compute Engine by IPv6, Alibaba Cloud.
                Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254).into(),
                Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254).into(),
                Ipv4Addr::new(100, 100, 100, 200).into(),
            ],
            except: Vec::new(),
        }
    }
}

impl LinkLocal {
    /// The first and last address of what is forbidden.
    fn forbidden(&self) -> Vec<(IpAddr, IpAddr)> {
        let v4 = |a, b, c, d| IpAddr::from(Ipv4Addr::new(a, b, c, d));
        let v6 = |a, n| IpAddr::from(Ipv6Addr::new(a, n, n, n, n, n, n, n));
        let nat64 = |last| IpAddr::from(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0xa9fe, last));
        let mut ranges = vec![
            (v4(169, 254, 0, 0), v4(169, 254, 255, 255)),
            // The same by way of a NAT64 (RFC 6052).
            (nat64(0), nat64(0xffff)),
            (v6(0xfe80, 0), v6(0xfebf, 0xffff)),
        ];
        ranges.extend(self.metadata.iter().map(|ip| (*ip, *ip)));
        ranges
    }
}

/// The rules of one network namespace, and the way to their counter.
pub struct Guard {
    socket: Socket,
    sequence: u32,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").finish_non_exhaustive()
    }
}

impl Guard {
    /// Has the kernel drop and count what `policy` forbids, and frames that are neither IP nor ARP,
    /// on every link that `netns` has now but its loopback. Rules of an earlier call are replaced.
    /// They outlive the result. Blocks.
    ///
    /// # Errors
    /// See [`GuardError`].
    pub fn set(netns: BorrowedFd<'_>, policy: &LinkLocal) -> Result<Self, GuardError> {
        let (mut guard, links) = Self::enter(netns)?;
        if !links.guarded.is_empty() {
            guard.make(&links.guarded, policy)?;
        }
        match links.unreadable {
            names if names.is_empty() => Ok(guard),
            names => Err(GuardError::NotEthernet(names)),
        }
    }

    fn make(&mut self, devices: &[String], policy: &LinkLocal) -> Result<(), GuardError> {
        let mut batch = Batch::new(self.sequence, devices);
        for ip in &policy.except {
            batch.to(*ip, *ip, Verdict::Accept);
        }
        batch.neighbour_discovery();
        for (first, last) in policy.forbidden() {
            batch.to(first, last, Verdict::Drop);
        }
        batch.rest();
        let (bytes, last) = batch.finish();
        self.sequence = last + 1;
        self.send(&bytes).map_err(GuardError::Refused)?;
        self.answer(last).map_err(GuardError::Refused)?;
        Ok(())
    }

    /// The rules that [`Guard::set`] has made in `netns` before. Blocks.
    ///
    /// # Errors
    /// [`GuardError::Look`].
    pub fn of(netns: BorrowedFd<'_>) -> Result<Self, GuardError> {
        Self::enter(netns).map(|(guard, _)| guard)
    }

    /// How many packets have been dropped. Asks the kernel, which answers at once.
    ///
    /// # Errors
    /// [`GuardError::Count`], also where there are no rules.
    pub fn dropped(&mut self) -> Result<u64, GuardError> {
        self.count().map_err(GuardError::Count)
    }

    fn enter(netns: BorrowedFd<'_>) -> Result<(Self, Links), GuardError> {
        let look = || {
            let mut socket = Socket::new(NETLINK_NETFILTER)?;
            socket.bind_auto()?;
            // Only the kernel is listened to, and it answers before `send` is done.
            socket.connect(&SocketAddr::new(0, 0))?;
            let second = TimeVal::new(1, 0);
            setsockopt(&socket, ReceiveTimeout, &second)?;
            Ok((socket, Links::look()?))
        };
        let (socket, links) = in_netns(netns, look).map_err(GuardError::Look)?;
        let sequence = 0;
        Ok((Self { socket, sequence }, links))
    }

    fn count(&mut self) -> io::Result<u64> {
        self.sequence += 1;
        self.send(&nft::get_counter(self.sequence))?;
        let attributes = self.answer(self.sequence)?;
        nft::packets(&attributes).ok_or_else(|| io::Error::other("an answer without a counter"))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.socket.send(bytes, 0)?;
        if sent < bytes.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Waits for the answer to message `sequence`, and returns its attributes: none of an
    /// acknowledgement. Whatever message is refused before is an error too.
    fn answer(&self, sequence: u32) -> io::Result<Vec<u8>> {
        /// `NLMSG_ERROR`, which an acknowledgement is too (netlink(7)).
        const ERROR: u16 = 2;
        /// Of a `struct nlmsghdr`, and of a `struct nfgenmsg` after it.
        const HEADER: usize = 16;
        const NETFILTER: usize = 4;
        loop {
            let (bytes, _) = uninterrupted(|| self.socket.recv_from_full())?;
            let mut rest = bytes.as_slice();
            while let Some((header, _)) = rest.split_at_checked(HEADER) {
                let length = number(&header[..4]) as usize;
                let kind = u16::from_ne_bytes([header[4], header[5]]);
                let of = number(&header[8..12]);
                let Some(body) = rest.get(HEADER..length) else {
                    break;
                };
                if kind == ERROR {
                    let code = number(body.get(..4).unwrap_or(&[0xff; 4])).cast_signed();
                    if code != 0 && of <= sequence {
                        return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                    }
                }
                if of == sequence {
                    let attributes = if kind == ERROR { &[][..] } else { body };
                    let from = NETFILTER.min(attributes.len());
                    return Ok(attributes[from..].to_vec());
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(u32::MAX, u32::from_ne_bytes)
}

/// The names of a namespace's links but for loopback ones, each once.
struct Links {
    /// Those that get rules. Among them are links without Ethernet frames that are down, such as
    /// `tunl0`, which the kernel makes in every namespace: all is dropped there.
    guarded: Vec<String>,
    /// Those that are up and have no Ethernet frames.
    unreadable: Vec<String>,
}

impl Links {
    /// The links of the thread's namespace.
    fn look() -> io::Result<Self> {
        let mut is_readable = BTreeMap::new();
        // A link comes once for itself, and once for each of its addresses. One without a hardware
        // address comes without any the first time.
        for link in getifaddrs()? {
            if link.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
                continue;
            }
            let hardware = link.address.as_ref().and_then(|it| it.as_link_addr());
            let is_ethernet = hardware.is_some_and(|it| it.hatype() == libc::ARPHRD_ETHER);
            let is_up = link.flags.contains(InterfaceFlags::IFF_UP);
            *is_readable.entry(link.interface_name).or_insert(false) |= is_ethernet || !is_up;
        }
        let (guarded, unreadable): (Vec<_>, Vec<_>) =
            is_readable.into_iter().partition(|(_, readable)| *readable);
        let names = |links: Vec<(String, bool)>| links.into_iter().map(|(name, _)| name).collect();
        Ok(Self {
            guarded: names(guarded),
            unreadable: names(unreadable),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_forbidden_is_link_local_and_metadata() {
        let forbidden = LinkLocal::default().forbidden();
        let holds = |ip: &str| {
            let ip: IpAddr = ip.parse().unwrap();
            forbidden.iter().any(|(first, last)| {
                first.is_ipv4() == ip.is_ipv4() && (first..=last).contains(&&ip)
            })
        };
        for ip in [
            "169.254.0.0",
            "169.254.169.254",
            "169.254.255.255",
            "64:ff9b::a9fe:a9fe",
            "fe80::1",
            "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "fd00:ec2::254",
            "fd20:ce::254",
            "100.100.100.200",
        ] {
            assert!(holds(ip), "{ip}");
        }
        for ip in [
            "169.253.255.255",
            "169.255.0.0",
            "10.0.0.1",
            "64:ff9b::808:808",
            "fe7f::1",
            "fec0::1",
            "ff02::1:ff00:1",
            "2001:db8::1",
            "100.100.2.136",
        ] {
            assert!(!holds(ip), "{ip}");
        }
    }

    #[test]
    fn typos_are_errors() {
        let policy: LinkLocal = toml::from_str("mode = 'require'\nmetadata = []").unwrap();
        assert_eq!(policy.mode, Mode::Require);
        assert!(policy.metadata.is_empty());
        for text in ["mode = 'drp'", "metdata = []", "except = ['10.0.0.0/8']"] {
            assert!(toml::from_str::<LinkLocal>(text).is_err(), "{text}");
        }
    }
}
