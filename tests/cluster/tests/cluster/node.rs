// SPDX-License-Identifier: Apache-2.0

//! The node: its statistics, and `kiln-cluster` itself.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use kiln_tests::wait;
use serde_json::Value;

use crate::env::Env;

pub(crate) async fn stats_have_cpu_and_memory(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.pod(
        "busy",
        "gvisor",
        "seq 100000 > /dev/null; exec sleep 1000000",
        "",
    )
    .await?;
    let uid = ns.field("pod/busy", ".metadata.uid").await?;
    let path = format!(
        "/api/v1/nodes/{}/proxy/stats/summary",
        env.private.cluster().node()
    );
    let mut last = String::new();
    let found = wait::until(
        "statistics of the Pod",
        Duration::from_secs(60),
        async || {
            last = ns.kubectl(["get", "--raw", &path]).await.ok()?;
            let summary: Value = serde_json::from_str(&last).ok()?;
            let pods = summary["pods"].as_array()?;
            let pod = pods.iter().find(|p| p["podRef"]["uid"] == uid.as_str())?;
            let positive = |v: &Value| v.as_u64().is_some_and(|n| n > 0);
            let whole = |v: &Value| {
                positive(&v["cpu"]["usageCoreNanoSeconds"])
                    && positive(&v["memory"]["workingSetBytes"])
            };
            (whole(pod) && whole(&pod["containers"][0])).then_some(())
        },
    );
    ensure!(found.await.is_ok(), "{last}");
    Ok(())
}

pub(crate) async fn a_second_up_changes_nothing(env: &Env) -> Result<()> {
    let before = env.private.cluster().processes();
    let said = env.private.run("up").await?;
    ensure!(said.contains("runs already"), "{said}");
    ensure!(said.contains("export KUBECONFIG="), "{said}");
    ensure!(
        env.private.cluster().processes() == before,
        "other processes"
    );
    let status = env.private.run("status").await?;
    ensure!(
        status.contains("kubelet") && status.contains("up, in "),
        "{status}"
    );
    Ok(())
}

pub(crate) async fn others_may_not_use_its_place(env: &Env) -> Result<()> {
    let dir = env.private.dir().join("o");
    fs::create_dir(&dir)?;
    fs::write(dir.join("precious"), "")?;
    for command in ["up", "down"] {
        let Err(e) = env.private.run_in(&dir, command).await else {
            anyhow::bail!("{command} took a directory of others");
        };
        ensure!(e.to_string().contains("files of others"), "{e:#}");
    }
    ensure!(dir.join("precious").exists(), "it is gone");
    Ok(())
}
