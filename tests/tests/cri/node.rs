// SPDX-License-Identifier: Apache-2.0

//! What a Pod costs its node, and what a node does not let it do.

use anyhow::{Result, ensure};
use kiln_tests::{cri::v1, node::Node};

/// Resident memory of the shim of one Pod, KiB. Measured: 4 MiB (debug build 7).
const SHIM_RSS: u64 = 12 << 10;

pub(crate) async fn one_shim_and_no_satellites(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let a = pod.idle().start().await?;
    let b = pod.idle().start().await?;
    a.sh("true").await?;
    b.sh("true").await?;
    let shim = pod.shim()?;
    ensure!(
        node.shims_of(a.id()).is_empty() && node.shims_of(b.id()).is_empty(),
        "a shim per container"
    );
    // Threads for blocking work end when there is none.
    kiln_tests::wait::until_true("one thread", kiln_tests::wait::SOON, || {
        shim.status("Threads") == Some(1)
    })
    .await?;
    ensure!(
        shim.status("VmRSS").is_some_and(|kib| kib < SHIM_RSS),
        "{:?} KiB",
        shim.status("VmRSS")
    );
    let sandbox = node.sandbox_of(pod.id())?;
    let ids = [pod.id(), &sandbox, a.id(), b.id()];
    let names: Vec<String> = node
        .processes()
        .into_iter()
        .map(|p| p.argv)
        .filter(|argv| ids.iter().any(|id| argv.contains(id)))
        .collect();
    let count = |start: &str| names.iter().filter(|n| n.starts_with(start)).count();
    // A sentry that was booted ahead reads its own first process from an image.
    let gofers = if sandbox == pod.id() { 3 } else { 2 };
    ensure!(
        count("runsc-sandbox") == 1 && count("runsc-gofer") == gofers,
        "{names:#?}"
    );
    if handler != "gvisor-cli" {
        ensure!(
            names.len() == 2 + gofers,
            "more than the shim, a sentry and {gofers} gofers: {names:#?}"
        );
    }
    pod.remove().await
}

pub(crate) async fn privileged_is_refused(node: &Node) -> Result<()> {
    let privileged = |c: &mut v1::PodSandboxConfig| {
        c.linux
            .get_or_insert_default()
            .security_context
            .get_or_insert_default()
            .privileged = true;
    };
    let pod = node.pod("gvisor").with(privileged).run().await?;
    let refused = pod
        .idle()
        .privileged()
        .start()
        .await
        .map(|c| c.id().to_owned());
    ensure!(
        refused
            .as_ref()
            .is_err_and(|e| format!("{e:#}").contains("privileged containers are refused")),
        "{refused:?}"
    );
    let other = pod.idle().start().await?;
    ensure!(other.is_running().await?);
    pod.remove().await
}

pub(crate) async fn host_network_is_refused(node: &Node) -> Result<()> {
    let refused = node
        .pod("gvisor")
        .host_network()
        .run()
        .await
        .map(|p| p.id().to_owned());
    ensure!(
        refused
            .as_ref()
            .is_err_and(|e| format!("{e:#}").contains("hostNetwork is refused")),
        "{refused:?}"
    );
    Ok(())
}
