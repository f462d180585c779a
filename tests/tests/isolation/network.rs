// SPDX-License-Identifier: Apache-2.0

//! N1, N2, N4 to N6: what a Pod can send, and whom it can reach.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener, UdpSocket},
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::FileTypeExt,
            net::{SocketAddr, UnixListener},
        },
    },
    path::Path,
    process::Command,
};

use anyhow::{Result, ensure};
use kiln_host::egress::Guard;
use kiln_tests::{
    node::{Node, NodeOpts},
    pod::Pod,
    wait::{self, SOON},
};

use crate::{
    Neighbour, WARM,
    attempts::{PROBE, attacker, attempt, reported, try_all, with_probe},
    posture::gofer,
};

/// Sockets that are for packets of one's own making, or for machines.
const FORGERY: [&str; 9] = [
    "socket inet raw",
    "socket inet6 raw",
    "socket packet raw",
    "socket packet dgram",
    "socket vsock stream",
    "socket alg seqpacket",
    "socket bluetooth raw",
    "socket can raw",
    "socket xdp raw",
];

/// Also when a Pod asks for the capability, and by way of namespaces of its own.
pub(crate) async fn n1_packets_cannot_be_forged(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let address = neighbour.pod.ip().await?;
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    attempt(&container, "socket inet stream").await?.finds()?;
    for attempt in try_all(&container, &FORGERY).await? {
        attempt.fails_with(&["EPERM", "EAFNOSUPPORT"])?;
    }
    // A process of the container has no more than one that is run in it, and may have less.
    let command = [PROBE].into_iter().chain(FORGERY[2].split(' '));
    let asking = with_probe(pod.container(command))?.with(|c| {
        let linux = c.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        let capabilities = security.capabilities.get_or_insert_default();
        capabilities.add_capabilities = vec!["NET_RAW".to_owned()];
    });
    let asking = asking.start().await?;
    reported(&asking).await?.fails_with(&["EPERM"])?;
    let mut chain = vec!["unshare user".to_owned()];
    chain.extend(FORGERY.map(str::to_owned));
    // In a network of its own it may do as it likes, and there is nobody else.
    chain.extend(["unshare net".to_owned(), format!("connect {address}:80")]);
    let made = try_all(&container, &chain).await?;
    // It has the rights of a root there.
    for at in [0, FORGERY.len() + 1] {
        made[at].finds()?;
    }
    for attempt in &made[1..=FORGERY.len()] {
        attempt.fails_with(&["EPERM", "EAFNOSUPPORT"])?;
    }
    made[FORGERY.len() + 2].fails_with(&["ENETUNREACH"])?;
    pod.remove().await?;
    neighbour.remove().await
}

/// Addresses at which clouds serve metadata, and another that no router may pass on.
const LINK_LOCAL: [&str; 3] = ["169.254.169.254", "169.254.7.7", "100.100.100.200"];

/// A server at every address of the node, also at [`LINK_LOCAL`].
struct Metadata {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Metadata {
    fn serve(node: &Node) -> Result<Self> {
        node.netns().run(|| {
            for address in LINK_LOCAL {
                let args = ["addr", "replace", &format!("{address}/32"), "dev", "lo"];
                let added = Command::new("ip").args(args).status()?;
                ensure!(added.success(), "{address} cannot be added");
            }
            let (tcp, udp) = (
                TcpListener::bind("0.0.0.0:0")?,
                UdpSocket::bind("0.0.0.0:0")?,
            );
            tcp.set_nonblocking(true)?;
            udp.set_nonblocking(true)?;
            Ok(Self { tcp, udp })
        })
    }

    /// What to try, to reach it at `address`.
    fn words(&self, address: &str) -> Result<[String; 2]> {
        let (tcp, udp) = (self.tcp.local_addr()?.port(), self.udp.local_addr()?.port());
        Ok([
            format!("connect {address}:{tcp}"),
            format!("send {address}:{udp}"),
        ])
    }

    /// The addresses at which somebody has reached it by TCP and by UDP since it was last asked.
    fn reached(&self) -> Result<(Vec<String>, Vec<String>)> {
        let (mut by_tcp, mut by_udp) = (Vec::new(), Vec::new());
        while let Ok((stream, _)) = self.tcp.accept() {
            by_tcp.push(stream.local_addr()?.ip().to_string());
        }
        let mut words = [0; 64];
        while let Ok((length, _)) = self.udp.recv_from(&mut words) {
            let words = String::from_utf8_lossy(&words[..length]);
            by_udp.push(words.split(':').next().unwrap_or_default().to_owned());
        }
        Ok((by_tcp, by_udp))
    }
}

/// The address of the node in the Pods' network.
async fn gateway(pod: &Pod<'_>) -> Result<String> {
    let ip: Ipv4Addr = pod.ip().await?.parse()?;
    let [a, b, ..] = ip.octets();
    Ok(Ipv4Addr::new(a, b, 0, 1).to_string())
}

/// The same server is reached at the node's own address, and each packet to another is counted,
/// in the Pod's network and where there is one by the agent.
pub(crate) async fn n2_metadata_is_out_of_reach(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let server = Metadata::serve(node)?;
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let own = gateway(&pod).await?;
    let mut rules = Guard::of(pod.netns()?.as_fd())?;
    ensure!(rules.dropped()? == 0, "packets of nobody's are dropped");
    for attempt in try_all(&container, &server.words(&own)?).await? {
        attempt.finds()?;
    }
    let reached = server.reached()?;
    ensure!(
        reached == (vec![own.clone()], vec![own.clone()]),
        "{reached:?}"
    );
    ensure!(rules.dropped()? == 0, "packets to the node are dropped");
    for (n, address) in LINK_LOCAL.iter().enumerate() {
        let [connect, send] = server.words(address)?;
        attempt(&container, &connect).await?.fails()?;
        // The kernel of the sandbox has no answer for datagrams.
        attempt(&container, &send).await?;
        let dropped = rules.dropped()?;
        let least = 2 * (n as u64 + 1);
        ensure!(
            dropped >= least,
            "{dropped} packets are dropped, not {least}"
        );
    }
    let reached = server.reached()?;
    ensure!(reached == Default::default(), "reached at {reached:?}");
    // What goes elsewhere still does.
    for attempt in try_all(&container, &server.words(&own)?).await? {
        attempt.finds()?;
    }
    if handler == WARM {
        let dropped = rules.dropped()?;
        let [_, more] = server.words(LINK_LOCAL[0])?;
        wait::until("the agent to know", SOON, async || {
            // What the shim tells an agent that is late is lost, so there must be more to tell.
            attempt(&container, &more).await.ok()?;
            container.stats().await.ok()?;
            let report = node.agent().ok()?.report().await.ok()?;
            (report.link_local_dropped >= dropped).then_some(())
        })
        .await?;
        let unguarded = node.agent()?.report().await?.link_local_unguarded;
        ensure!(unguarded == 0, "{unguarded} Pods are not guarded");
    }
    pod.remove().await?;
    neighbour.remove().await
}

/// A node may let packets pass: that without the rules they would arrive is why these are there.
pub(crate) async fn n2_what_the_node_allows_is_reached(_: &Node) -> Result<()> {
    for (policy, reachable) in [
        ("mode = \"allow\"", &LINK_LOCAL[..]),
        (
            "except = [\"169.254.7.7\"], metadata = []",
            &LINK_LOCAL[1..],
        ),
    ] {
        let node = Node::start(NodeOpts {
            kiln: format!("link_local = {{ {policy} }}"),
            ..NodeOpts::default()
        })
        .await?;
        let server = Metadata::serve(&node)?;
        let pod = node.pod("gvisor").run().await?;
        let container = attacker(&pod).await?;
        for address in LINK_LOCAL {
            for words in server.words(address)? {
                attempt(&container, &words).await?;
            }
        }
        let (by_tcp, by_udp) = server.reached()?;
        ensure!(
            by_tcp == reachable && by_udp == reachable,
            "{policy}: {by_tcp:?} {by_udp:?}"
        );
        pod.remove().await?;
        node.stop().await?;
    }
    Ok(())
}

/// Sockets of the host that have no address but a name or the loopback interface.
pub(crate) async fn n4_the_hosts_network_is_out_of_reach(node: &Node, handler: &str) -> Result<()> {
    let name = node.unique("kiln-abstract");
    let listen = || {
        Ok(UnixListener::bind_addr(&SocketAddr::from_abstract_name(
            &name,
        )?)?)
    };
    let _of_the_host = listen()?;
    let _of_the_node = node.netns().run(listen)?;
    let tcp = || Ok(TcpListener::bind("127.0.0.1:0")?);
    let (of_the_host, of_the_node) = (tcp()?, node.netns().run(tcp)?);
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let mut words = vec![
        format!("dial @{name}"),
        "dial /run/containerd/containerd.sock".to_owned(),
        format!("dial {}", node.socket().display()),
    ];
    for listener in [&of_the_host, &of_the_node] {
        words.push(format!("connect {}", listener.local_addr()?));
    }
    for attempt in try_all(&container, &words).await? {
        attempt.fails_with(&["ECONNREFUSED", "ENOENT"])?;
    }
    // Neither sentry nor gofer is where containerd and the host are.
    let netns = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net"));
    let of_the_node = node
        .netns()
        .run(|| Ok(fs::read_link("/proc/thread-self/ns/net")?))?;
    let mut processes = vec![pod.sentry()?, gofer(&container)?];
    processes.extend(pod.runtime_processes("runsc-gofer"));
    for process in processes {
        let own = netns(process.pid)?;
        ensure!(
            own != of_the_node && own != netns(std::process::id())?,
            "{process:?}"
        );
    }
    pod.remove().await
}

/// Not by changing the interface, not by speaking for an address that is another's.
pub(crate) async fn n5_an_address_cannot_be_taken(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let theirs = neighbour.pod.ip().await?;
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let words = [
        format!("address eth0 {theirs}"),
        "hwaddr eth0".to_owned(),
        format!("bind {theirs}"),
        "bind 192.0.2.1".to_owned(),
    ];
    for attempt in try_all(&container, &words).await? {
        attempt.fails()?;
    }
    for command in [
        format!("ip addr add {theirs}/16 dev eth0"),
        "ip link set eth0 address 02:00:00:00:00:01".to_owned(),
        "ip link set eth0 down".to_owned(),
        "ip route add 192.0.2.0/24 dev eth0".to_owned(),
    ] {
        let ran = container.exec(["sh", "-c", &command]).await?;
        ensure!(ran.code != 0, "{command}: {ran:?}");
    }
    let own = pod.ip().await?;
    let shown = container.sh("ip -o -4 addr show eth0").await?;
    ensure!(shown.contains(&own) && !shown.contains(&theirs), "{shown}");
    pod.remove().await?;
    neighbour.remove().await
}

/// A socket in a volume is not a way to who listens there, and a Pod cannot leave one for others.
pub(crate) async fn n6_sockets_of_the_host_are_no_way_out(
    node: &Node,
    handler: &str,
) -> Result<()> {
    let volume = node.volume()?;
    let path = volume.join("host");
    let listener = UnixListener::bind(&path)?;
    listener.set_nonblocking(true)?;
    let pod = node.pod(handler).run().await?;
    let container = with_probe(pod.idle())?
        .mount(&volume, "/volume")
        .mount(&path, "/single")
        .start()
        .await?;
    for attempt in try_all(&container, &["dial /volume/host", "dial /single"]).await? {
        attempt.fails()?;
    }
    let nobody = listener.accept();
    ensure!(
        nobody
            .as_ref()
            .is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock),
        "{nobody:?} has come from a sandbox"
    );
    attempt(&container, "offer /volume/guest").await?;
    ensure!(
        !is_socket(&volume.join("guest")),
        "a sandbox has made a socket of the host"
    );
    pod.remove().await
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket())
}
