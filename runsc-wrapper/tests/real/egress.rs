// SPDX-License-Identifier: Apache-2.0

//! Frames that are put on a link by a packet socket, as a sentry does it, and what of them comes
//! out at its other end.

use std::{
    fs::File,
    io::Read,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::{Command, Stdio},
};

use kiln_host::{
    egress::{Guard, GuardError, LinkLocal},
    in_netns,
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socket,
            sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

/// How often a frame that must arrive is sent: links that are just up drop everything until the
/// kernel gets round to them.
const TRIES: usize = 50;

fn new_namespace() -> OwnedFd {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        OwnedFd::from(File::open("/proc/thread-self/ns/net").unwrap())
    };
    std::thread::spawn(make).join().unwrap()
}

/// A namespace with two links that lead to each other, `eth0` and `peer`.
fn namespace() -> OwnedFd {
    let netns = new_namespace();
    let make =
        "ip link add eth0 type veth peer name peer && ip link set eth0 up && ip link set peer up";
    in_namespace(&netns, make);
    netns
}

/// Runs a command of the shell in the namespace.
fn in_namespace(netns: &OwnedFd, command: &str) {
    let run = || {
        let mut child = Command::new("sh")
            .args(["-c", &format!("{command} && echo done")])
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = String::new();
        let mut output = child.stdout.take().unwrap();
        output.read_to_string(&mut said)?;
        // Its status may be gone: other tests have all children reaped (`reap::become_subreaper`).
        let _ = child.wait();
        Ok(said)
    };
    assert_eq!(in_netns(netns.as_fd(), run).unwrap(), "done\n", "{command}");
}

/// A packet socket of a link for frames of every type, whose own it says are of type `protocol`.
fn packets(netns: &OwnedFd, link: &str, protocol: i32) -> OwnedFd {
    let open = || {
        let fd = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        // SAFETY: all zeroes is a value of this plain C struct.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (protocol as u16).to_be();
        address.sll_ifindex = nix::net::if_::if_nametoindex(link)?.cast_signed();
        let size = u32::try_from(size_of_val(&address)).unwrap();
        // SAFETY: the pointer is to a whole sockaddr_ll of that size.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size) };
        Errno::result(bound)?;
        let moment = TimeVal::new(0, 200_000);
        setsockopt(&fd, ReceiveTimeout, &moment)?;
        Ok(fd)
    };
    in_netns(netns.as_fd(), open).unwrap()
}

/// An Ethernet frame with a packet to `to`, whose payload is `payload`.
fn frame(to: IpAddr, next: u8, hops: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    let length = u16::try_from(payload.len()).unwrap();
    match to {
        IpAddr::V4(to) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + length).to_be_bytes());
            frame.extend([0, 0, 0, 0, hops, next, 0, 0]);
            frame.extend(Ipv4Addr::new(10, 0, 0, 1).octets());
            frame.extend(to.octets());
        }
        IpAddr::V6(to) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(length.to_be_bytes());
            frame.extend([next, hops]);
            frame.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets());
            frame.extend(to.octets());
        }
    }
    frame.extend(payload);
    frame
}

/// Has frames of a packet socket go to the device past the queues (packet(7)).
fn bypass_queues(socket: &OwnedFd) {
    let (on, size) = (1i32, 4);
    // SAFETY: the pointer is to an integer of that size.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            (&raw const on).cast(),
            size,
        )
    };
    Errno::result(set).unwrap();
}

struct Link {
    netns: OwnedFd,
    sender: OwnedFd,
    receiver: OwnedFd,
}

impl Link {
    fn new() -> Self {
        let netns = namespace();
        let [sender, receiver] =
            ["eth0", "peer"].map(|link| packets(&netns, link, libc::ETH_P_ALL));
        Self {
            netns,
            sender,
            receiver,
        }
    }

    /// Whether a frame arrives.
    fn passes(&self, frame: &[u8]) -> bool {
        self.passes_by(&self.sender, frame, frame)
    }

    /// Whether what `sender` sends arrives as `frame`.
    fn passes_by(&self, sender: &OwnedFd, sent: &[u8], frame: &[u8]) -> bool {
        // A frame that is dropped at egress is an error of the sender's.
        match send(sender.as_raw_fd(), sent, MsgFlags::empty()) {
            Ok(_) | Err(Errno::ENOBUFS) => {}
            Err(e) => panic!("send: {e}"),
        }
        let mut buffer = [0; 256];
        loop {
            match recv(self.receiver.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) if buffer[..length] == *frame => return true,
                Ok(_) => {}             // the kernel's own neighbour discovery
                Err(Errno::EINTR) => {} // a child of another test has ended
                Err(Errno::EAGAIN) => return false,
                Err(e) => panic!("receive: {e}"),
            }
        }
    }

    fn passes_to(&self, to: &str) -> bool {
        self.passes(&frame(to.parse().unwrap(), 17, 64, b"hello"))
    }

    /// Whether a frame that nothing is to drop arrives, sooner or later.
    fn arrives(&self, frame: &[u8]) -> bool {
        self.arrives_by(&self.sender, frame, frame)
    }

    fn arrives_by(&self, sender: &OwnedFd, sent: &[u8], frame: &[u8]) -> bool {
        let failed = (0..TRIES).position(|_| self.passes_by(sender, sent, frame));
        if failed.is_some_and(|tries| tries > 0) {
            // Those that were only late must not be taken for later ones.
            let mut buffer = [0; 256];
            let mut next = || recv(self.receiver.as_raw_fd(), &mut buffer, MsgFlags::empty());
            while matches!(next(), Ok(_) | Err(Errno::EINTR)) {}
        }
        failed.is_some()
    }

    fn arrives_to(&self, to: &str) -> bool {
        self.arrives(&frame(to.parse().unwrap(), 17, 64, b"hello"))
    }
}

const FORBIDDEN: [&str; 8] = [
    "169.254.0.1",
    "169.254.169.254",
    "169.254.255.255",
    "100.100.100.200",
    "64:ff9b::a9fe:a9fe",
    "fe80::1",
    "fd00:ec2::254",
    "fd20:ce::254",
];

const FREE: [&str; 5] = [
    "10.0.0.2",
    "8.8.8.8",
    "169.253.255.255",
    "2001:db8::2",
    "fec0::1",
];

#[test]
#[ignore = "needs root"]
fn frames_to_forbidden_addresses_are_dropped_and_counted() {
    let link = Link::new();
    for to in FORBIDDEN.into_iter().chain(FREE) {
        assert!(link.arrives_to(to), "{to} before");
    }
    let mut guard = Guard::set(link.netns.as_fd(), &LinkLocal::default()).unwrap();
    assert_eq!(guard.dropped().unwrap(), 0);
    for (n, to) in FORBIDDEN.into_iter().enumerate() {
        assert!(!link.passes_to(to), "{to}");
        assert_eq!(guard.dropped().unwrap(), n as u64 + 1, "{to}");
    }
    for to in FREE {
        assert!(link.arrives_to(to), "{to}");
    }
    // They stay when whoever made them is gone, and can be found again.
    drop(guard);
    assert!(!link.passes_to(FORBIDDEN[0]));
    let mut found = Guard::of(link.netns.as_fd()).unwrap();
    assert_eq!(found.dropped().unwrap(), FORBIDDEN.len() as u64 + 1);
}

#[test]
#[ignore = "needs root"]
fn a_tag_or_a_wrong_word_on_the_type_hides_nothing() {
    let link = Link::new();
    let frame = frame("169.254.169.254".parse().unwrap(), 17, 64, b"hello");
    let tagged = |tag: [u8; 2]| [&frame[..12], &tag, &[0, 0], &frame[12..]].concat();
    let all = [
        // Tags of VLAN 0, which the other end takes off.
        (libc::ETH_P_ALL, Queues::Used, tagged([0x81, 0x00])),
        (libc::ETH_P_ALL, Queues::Used, tagged([0x88, 0xa8])),
        // The kernel then looks for the packet four bytes further on.
        (libc::ETH_P_8021Q, Queues::Used, frame.clone()),
        (libc::ETH_P_ALL, Queues::Bypassed, frame.clone()),
        // The kernel then knows of no link layer header.
        (libc::ETH_P_IP, Queues::Bypassed, frame.clone()),
    ];
    let sender = |protocol, queues: &Queues| {
        let sender = packets(&link.netns, "eth0", protocol);
        if matches!(queues, Queues::Bypassed) {
            bypass_queues(&sender);
        }
        sender
    };
    let passes = |(protocol, queues, sent): &(i32, Queues, Vec<u8>)| {
        link.passes_by(&sender(*protocol, queues), sent, &frame)
    };
    let arrives = |(protocol, queues, sent): &(i32, Queues, Vec<u8>)| {
        link.arrives_by(&sender(*protocol, queues), sent, &frame)
    };
    assert_eq!(all.each_ref().map(arrives), [true; 5], "before");
    let mut guard = Guard::set(link.netns.as_fd(), &LinkLocal::default()).unwrap();
    assert_eq!(all.each_ref().map(passes), [false; 5]);
    assert_eq!(guard.dropped().unwrap(), 5);
}

/// Whether frames of a socket wait in the queues of its device.
enum Queues {
    Used,
    Bypassed,
}

#[test]
#[ignore = "needs root"]
fn frames_of_other_types_than_ip_and_arp_are_dropped_and_counted() {
    let link = Link::new();
    let packet = &frame("8.8.8.8".parse().unwrap(), 17, 64, b"hello")[14..];
    let of_type = |ethertype: [u8; 2], before: &[u8]| {
        let ends = [[0xff; 6], [2, 0, 0, 0, 0, 1]].concat();
        [&ends, &ethertype[..], before, packet].concat()
    };
    let length = u16::try_from(packet.len() + 8).unwrap().to_be_bytes();
    let others = [
        of_type(length, &[0xaa, 0xaa, 3, 0, 0, 0, 8, 0]), // IEEE 802.2 SNAP
        of_type([0x88, 0x47], &[0, 0, 1, 64]),            // MPLS
        of_type([0x88, 0x64], &[0x11, 0, 0, 1, 0, 35, 0, 0x21]), // PPPoE
        of_type([0x91, 0x00], &[0, 0, 8, 0]),             // an older tag of tags
    ];
    let arp = of_type([0x08, 0x06], &[]);
    for frame in others.iter().chain([&arp]) {
        assert!(link.arrives(frame), "{frame:x?} before");
    }
    let mut guard = Guard::set(link.netns.as_fd(), &LinkLocal::default()).unwrap();
    for (n, frame) in others.iter().enumerate() {
        assert!(!link.passes(frame), "{frame:x?}");
        assert_eq!(guard.dropped().unwrap(), n as u64 + 1, "{frame:x?}");
    }
    assert!(link.arrives(&arp));
}

#[test]
#[ignore = "needs root"]
fn links_without_ethernet_frames_are_an_error_and_others_are_guarded() {
    let link = Link::new();
    let guard = || Guard::set(link.netns.as_fd(), &LinkLocal::default());
    in_namespace(&link.netns, "ip tuntap add tun0 mode tun");
    guard().expect("nothing is sent on a link that is down");
    in_namespace(&link.netns, "ip link set tun0 up");
    let refused = guard().unwrap_err();
    assert!(
        matches!(&refused, GuardError::NotEthernet(links) if *links == ["tun0"]),
        "{refused}"
    );
    assert!(!link.passes_to(FORBIDDEN[0]));
}

#[test]
#[ignore = "needs root"]
fn neighbours_are_still_discovered_and_nothing_else_goes_with_it() {
    let link = Link::new();
    Guard::set(link.netns.as_fd(), &LinkLocal::default()).unwrap();
    let to = |kind, hops, next| {
        let message = [kind, 0, 0, 0, 0, 0, 0, 0];
        frame("fe80::1".parse().unwrap(), next, hops, &message)
    };
    for kind in [133, 135, 136] {
        assert!(link.arrives(&to(kind, 255, 58)), "type {kind}");
    }
    for (dropped, why) in [
        (to(128, 255, 58), "an echo request is no discovery"),
        (to(134, 255, 58), "routers advertise, and Pods do not"),
        (to(137, 255, 58), "routers redirect, and Pods do not"),
        (to(135, 64, 58), "discovery does not pass routers"),
        (to(135, 255, 17), "UDP is no discovery"),
    ] {
        assert!(!link.passes(&dropped), "{why}");
    }
}

#[test]
#[ignore = "needs root"]
fn exceptions_pass_and_rules_are_replaced() {
    let link = Link::new();
    let policy = LinkLocal {
        metadata: vec!["192.0.2.9".parse().unwrap()],
        except: vec!["169.254.20.10".parse().unwrap()],
        ..LinkLocal::default()
    };
    Guard::set(link.netns.as_fd(), &policy).unwrap();
    assert!(link.arrives_to("169.254.20.10"));
    assert!(!link.passes_to("169.254.20.11"));
    assert!(!link.passes_to("192.0.2.9"));
    let mut guard = Guard::set(link.netns.as_fd(), &LinkLocal::default()).unwrap();
    assert!(!link.passes_to("169.254.20.10"));
    assert!(link.arrives_to("192.0.2.9"));
    assert_eq!(guard.dropped().unwrap(), 1, "the counter begins anew");
}

#[test]
#[ignore = "needs root"]
fn a_namespace_without_links_needs_no_rules_and_one_without_rules_has_no_counter() {
    let netns = new_namespace();
    let mut guard = Guard::set(netns.as_fd(), &LinkLocal::default()).unwrap();
    assert!(guard.dropped().is_err());
}
