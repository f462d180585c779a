// SPDX-License-Identifier: Apache-2.0

//! A network namespace to try a runtime out in, with what a Pod's has.

use std::{fs::File, io, net::Ipv4Addr, os::fd::OwnedFd, thread};

use futures_util::TryStreamExt;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder, new_connection};
use tokio::task::JoinHandle;

/// The link in it that is like a Pod's.
pub(crate) const LINK: &str = "eth0";
/// Its other end.
const PEER: &str = "peer";
/// Addresses that are nobody's (RFC 5737): the link's, and its gateway's.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const PREFIX: u8 = 24;

/// Makes a network namespace with loopback and a link that has an address and leads to a
/// gateway, all of them up. It lasts as long as the descriptor.
///
/// # Errors
/// What the kernel says; making one needs CAP_SYS_ADMIN.
pub(crate) async fn with_link() -> io::Result<OwnedFd> {
    let made = tokio::task::spawn_blocking(new_namespace).await;
    let (netns, netlink, connection) = made.map_err(io::Error::other)??;
    let filled = fill(&netlink).await.map_err(io::Error::other);
    connection.abort();
    filled?;
    Ok(netns)
}

/// Makes a namespace, and a connection to the kernel that is in it.
fn new_namespace() -> io::Result<(OwnedFd, Handle, JoinHandle<()>)> {
    let runtime = tokio::runtime::Handle::current();
    // A namespace is a thread's own, and this one is not to come back.
    let made = thread::spawn(move || {
        let _inside = runtime.enter();
        unshare(CloneFlags::CLONE_NEWNET)?;
        let (connection, netlink, _) = new_connection()?;
        let netns = File::open("/proc/thread-self/ns/net")?;
        Ok((netns.into(), netlink, runtime.spawn(connection)))
    });
    let panicked = |_| io::Error::other("the thread of the namespace panicked");
    made.join().map_err(panicked)?
}

async fn fill(netlink: &Handle) -> Result<(), rtnetlink::Error> {
    let veth = LinkVeth::new(LINK, PEER).build();
    netlink.link().add(veth).execute().await?;
    for name in ["lo", PEER, LINK] {
        let up = LinkUnspec::new_with_name(name).up().build();
        netlink.link().set(up).execute().await?;
    }
    let mut found = netlink.link().get().match_name(LINK.to_owned()).execute();
    let link = found
        .try_next()
        .await?
        .ok_or(rtnetlink::Error::RequestFailed)?;
    let address = netlink
        .address()
        .add(link.header.index, ADDRESS.into(), PREFIX);
    address.execute().await?;
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(GATEWAY)
        .build();
    netlink.route().add(route).execute().await
}
