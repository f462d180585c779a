// SPDX-License-Identifier: Apache-2.0

//! Pods in sandboxes that were there before them.

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use kiln_agent_api::Shape;
use kiln_tests::{
    agent::holding,
    cri::v1,
    node::{Node, NodeOpts},
    tools,
    wait::{self, SOON},
};
use nix::sys::signal::Signal;

use crate::{HANDLER, WARM, agent::settled};

/// A Pod gets a sandbox that is older than itself, the agent knows of it and boots another.
pub(crate) async fn a_pod_adopts(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let before = agent.adopted().await?;
    let warm = node.processes();
    let pod = node.pod(HANDLER).run().await?;
    let sentry = pod.sentry()?;
    ensure!(
        warm.iter().any(|p| p.pid == sentry.pid),
        "{sentry:?} is new"
    );
    let look = async || (agent.adopted().await.ok()? == before + 1).then_some(());
    wait::until("the agent to know", SOON, look).await?;
    agent.expect_ready(WARM).await?;
    let sandbox = pod.sandbox();
    pod.remove().await?;
    node.expect_gone(&sandbox).await
}

/// Before it is a Pod's, a sandbox may be late, which costs less; from then on it is in time.
pub(crate) async fn a_sandbox_rests_until_it_is_adopted(node: &Node) -> Result<()> {
    node.agent()?.expect_ready(WARM).await?;
    let resting = settled(node).await?;
    ensure!(resting.len() == WARM as usize, "{resting:?}");
    for sentry in &resting {
        let slacks = sentry.timer_slacks()?;
        ensure!(slacks == [5_000_000].into(), "{sentry:?} has {slacks:?}");
    }
    let pod = node.pod(HANDLER).run().await?;
    let container = pod.idle().start().await?;
    container.sh("sleep 0.01").await?;
    let slacks = pod.sentry()?.timer_slacks()?;
    ensure!(slacks == [50_000].into(), "{slacks:?}");
    pod.remove().await
}

/// The sandbox has the Pod's address and name, and its sentry no way to the host's network.
pub(crate) async fn the_network_is_the_pods(node: &Node) -> Result<()> {
    let pod = node.pod(HANDLER).run().await?;
    let container = pod.idle().start().await?;
    let address = pod.ip().await?;
    let shown = container.sh("ip -o -4 addr show eth0").await?;
    ensure!(shown.contains(&address), "{address} is not in {shown}");
    let name = container.sh("hostname").await?;
    ensure!(name.trim() == pod.hostname(), "{name:?}");
    let sentry = pod.sentry()?;
    let links = std::fs::read_to_string(format!("/proc/{}/net/dev", sentry.pid))?;
    ensure!(
        !links.contains("eth0"),
        "the sentry is in the Pod's namespace: {links}"
    );
    pod.remove().await
}

/// A Pod without a name adopts, too, and has as little of one as if it had started cold.
pub(crate) async fn a_pod_without_a_name_has_none(node: &Node) -> Result<()> {
    let mut names = Vec::new();
    for handler in ["gvisor", HANDLER] {
        let pod = node.pod(handler).with(|c| c.hostname.clear()).run().await?;
        let container = pod.idle().start().await?;
        names.push(container.sh("cat /proc/sys/kernel/hostname").await?);
        pod.remove().await?;
    }
    ensure!(names[0] == names[1], "{names:?}");
    ensure!(names[0].trim().is_empty(), "{names:?}");
    Ok(())
}

/// Everything of the sandbox is charged to the Pod, and nothing stays where it was booted.
pub(crate) async fn the_host_cgroup_is_the_pods(node: &Node) -> Result<()> {
    let pod = node.pod(HANDLER).run().await?;
    let _container = pod.idle().start().await?;
    let sandbox = pod.sandbox();
    let all = [
        pod.runtime_processes("runsc-sandbox"),
        pod.runtime_processes("runsc-gofer"),
    ]
    .concat();
    ensure!(all.len() == 2, "{all:?}");
    for process in all {
        let groups = std::fs::read_to_string(format!("/proc/{}/cgroup", process.pid))?;
        // Beside hierarchies of v1, that of v2 limits nothing.
        let of_v1 = groups.lines().filter(|l| !l.starts_with("0::"));
        let lines: Vec<_> = of_v1.collect();
        let lines = if lines.is_empty() {
            groups.lines().collect()
        } else {
            lines
        };
        for line in lines {
            let path = line.rsplit(':').next().unwrap_or_default();
            // Hierarchies in which nobody has made a directory are of no account.
            ensure!(
                path == "/" || path.contains(pod.id()),
                "{} is in {line}",
                process.argv
            );
            ensure!(!path.contains(&sandbox), "{} is in {line}", process.argv);
        }
    }
    pod.remove().await
}

/// Whatever limits the agent itself was started with.
pub(crate) async fn limits_on_files_are_those_of_a_cold_pod(node: &Node) -> Result<()> {
    // Soft ones, which need no capability to be raised again.
    const OTHERS: [&str; 3] = ["prlimit", "--nofile=4096:", "--fsize=1073741824:"];
    let agent = node.agent()?;
    agent.drain().await?;
    node.run_agent_by(&OTHERS).await?;
    agent.expect_ready(WARM).await?;
    let mut limits = Vec::new();
    for handler in ["gvisor", HANDLER] {
        let pod = node.pod(handler).run().await?;
        let container = pod.idle().start().await?;
        let shown = container.sh("ulimit -S -n; ulimit -H -n; ulimit -S -f; ulimit -H -f");
        limits.push(shown.await?);
        pod.remove().await?;
    }
    let look = async || (agent.adopted().await.ok()? == 1).then_some(());
    wait::until("one adoption", SOON, look).await?;
    ensure!(limits[0] == limits[1], "{limits:?}");
    ensure!(!limits[0].contains("4096"), "{limits:?} are the agent's");
    agent.drain().await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await
}

/// The first container's files are served by a gofer that is older than the Pod, a second one's by
/// another; both see what they are to see, and nothing of either stays.
pub(crate) async fn the_first_container_takes_the_slots(node: &Node) -> Result<()> {
    node.agent()?.expect_ready(WARM).await?;
    let warm: Vec<_> = node.processes().iter().map(|p| p.pid).collect();
    let pod = node.pod(HANDLER).run().await?;
    let sandbox = pod.sandbox();
    let (mut served, mut postures) = (Vec::new(), Vec::new());
    for (which, expect_old) in [("first", true), ("second", false)] {
        let container = pod
            .script(&format!("echo {which} >/etc/own; cat /etc/own; sleep 3600"))
            .start()
            .await?;
        container.logged(&format!("{which}\n")).await?;
        // One that was started ahead bears the name of the sandbox, others that of the container.
        let named = if expect_old { &sandbox } else { container.id() };
        let all = node.processes().into_iter();
        let mut gofers = all.filter(|p| p.argv.starts_with("runsc-gofer"));
        let gofer = gofers.find(|p| p.argv.contains(named));
        let gofer = gofer.with_context(|| format!("{which} has no gofer\n{}", node.log()))?;
        ensure!(
            warm.contains(&gofer.pid) == expect_old,
            "{which}: {gofer:?}"
        );
        served.push(gofer.pid);
        postures.push(posture(gofer.pid)?);
        let hosts = container.sh("cat /etc/hosts /etc/own").await?;
        ensure!(hosts.ends_with(&format!("{which}\n")), "{hosts:?}");
        let shm = container.sh("echo x >/dev/shm/x; ls /dev/shm").await?;
        ensure!(shm == "x\n", "{shm:?}");
    }
    ensure!(postures[0] == postures[1], "{postures:?}");
    pod.remove().await?;
    node.expect_gone(&sandbox).await?;
    let left: Vec<_> = node.processes().into_iter().map(|p| p.pid).collect();
    ensure!(!served.iter().any(|pid| left.contains(pid)), "{served:?}");
    Ok(())
}

/// What process `pid` may do, and in which namespaces it is not the host's.
fn posture(pid: u32) -> Result<Vec<String>> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let told = ["Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp"];
    let lines = status.lines().map(str::to_owned);
    let mut posture: Vec<_> = lines
        .filter(|line| told.iter().any(|key| line.starts_with(key)))
        .collect();
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/{kind}"));
        let own = of(&pid.to_string())? != of("self")?;
        posture.push(format!("{kind}: {own}"));
    }
    let root = std::fs::read_link(format!("/proc/{pid}/root"))?;
    posture.push(format!("{}", root.display()));
    Ok(posture)
}

/// A Pod with a memory limit finds that limit in its sandbox, adopted or not, and hits it.
pub(crate) async fn limits_of_the_pod_hold(node: &Node) -> Result<()> {
    for adopts in [false, true] {
        let pod = limited(node, 192 << 20);
        let pod = if adopts {
            pod.run().await?
        } else {
            pod.run_cold_or_warm().await?
        };
        ensure!(
            (pod.sandbox() != pod.id()) == adopts,
            "who has known that shape?"
        );
        let container = pod.idle().start().await?;
        let total = container
            .sh("awk '/MemTotal/ {print $2}' /proc/meminfo")
            .await?;
        let total: u64 = total.trim().parse()?;
        // The limit and what the sandbox needs for itself.
        ensure!((192 << 10..400 << 10).contains(&total), "{total} KiB");
        pod.remove().await?;
        // It was learned by the first.
        learned(node, 192 << 20).await?;
    }
    Ok(())
}

/// Waits until a sandbox of a shape that was learned is ready, with `memory` bytes and what
/// sandboxes need beside.
async fn learned(node: &Node, memory: u64) -> Result<()> {
    let agent = node.agent()?;
    let fits = |shape: &str| {
        let shape = Shape::from_json(shape).ok();
        shape
            .and_then(|s| s.memory)
            .is_some_and(|m| (memory..memory + (96 << 20)).contains(&m))
    };
    let look = async || {
        let report = agent.report().await.ok()?;
        let mut learned = report.classes.iter().filter(|c| c.class.is_empty());
        learned.find(|c| c.ready == 1 && fits(&c.shape)).map(drop)
    };
    let found = wait::until("the learned shape", SOON, look).await;
    found.with_context(|| agent.log())
}

/// What Pods miss is booted for the next of them.
pub(crate) async fn a_shape_is_learned(node: &Node) -> Result<()> {
    // Before that, it learns nothing.
    node.agent()?.expect_some().await?;
    let pod = limited(node, 321 << 20).run_cold_or_warm().await?;
    ensure!(pod.sandbox() == pod.id(), "who has known that shape?");
    learned(node, 321 << 20).await?;
    // An agent that comes back has it ready, and keeps it.
    let agent = node.agent()?;
    agent.stop(Signal::SIGTERM).await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await?;
    learned(node, 321 << 20).await?;
    let next = limited(node, 321 << 20).run().await?;
    next.remove().await?;
    pod.remove().await
}

fn limited(node: &Node, memory: i64) -> kiln_tests::pod::PodBuilder<'_> {
    node.pod(HANDLER).with(|config| {
        config.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..v1::LinuxContainerResources::default()
        });
    })
}

/// A container that CRI does not know of is no Pod, and gets no warm sandbox.
pub(crate) async fn what_cannot_be_adopted_starts_cold(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let before = agent.adopted().await?;
    let pod = node.pod("gvisor").run().await?;
    ensure!(
        pod.sandbox() == pod.id(),
        "a handler without an agent has adopted"
    );
    pod.remove().await?;
    ensure!(agent.adopted().await? == before);
    ensure!(agent.ready().await? >= WARM);
    Ok(())
}

/// More Pods at once than there are warm sandboxes: each runs, and none shares.
pub(crate) async fn a_burst_is_served_as_far_as_there_is(node: &Node) -> Result<()> {
    const PODS: usize = 24;
    let agent = node.agent()?;
    agent.expect_some().await?;
    let up = async |n: usize| {
        let pod = node.pod(HANDLER).run_cold_or_warm().await?;
        let container = pod
            .script(&format!("echo Pod {n}; sleep 3600"))
            .start()
            .await?;
        container.logged(&format!("Pod {n}\n")).await?;
        anyhow::Ok(pod)
    };
    let pods = try_join_all((0..PODS).map(&up)).await?;
    let mut sandboxes: Vec<_> = pods.iter().map(|pod| pod.sandbox()).collect();
    let adopted = pods.iter().filter(|pod| pod.sandbox() != pod.id()).count();
    ensure!(adopted > 0, "none has adopted");
    sandboxes.sort_unstable();
    sandboxes.dedup();
    ensure!(sandboxes.len() == PODS, "two Pods in one sandbox");
    try_join_all(pods.into_iter().map(|pod| pod.remove())).await?;
    for sandbox in sandboxes {
        node.expect_gone(&sandbox).await?;
    }
    Ok(())
}

/// What a Pod takes beside its containers is no more than its RuntimeClass says, cold or adopted.
pub(crate) async fn an_idle_sandbox_takes_no_more_than_its_overhead(_: &Node) -> Result<()> {
    let opts = NodeOpts {
        agent: Some(holding(1, 2)),
        shim: Some(tools::installed_shim()?),
        ..NodeOpts::default()
    };
    let node = Node::start(opts).await?;
    let fits = fits_overhead(&node).await;
    let clean = node.check_for_leaks().await;
    let stopped = node.stop().await;
    fits.and(clean).and(stopped)
}

async fn fits_overhead(node: &Node) -> Result<()> {
    let overhead = overhead()?;
    node.agent()?.expect_ready(1).await?;
    for handler in ["gvisor", HANDLER] {
        let pod = node.pod(handler).run().await?;
        let container = pod.idle().start().await?;
        let mut all = vec![pod.shim()?];
        all.extend(pod.runtime_processes("runsc-sandbox"));
        ensure!(all.len() == 2, "{all:?}");
        // Gofers have the id of the sandbox or of their container. Some have none.
        let (sandbox, container) = (pod.sandbox(), container.id().to_owned());
        let gofers = node.processes().into_iter().filter(|p| {
            let is_its = p.argv.contains(&sandbox) || p.argv.contains(&container);
            p.argv.starts_with("runsc-gofer") && is_its
        });
        all.extend(gofers);
        let each: Vec<u64> = all.iter().map(|p| pss(p.pid)).collect::<Result<_>>()?;
        let pss: u64 = each.iter().sum();
        ensure!(
            pss < overhead,
            "{handler}: {pss} of {overhead} bytes, {each:?}"
        );
        // So much that the number says something.
        ensure!(pss > overhead / 4, "{handler}: {pss} of {overhead} bytes");
        pod.remove().await?;
    }
    Ok(())
}

/// Bytes of memory that RuntimeClass `gvisor` counts for a Pod.
fn overhead() -> Result<u64> {
    let class: serde_json::Value =
        serde_saphyr::from_str(include_str!("../../../deploy/base/runtimeclass.yaml"))?;
    let memory = class["overhead"]["podFixed"]["memory"].as_str();
    let number = memory.and_then(|m| m.strip_suffix("Mi"));
    Ok(number.context("no overhead in Mi")?.parse::<u64>()? << 20)
}

/// Bytes of memory of a process, its part of what it shares.
fn pss(pid: u32) -> Result<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|l| l.strip_prefix("Pss:"));
    let kib = line.and_then(|l| l.split_whitespace().next());
    Ok(kib.context("no Pss")?.parse::<u64>()? << 10)
}
