// SPDX-License-Identifier: Apache-2.0

//! Whole lives.

use std::{fs, io::Write, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{api, protobuf::Enum, ttrpc::Code};
use futures_util::future::try_join_all;
use kiln_tests::{
    leaks::SCRATCH,
    mini::{Config, Mini, Runtime, Shim, bundle::Bundle, code, ctx, fifo::Fifo},
    process::signal_to,
    wait,
};
use nix::sys::signal::Signal;

use crate::{end, gone, sandbox};

async fn status(shim: &Shim, id: &str, exec: &str) -> Result<api::Status> {
    let state = shim.state(id, exec).await.context("state")?;
    state
        .status
        .enum_value()
        .map_err(|n| anyhow::anyhow!("status {n}"))
}

pub(crate) async fn a_life_has_its_events_in_order(mini: &Mini, runtime: Runtime) -> Result<()> {
    let id = format!("life-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(
        mini,
        runtime,
        &id,
        "echo one; read wait < /dev/null; sleep 1; echo two >&2; exit 6",
    )
    .await?;
    let output = shim.create(&bundle).await?;
    ensure!(status(&shim, &id, "").await? == api::Status::CREATED);
    let pid = shim.start(&id, "").await?;
    ensure!(pid > 0 && status(&shim, &id, "").await? == api::Status::RUNNING);

    let ran = shim
        .exec(&bundle, "first", &["sh", "-c", "echo from exec; exit 3"])
        .await?;
    ensure!(status(&shim, &id, "first").await? == api::Status::CREATED);
    ensure!(shim.start(&id, "first").await? > 0);
    ensure!(shim.wait(&id, "first").await? == 3);
    ensure!(ran.read_to_end().await? == ("from exec\n".to_owned(), String::new()));
    ensure!(status(&shim, &id, "first").await? == api::Status::STOPPED);
    ensure!(shim.remove(&id, "first").await? == 3);
    ensure!(code(shim.state(&id, "first").await)? == Some(Code::NOT_FOUND));

    let request = api::ConnectRequest {
        id: id.clone(),
        ..api::ConnectRequest::default()
    };
    let connected = shim.task().connect(ctx(), &request).await?;
    let process = mini.shims_of(&id).into_iter().next().context("no shim")?;
    ensure!(
        (connected.shim_pid, connected.task_pid) == (process.pid, pid),
        "{connected}"
    );

    ensure!(shim.wait(&id, "").await? == 6);
    ensure!(output.read_to_end().await? == ("one\n".to_owned(), "two\n".to_owned()));
    let state = shim.state(&id, "").await.context("state")?;
    ensure!(
        state.status.value() == api::Status::STOPPED.value()
            && state.exit_status == 6
            && state.exited_at.seconds > 0,
        "{state}"
    );
    ensure!(shim.remove(&id, "").await? == 6);
    shim.shutdown().await?;
    gone(mini, bundle).await?;

    mini.events()
        .expect(&id, &["create", "start", "exit", "delete"])
        .await?;
    let all: Vec<_> = mini
        .events()
        .of(&id)
        .into_iter()
        .map(|e| (e.topic, e.exec, e.exit))
        .collect();
    let event =
        |topic: &str, exec: Option<&str>, exit| (topic.to_owned(), exec.map(str::to_owned), exit);
    let expected = [
        event("create", None, None),
        event("start", None, None),
        event("exec-added", Some("first"), None),
        event("exec-started", Some("first"), None),
        event("exit", Some("first"), Some(3)),
        event("exit", None, Some(6)),
        event("delete", None, None),
    ];
    ensure!(all == expected, "{all:?}");
    Ok(())
}

pub(crate) async fn members_live_in_their_sandbox(mini: &Mini, runtime: Runtime) -> Result<()> {
    let id = format!("pod-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    let mut members = Vec::new();
    for n in 0..3 {
        let member = mini
            .bundle(&format!("{id}-c{n}"))
            .member_of(&id)
            .script(&format!("echo member {n}; sleep 3600"))
            .write()?;
        let output = shim.run(&member).await?;
        output.stdout.read_until(&format!("member {n}\n")).await?;
        members.push((member, output));
    }
    ensure!(mini.shims_of(&id).len() == 1);
    for (member, output) in members {
        ensure!(shim.end(member.id()).await? == 137);
        output.read_to_end().await?;
        mini.events()
            .expect(member.id(), &["create", "start", "exit", "delete"])
            .await?;
        gone(mini, member).await?;
        ensure!(status(&shim, &id, "").await? == api::Status::RUNNING);
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn output_is_complete_when_the_exit_is_known(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("words-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    for n in 0..15 {
        let exec = format!("e{n}");
        let words = format!("last words {n}\n").repeat(50);
        let output = shim.exec(&bundle, &exec, &["echo", "-n", &words]).await?;
        shim.start(&id, &exec).await?;
        ensure!(shim.wait(&id, &exec).await? == 0);
        let now = output.stdout.read_now()?;
        ensure!(
            now == words,
            "exec {n}: {} of {} bytes",
            now.len(),
            words.len()
        );
        shim.remove(&id, &exec).await?;
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn execs_side_by_side_have_their_own_ends(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("execs-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    let run = async |n: u32| -> Result<()> {
        let exec = format!("e{n}");
        let output = shim
            .exec(
                &bundle,
                &exec,
                &["sh", "-c", &format!("sleep 0.5; echo {n}; exit {n}")],
            )
            .await?;
        shim.start(&id, &exec).await?;
        ensure!(shim.wait(&id, &exec).await? == n);
        ensure!(output.read_to_end().await?.0 == format!("{n}\n"));
        ensure!(shim.remove(&id, &exec).await? == n);
        Ok(())
    };
    try_join_all((1..=10).map(&run)).await?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn a_container_that_never_ran_is_deleted(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("unborn-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    let output = shim.create(&bundle).await?;
    shim.remove(&id, "").await?;
    output.read_to_end().await?;
    shim.shutdown().await?;
    mini.events().expect(&id, &["create", "delete"]).await?;
    gone(mini, bundle).await
}

pub(crate) async fn input_ends_with_close_io(mini: &Mini, runtime: Runtime) -> Result<()> {
    let id = format!("input-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "cat; echo end of input").await?;
    let stdin = Fifo::new(&bundle.io_dir(), "in")?;
    let stdout = Fifo::new(&bundle.io_dir(), "out")?;
    let request = api::CreateTaskRequest {
        stdin: stdin.path(),
        stdout: stdout.path(),
        ..shim.create_request(&bundle)
    };
    shim.task().create(ctx(), &request).await?;
    shim.start(&id, "").await?;
    let mut writer = stdin.writer()?;
    writer.write_all(b"a line\n")?;
    stdout.read_until("a line\n").await?;
    // A client that goes is no end of input.
    drop(writer);
    tokio::time::sleep(Duration::from_millis(200)).await;
    ensure!(stdout.read_now()?.is_empty());
    let mut writer = stdin.writer()?;
    writer.write_all(b"another\n")?;
    drop(writer);
    stdout.read_until("another\n").await?;
    let close = api::CloseIORequest {
        id: id.clone(),
        stdin: true,
        ..api::CloseIORequest::default()
    };
    shim.task().close_io(ctx(), &close).await?;
    ensure!(shim.wait(&id, "").await? == 0);
    ensure!(stdout.read_to_end().await? == "end of input\n");
    end(mini, &shim, bundle).await
}

/// SIGTERM is how a node's service manager ends what is left of containerd's cgroup.
pub(crate) async fn a_shim_that_is_told_to_end_leaves_its_containers(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("told-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    let process = mini.shims_of(&id).into_iter().next().context("no shim")?;
    signal_to(process.pid, Signal::SIGTERM)?;
    wait::until_true("the shim's end", wait::SOON, || {
        mini.shims_of(&id).is_empty()
    })
    .await?;
    let inside = mini.place().processes();
    ensure!(
        inside
            .iter()
            .any(|p| p.argv.contains("sleep 3600") || p.argv.starts_with("runsc-sandbox")),
        "{inside:#?}"
    );
    ensure!(mini.delete(&bundle).await?.exit_status == 137);
    gone(mini, bundle).await
}

/// containerd does that where it could not reach a shim in time, and never asks that one again.
pub(crate) async fn a_delete_ends_a_shim_that_still_serves_and_spares_the_pod_of_a_member(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("slow-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    // runsc takes an id that begins another one for ambiguous.
    let [first, second] = ["a", "b"].map(|name| {
        let member = mini.bundle(&format!("{name}-{id}")).member_of(&id);
        member.script("sleep 3600").write()
    });
    let (first, second) = (first?, second?);
    shim.run(&first).await?;
    shim.run(&second).await?;
    mini.delete(&first).await?;
    mini.events()
        .expect(first.id(), &["create", "start", "exit", "delete"])
        .await?;
    for stays in [&id, second.id()] {
        ensure!(status(&shim, stays, "").await? == api::Status::RUNNING);
    }
    mini.delete(&bundle).await?;
    mini.delete(&second).await?;
    for bundle in [first, second, bundle] {
        gone(mini, bundle).await?;
    }
    Ok(())
}

/// A containerd that dies between the two calls finds nothing to shut down when it comes back.
pub(crate) async fn a_delete_ends_a_shim_that_was_not_told_that_its_pod_is_gone(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("untold-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    shim.end(&id).await?;
    ensure!(mini.shims_of(&id).len() == 1);
    mini.delete(&bundle).await?;
    gone(mini, bundle).await
}

/// Runs a process in a container and checks that it ends well.
async fn exec_works(shim: &Shim, bundle: &Bundle, exec_id: &str) -> Result<()> {
    let _output = shim.exec(bundle, exec_id, &["true"]).await?;
    shim.start(bundle.id(), exec_id).await?;
    ensure!(shim.wait(bundle.id(), exec_id).await? == 0);
    shim.remove(bundle.id(), exec_id).await?;
    Ok(())
}

fn kill_shim_of(mini: &Mini, bundle: &Bundle) -> Result<()> {
    let namespace = format!("-namespace {} ", bundle.namespace());
    for shim in mini.shims_of(bundle.id()) {
        if shim.argv.contains(&namespace) {
            signal_to(shim.pid, Signal::SIGKILL)?;
        }
    }
    Ok(())
}

/// However the other one goes.
pub(crate) async fn a_pod_does_without_the_one_of_its_id_in_another_namespace(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("twin-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    let config = mini.config(runtime, &Config::default())?;
    let run_other = async || {
        let other = mini.bundle(&id).in_namespace("others").sandbox();
        let other = other.script("sleep 3600").write()?;
        let shim = mini.shim(&other, &config).await?;
        let output = shim.run(&other).await?;
        anyhow::Ok((other, shim, output))
    };
    let (other, other_shim, _output) = run_other().await?;
    exec_works(&shim, &bundle, "beside-it").await?;
    exec_works(&other_shim, &other, "beside-us").await?;
    other_shim.end(&id).await?;
    other_shim.shutdown().await?;
    other.remove()?;
    exec_works(&shim, &bundle, "after-its-end").await?;
    let (other, _, _output) = run_other().await?;
    kill_shim_of(mini, &other)?;
    mini.delete(&other).await?;
    other.remove()?;
    exec_works(&shim, &bundle, "after-its-delete").await?;
    end(mini, &shim, bundle).await
}

/// Older releases named the directory of a sandbox by nothing but its id.
pub(crate) async fn a_delete_finds_what_an_older_shim_has_left(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let id = format!("older-{runtime:?}").to_lowercase();
    let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
    shim.run(&bundle).await?;
    kill_shim_of(mini, &bundle)?;
    let ours = |name: &str| name.split_once('@').is_some_and(|(of, _)| of == id);
    let dir = fs::read_dir(SCRATCH)?
        .flatten()
        .find(|entry| ours(&entry.file_name().to_string_lossy()))
        .context("the sandbox has no directory")?;
    let old = Path::new(SCRATCH).join(&id);
    fs::rename(dir.path(), &old)?;
    mini.delete(&bundle).await?;
    ensure!(!old.exists());
    gone(mini, bundle).await
}

/// A node's file is changed, or broken by a typing error, while Pods run.
pub(crate) async fn a_delete_does_without_the_nodes_file(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    for now in ["root = \"/run/elsewhere\"\n", "root = \n"] {
        let id = format!("moved-{runtime:?}-{}", now.len()).to_lowercase();
        let bundle = mini.bundle(&id).sandbox().script("sleep 3600").write()?;
        let config = mini.config(runtime, &Config::default())?;
        let shim = mini.shim(&bundle, &config).await?;
        shim.run(&bundle).await?;
        kill_shim_of(mini, &bundle)?;
        fs::write(&config, now)?;
        mini.delete(&bundle).await?;
        gone(mini, bundle).await?;
    }
    Ok(())
}

/// In a place of its own, whose Events service goes away and comes back.
pub(crate) async fn events_wait_for_containerd(_: &Mini, runtime: Runtime) -> Result<()> {
    let mini = Mini::start().await?;
    let config = mini.config(runtime, &Config::default())?;
    let bundle = mini
        .bundle("waits")
        .sandbox()
        .script("sleep 3600")
        .write()?;
    let shim = mini.shim(&bundle, &config).await?;
    shim.create(&bundle).await?;
    mini.events().wait_for("waits", "create").await?;
    mini.stop_events().await?;
    shim.start("waits", "").await?;
    ensure!(shim.end("waits").await? == 137);
    tokio::time::sleep(Duration::from_secs(2)).await;
    mini.start_events().await?;
    mini.events()
        .expect("waits", &["create", "start", "exit", "delete"])
        .await?;
    shim.shutdown().await?;
    gone(&mini, bundle).await?;
    mini.place().check_for_leaks().await
}
