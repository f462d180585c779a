// SPDX-License-Identifier: Apache-2.0

//! Row W1 of the table in docs/security.md: a sandbox serves one Pod. Only many Pods can show it,
//! which take time; most of a suite's time is waiting, so this one runs beside the others and
//! leaves them the CPU.

use std::{collections::BTreeSet, env, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use kiln_tests::{
    agent::holding,
    node::{Node, NodeOpts, WARM},
    process::Proc,
    suite::{CASE, Cases},
    wait,
};

/// How many Pods run unless `$KILN_ADOPTIONS` says it.
const ADOPTIONS: usize = 1000;

/// How many sandboxes the agent of the node holds.
const HELD: u32 = 4;

/// Descriptors by which the agent may have more at the end than at the beginning: less than two
/// sandboxes take.
const MORE_FILES: usize = 24;

/// How many at a time: neither one that goes nor one that runs may be met.
const AT_A_TIME: usize = 3;

/// How long one of them may take, the rest of the case aside.
const EACH: Duration = Duration::from_secs(4);

/// Where a Pod could leave something for the next one.
const PLACES: [&str; 5] = [
    "/tmp/token",
    "/dev/shm/token",
    "/root/token",
    "/run/token",
    "/etc/token",
];

fn main() -> ExitCode {
    let count = match env::var("KILN_ADOPTIONS") {
        Ok(count) => count.parse().context("read KILN_ADOPTIONS"),
        Err(_) => Ok(ADOPTIONS),
    };
    // The case itself says what is wrong with the number.
    let pods = u32::try_from(*count.as_ref().unwrap_or(&ADOPTIONS)).unwrap_or(u32::MAX);
    let mut cases = Cases::<Node>::new().limit(CASE + EACH * pods);
    cases.add("w1_a_sandbox_serves_one_pod", async move |node| {
        w1_a_sandbox_serves_one_pod(node, count?).await
    });
    cases.run(|| {
        Node::start(NodeOpts {
            agent: Some(holding(HELD, 8)),
            in_background: true,
            ..NodeOpts::default()
        })
    })
}

/// No token of one Pod is seen by another, and no sandbox, boot or process is seen twice. The agent
/// lets go of each.
async fn w1_a_sandbox_serves_one_pod(node: &Node, count: usize) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(HELD).await?;
    let process = agent.pid().await.and_then(Proc::find);
    let process = process.context("the agent does not run")?;
    let files = || process.files().map_or(0, |files| files.len());
    let before = files();
    let pods = stream::iter(0..count).map(|n| serve(node, n));
    let served: Vec<_> = pods.buffer_unordered(AT_A_TIME).try_collect().await?;
    let (mut sandboxes, mut boots, mut sentries) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (sandbox, boot, sentry) in served {
        ensure!(sandboxes.insert(sandbox.clone()), "{sandbox} again");
        ensure!(boots.insert(boot.clone()), "boot {boot} again");
        ensure!(sentries.insert(sentry), "sentry {sentry:?} again");
    }
    agent.expect_ready(HELD).await?;
    let closed = || (1..=before + MORE_FILES).contains(&files());
    let has = wait::until_true("an agent that has let go", wait::SOON, closed).await;
    has.with_context(|| format!("it had {before} descriptors, and has {}", files()))
}

/// Runs a Pod that looks for tokens and leaves its own; returns its sandbox, boot and sentry.
async fn serve(node: &Node, n: usize) -> Result<(String, String, (u32, Option<u64>))> {
    let pod = node.pod(WARM).run().await?;
    let container = pod.idle().start().await?;
    let look = format!(
        "cat {} 2>/dev/null; ls -A /tmp /dev/shm /root /run; hostname; env; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '; cat /proc/net/unix",
        PLACES.join(" ")
    );
    let leave = PLACES.map(|p| format!("echo $T > {p}")).join("; ");
    // Without the exec's streams, which would not end else.
    let stay = "setsid sh -c 'sleep 3600; :' $T >/dev/null 2>&1 & \
         TOKEN=$T sleep 3600 >/dev/null 2>&1 &";
    // The script itself, which is looked at too, has no token in it.
    let token = format!("T=token; T=$T-of-{n}");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let found = container
        .sh(&format!("{look}; {token}; {leave}; {stay} {boot}"))
        .await?;
    ensure!(!found.contains("token-of-"), "Pod {n} sees {found}");
    let boot = found.lines().last().context("no boot id")?.to_owned();
    let sentry = pod.sentry()?;
    let sandbox = pod.sandbox();
    let known = (sandbox.clone(), boot, (sentry.pid, sentry.started()));
    pod.remove().await?;
    node.expect_gone(&sandbox).await?;
    Ok(known)
}
