// SPDX-License-Identifier: Apache-2.0

//! The messages to nf_tables that [`super::Guard`] needs, put together by hand: they are a dozen,
//! nodes need no `nft`, and no maintained crate speaks of egress hooks without it.
//!
//! Numbers are those of the kernel's `include/uapi/linux/netfilter/nf_tables.h`, `nfnetlink.h` and
//! `netfilter.h`; names of attributes are kept as comments.

use std::net::IpAddr;

/// Family of tables that see frames of devices: `NFPROTO_NETDEV`.
const NETDEV: u8 = 5;
/// Messages of nf_tables: `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = NFTABLES << 8;
const DEL_TABLE: u16 = NFTABLES << 8 | 2;
const NEW_CHAIN: u16 = NFTABLES << 8 | 3;
const NEW_RULE: u16 = NFTABLES << 8 | 6;
const NEW_OBJECT: u16 = NFTABLES << 8 | 18;
const GET_OBJECT: u16 = NFTABLES << 8 | 19;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// Attribute types with other attributes inside: `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;

/// `NF_NETDEV_EGRESS`, since kernel 5.16.
const EGRESS: u32 = 1;
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// `NFT_OBJECT_COUNTER`.
const COUNTER_OBJECT: u32 = 1;
/// `NFT_REG_1`, of 16 bytes.
const REGISTER: u32 = 1;
/// `NFT_PAYLOAD_LL_HEADER`.
const FRAME: u32 = 0;

/// Where a frame says its type, and where what it carries begins: what the other end goes by,
/// while what the kernel notes with a packet, where its network header is too, is what the sender
/// of a packet socket says.
const ETHERTYPE: u32 = 12;
const NETWORK: u32 = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const ARP: [u8; 2] = [0x08, 0x06];
/// Where the destination is in a header, and where what neighbour discovery is known by is.
const IPV4_DESTINATION: u32 = 16;
const IPV6_DESTINATION: u32 = 24;
const IPV6_NEXT_HEADER: u32 = 6;
const IPV6_HOP_LIMIT: u32 = 7;
const IPV6_PAYLOAD: u32 = 40;
const ICMPV6: u8 = 58;
/// The first and last types of ICMPv6 by which a host, and not a router, discovers its neighbours
/// (RFC 4861): router solicitation, neighbour solicitation and neighbour advertisement.
const HOST_DISCOVERY: [(u8, u8); 2] = [(133, 133), (135, 136)];

/// Table, chain and counter.
const TABLE: &str = "kiln";
const CHAIN: &str = "egress";
const COUNTER: &str = "dropped";

/// What becomes of a packet.
#[derive(Clone, Copy)]
pub(super) enum Verdict {
    /// It may go.
    Accept,
    /// It is counted and dropped.
    Drop,
}

/// A list of attributes.
#[derive(Default)]
struct Attributes(Vec<u8>);

impl Attributes {
    fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        // Values here are names, numbers and lists of few rules: far below 64 KiB.
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes)
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let mut inner = Self::default();
        fill(&mut inner);
        self.put(kind | NESTED, &inner.0)
    }

    /// An element of a list of expressions.
    fn expression(&mut self, name: &str, fill: impl FnOnce(&mut Self)) -> &mut Self {
        // NFTA_LIST_ELEM: NFTA_EXPR_NAME, NFTA_EXPR_DATA
        self.nest(1, |element| {
            element.text(1, name).nest(2, fill);
        })
    }

    /// Goes on only with frames of this type.
    fn of_type(&mut self, ethertype: [u8; 2]) -> &mut Self {
        self.bytes_within(ETHERTYPE, &ethertype, &ethertype)
    }

    /// Goes on only where the bytes at `offset` of the frame are from `first` to `last`.
    fn bytes_within(&mut self, offset: u32, first: &[u8], last: &[u8]) -> &mut Self {
        let length = u32::try_from(first.len()).unwrap_or(u32::MAX);
        // NFTA_PAYLOAD_DREG, _BASE, _OFFSET, _LEN
        self.expression("payload", |e| {
            e.number(1, REGISTER)
                .number(2, FRAME)
                .number(3, offset)
                .number(4, length);
        });
        // NFTA_RANGE_SREG, _OP (NFT_RANGE_EQ), _FROM_DATA, _TO_DATA; NFTA_DATA_VALUE
        self.expression("range", |e| {
            e.number(1, REGISTER)
                .number(2, 0)
                .nest(3, |d| _ = d.put(1, first))
                .nest(4, |d| _ = d.put(1, last));
        })
    }

    /// The same of the network's header.
    fn network(&mut self, offset: u32, first: &[u8], last: &[u8]) -> &mut Self {
        self.bytes_within(NETWORK + offset, first, last)
    }

    fn count(&mut self) -> &mut Self {
        // NFTA_OBJREF_IMM_TYPE, _IMM_NAME
        self.expression("objref", |e| {
            e.number(1, COUNTER_OBJECT).text(2, COUNTER);
        })
    }

    fn verdict(&mut self, verdict: Verdict) -> &mut Self {
        let code = match verdict {
            Verdict::Accept => ACCEPT,
            Verdict::Drop => {
                self.count();
                DROP
            }
        };
        // NFTA_IMMEDIATE_DREG (NFT_REG_VERDICT), _DATA; NFTA_DATA_VERDICT; NFTA_VERDICT_CODE
        self.expression("immediate", |e| {
            e.number(1, 0).nest(2, |d| {
                d.nest(2, |v| _ = v.number(1, code));
            });
        })
    }
}

/// Messages that the kernel takes all or none of.
pub(super) struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    /// A batch that makes the table anew, with its counter and its chain at the egress of
    /// `devices`, which drops what no rule accepts. Messages are numbered from `sequence`.
    pub(super) fn new(sequence: u32, devices: &[String]) -> Self {
        let mut batch = Self {
            bytes: Vec::new(),
            sequence,
        };
        batch.add(BATCH_BEGIN, 0, &Attributes::default());
        let mut table = Attributes::default();
        table.text(1, TABLE); // NFTA_TABLE_NAME
        // One that is there is made again: it may be of a start that failed, with other devices.
        batch.add(NEW_TABLE, CREATE, &table);
        batch.add(DEL_TABLE, 0, &table);
        batch.add(NEW_TABLE, CREATE, &table);
        batch.add(NEW_OBJECT, CREATE, &counter(true));
        let mut chain = Attributes::default();
        // NFTA_CHAIN_TABLE, _NAME, _HOOK, _POLICY, _TYPE
        chain.text(1, TABLE).text(3, CHAIN).nest(4, |hook| {
            // NFTA_HOOK_HOOKNUM, _PRIORITY, _DEVS; NFTA_DEVICE_NAME
            hook.number(1, EGRESS).number(2, 0).nest(4, |names| {
                for device in devices {
                    names.text(1, device);
                }
            });
        });
        // A rule does not match a frame that it cannot read, so that only a policy can drop it. The
        // kernel has no link layer header for rules to read if a sender sets PACKET_QDISC_BYPASS
        // and names a protocol (`packet_snd` of its `net/packet/af_packet.c`).
        chain.number(5, DROP).text(7, "filter");
        batch.add(NEW_CHAIN, CREATE, &chain);
        batch
    }

    /// What becomes of packets to addresses from `first` to `last`, which are of one family.
    pub(super) fn to(&mut self, first: IpAddr, last: IpAddr, verdict: Verdict) {
        self.rule(|rule| match (first, last) {
            (IpAddr::V4(first), IpAddr::V4(last)) => {
                rule.of_type(IPV4)
                    .network(IPV4_DESTINATION, &first.octets(), &last.octets())
                    .verdict(verdict);
            }
            (first, last) => {
                let octets = |ip| match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                rule.of_type(IPV6)
                    .network(IPV6_DESTINATION, &octets(first), &octets(last))
                    .verdict(verdict);
            }
        });
    }

    /// Lets the neighbour discovery of hosts pass, sent with a hop limit of 255 (RFC 4861). Without
    /// it a router's link-local address cannot be resolved, nor the Pod's by the router.
    pub(super) fn neighbour_discovery(&mut self) {
        for (first, last) in HOST_DISCOVERY {
            self.rule(|rule| {
                rule.of_type(IPV6)
                    .network(IPV6_NEXT_HEADER, &[ICMPV6], &[ICMPV6])
                    .network(IPV6_HOP_LIMIT, &[255], &[255])
                    .network(IPV6_PAYLOAD, &[first], &[last])
                    .verdict(Verdict::Accept);
            });
        }
    }

    /// Accepts frames of IP and ARP, and counts all others before the policy drops them. Those may
    /// hide what they carry: the receiver takes off a tag of VLAN 0 and goes on as if it had never
    /// been there (`skb_vlan_untag` of the kernel).
    pub(super) fn rest(&mut self) {
        for ethertype in [IPV4, IPV6, ARP] {
            self.rule(|rule| _ = rule.of_type(ethertype).verdict(Verdict::Accept));
        }
        self.rule(|rule| _ = rule.count());
    }

    fn rule(&mut self, fill: impl FnOnce(&mut Attributes)) {
        let mut rule = Attributes::default();
        // NFTA_RULE_TABLE, _CHAIN, _EXPRESSIONS
        rule.text(1, TABLE).text(2, CHAIN).nest(4, fill);
        // Each is acknowledged; what counts is the last.
        self.add(NEW_RULE, CREATE | APPEND | ACK, &rule);
    }

    fn add(&mut self, kind: u16, flags: u16, attributes: &Attributes) {
        self.sequence += 1;
        let frame = matches!(kind, BATCH_BEGIN | BATCH_END);
        let (family, resource) = if frame { (0, NFTABLES) } else { (NETDEV, 0) };
        self.bytes.extend(message(
            kind,
            flags,
            self.sequence,
            family,
            resource,
            attributes,
        ));
    }

    /// All of it, and the number of the last message that is acknowledged.
    pub(super) fn finish(mut self) -> (Vec<u8>, u32) {
        let last = self.sequence;
        self.add(BATCH_END, 0, &Attributes::default());
        (self.bytes, last)
    }
}

/// A request for the counter.
pub(super) fn get_counter(sequence: u32) -> Vec<u8> {
    message(GET_OBJECT, 0, sequence, NETDEV, 0, &counter(false))
}

/// How many packets an answer to that says were dropped.
pub(super) fn packets(attributes: &[u8]) -> Option<u64> {
    // NFTA_OBJ_DATA, NFTA_COUNTER_PACKETS
    let packets = find(find(attributes, 4)?, 2)?;
    Some(u64::from_be_bytes(packets.try_into().ok()?))
}

fn counter(new: bool) -> Attributes {
    let mut counter = Attributes::default();
    // NFTA_OBJ_TABLE, _NAME, _TYPE
    counter
        .text(1, TABLE)
        .text(2, COUNTER)
        .number(3, COUNTER_OBJECT);
    if new {
        counter.nest(4, |_| {});
    }
    counter
}

/// The value of the attribute `kind` in a list of them.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let found = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(4..length)?;
        if found & !NESTED == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// An `nlmsghdr` with an `nfgenmsg` and attributes.
fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: &Attributes,
) -> Vec<u8> {
    const HEADERS: usize = 16 + 4;
    let length = u32::try_from(HEADERS + attributes.0.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADERS + attributes.0.len());
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]); // the kernel fills the port in
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(&attributes.0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_and_what_is_cut_off_is_none() {
        let mut answer = Attributes::default();
        answer.text(1, TABLE).nest(4, |data| {
            data.put(1, &70u64.to_be_bytes())
                .put(2, &3u64.to_be_bytes());
        });
        assert_eq!(packets(&answer.0), Some(3));
        for length in 0..answer.0.len() {
            assert_eq!(packets(&answer.0[..length]), None, "{length}");
        }
        assert_eq!(packets(&[0; 64]), None, "an attribute without a length");
    }
}
