// SPDX-License-Identifier: Apache-2.0

//! CPU time of containerd and everything that it starts, without the sandboxes.
//!
//! containerd is in a cgroup of its own, which what it starts inherits: shims, the runtime's
//! commands and CNI's plugins. Runtimes move sandboxes and containers out of it, into the Pod's.

use std::fs;

use anyhow::{Context, Result, bail};
use kiln_tests::{cgroup, node::Node, process::Proc};
use nix::unistd::{SysconfVar, sysconf};

/// The part of a node's cgroup that containerd is in.
const DAEMON: &str = "daemon";

/// Has the kernel count the CPU time of the node's containerd apart from that of Pods.
///
/// On cgroup v1 the harness puts containerd into the hierarchy only by which it tracks processes.
///
/// # Errors
/// When containerd cannot be found or moved.
pub(crate) fn account(node: &Node) -> Result<()> {
    if cgroup::is_v2() {
        return Ok(());
    }
    let containerd = node
        .processes()
        .into_iter()
        .find(|p| p.program() == "containerd")
        .context("find containerd")?;
    let dir = format!("/sys/fs/cgroup/cpuacct{}/{DAEMON}", node.cgroup().parent());
    fs::create_dir_all(&dir).with_context(|| format!("make {dir}"))?;
    fs::write(format!("{dir}/cgroup.procs"), containerd.pid.to_string())
        .with_context(|| format!("move containerd to {dir}"))
}

/// CPU time that containerd and what it has started have used so far, in milliseconds.
///
/// # Errors
/// When the cgroup cannot be read.
pub(crate) fn used(node: &Node) -> Result<f64> {
    let text = node
        .cgroup()
        .read(DAEMON, "cpuacct", "cpuacct.usage", "cpu.stat")?;
    if cgroup::is_v2() {
        let usec = text
            .lines()
            .find_map(|line| line.strip_prefix("usage_usec "))
            .context("no usage in cpu.stat")?;
        return Ok(usec.parse::<f64>()? / 1e3);
    }
    Ok(text.parse::<f64>().context("read cpuacct.usage")? / 1e6)
}

/// CPU time that one process has used so far, in milliseconds.
///
/// # Errors
/// When it is gone.
pub(crate) fn of_process(process: &Proc) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid))
        .context("read the shim's CPU time")?;
    // The name in parentheses may hold anything; utime and stime are fields 14 and 15
    // (proc_pid_stat(5)), counted from the state, which is field 3.
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .context("stat without a name")?
        .1
        .split_whitespace()
        .collect();
    let (Some(user), Some(system)) = (fields.get(11), fields.get(12)) else {
        bail!("stat is too short: {stat}")
    };
    let ticks = user.parse::<f64>()? + system.parse::<f64>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock ticks")?;
    Ok(ticks * 1e3 / per_second as f64)
}
