// SPDX-License-Identifier: Apache-2.0

//! What only such a node can fail: systemd at work on cgroups that a Pod's limits are in.

use anyhow::{Context, Result, bail, ensure};

use crate::node::{MANAGER, MEMORY, Node, Pod};

pub(crate) async fn a_cold_pod_works(node: &Node) -> Result<()> {
    node.enabled().await?;
    let pod = node.pod("cold").await?;
    pod.expect_accounted().await?;
    works(node, &pod).await?;
    pod.remove().await?;
    node.expect_nothing().await
}

/// Logs, exec, figures, port-forward, and no way to link-local addresses.
async fn works(node: &Node, pod: &Pod<'_>) -> Result<()> {
    let (id, container) = (&pod.id, &pod.container);
    let kernel = pod.exec("uname -r").await?;
    ensure!(kiln_tests::is_gvisors(&kernel), "{kernel}");
    let code = format!("crictl exec -s {container} sh -c 'exit 7'; [ $? != 0 ]");
    node.sh(&code).await?;
    let log = format!("crictl logs {container} | grep hello");
    node.machine().until("a log", &log).await?;
    let stats = node
        .sh(&format!("crictl stats -o json {container}"))
        .await?;
    let stats: serde_json::Value = serde_json::from_str(&stats)?;
    let used = stats["stats"][0]["memory"]["workingSetBytes"]["value"].as_str();
    let used: u64 = used
        .unwrap_or_default()
        .parse()
        .context(stats.to_string())?;
    ensure!((1 << 20..MEMORY).contains(&used), "{stats}");
    let forward = format!(
        "crictl port-forward {id} 18080:8080 >/tmp/forward.log 2>&1 & p=$!; trap 'kill $p' EXIT\n\
         for i in $(seq 120); do grep -q Forwarding /tmp/forward.log && break; sleep 0.5; done\n\
         busybox wget -q -O - http://127.0.0.1:18080/busybox | sha256sum | cut -d' ' -f1; \
         sha256sum </mnt/bin/busybox | cut -d' ' -f1"
    );
    let forwarded = node.sh(&forward).await?;
    let sums: Vec<_> = forwarded.lines().collect();
    ensure!(sums.len() == 2 && sums[0] == sums[1], "{forwarded}");
    // A connection that a busy machine has not tried in time has sent nothing.
    let guarded = format!(
        "ns=$(crictl inspectp {id} | grep -o '/var/run/netns/[^\"]*' | head -1)\n\
         crictl exec -s {container} sh -c 'timeout 5 nc 169.254.169.254 80'\n\
         rules=$(nsenter --net=$ns nft list ruleset); echo \"$rules\"\n\
         grep -q '0xa9fe0000-0xa9feffff counter name \"dropped\" drop' <<<$rules && ! grep -q 'packets 0 ' <<<$rules"
    );
    let dropped = node.machine().until("a packet that is dropped", &guarded);
    dropped.await.map(drop)
}

/// What a kubelet does to a Pod's slice when it resizes the Pod, and what else systemd is asked.
pub(crate) async fn systemd_keeps_what_limits_a_pod(node: &Node) -> Result<()> {
    node.enabled().await?;
    let pod = node.pod("kept").await?;
    let slice = &pod.slice;
    for act in [
        format!(
            "busctl call {MANAGER} SetUnitProperties 'sba(sv)' {slice} true 1 MemoryMax t {MEMORY}"
        ),
        "systemctl daemon-reload".to_owned(),
        format!("systemd-run -q --scope --slice={slice} -p Delegate=yes true"),
    ] {
        node.sh(&act).await?;
        pod.expect_accounted().await.context(act)?;
    }
    let end = pod.exhaust().await?;
    ensure!(end.contains("OOMKilled") && end.contains("137"), "{end}");
    pod.remove().await?;
    node.expect_nothing().await
}

pub(crate) async fn a_pod_that_exhausts_its_memory_is_oom_killed(node: &Node) -> Result<()> {
    node.enabled().await?;
    let pod = node.pod("oom").await?;
    let end = pod.exhaust().await?;
    ensure!(end.contains("OOMKilled") && end.contains("137"), "{end}");
    pod.remove().await?;
    node.expect_nothing().await
}

/// How many Pods may come before one that adopts: the first tells the agent what to hold, and an
/// agent on a busy machine has others start cold, as it should.
const TRIES: u32 = 6;

/// Starts a Pod in a sandbox that was warm.
pub(crate) async fn adopted<'a>(node: &'a Node, name: &str) -> Result<Pod<'a>> {
    node.agent().await?;
    let mut log = String::new();
    for _ in 0..TRIES {
        let pod = node.pod(name).await?;
        let words = format!(
            "journalctl -u containerd -o cat | grep {} | grep -E 'adopted|cold'",
            pod.id
        );
        log = node.machine().until("what the shim says", &words).await?;
        if log.contains("adopted warm-") {
            return Ok(pod);
        }
        pod.remove().await?;
        node.expect_warm().await?;
    }
    bail!("no Pod adopts: {log}")
}

pub(crate) async fn an_adopted_pod_is_in_its_slice(node: &Node) -> Result<()> {
    let pod = adopted(node, "adopted").await?;
    pod.expect_accounted().await?;
    let (slice, cgroup) = (&pod.slice, pod.cgroup());
    node.sh(&format!(
        "busctl call {MANAGER} SetUnitProperties 'sba(sv)' {slice} true 1 MemoryMax t {MEMORY}"
    ))
    .await?;
    pod.expect_accounted().await?;
    works(node, &pod).await?;
    // All of its processes, and nothing but its own.
    let sentries = format!("pgrep -f runsc-sandbox | grep -cFxf {cgroup}/cgroup.procs");
    let sentries = node.sh(&sentries).await?;
    ensure!(sentries.trim() == "1", "{sentries}");
    let end = pod.exhaust().await?;
    ensure!(end.contains("OOMKilled"), "{end}");
    pod.remove().await
}

/// gVisor's documentation has nodes with systemd set it.
pub(crate) async fn a_flag_for_systemd_is_honoured(node: &Node) -> Result<()> {
    node.enabled().await?;
    node.sh("cp /etc/kiln/runsc.toml /tmp/; sed -i 's/^\\[runsc_config\\]/&\\nsystemd-cgroup = \"true\"/' /etc/kiln/runsc.toml; grep systemd-cgroup /etc/kiln/runsc.toml").await?;
    let worked = async {
        let pod = node.pod("flag").await?;
        pod.expect_accounted().await?;
        ensure!(pod.exec("echo $((6*7))").await?.trim() == "42");
        pod.remove().await
    };
    let worked = worked.await;
    node.sh("cp /tmp/runsc.toml /etc/kiln/").await?;
    worked
}
