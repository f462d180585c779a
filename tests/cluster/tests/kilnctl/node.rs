// SPDX-License-Identifier: Apache-2.0

//! What `kilnctl` says of this machine, and how it is called.

use std::{env::join_paths, fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result, ensure};
use kiln_cluster::account::deploy;
use kiln_tests::{
    process::{Cmd, Output},
    tools,
};
use serde_json::Value;

use crate::env::{Env, fails, program};

/// Looks at this machine with a containerd that is configured by the files in `dir`.
async fn preflight(containerd: &Path, dir: &Path) -> Result<(Output, Vec<Value>)> {
    let shims = tools::shim()?.parent().context("no directory")?.to_owned();
    let path = join_paths([&shims, Path::new("/usr/bin")])?;
    let output = Cmd::new(&program()?)
        .args(["node", "preflight", "-o", "json", "--containerd"])
        .args([
            containerd,
            "--containerd-config".as_ref(),
            &dir.join("config.toml"),
        ])
        .args([
            "--runtime-config".as_ref(),
            dir.join("runsc.toml").as_os_str(),
        ])
        .env("PATH", path)
        .output()
        .await?;
    let checks = serde_json::from_slice(&output.stdout).with_context(|| output.errors())?;
    Ok((output, checks))
}

#[track_caller]
fn check<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    let found = checks.iter().find(|c| c["check"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {checks:?}"))
}

pub(crate) async fn preflight_says_what_is_missing(env: &Env) -> Result<()> {
    let dir = env.plane.dir().join("preflight");
    fs::create_dir(&dir)?;
    let containerd = tools::program("containerd")?;
    let handler = fs::read_to_string(deploy().join("containerd.toml"))?;
    fs::write(dir.join("config.toml"), &handler)?;
    let runsc = format!("binary_name = \"{}\"\n", tools::runsc()?.display());
    fs::write(dir.join("runsc.toml"), &runsc)?;
    let (output, checks) = preflight(&containerd, &dir).await?;
    for name in [
        "root",
        "kernel",
        "cgroup",
        "containerd's handler",
        "shim",
        "runtime",
    ] {
        let found = check(&checks, name);
        ensure!(found["verdict"] == "ok" && found["advice"] == "", "{found}");
    }
    // What else the machine lacks is its own affair, but is told by the code.
    let lacks = checks.iter().any(|c| c["verdict"] == "missing");
    ensure!(output.code() == i32::from(lacks), "{checks:?}");

    let gone = "binary_name = \"/nowhere/runsc\"\n";
    fs::write(dir.join("runsc.toml"), gone)?;
    fs::write(dir.join("config.toml"), "version = 3\n")?;
    let (output, checks) = preflight(&containerd, &dir).await?;
    ensure!(output.code() == 1, "{output:?}");
    for (name, advice) in [
        ("containerd's handler", "deploy/containerd.toml"),
        ("runtime", "install runsc"),
    ] {
        let found = check(&checks, name);
        let told = found["advice"].as_str().unwrap_or_default();
        ensure!(
            found["verdict"] == "missing" && told.contains(advice),
            "{found}"
        );
    }

    // containerd 1.7 reads another form, with no file of its own as well.
    fs::remove_file(dir.join("config.toml"))?;
    let old = tools::program("containerd-1.7")?;
    for own in [None, Some("version = 2\n")] {
        if let Some(text) = own {
            fs::write(dir.join("config.toml"), text)?;
        }
        let (_, checks) = preflight(&old, &dir).await?;
        let found = check(&checks, "containerd's handler");
        let told = found["advice"].as_str().unwrap_or_default();
        ensure!(
            told.contains("append deploy/containerd-1.7.toml to"),
            "{found}"
        );
    }
    let table = fs::read_to_string(deploy().join("containerd-1.7.toml"))?;
    fs::write(dir.join("config.toml"), format!("version = 2\n{table}"))?;
    let (_, checks) = preflight(&old, &dir).await?;
    let found = check(&checks, "containerd's handler");
    ensure!(found["verdict"] == "ok", "{found}");

    fs::write(dir.join("runsc.toml"), "binary_name = 3\n")?;
    fs::write(dir.join("config.toml"), "version = [")?;
    let (output, checks) = preflight(&containerd, &dir).await?;
    ensure!(output.code() == 1, "{output:?}");
    for name in ["containerd's config", "runtime's config"] {
        ensure!(check(&checks, name)["verdict"] == "missing", "{checks:?}");
    }

    let old = dir.join("containerd");
    fs::write(
        &old,
        "#!/bin/sh\necho containerd containerd.io 1.6.33 abc\n",
    )?;
    fs::set_permissions(&old, fs::Permissions::from_mode(0o755))?;
    let (output, checks) = preflight(&old, &dir).await?;
    ensure!(output.code() == 1, "{output:?}");
    let found = check(&checks, "containerd");
    ensure!(found["advice"] == "use containerd 1.7 or newer", "{found}");
    Ok(())
}

pub(crate) async fn an_agent_that_is_away_is_named(env: &Env) -> Result<()> {
    let socket = env.plane.dir().join("no.sock").display().to_string();
    let output = env
        .kilnctl(&format!("node status --socket {socket}"))
        .await?;
    fails(&output, &[&socket, "does it run on this node"])
}

pub(crate) async fn it_is_a_plugin_of_kubectl(env: &Env) -> Result<()> {
    let dir = env.plane.dir().join("plugins");
    fs::create_dir(&dir)?;
    std::os::unix::fs::symlink(program()?, dir.join("kubectl-kiln"))?;
    let path = join_paths([&dir, Path::new("/usr/bin")])?;
    let kubectl = |args: &'static [&'static str]| -> Result<Cmd> {
        let kubectl = Cmd::new(&tools::program("kubectl")?);
        Ok(kubectl
            .args(args)
            .env("PATH", &path)
            .env("HOME", env.plane.dir()))
    };
    let version = kubectl(&["kiln", "version"])?.run().await?;
    ensure!(
        version == format!("kilnctl {}\n", env!("CARGO_PKG_VERSION")),
        "{version}"
    );
    let help = kubectl(&["kiln", "enable", "--help"])?.run().await?;
    ensure!(help.contains("Usage: kubectl kiln enable"), "{help}");
    let script = env.does("completion bash").await?;
    ensure!(script.contains("preflight"), "{script}");
    Ok(())
}
