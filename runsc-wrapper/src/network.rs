// SPDX-License-Identifier: Apache-2.0

//! Gives a sandbox the network of a namespace over its control socket.
//!
//! `runsc start` reads links, addresses and routes in the sandbox's network namespace, takes the
//! addresses away from the host's side, and hands packet sockets to the sentry (gVisor
//! `runsc/sandbox/network.go`). The same is done here without a process, and in another order:
//! the host's side keeps its addresses until the sentry has said yes.
//!
//! The call belongs to the release ([`Release`](crate::Release)), and a network that is not plain
//! is left to the command.

mod links;
mod netlink;
mod socket;

use kiln_host::in_netns;
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use crate::{
    NetworkCall,
    control::{Client, ControlError},
};

use netlink::{Address, Netlink};

pub(crate) use links::Links;

/// Flags of runsc that change what it does about a network.
const NETWORK_FLAGS: [&str; 18] = [
    "allow-connected-on-save",
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
    "qdisc-tbf-burst",
    "qdisc-tbf-rate",
    "reproduce-nat",
    "reproduce-nftables",
    "rx-checksum-offload",
    "software-gso",
    "tx-checksum-offload",
];

/// Flags of runsc that have a sandbox send by AF_XDP, under the names that releases give them.
const XDP_FLAGS: [&str; 2] = ["EXPERIMENTAL-xdp", "xdp"];

/// Flag of runsc that has sandboxes send by AF_XDP. Frames of such a socket pass no egress hook
/// ([`kiln_host::egress`]).
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("runsc's flag `{0}` has sandboxes send by AF_XDP, which no rule sees")]
pub struct XdpFlag(&'static str);

/// Checks that no flag of runsc has sandboxes send by AF_XDP.
///
/// # Errors
/// [`XdpFlag`] names the flag.
pub fn check_no_xdp(flags: &BTreeMap<String, String>) -> Result<(), XdpFlag> {
    // Its value is `off` unless it is set (gVisor `runsc/config/config.go`, `XDP`).
    let is_on = |flag: &&str| flags.get(*flag).is_some_and(|value| value != "off");
    let on = XDP_FLAGS.into_iter().find(is_on);
    on.map_or(Ok(()), |flag| Err(XdpFlag(flag)))
}

/// Whether runsc does about a network with these flags what is done here.
pub(crate) fn has_plain_network(flags: &BTreeMap<String, String>) -> bool {
    let mut changes = NETWORK_FLAGS.iter().chain(&XDP_FLAGS);
    !changes.any(|flag| flags.contains_key(*flag))
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

    /// Gives it to the sandbox of `client` by this call.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub(crate) async fn give(
        &self,
        client: &Client,
        call: NetworkCall,
    ) -> Result<(), ControlError> {
        let sockets: Vec<_> = self.sockets.iter().map(AsFd::as_fd).collect();
        client.order(call.method(), &self.links, &sockets).await
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
    fn a_flag_that_sends_past_the_rules_is_named() {
        let named = |flag: &str, value: &str| {
            let flags = BTreeMap::from([(flag.to_owned(), value.to_owned())]);
            check_no_xdp(&flags).map_err(|e| e.0)
        };
        for (flag, value) in [
            ("EXPERIMENTAL-xdp", "ns"),
            ("EXPERIMENTAL-xdp", "redirect:eth0"),
            ("xdp", "tunnel:eth0"),
        ] {
            assert_eq!(named(flag, value), Err(flag));
        }
        for (flag, value) in [
            ("EXPERIMENTAL-xdp", "off"),
            ("EXPERIMENTAL-xdp-need-wakeup", "true"),
            ("network", "sandbox"),
        ] {
            assert_eq!(named(flag, value), Ok(()), "{flag}");
        }
    }
}
