// SPDX-License-Identifier: Apache-2.0

//! How Pods start, fail and end.

use anyhow::{Result, ensure};
use kiln_tests::{process::Proc, wait};

use crate::env::{Env, pod};

pub(crate) async fn a_failing_liveness_probe_restarts(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let sick = pod(
        "sick",
        "gvisor",
        "touch /ok; sleep 3; rm /ok; exec sleep 1000000",
        "",
    );
    let probe =
        "    livenessProbe: {exec: {command: [cat, /ok]}, periodSeconds: 1, failureThreshold: 1}\n";
    ns.apply(&(sick + probe)).await?;
    let count = ".status.containerStatuses[0].restartCount";
    ns.until_field("pod/sick", count, |n| n.parse().is_ok_and(|n: u32| n >= 1))
        .await?;
    // It runs again.
    ns.until_field(
        "pod/sick",
        ".status.containerStatuses[0].state.running",
        |s| !s.is_empty(),
    )
    .await?;
    Ok(())
}

pub(crate) async fn a_job_runs_to_its_end(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    for (name, command, phase) in [
        ("good", "echo done", "Succeeded"),
        ("bad", "exit 3", "Failed"),
    ] {
        ns.apply(&pod(name, "gvisor", command, "  restartPolicy: Never"))
            .await?;
        ns.until_field(&format!("pod/{name}"), ".status.phase", |p| p == phase)
            .await?;
    }
    let code = ".status.containerStatuses[0].state.terminated.exitCode";
    let code = ns.field("pod/bad", code).await?;
    ensure!(code == "3", "{code}");
    let logs = ns.kubectl(["logs", "good"]).await?;
    ensure!(logs == "done\n", "{logs:?}");
    Ok(())
}

/// Neither processes nor cgroups.
pub(crate) async fn a_pod_leaves_nothing(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.pod("short", "gvisor", "sleep 1000000", "").await?;
    let uid = ns.field("pod/short", ".metadata.uid").await?;
    let sandboxes = env.private.sandboxes(&ns.name).await?;
    ensure!(sandboxes.len() == 1, "{sandboxes:?}");
    let processes = || Proc::with(&sandboxes[0]);
    ensure!(!processes().is_empty(), "no process of the Pod");
    let cgroups = || {
        let dirs = env.private.cluster().cgroup().dirs().into_iter();
        dirs.filter(|d| d.to_string_lossy().contains(&uid)).count()
    };
    ensure!(cgroups() > 0, "no cgroup of the Pod");
    ns.kubectl(["delete", "pod/short", "--timeout=50s"]).await?;
    wait::until_true("no process and no cgroup", wait::SOON, || {
        cgroups() == 0 && processes().is_empty()
    })
    .await
}

/// Even where it must be pulled each time.
pub(crate) async fn an_image_of_any_registry_is_pulled(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let far = pod("far", "gvisor", "sleep 1000000", "").replace(
        "image: busybox:1",
        "image: registry.k8s.io/e2e-test-images/busybox:1.29-2\n    imagePullPolicy: Always",
    );
    ns.apply(&far).await?;
    ns.ready("far").await
}
