// SPDX-License-Identifier: Apache-2.0

//! What a Pod costs (processes, threads, descriptors, memory, runs of the runtime) and may cost.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    leaks::bears,
    mini::{Config, Mini, Runtime},
    tools, wait,
};

use crate::{end, gone, sandbox};

/// KiB by which a shim may grow in a hundred execs: allocators keep what they had.
const GROWTH: u64 = 1536;

pub(crate) async fn one_process_and_one_thread(mini: &Mini, runtime: Runtime) -> Result<()> {
    let id = format!("frugal-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    let shims = mini.shims_of(&id);
    ensure!(shims.len() == 1, "{shims:?}");
    wait::until_true("one thread", wait::SOON, || {
        shims[0].status("Threads") == Some(1)
    })
    .await?;
    let names = || {
        mini.place()
            .processes()
            .into_iter()
            .map(|p| p.argv)
            .filter(|a| bears(a, &id))
            .collect::<Vec<_>>()
    };
    let of_the_runtime = names()
        .into_iter()
        .filter(|a| a.starts_with("runsc-sandbox") || a.starts_with("runsc-gofer"))
        .count();
    match runtime {
        Runtime::Runsc => ensure!(names().len() == 3 && of_the_runtime == 2, "{:#?}", names()),
        // Without the control socket something must wait for the end.
        Runtime::RunscCli => ensure!(names().len() <= 4 && of_the_runtime == 2, "{:#?}", names()),
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn nothing_grows_with_execs(mini: &Mini, runtime: Runtime) -> Result<()> {
    let id = format!("steady-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    let process = mini.shims_of(&id).into_iter().next().context("no shim")?;
    let execs = async |round: &str, count: u32| -> Result<()> {
        for n in 0..count {
            let exec = format!("{round}{n}");
            let output = shim.exec(&bundle, &exec, &["true"]).await?;
            shim.start(&id, &exec).await?;
            ensure!(shim.wait(&id, &exec).await? == 0);
            shim.remove(&id, &exec).await?;
            output.read_to_end().await?;
        }
        Ok(())
    };
    execs("warm", 10).await?;
    let (fds, rss) = (process.files()?, process.status("VmRSS").context("no RSS")?);
    let count = if runtime == Runtime::Runsc { 100 } else { 30 };
    execs("more", count).await?;
    let (fds_after, rss_after) = (process.files()?, process.status("VmRSS").context("no RSS")?);
    ensure!(
        fds_after.len() <= fds.len(),
        "{fds:#?}, after {count} execs {fds_after:#?}"
    );
    ensure!(
        rss_after <= rss + GROWTH,
        "{rss} KiB, after {count} execs {rss_after} KiB"
    );
    end(mini, &shim, bundle).await
}

/// A runtime that writes down what it is asked.
fn recorded(mini: &Mini, log: &Path) -> Result<PathBuf> {
    let program = tools::runsc()?;
    let path = mini.dir().join("recorded");
    // One write, so that two at a time do not mix.
    let script = format!(
        "#!/bin/sh\nprintf '%s\\n' \"$*\" >> {}\nexec {} \"$@\"\n",
        log.display(),
        program.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

pub(crate) async fn a_pod_takes_few_commands(mini: &Mini) -> Result<()> {
    const MOST: usize = 6;
    let id = "few";
    let log = mini.dir().join(format!("{id}.log"));
    let binary = Some(recorded(mini, &log)?);
    let config = mini.config(
        Runtime::Runsc,
        &Config {
            binary,
            ..Config::default()
        },
    )?;
    let bundle = mini.bundle(id).sandbox().script("sleep 3600").write()?;
    let shim = mini.shim(&bundle, &config).await?;
    shim.run(&bundle).await?;
    let member = mini
        .bundle(&format!("{id}-c"))
        .member_of(id)
        .script("sleep 3600")
        .write()?;
    let output = shim.run(&member).await?;
    let up = fs::read_to_string(&log)?.lines().count();
    // An exec, and looking at it, takes none.
    let ran = shim.exec(&member, "free", &["true"]).await?;
    shim.start(member.id(), "free").await?;
    ensure!(shim.wait(member.id(), "free").await? == 0);
    ran.read_to_end().await?;
    shim.state(member.id(), "").await?;
    let commands = fs::read_to_string(&log)?;
    ensure!(commands.lines().count() == up, "{commands}");
    shim.end(member.id()).await?;
    output.read_to_end().await?;
    gone(mini, member).await?;
    end(mini, &shim, bundle).await?;
    let commands = fs::read_to_string(&log)?;
    ensure!(
        commands.lines().count() <= MOST,
        "{} commands of {MOST}:\n{commands}",
        commands.lines().count()
    );
    Ok(())
}

/// Without CRI around it a container is a sandbox of its own, with its own limits.
pub(crate) async fn a_container_of_its_own_has_its_limits(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    const LIMIT: i64 = 100 << 20;
    let id = format!("limited-{runtime:?}").to_lowercase();
    let bundle = mini
        .bundle(&id)
        .script("awk 'BEGIN { s = \"x\"; while (1) s = s s }'");
    let bundle = bundle
        .edit(|s| s["linux"]["resources"]["memory"] = serde_json::json!({"limit": LIMIT}))
        .write()?;
    let shim = mini
        .shim(&bundle, &mini.config(runtime, &Config::default())?)
        .await?;
    shim.create(&bundle).await?;
    let limit: i64 = mini
        .place()
        .cgroup()
        .read(&id, "memory", "memory.limit_in_bytes", "memory.max")?
        .parse()?;
    // A sandbox has some for itself.
    ensure!(
        (LIMIT..=LIMIT + (64 << 20)).contains(&limit),
        "{limit} bytes"
    );
    shim.start(&id, "").await?;
    ensure!(shim.wait(&id, "").await? == 137);
    shim.remove(&id, "").await?;
    mini.events()
        .expect(&id, &["create", "start", "oom", "exit", "delete"])
        .await?;
    shim.shutdown().await?;
    gone(mini, bundle).await
}
