// SPDX-License-Identifier: Apache-2.0

//! Which addresses may be connected to.
//!
//! Clients give the addresses of Pods, and DNS names of services lead wherever who made the
//! service wants. So no address is believed: it must be in a network of Pods, and must not be one
//! behind which something else than a sandbox answers.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Length of the prefix that Pods share with the router where nobody says which networks they
/// have: what kubeadm, kind and k3s give to a cluster.
const GUESS_V4: u8 = 16;
/// The same for IPv6: what dual-stack clusters of kubeadm have.
const GUESS_V6: u8 = 56;

/// Metadata servers of clouds that are not link-local: Azure, Alibaba, Oracle, AWS.
const METADATA: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// An address that is not connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no address of a sandbox")]
pub struct Forbidden(pub IpAddr);

/// Whether sandboxes may be behind loopback addresses, as where one shares the router's Pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loopback {
    /// They are not.
    Refused,
    /// They may be.
    Allowed,
}

/// Where sandboxes are.
#[derive(Debug, Clone)]
pub struct Networks {
    pods: Vec<IpNet>,
    never: Vec<IpAddr>,
    loopback: Loopback,
}

impl Networks {
    /// Sandboxes are in the networks `pods`, and at none of the addresses `never`.
    #[must_use]
    pub fn new(pods: Vec<IpNet>, never: &[IpAddr], loopback: Loopback) -> Self {
        let never = never.iter().chain(&METADATA).map(IpAddr::to_canonical);
        Self {
            pods,
            never: never.collect(),
            loopback,
        }
    }

    /// The network around a Pod in which the others are likely to be.
    #[must_use]
    pub fn around(pod: IpAddr) -> IpNet {
        match pod.to_canonical() {
            IpAddr::V4(v4) => Ipv4Net::new_assert(v4, GUESS_V4).trunc().into(),
            IpAddr::V6(v6) => Ipv6Net::new_assert(v6, GUESS_V6).trunc().into(),
        }
    }

    /// The networks of Pods.
    #[must_use]
    pub fn pods(&self) -> &[IpNet] {
        &self.pods
    }

    /// The address in its plain form, if it may be connected to.
    ///
    /// # Errors
    /// When it may not be.
    pub fn check(&self, address: IpAddr) -> Result<IpAddr, Forbidden> {
        // An IPv4 address in IPv6's clothes is connected to as what it is.
        let plain = address.to_canonical();
        let is_fine = if plain.is_loopback() {
            self.loopback == Loopback::Allowed
        } else {
            !is_special(plain)
                && !self.never.contains(&plain)
                && self.pods.iter().any(|network| network.contains(&plain))
        };
        is_fine.then_some(plain).ok_or(Forbidden(address))
    }
}

/// Addresses that no Pod has, whatever the networks are said to be.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            v4.octets()[0] == 0 || v4.is_link_local() || v4.is_multicast() || v4.is_broadcast()
        }
        IpAddr::V6(v6) => v6.is_unspecified() || v6.is_unicast_link_local() || v6.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(pods: &[&str], loopback: Loopback) -> Networks {
        let pods = pods.iter().map(|n| n.parse().unwrap()).collect();
        let never = ["10.244.0.1", "10.96.0.1"].map(|a| a.parse().unwrap());
        Networks::new(pods, &never, loopback)
    }

    #[track_caller]
    fn expect(networks: &Networks, address: &str, is_fine: bool) {
        let checked = networks.check(address.parse().unwrap());
        assert_eq!(checked.is_ok(), is_fine, "{address}");
    }

    #[test]
    fn only_pods_are_connected_to() {
        let some = networks(&["10.244.0.0/16", "fd00:10:244::/56"], Loopback::Refused);
        for fine in ["10.244.3.7", "::ffff:10.244.3.7", "fd00:10:244::7"] {
            expect(&some, fine, true);
        }
        for other in [
            "10.245.0.1",
            "10.96.0.1",
            "8.8.8.8",
            "10.244.0.1",
            "::ffff:10.244.0.1",
            "127.0.0.1",
            "::1",
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "0.0.0.0",
            "::",
            "fd00:10:245::7",
        ] {
            expect(&some, other, false);
        }
    }

    /// Someone may have said that Pods are everywhere.
    #[test]
    fn some_addresses_are_never_a_pods() {
        let all = networks(&["0.0.0.0/0", "::/0"], Loopback::Refused);
        for other in [
            "127.0.0.1",
            "127.8.9.10",
            "::ffff:127.0.0.1",
            "::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "169.254.169.254",
            "fe80::1",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "168.63.129.16",
            "100.100.100.200",
            "fd00:ec2::254",
            "10.96.0.1",
        ] {
            expect(&all, other, false);
        }
        expect(&all, "10.1.2.3", true);
        expect(&all, "2001:db8::1", true);
    }

    #[test]
    fn without_networks_nothing_is_connected_to() {
        let none = networks(&[], Loopback::Refused);
        expect(&none, "10.244.3.7", false);
        let own = networks(&[], Loopback::Allowed);
        expect(&own, "127.0.0.1", true);
        expect(&own, "10.244.3.7", false);
    }

    #[test]
    fn pods_are_guessed_around_the_router() {
        let around = |address: &str| Networks::around(address.parse().unwrap()).to_string();
        assert_eq!(around("10.244.3.7"), "10.244.0.0/16");
        assert_eq!(around("fd00:10:244:1::7"), "fd00:10:244::/56");
    }
}
