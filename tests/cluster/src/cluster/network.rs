// SPDX-License-Identifier: Apache-2.0

//! The network of a cluster: a namespace, and a pair of links between it and the host's.
//!
//! What Pods and services need (a bridge, rules of iptables, ports) is made in the namespace and
//! goes with it.

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::{Context, Result};
use kiln_tests::{netns::Netns, process::Cmd, tools};

use super::{layout::Layout, state::State};

/// Port of the apiserver.
const PORT: u16 = 6443;

/// A cluster's network.
pub(super) struct Network {
    pub(super) netns: Netns,
    /// The node's address, which the host reaches.
    pub(super) node: Ipv4Addr,
}

impl Network {
    /// Where the apiserver is.
    pub(super) fn server(&self) -> String {
        format!("https://{}:{PORT}", self.node)
    }
}

/// Makes the network, and notes what [`remove`] needs.
pub(super) async fn make(layout: &Layout, state: &mut State) -> Result<Network> {
    let netns = Netns::new()?;
    netns.keep_at(&layout.netns())?;
    netns.run(|| {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("let the node forward packets")
    })?;
    let number = free_number().await?;
    let link = format!("kiln{number}");
    let [host, node] = [1, 2].map(|last| Ipv4Addr::new(10, 210, number, last));
    state.link = Some(link.clone());
    state.save(layout)?;

    let us = std::process::id();
    let inside = format!(
        "link add eth0 type veth peer name {link} netns {us}\n\
         addr add {node}/24 dev eth0\n\
         link set eth0 up\n\
         route add default via {host}\n"
    );
    ip()?
        .netns(&netns)
        .args(["-batch", "-"])
        .input(inside.as_bytes())
        .run()
        .await?;
    let outside = format!("addr add {host}/24 dev {link}\nlink set {link} up\n");
    ip()?
        .args(["-batch", "-"])
        .input(outside.as_bytes())
        .run()
        .await?;
    Ok(Network { netns, node })
}

/// Removes the pair of links. (The namespace goes when nothing is in it and it is unmounted.)
pub(super) async fn remove(link: Option<&str>) -> Result<()> {
    match link {
        Some(link) if exists(link) => {
            ip()?.args(["link", "delete", link]).run().await?;
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The first N for which the host has no link `kilnN` and no address in 10.210.N.0/24.
async fn free_number() -> Result<u8> {
    let used = ip()?.args(["-o", "-4", "addr", "show"]).run().await?;
    let is_free = |n: &u8| !used.contains(&format!(" 10.210.{n}.")) && !exists(&format!("kiln{n}"));
    (0..=u8::MAX)
        .find(is_free)
        .context("the host has addresses in all of 10.210.0.0/16")
}

fn exists(link: &str) -> bool {
    Path::new("/sys/class/net").join(link).exists()
}

fn ip() -> Result<Cmd> {
    let path = ["/usr/sbin/ip", "/sbin/ip"].map(Path::new);
    match path.into_iter().find(|p| p.exists()) {
        Some(path) => Ok(Cmd::new(path)),
        None => Ok(Cmd::new(&tools::program("ip")?)),
    }
}
