// SPDX-License-Identifier: Apache-2.0

//! The links of a namespace in the form of a sentry's call (gVisor `runsc/boot/network.go`).
//! Fields that are not here are zero in Go.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use netlink_packet_route::{
    AddressFamily,
    address::AddressAttribute,
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric},
};
use serde::Serialize;

use super::netlink::{Address, Netlink};

/// `stack.GVisorGSOMaxSize` of gVisor, bytes.
const SENTRY_GSO: u32 = 1 << 16;
/// `config.QDiscFIFO` of gVisor, runsc's default.
const FIFO: u32 = 1;

/// `boot.CreateLinksAndRoutesArgs`.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Links {
    loopback_links: Vec<Loopback>,
    #[serde(rename = "FDBasedLinks")]
    ethernets: Vec<Ethernet>,
    #[serde(skip_serializing_if = "Option::is_none")]
    defaultv4_gateway: Option<DefaultRoute>,
    #[serde(skip_serializing_if = "Option::is_none")]
    defaultv6_gateway: Option<DefaultRoute>,
}

/// `boot.LoopbackLink`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Loopback {
    name: String,
    addresses: Vec<Prefix>,
    routes: Vec<Route>,
}

/// `boot.FDBasedLink`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Ethernet {
    name: String,
    interface_index: u32,
    #[serde(rename = "MTU")]
    mtu: u32,
    addresses: Vec<Prefix>,
    routes: Vec<Route>,
    #[serde(rename = "GSOMaxSize")]
    gso_max_size: u32,
    #[serde(rename = "GVisorGSOEnabled")]
    sentry_gso: bool,
    #[serde(rename = "RXChecksumOffload")]
    rx_checksum_offload: bool,
    link_address: String,
    #[serde(rename = "QDisc")]
    qdisc: u32,
    neighbors: Vec<Neighbor>,
    num_channels: u32,
}

/// `boot.IPWithPrefix`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Prefix {
    address: IpAddr,
    prefix_len: u8,
}

/// `boot.Route`.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Route {
    destination: IpNet,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    #[serde(rename = "MTU")]
    mtu: u32,
}

/// `net.IPNet`.
#[derive(Debug, PartialEq, Serialize)]
struct IpNet {
    #[serde(rename = "IP")]
    ip: IpAddr,
    #[serde(rename = "Mask")]
    mask: String,
}

/// `boot.DefaultRoute`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct DefaultRoute {
    route: Route,
    name: String,
}

/// `boot.Neighbor`.
#[derive(Debug, Serialize)]
struct Neighbor {
    #[serde(rename = "IP")]
    ip: IpAddr,
    #[serde(rename = "HardwareAddr")]
    hardware_address: String,
}

impl Ethernet {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn index(&self) -> u32 {
        self.interface_index
    }

    /// Who segments: the host, or else the sentry.
    pub(super) fn set_gso(&mut self, by_host: bool) {
        if !by_host || self.gso_max_size == 0 {
            self.gso_max_size = SENTRY_GSO;
            self.sentry_gso = true;
        }
    }
}

impl Links {
    /// Looks at the namespace of `netlink`. Also returns the addresses that the host's side must
    /// give up.
    ///
    /// # Errors
    /// When something there has no place in the call.
    pub(super) fn look(netlink: &mut Netlink) -> io::Result<(Self, Vec<Address>)> {
        let mut found = Self::default();
        let mut to_take = Vec::new();
        let links = netlink.links()?;
        let addresses = netlink.addresses()?;
        let routes = netlink.routes()?;
        let neighbours = netlink.neighbours()?;
        for link in links {
            if !link.header.flags.contains(LinkFlags::Up) {
                continue;
            }
            let index = link.header.index;
            let own = addresses.iter().filter(|a| a.header.index == index);
            let own: Vec<&Address> = own.collect();
            let prefixes: Vec<Prefix> = own.iter().filter_map(|a| prefix(a)).collect();
            let name = name_of(&link)?;
            if link.header.flags.contains(LinkFlags::Loopback) {
                let routes = prefixes.iter().map(Prefix::network).collect();
                found.loopback_links.push(Loopback {
                    name,
                    addresses: prefixes,
                    routes,
                });
                continue;
            }
            if prefixes.is_empty() {
                continue;
            }
            let mut ethernet = Ethernet::new(&link, name, prefixes);
            ethernet.neighbors = permanent(&neighbours, index);
            for route in routes.iter().filter(|r| is_of(r, index)) {
                found.add_route(&mut ethernet, route)?;
            }
            found.ethernets.push(ethernet);
            to_take.extend(own.into_iter().cloned());
        }
        if routes.iter().any(is_shared) {
            return Err(io::Error::other("a route has several next hops"));
        }
        Ok((found, to_take))
    }

    pub(super) fn ethernets(&mut self) -> impl Iterator<Item = &mut Ethernet> {
        self.ethernets.iter_mut()
    }

    fn add_route(&mut self, link: &mut Ethernet, message: &RouteMessage) -> io::Result<()> {
        let route = Route::of(message)?;
        if message.header.destination_prefix_length > 0 {
            link.routes.push(route);
            return Ok(());
        }
        let default = match route.gateway {
            None => return Err(io::Error::other("a default route without a gateway")),
            Some(IpAddr::V4(_)) => &mut self.defaultv4_gateway,
            Some(IpAddr::V6(_)) => &mut self.defaultv6_gateway,
        };
        let name = link.name.clone();
        match default.replace(DefaultRoute { route, name }) {
            None => Ok(()),
            Some(_) => Err(io::Error::other("more than one default route")),
        }
    }
}

impl Ethernet {
    fn new(link: &LinkMessage, name: String, addresses: Vec<Prefix>) -> Self {
        let mut new = Self {
            name,
            interface_index: link.header.index,
            mtu: 0,
            addresses,
            routes: Vec::new(),
            gso_max_size: 0,
            sentry_gso: false,
            rx_checksum_offload: true,
            link_address: String::new(),
            qdisc: FIFO,
            neighbors: Vec::new(),
            num_channels: 1,
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => new.mtu = *mtu,
                LinkAttribute::GsoMaxSize(size) => new.gso_max_size = *size,
                LinkAttribute::Address(mac) => new.link_address = BASE64_STANDARD.encode(mac),
                _ => {}
            }
        }
        new
    }
}

impl Route {
    fn of(message: &RouteMessage) -> io::Result<Self> {
        let length = message.header.destination_prefix_length;
        let mut ip = match message.header.address_family {
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        };
        let (mut gateway, mut mtu) = (None, 0);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(to) => ip = address(to)?,
                RouteAttribute::Gateway(via) => gateway = Some(address(via)?),
                RouteAttribute::Metrics(metrics) => {
                    let of_mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                    mtu = of_mtu.unwrap_or_default();
                }
                RouteAttribute::Via(_) => {
                    return Err(io::Error::other("a route by way of another family"));
                }
                _ => {}
            }
        }
        Ok(Self {
            destination: IpNet::new(ip, length),
            gateway,
            mtu,
        })
    }
}

impl Prefix {
    /// The route to its own network.
    fn network(&self) -> Route {
        Route {
            destination: IpNet::new(self.address, self.prefix_len),
            gateway: None,
            mtu: 0,
        }
    }
}

impl IpNet {
    /// The network of `length` bits that `ip` is in.
    fn new(ip: IpAddr, length: u8) -> Self {
        let (ip, mask) = match ip {
            IpAddr::V4(ip) => {
                let bits = 32 - u32::from(length.min(32));
                let mask = u32::MAX.checked_shl(bits).unwrap_or(0);
                let ip = Ipv4Addr::from_bits(ip.to_bits() & mask);
                (ip.into(), mask.to_be_bytes().to_vec())
            }
            IpAddr::V6(ip) => {
                let bits = 128 - u32::from(length.min(128));
                let mask = u128::MAX.checked_shl(bits).unwrap_or(0);
                let ip = Ipv6Addr::from_bits(ip.to_bits() & mask);
                (IpAddr::from(ip), mask.to_be_bytes().to_vec())
            }
        };
        Self {
            ip,
            mask: BASE64_STANDARD.encode(mask),
        }
    }
}

fn name_of(link: &LinkMessage) -> io::Result<String> {
    let name = link
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
    name.ok_or_else(|| io::Error::other("a link without a name"))
}

/// The local address; at a point-to-point link the other one is the peer's.
fn prefix(address: &Address) -> Option<Prefix> {
    let of =
        |want: fn(&AddressAttribute) -> Option<IpAddr>| address.attributes.iter().find_map(want);
    let local = of(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let any = of(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    Some(Prefix {
        address: local.or(any)?,
        prefix_len: address.header.prefix_len,
    })
}

/// Whether a route of the main table leads over the link `index`, and was not made by the kernel
/// for one destination of another.
fn is_of(route: &RouteMessage, index: u32) -> bool {
    let mut table = u32::from(route.header.table);
    let mut over = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(link) => over = Some(*link),
            _ => {}
        }
    }
    table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && over == Some(index)
        && !route.header.flags.contains(RouteFlags::Cloned)
}

fn is_shared(route: &RouteMessage) -> bool {
    let is_multi = |a: &RouteAttribute| matches!(a, RouteAttribute::MultiPath(_));
    route.attributes.iter().any(is_multi)
}

/// The neighbours on link `index` that somebody has entered; others are found again.
fn permanent(neighbours: &[NeighbourMessage], index: u32) -> Vec<Neighbor> {
    let permanent = neighbours.iter().filter(|neighbour| {
        neighbour.header.ifindex == index && neighbour.header.state == NeighbourState::Permanent
    });
    permanent.filter_map(Neighbor::of).collect()
}

impl Neighbor {
    fn of(message: &NeighbourMessage) -> Option<Self> {
        let (mut ip, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                    ip = Some(IpAddr::V4(*v4));
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                    ip = Some(IpAddr::V6(*v6));
                }
                NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes),
                _ => {}
            }
        }
        Some(Self {
            ip: ip?,
            hardware_address: BASE64_STANDARD.encode(mac?),
        })
    }
}

fn address(address: &RouteAddress) -> io::Result<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Ok(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Ok(IpAddr::V6(*v6)),
        _ => Err(io::Error::other("a route of a family that is not IP")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(ip: &str, length: u8) -> (String, String) {
        let net = IpNet::new(ip.parse().unwrap(), length);
        (net.ip.to_string(), net.mask)
    }

    #[test]
    fn networks_are_masked() {
        for (ip, length, network, mask) in [
            ("10.1.2.3", 24, "10.1.2.0", "////AA=="),
            ("10.1.2.3", 32, "10.1.2.3", "/////w=="),
            ("10.1.2.3", 0, "0.0.0.0", "AAAAAA=="),
            ("fd00::1:2", 112, "fd00::1:0", "//////////////////8AAA=="),
            ("fd00::1", 0, "::", "AAAAAAAAAAAAAAAAAAAAAA=="),
        ] {
            assert_eq!(net(ip, length), (network.to_owned(), mask.to_owned()));
        }
    }

    fn default_route(via: RouteAddress, family: AddressFamily) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.attributes = vec![RouteAttribute::Oif(2), RouteAttribute::Gateway(via)];
        route
    }

    fn ethernet() -> Ethernet {
        let mut link = LinkMessage::default();
        link.header.index = 2;
        link.attributes = vec![
            LinkAttribute::Mtu(1500),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
            LinkAttribute::GsoMaxSize(65536),
        ];
        let address = Prefix {
            address: "10.0.0.5".parse().unwrap(),
            prefix_len: 16,
        };
        Ethernet::new(&link, "eth0".to_owned(), vec![address])
    }

    #[test]
    fn a_link_and_its_default_routes_are_as_the_sentry_reads_them() {
        let mut links = Links::default();
        let mut link = ethernet();
        let v4 = default_route(
            RouteAddress::Inet(Ipv4Addr::new(10, 0, 0, 1)),
            AddressFamily::Inet,
        );
        let v6 = default_route(
            RouteAddress::Inet6("fd00::1".parse().unwrap()),
            AddressFamily::Inet6,
        );
        assert!(is_of(&v4, 2) && !is_of(&v4, 3));
        links.add_route(&mut link, &v4).unwrap();
        links.add_route(&mut link, &v6).unwrap();
        assert!(links.add_route(&mut link, &v4).is_err(), "two of them");
        link.set_gso(true);
        links.ethernets.push(link);
        let json = serde_json::to_value(&links).unwrap();
        assert_eq!(json["Defaultv6Gateway"]["Route"]["Gateway"], "fd00::1");
        let route = &json["Defaultv6Gateway"]["Route"]["Destination"];
        assert_eq!(route["IP"], "::");
        let link = &json["FDBasedLinks"][0];
        assert_eq!(link["Name"], "eth0");
        assert_eq!(link["MTU"], 1500);
        assert_eq!(link["LinkAddress"], "AgAAAAAB");
        assert_eq!(link["GSOMaxSize"], 65536);
        assert_eq!(link["GVisorGSOEnabled"], false);
        assert_eq!(link["Addresses"][0]["PrefixLen"], 16);
        assert_eq!(link["QDisc"], 1);
    }

    #[test]
    fn the_sentry_segments_where_the_host_does_not() {
        let mut link = ethernet();
        link.set_gso(false);
        assert!(link.sentry_gso && link.gso_max_size == SENTRY_GSO);
    }

    #[test]
    fn a_default_route_needs_a_gateway() {
        let mut route = default_route(RouteAddress::Inet(Ipv4Addr::LOCALHOST), AddressFamily::Inet);
        route.attributes.pop();
        let error = Links::default().add_route(&mut ethernet(), &route);
        assert!(error.unwrap_err().to_string().contains("gateway"));
    }
}
