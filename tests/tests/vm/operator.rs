// SPDX-License-Identifier: Apache-2.0

//! What an operator does to a node, by README, and what its Pods live through.

use anyhow::{Context, Result, ensure};

use crate::{node::Node, only_here::adopted};

/// What preflight calls the handler.
const HANDLER: &str = "containerd's handler";

/// Before Kiln is there, preflight misses the handler and nothing else.
pub(crate) async fn preflight_names_what_is_missing(node: &Node) -> Result<()> {
    let checks = node
        .machine()
        .output("kilnctl node preflight -o json")
        .await?;
    let missing = missing(&checks.out)?;
    ensure!(checks.code != 0, "{checks:?}");
    ensure!(missing == [HANDLER], "{missing:?}: {checks:?}");
    Ok(())
}

pub(crate) async fn a_node_is_enabled(node: &Node) -> Result<()> {
    node.enabled().await?;
    let checks = node
        .machine()
        .output("kilnctl node preflight -o json")
        .await?;
    let missing = missing(&checks.out)?;
    ensure!(checks.code == 0 && missing.is_empty(), "{checks:?}");
    // What the node had is still there.
    let runc = "$(readlink /proc/$(systemctl show -P MainPID containerd)/exe) config dump | grep -q 'SystemdCgroup = true'";
    node.sh(runc).await.map(drop)
}

/// The names of the checks that fail.
fn missing(checks: &str) -> Result<Vec<String>> {
    let checks: Vec<serde_json::Value> = serde_json::from_str(checks).context(checks.to_owned())?;
    let missing = checks.iter().filter(|c| c["verdict"] == "missing");
    let names = missing.filter_map(|c| c["check"].as_str());
    Ok(names.map(str::to_owned).collect())
}

/// Whatever the unit of the agent has systemd end with it, and whatever systemd is asked: what is
/// warm is in cgroups of its own.
pub(crate) async fn pods_and_warm_sandboxes_survive_restarts(node: &Node) -> Result<()> {
    let pod = adopted(node, "restarts").await?;
    node.expect_warm().await?;
    let warm = node.warm().await?;
    let dir = "/run/systemd/system/kiln-node-agent.service.d";
    let ends_all = format!(
        "mkdir -p {dir}; printf '[Service]\nKillMode=control-group\n' >{dir}/kill.conf; systemctl daemon-reload"
    );
    for before in ["systemctl restart containerd", &ends_all] {
        node.sh(&format!("{before} && systemctl restart kiln-node-agent"))
            .await?;
        ensure!(pod.exec("echo $((6*7))").await?.trim() == "42");
        node.expect_warm().await?;
        ensure!(node.warm().await? == warm, "another sandbox is warm");
    }
    let controllers = format!(
        "rm -r {dir}; systemctl set-property --runtime system.slice MemoryMax=2G; systemctl daemon-reload\n\
         cat /sys/fs/cgroup/kiln-warm/{}/cgroup.controllers",
        warm.trim()
    );
    let controllers = node.sh(&controllers).await?;
    for name in ["cpu", "memory", "pids"] {
        let is_there = controllers.split_whitespace().any(|c| c == name);
        ensure!(is_there, "{name} was taken away: {controllers}");
    }
    pod.remove().await
}

pub(crate) async fn a_reboot_brings_all_back(node: &Node) -> Result<()> {
    node.agent().await?;
    node.machine().reboot().await?;
    let machine = node.machine();
    machine.until("containerd", "crictl rmp -f -a").await?;
    let pod = adopted(node, "rebooted").await?;
    pod.expect_accounted().await?;
    pod.remove().await
}

pub(crate) async fn an_upgrade_keeps_pods(node: &Node) -> Result<()> {
    let pod = adopted(node, "upgraded").await?;
    // What follows a program's last byte changes nothing in it.
    node.sh("cp -r /mnt/kiln /tmp/newer; echo >>/tmp/newer/containerd-shim-kiln-v2")
        .await?;
    let said = node.enable("/tmp/newer").await?;
    ensure!(said.contains("sandboxes run"), "{said}");
    ensure!(pod.exec("echo $((6*7))").await?.trim() == "42");
    let next = node.pod("next").await?;
    next.remove().await?;
    pod.remove().await
}

pub(crate) async fn a_node_is_disabled(node: &Node) -> Result<()> {
    node.agent().await?;
    node.sh("crictl rmp -f -a >/dev/null; systemctl disable --now kiln-node-agent; /opt/kiln/bin/kiln-node-agent --drain").await?;
    node.expect_nothing().await?;
    let said = node.sh("kilnctl node disable 2>&1").await?;
    let left = node.sh("systemctl is-active containerd; ls -A /opt/kiln /etc/kiln 2>/dev/null; grep -r kiln /etc/containerd || true").await?;
    ensure!(!left.contains("shim-kiln"), "{said}: {left}");
    let checks = node
        .machine()
        .output("kilnctl node preflight -o json")
        .await?;
    ensure!(missing(&checks.out)? == [HANDLER], "{checks:?}");
    Ok(())
}
