// SPDX-License-Identifier: Apache-2.0

//! What containers use, what they may use, and who decides when they run.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    cri::v1,
    node::Node,
    pod::{Container, GUEST},
    wait,
};

const MIB: i64 = 1 << 20;

/// What a sandbox may have on top for itself.
const OWN: i64 = 64 * MIB;

/// No machine has as much: a figure above is an overflow.
const ABSURD: u64 = 1 << 50;

/// CPU nanoseconds, bytes of the working set, bytes that are left of a limit.
async fn usage(container: &Container<'_, '_>) -> Result<(u64, u64, u64)> {
    let stats = container.stats().await?;
    let memory = stats.memory.context("no memory")?;
    let cpu = stats
        .cpu
        .and_then(|c| c.usage_core_nano_seconds)
        .context("no CPU time")?
        .value;
    let working_set = memory.working_set_bytes.context("no working set")?.value;
    let available = memory.available_bytes.context("no available bytes")?.value;
    Ok((cpu, working_set, available))
}

pub(crate) async fn usage_is_reported(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let busy = pod
        .script("while :; do :; done")
        .memory(200 * MIB)
        .start()
        .await?;
    let idle = pod.idle().start().await?;
    let (cpu, memory, available) = usage(&busy).await?;
    ensure!(
        memory > 0 && memory < (200 * MIB).unsigned_abs(),
        "{memory} bytes used"
    );
    ensure!(
        available > 0 && available <= (200 * MIB).unsigned_abs(),
        "{available} bytes left of 200 MiB"
    );
    let grown = wait::until("200 ms of CPU", wait::SOON, async || {
        let (now, ..) = usage(&busy).await.ok()?;
        (now > cpu + 200_000_000).then_some(now)
    });
    grown.await?;
    let (idle_cpu, idle_memory, unlimited) = usage(&idle).await?;
    let (busy_cpu, ..) = usage(&busy).await?;
    ensure!(
        idle_cpu < busy_cpu,
        "the idle one has used {idle_cpu} ns, the busy one {busy_cpu} ns"
    );
    ensure!(
        idle_memory > 0 && unlimited < ABSURD,
        "{idle_memory} bytes used, {unlimited} left of no limit"
    );
    pod.remove().await
}

pub(crate) async fn a_memory_limit_holds(node: &Node, handler: &str) -> Result<()> {
    let neighbour = node.pod(handler).run().await?;
    let other = neighbour.idle().start().await?;
    let pod = node.pod(handler).run().await?;
    let container = pod
        .container(["eat", &(400 * MIB).to_string()])
        .image(GUEST)
        .memory(96 * MIB)
        .start()
        .await?;
    let status = container.ended().await?;
    ensure!(
        (status.exit_code, status.reason.as_str()) == (137, "OOMKilled"),
        "{status:?}"
    );
    ensure!(other.sh("echo well").await? == "well\n");
    pod.remove().await?;
    neighbour.remove().await
}

/// What CRI names for the Pod holds for all of it, and is what the sentry shows inside.
pub(crate) async fn a_limit_of_the_pod_holds(node: &Node, handler: &str) -> Result<()> {
    let limits = v1::LinuxContainerResources {
        memory_limit_in_bytes: 128 * MIB,
        ..v1::LinuxContainerResources::default()
    };
    let pod = node.pod(handler).limits(limits).run_cold_or_warm().await?;
    let idle = pod.idle().start().await?;
    let total = idle
        .sh("awk '/MemTotal/ { print $2 }' /proc/meminfo")
        .await?;
    let total: i64 = total.trim().parse()?;
    ensure!(
        total << 10 <= 128 * MIB + OWN,
        "{total} KiB inside a Pod of 128 MiB"
    );
    let container = pod
        .container(["eat", &(400 * MIB).to_string()])
        .image(GUEST)
        .start()
        .await?;
    let status = container.ended().await?;
    ensure!(
        (status.exit_code, status.reason.as_str()) == (137, "OOMKilled"),
        "{status:?}"
    );
    pod.remove().await
}

/// A kubelet limits the Pod's cgroup itself.
pub(crate) async fn a_kubelets_limit_holds(node: &Node, handler: &str) -> Result<()> {
    let name = format!("pod-{handler}");
    let parent = node.cgroup().pod(&name, 128 * MIB)?;
    let pod = node
        .pod(handler)
        .with(|c| c.linux.get_or_insert_default().cgroup_parent = parent)
        .run_cold_or_warm()
        .await?;
    let container = pod
        .container(["eat", &(400 * MIB).to_string()])
        .image(GUEST)
        .memory(128 * MIB)
        .start()
        .await?;
    let status = container.ended().await?;
    ensure!(
        (status.exit_code, status.reason.as_str()) == (137, "OOMKilled"),
        "{status:?}"
    );
    pod.remove().await?;
    node.cgroup().remove_pod(&name)
}

pub(crate) async fn a_cpu_limit_holds(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .container(["burn", "60"])
        .image(GUEST)
        .cpu(200)
        .start()
        .await?;
    // What starting the container has used is not limited yet where the sandbox is.
    let (before, ..) = usage(&container).await?;
    let start = Instant::now();
    tokio::time::sleep(Duration::from_secs(4)).await;
    let (after, ..) = usage(&container).await?;
    let share = (after - before) as f64 / start.elapsed().as_nanos() as f64;
    ensure!(share < 0.35, "{share:.2} CPUs used of 0.2");
    pod.remove().await
}

pub(crate) async fn limits_can_be_changed(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().memory(200 * MIB).cpu(500).start().await?;
    // A sandbox is limited as one, and has some memory for itself.
    let (group, own) = if handler == "runc" {
        (container.id(), 0)
    } else {
        (pod.id(), OWN)
    };
    let limited_to = |memory: i64, quota: &str| -> Result<()> {
        let bytes: i64 = node
            .cgroup()
            .read(group, "memory", "memory.limit_in_bytes", "memory.max")?
            .parse()?;
        ensure!(
            (memory..=memory + own).contains(&bytes),
            "{bytes} bytes, not {memory}"
        );
        let cpu = node
            .cgroup()
            .read(group, "cpu", "cpu.cfs_quota_us", "cpu.max")?;
        ensure!(
            cpu.split(' ').next() == Some(quota),
            "quota {cpu}, not {quota}"
        );
        Ok(())
    };
    limited_to(200 * MIB, "50000")?;
    let more = v1::LinuxContainerResources {
        memory_limit_in_bytes: 300 * MIB,
        cpu_period: 100_000,
        cpu_quota: 80_000,
        ..v1::LinuxContainerResources::default()
    };
    container.update(more).await?;
    limited_to(300 * MIB, "80000")?;
    let cpu_only = v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 60_000,
        ..v1::LinuxContainerResources::default()
    };
    container.update(cpu_only).await?;
    limited_to(300 * MIB, "60000")?;
    let (_, used, available) = usage(&container).await?;
    ensure!(
        used + available == (300 * MIB).unsigned_abs(),
        "{used} bytes used, {available} left of 300 MiB"
    );
    pod.remove().await
}

pub(crate) async fn processes_are_listed(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.script("sleep 600 & sleep 600 & wait").start().await?;
    let three = wait::until("three processes", wait::SOON, async || {
        let table = node
            .ctr(["-n", "k8s.io", "task", "ps", container.id()])
            .run()
            .await
            .ok()?;
        (table.lines().count() == 4).then_some(())
    });
    three.await?;
    pod.remove().await
}

pub(crate) async fn a_pause_stops_and_a_resume_goes_on(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod
        .script("i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.1; done")
        .start()
        .await?;
    container.logged("tick 3\n").await?;
    let task = async |verb: &str| {
        node.ctr(["-n", "k8s.io", "task", verb, container.id()])
            .run()
            .await
    };
    task("pause").await?;
    let listed = node.ctr(["-n", "k8s.io", "task", "list"]).run().await?;
    ensure!(
        listed
            .lines()
            .any(|l| l.contains(container.id()) && l.contains("PAUSED")),
        "{listed}"
    );
    let ticks = || container.log().lines().count();
    // What was under way may still arrive.
    let before = wait::until("a second without a tick", wait::SOON, async || {
        let before = ticks();
        tokio::time::sleep(Duration::from_secs(1)).await;
        (ticks() == before).then_some(before)
    });
    let before = before.await.context("it goes on while it is paused")?;
    task("resume").await?;
    wait::until_true("more ticks", wait::SOON, || ticks() > before + 3).await?;
    // With a sandbox, a paused container can be ended all the same.
    if handler != "runc" {
        task("pause").await?;
    }
    pod.remove().await
}
