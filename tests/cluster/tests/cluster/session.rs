// SPDX-License-Identifier: Apache-2.0

//! Looking into a Pod: logs, exec, cp.

use std::fs;

use anyhow::{Result, ensure};

use crate::env::{Env, web};

pub(crate) async fn logs_and_exec_work(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.pod("web", "gvisor", &web("hello"), "").await?;
    let logs = ns.kubectl(["logs", "web"]).await?;
    ensure!(logs == "serving\n", "{logs:?}");
    let kernel = ns.shell("web", "dmesg").await?;
    ensure!(kernel.contains("Starting gVisor"), "{kernel}");
    let failed = ns
        .kubectl_with(["exec", "web", "--", "sh", "-c", "exit 7"], "")
        .await?;
    ensure!(failed.code() == 7, "{failed:?}");
    let counted = ns
        .kubectl_with(["exec", "-i", "web", "--", "wc", "-l"], "a\nb\nc\n")
        .await?;
    ensure!(counted.text().trim() == "3", "{counted:?}");
    Ok(())
}

pub(crate) async fn a_terminal_is_one(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.pod("idle", "gvisor", "sleep 1000000", "").await?;
    // `script` types an end of file at once, which often comes after the command has ended.
    for _ in 0..10 {
        let said = ns
            .on_a_terminal("exec -it idle -- sh -c 'test -t 0 && test -t 1 && echo is-one'")
            .await?;
        ensure!(said.contains("is-one"), "{said:?}");
    }
    Ok(())
}

pub(crate) async fn files_are_copied_both_ways(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.pod("idle", "gvisor", "sleep 1000000", "").await?;
    let (from, to) = (
        env.private.dir().join("cp-from"),
        env.private.dir().join("cp-to"),
    );
    fs::write(&from, "some text")?;
    ns.kubectl(["cp", &from.display().to_string(), "idle:/tmp/file"])
        .await?;
    let there = ns.shell("idle", "cat /tmp/file").await?;
    ensure!(there == "some text", "{there:?}");
    ns.kubectl(["cp", "idle:/tmp/file", &to.display().to_string()])
        .await?;
    let back = fs::read_to_string(&to)?;
    ensure!(back == "some text", "{back:?}");
    Ok(())
}
