// SPDX-License-Identifier: Apache-2.0

//! Gives a sandbox the network of a namespace over its control socket.
//!
//! `runsc start` reads links, addresses and routes in the sandbox's network namespace, takes the
//! addresses away from the host's side, and hands packet sockets to the sentry (gVisor
//! `runsc/sandbox/network.go`). The same is done here without a process, and in another order:
//! the host's side keeps its addresses until the sentry has said yes.
//!
//! The call's arguments belong to the release ([`known`]), and a network that is not plain is
//! left to the command.

mod links;
mod netlink;
mod socket;

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::sched::{CloneFlags, setns};

use crate::control::{Client, ControlError};

use netlink::{Address, Netlink};

pub(crate) use links::Links;

/// Releases whose `Network.CreateLinksAndRoutes` takes what [`Links`] is, by their date (gVisor
/// `runsc/boot/network.go`): the first and the last.
const RELEASES: (u32, u32) = (20_260_201, 20_260_331);

/// Flags of runsc that change what it does about a network.
const NETWORK_FLAGS: [&str; 15] = [
    "gso",
    "gvisor-gro",
    "log-packets",
    "network",
    "network-processors-per-channel",
    "num-network-channels",
    "pause-external-networking",
    "pcap-log",
    "plugin-network",
    "qdisc",
    "reproduce-nat",
    "reproduce-nftables",
    "rx-checksum-offload",
    "software-gso",
    "tx-checksum-offload",
];

/// Flags of runsc that have a sandbox send by AF_XDP, under the names that releases give them.
pub(crate) const XDP_FLAGS: [&str; 2] = ["EXPERIMENTAL-xdp", "xdp"];

/// How a sandbox that was booted ahead is given its network and started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartWay {
    /// By the runtime's own command: any release.
    Command,
    /// Over the sentry's control socket, which costs no process: releases that are known.
    Control,
}

/// The best way for a runsc of `version` (as its features say, `release-20260224.0`) that runs
/// with `flags`. Whoever relies on it has tried it out before.
#[must_use]
pub fn known(version: &str, flags: &BTreeMap<String, String>) -> StartWay {
    let date = version
        .strip_prefix("release-")
        .and_then(|rest| rest.get(..8)?.parse().ok());
    let mut changes = NETWORK_FLAGS.iter().chain(&XDP_FLAGS);
    let is_plain = !changes.any(|flag| flags.contains_key(*flag));
    match date {
        Some(date) if is_plain && (RELEASES.0..=RELEASES.1).contains(&date) => StartWay::Control,
        _ => StartWay::Command,
    }
}

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

/// A network that a sandbox can be given.
#[derive(Debug)]
pub(crate) struct Network {
    links: Links,
    sockets: Vec<OwnedFd>,
    /// In the namespace.
    netlink: Netlink,
    addresses: Vec<Address>,
}

impl Network {
    /// Looks at the network of `netns`, and changes nothing there. Blocks.
    ///
    /// # Errors
    /// When it is no plain network, or cannot be looked at.
    pub(crate) fn of(netns: BorrowedFd<'_>) -> io::Result<Self> {
        in_netns(netns, || {
            let mut netlink = Netlink::new()?;
            let (links, addresses) = Links::look(&mut netlink)?;
            let mut network = Self {
                links,
                sockets: Vec::new(),
                netlink,
                addresses,
            };
            for link in network.links.ethernets() {
                let (socket, has_gso) = socket::open(link.name(), link.index())?;
                link.set_gso(has_gso);
                network.sockets.push(socket);
            }
            Ok(network)
        })
    }

    /// Gives it to the sandbox of `client`.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub(crate) async fn give(&self, client: &Client) -> Result<(), ControlError> {
        let sockets: Vec<_> = self.sockets.iter().map(AsFd::as_fd).collect();
        client
            .order("Network.CreateLinksAndRoutes", &self.links, &sockets)
            .await
    }

    /// Takes the addresses away from the host's side, which would answer for them. Blocks.
    ///
    /// # Errors
    /// What the kernel says. An address that is gone already is no error.
    pub(crate) fn take_addresses(mut self) -> io::Result<()> {
        let addresses = std::mem::take(&mut self.addresses);
        addresses
            .into_iter()
            .try_for_each(|address| self.netlink.remove(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_known_by_its_date_and_plain_flags() {
        let none = BTreeMap::new();
        for (version, way) in [
            ("release-20260224.0", StartWay::Control),
            ("release-20260224-573d5e7127a8", StartWay::Control),
            ("release-20240729.0", StartWay::Command),
            ("release-20260801.0", StartWay::Command),
            ("release-2026", StartWay::Command),
            ("0.0~20260224.0", StartWay::Command),
            ("", StartWay::Command),
        ] {
            assert_eq!(known(version, &none), way, "{version}");
        }
        let flags = |name: &str| BTreeMap::from([(name.to_owned(), "x".to_owned())]);
        let of = |name| known("release-20260224.0", &flags(name));
        assert_eq!(of("platform"), StartWay::Control);
        assert_eq!(of("qdisc"), StartWay::Command);
    }
}
