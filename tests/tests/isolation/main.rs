// SPDX-License-Identifier: Apache-2.0

//! Isolation: what somebody in a sandbox tries, and what a sandbox looks like from outside. Cases
//! are named by the rows of the table in docs/security.md, and run in Pods that start cold and in
//! Pods that adopt. `$KILN_ISOLATION_HANDLERS` names other handlers, such as `runsc-go`, gVisor's
//! own shim, of which some cases fail. W1 is the suite `reuse`.

mod adoption;
mod attempts;
mod control;
mod files;
mod network;
mod posture;
mod process;
mod requests;

use std::{os::fd::OwnedFd, process::ExitCode, sync::OnceLock};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    agent::holding,
    node::{Node, NodeOpts, WARM},
    pod::{Container, Pod},
    suite::Cases,
};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// How many sandboxes the agent of the node holds.
const HELD: u32 = 4;

/// An image with setuid programs, and symbolic links where things are mounted.
const HOSTILE: &str = "docker.io/library/kiln-hostile:latest";

/// Name of a file that everything on the node inherits and no sandbox may have.
const MARKER: &str = "kiln-marker";

fn main() -> ExitCode {
    let chosen = std::env::var("KILN_ISOLATION_HANDLERS").ok();
    let handlers: Vec<&'static str> = match &chosen {
        Some(list) => list.split(',').map(|h| &*h.to_owned().leak()).collect(),
        None => vec!["gvisor", WARM],
    };
    let mut cases = Cases::<Node>::new();
    macro_rules! each {
        ($add:ident, $module:ident: $($case:ident),+ $(,)?) => {
            for handler in handlers.iter().copied() {
                $(cases.$add(
                    format!("{}::{handler}", stringify!($case)),
                    async move |node: &Node| $module::$case(node, handler).await,
                );)+
            }
        };
    }
    each!(add, process:
        p1_the_hosts_kernel_is_not_seen, p2_the_hosts_processes_are_not_there, p10_nobody_becomes_more_than_they_are,
        p11_there_are_no_devices_of_the_host, p12_privileged_is_refused,
    );
    each!(add, posture:
        p3_the_sentry_has_what_it_needs, p4_a_gofer_has_what_it_needs, p5_no_open_file_gets_in,
        p6_the_runtime_cannot_be_overwritten,
    );
    each!(add, files:
        s1_an_image_is_never_written_to, s2_what_is_written_is_counted, s3_a_volume_is_as_large_as_its_limit,
        s8_secrets_stay_with_the_pod, s9_nothing_is_left,
    );
    each!(add, requests:
        s6_an_id_is_no_path, s7_streams_are_fifos, a2_a_spec_cannot_reach_out, c1_only_root_reaches_a_shim,
    );
    each!(add, network:
        n1_packets_cannot_be_forged, n2_metadata_is_out_of_reach, n4_the_hosts_network_is_out_of_reach, n5_an_address_cannot_be_taken,
        n6_sockets_of_the_host_are_no_way_out,
    );
    each!(add, adoption: w2_two_sandboxes_share_nothing);
    each!(add, control: a1_annotations_choose_nothing);
    // What others would notice, or would be noticed by.
    each!(add_alone, process:
        p7_a_fork_bomb_ends_its_own_pod, p8_a_memory_bomb_ends_its_own_pod, p9_a_busy_pod_leaves_time_to_others,
    );
    each!(add_alone, files: s5_a_mount_stays_inside, s5_a_mount_stays_inside_while_links_change);
    if handlers.contains(&WARM) {
        cases.add_alone(
            "w2_gofers_share_no_slots",
            adoption::w2_gofers_share_no_slots,
        );
        cases.add_alone(
            "w3_what_is_the_pods_comes_with_the_pod",
            adoption::w3_what_is_the_pods_comes_with_the_pod,
        );
        cases.add_alone(
            "c2_the_agent_listens_to_root_only",
            control::c2_the_agent_listens_to_root_only,
        );
        cases.add_alone(
            "c3_who_takes_all_costs_no_pod",
            control::c3_who_takes_all_costs_no_pod,
        );
    }
    if chosen.is_none() {
        cases.add_alone(
            "p3_without_directfs_the_sentry_is_nobody",
            posture::p3_without_directfs_the_sentry_is_nobody,
        );
        cases.add_alone(
            "n2_what_the_node_allows_is_reached",
            network::n2_what_the_node_allows_is_reached,
        );
        cases.add_alone(
            "s2_a_limit_of_the_node_holds",
            files::s2_a_limit_of_the_node_holds,
        );
    }
    cases.run(start)
}

/// A node whose configuration is as careless as it can be about what users say.
async fn start() -> Result<Node> {
    static INHERITED: OnceLock<OwnedFd> = OnceLock::new();
    if INHERITED.get().is_none() {
        let marker = memfd_create(MARKER, MFdFlags::empty()).context("make the marker")?;
        INHERITED.get_or_init(|| marker);
    }
    let node = Node::start(NodeOpts {
        agent: Some(holding(HELD, 8)),
        // A name with a prefix needs a pattern with one.
        pod_annotations: vec!["*".to_owned(), "*/*".to_owned()],
        ..NodeOpts::default()
    })
    .await?;
    node.pull(HOSTILE).await?;
    Ok(node)
}

/// A Pod beside the one that attacks, which must not notice.
struct Neighbour<'n> {
    pod: Pod<'n>,
    container: String,
}

impl<'n> Neighbour<'n> {
    async fn run(node: &'n Node, handler: &str) -> Result<Self> {
        let pod = node.pod(handler).run().await?;
        let container = pod.idle().start().await?;
        container.sh("echo mine > /tmp/mine").await?;
        let container = container.id().to_owned();
        Ok(Self { pod, container })
    }

    /// It runs, answers and has what it had.
    async fn is_well(&self) -> Result<()> {
        let container = Container::found(&self.pod, &self.container);
        ensure!(container.is_running().await?, "the neighbour has ended");
        let has = container.sh("cat /tmp/mine").await?;
        ensure!(has == "mine\n", "the neighbour has {has:?}");
        Ok(())
    }

    async fn remove(self) -> Result<()> {
        self.is_well().await?;
        self.pod.remove().await
    }
}
