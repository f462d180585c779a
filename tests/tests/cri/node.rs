// SPDX-License-Identifier: Apache-2.0

//! What a Pod costs its node, and what a node does not let it do.

use anyhow::{Result, ensure};
use kiln_tests::{cri::v1, node::Node};

/// Memory that the shim of one Pod has for itself, KiB. Measured: 0.5 MiB (debug build 2). How much
/// of its program is resident says nothing where it is not the program that is installed.
const SHIM_ANON: u64 = 4 << 10;

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
        shim.status("RssAnon").is_some_and(|kib| kib < SHIM_ANON),
        "{:?} KiB",
        shim.status("RssAnon")
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
    // A sentry that was booted ahead reads its own root file system from an image.
    let gofers = if handler == "gvisor-warm" { 2 } else { 3 };
    ensure!(
        count("runsc-sandbox") == 1 && count("runsc-gofer") == gofers,
        "{names:#?}"
    );
    if handler != "gvisor-cli" {
        ensure!(
            names.len() == 2 + gofers,
            "more than the shim, a sentry and its gofers: {names:#?}"
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
    pod.expect_privileged_refused().await?;
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
