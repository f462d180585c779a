// SPDX-License-Identifier: Apache-2.0

//! What goes wrong: sandboxes that are killed, containers that cannot be made, commands that
//! take too long.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, FdFlag};
use runsc_wrapper::{KillTarget, Runsc, Runtime, RuntimeError, Status, Stdio};

use crate::{
    for_flavors,
    world::{Flavor, PATIENCE, World, end_of, id, is_alive, piped, until},
};

for_flavors! { [Runsc RunscCli Runsc202602 Runsc2024]:
    a_killed_sandbox_takes_everything_with_it
    the_end_of_the_root_container_is_the_end_of_all
    a_create_that_takes_too_long_leaves_nothing
    a_delete_that_takes_too_long_is_finished_with_the_sandbox
    a_prefix_of_an_id_is_nobody
    a_sandbox_inherits_nothing
    a_stopped_sentry_is_not_waited_for_for_ever
    a_wrong_flag_is_named
    a_container_that_cannot_be_made_leaves_nothing
    a_program_that_is_not_there_is_said_at_create_or_start
    a_container_that_was_never_started_can_be_deleted
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

async fn a_killed_sandbox_takes_everything_with_it(world: World) {
    let (root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let (exec, _output) = world
        .exec(app.id.as_str(), &["sleep", "1000"])
        .await
        .unwrap();
    // Some exits are being waited for, others are asked for later.
    let exec_exit = tokio::spawn(end_of(exec.exit));
    let root_exit = tokio::spawn(end_of(root.exit));
    tokio::time::sleep(Duration::from_millis(300)).await;
    kill(root.pid);
    assert_eq!(root_exit.await.unwrap().code, 137);
    assert_eq!(exec_exit.await.unwrap().code, 137);
    assert_eq!(end_of(app.exit).await.code, 137);
    let runtime = &world.runtime;
    assert_eq!(runtime.status(&app.id).await.unwrap(), Status::Stopped);
    for error in [
        runtime.kill(&app.id, KillTarget::All, 9).await.unwrap_err(),
        runtime
            .kill(&root.id, KillTarget::Init, 9)
            .await
            .unwrap_err(),
    ] {
        assert!(matches!(error, RuntimeError::NotFound { .. }), "{error:?}");
    }
    let error = world
        .exec(app.id.as_str(), &["true"])
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(error, RuntimeError::NotRunning { .. }),
        "{error:?}"
    );
    let error = runtime.stats(&app.id).await.unwrap_err();
    assert!(
        matches!(
            error,
            RuntimeError::NotRunning { .. } | RuntimeError::Failed { .. }
        ),
        "{error:?}"
    );
    // An exit is there for whoever asks again.
    assert_eq!(
        end_of(runtime.watch(&app.id).await.unwrap()).await.code,
        137
    );
    assert_eq!(world.runtime.control_fallbacks(), 0);
    let deleting = Instant::now();
    world.delete_all().await;
    let took = deleting.elapsed();
    println!("delete of two dead containers: {took:?}");
    assert!(took < PATIENCE);
}

async fn the_end_of_the_root_container_is_the_end_of_all(world: World) {
    let root = world
        .run(
            "pod",
            "pod",
            &[
                "/bin/sh",
                "-c",
                "trap 'exit 3' TERM; echo ready; while :; do sleep 0.1; done",
            ],
        )
        .await;
    let app = world.run("app", "pod", &["/bin/sleep", "1000"]).await;
    let mut output = root.output;
    output.some().await;
    world
        .runtime
        .kill(&root.id, KillTarget::Init, libc::SIGTERM)
        .await
        .unwrap();
    assert_eq!(end_of(root.exit).await.code, 3);
    assert_eq!(end_of(app.exit).await.code, 137);
    until("the sentry is gone", async || !is_alive(root.pid)).await;
    world.runtime.delete(&app.id).await.unwrap();
    world.runtime.delete(&root.id).await.unwrap();
    world.assert_nothing_left().await;
}

async fn a_create_that_takes_too_long_leaves_nothing(world: World) {
    // Half-way through: with 30 ms there is no sentry yet, with 150 there often is.
    for deadline in (30..=150).step_by(10).map(Duration::from_millis) {
        let mut config = world.config.clone();
        config.deadlines.create = deadline;
        let runtime = Runsc::new(config);
        let bundle = world.bundle("pod", "pod", &["/bin/sleep", "1000"]);
        let opts = world.create_opts("pod", "pod", bundle, Stdio::default());
        match runtime.create(&opts).await {
            Err(RuntimeError::Timeout { .. }) => {}
            Ok(_) => runtime.delete(&opts.id).await.unwrap(),
            Err(e) => panic!("{e}"),
        }
        assert!(world.files().is_empty(), "after {deadline:?}");
        until("no process is left", async || world.processes().is_empty()).await;
    }
    // And the name can be used.
    let _root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    world.delete_all().await;
}

async fn a_delete_that_takes_too_long_is_finished_with_the_sandbox(world: World) {
    let mut config = world.config.clone();
    config.deadlines.delete = Duration::from_millis(1);
    let hasty = Arc::new(Runsc::new(config));
    // The second time, the commands get to their ends again.
    for last in [&hasty, &world.runtime] {
        let pod = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
        let app = world.run("app", "pod", &["/bin/sleep", "1000"]).await;
        let error = hasty.delete(&app.id).await.unwrap_err();
        assert!(matches!(error, RuntimeError::Timeout { .. }), "{error:?}");
        last.delete(&pod.id).await.unwrap();
        world.assert_nothing_left().await;
        last.delete(&app.id).await.unwrap();
    }
    // Or by the next delete, where the sandbox's own was cut short after it.
    let pod = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    world.run("app", "pod", &["/bin/sleep", "1000"]).await;
    let state = world.config.root.join("app_sandbox:pod.state");
    let aside = world.dir.path().join("state");
    fs::rename(&state, &aside).unwrap();
    world.runtime.delete(&pod.id).await.unwrap();
    fs::rename(aside, state).unwrap();
    world.another().delete(&pod.id).await.unwrap();
    world.assert_nothing_left().await;
}

async fn a_prefix_of_an_id_is_nobody(world: World) {
    let root = world
        .run("podlong", "podlong", &["/bin/sleep", "1000"])
        .await;
    let short = id("pod");
    world.runtime.delete(&short).await.unwrap();
    let error = world
        .runtime
        .kill(&short, KillTarget::Init, 9)
        .await
        .unwrap_err();
    assert!(matches!(error, RuntimeError::NotFound { .. }), "{error:?}");
    assert_eq!(
        world.runtime.status(&root.id).await.unwrap(),
        Status::Running
    );
    world.delete_all().await;
}

async fn a_sandbox_inherits_nothing(world: World) {
    let marker = world.dir.path().join("marker");
    let file = fs::File::create(&marker).unwrap();
    // As a careless library would leave it.
    nix::fcntl::fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let (root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let _ = app;
    for (pid, args) in world.processes() {
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            assert_ne!(target, marker, "{pid} {args}");
        }
    }
    // The log of its create is memory without a name.
    let files: Vec<_> = fs::read_dir(format!("/proc/{}/fd", root.pid))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect();
    assert!(
        files
            .iter()
            .all(|f| !f.to_string_lossy().ends_with(".json")),
        "{files:?}"
    );
    world.delete_all().await;
}

async fn a_stopped_sentry_is_not_waited_for_for_ever(world: World) {
    let (root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let mut config = world.config.clone();
    config.deadlines.control = Duration::from_secs(1);
    config.deadlines.query = Duration::from_secs(2);
    let hasty = Runsc::new(config);
    // So that it has found the control socket, unless the machine is too busy for its haste.
    hasty.status(&app.id).await.ok();
    let pid = nix::unistd::Pid::from_raw(root.pid.cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    // The signal takes effect thread by thread.
    let state = format!("/proc/{}/task", root.pid);
    until("all its threads have stopped", async || {
        fs::read_dir(&state).unwrap().flatten().all(|task| {
            fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
        })
    })
    .await;
    let start = Instant::now();
    let error = hasty.stats(&app.id).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Timeout { .. }), "{error:?}");
    assert!(start.elapsed() < PATIENCE);
    // It can be removed all the same.
    world.runtime.delete(&root.id).await.unwrap();
    assert_eq!(end_of(app.exit).await.code, 137);
    world.delete_all().await;
}

async fn a_container_that_cannot_be_made_leaves_nothing(world: World) {
    let bundle = world.bundle("pod", "pod", &["/bin/sleep", "1000"]);
    fs::write(bundle.join("config.json"), "{ this is no specification").unwrap();
    let opts = world.create_opts("pod", "pod", bundle, Stdio::default());
    let error = world.create(&opts).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Failed { .. }), "{error:?}");
    assert!(error.to_string().contains("invalid character"), "{error}");
    world.assert_nothing_left().await;
    // A container of a sandbox that is not there.
    let bundle = world.bundle("app", "nowhere", &["/bin/sleep", "1000"]);
    let opts = world.create_opts("app", "nowhere", bundle, Stdio::default());
    let error = world.create(&opts).await.unwrap_err();
    assert!(matches!(error, RuntimeError::NotFound { .. }), "{error:?}");
    world.assert_nothing_left().await;
}

async fn a_program_that_is_not_there_is_said_at_create_or_start(world: World) {
    let _root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    let (stdio, _output) = piped();
    let bundle = world.bundle("app", "pod", &["/no/such/program"]);
    let opts = world.create_opts("app", "pod", bundle, stdio);
    let made = match world.create(&opts).await {
        Ok(_) => world.runtime.start(&opts.id, &opts.stdio).await,
        Err(e) => Err(e),
    };
    let error = made.unwrap_err();
    let RuntimeError::Failed { message, .. } = &error else {
        panic!("{error:?}")
    };
    assert!(message.contains("/no/such/program"), "{message}");
    world.delete_all().await;
}

async fn a_container_that_was_never_started_can_be_deleted(world: World) {
    let bundle = world.bundle("pod", "pod", &["/bin/sleep", "1000"]);
    let opts = world.create_opts("pod", "pod", bundle, Stdio::default());
    world.create(&opts).await.unwrap();
    let exit = world.runtime.watch(&opts.id).await.unwrap();
    // The command of a runsc of the summer of 2026 ends the sandbox.
    match world.runtime.kill(&opts.id, KillTarget::Init, 9).await {
        Err(RuntimeError::NotRunning { .. }) => {}
        Ok(()) if world.flavor == Flavor::RunscCli => {}
        other => panic!("{other:?}"),
    }
    world.runtime.delete(&opts.id).await.unwrap();
    assert_eq!(end_of(exit).await.code, 137);
    world.assert_nothing_left().await;
}

async fn a_wrong_flag_is_named(world: World) {
    let flavor = world.flavor;
    drop(world);
    for (flag, word) in [
        ("overlay3 = 'none'", "overlay3"),
        ("overlay2 = 'nonsense'", "nonsense"),
        ("num-network-channels = -1", "num_network_channels"),
    ] {
        let Some(world) = World::with(flavor, flag) else {
            return;
        };
        let bundle = world.bundle("pod", "pod", &["/bin/true"]);
        let opts = world.create_opts("pod", "pod", bundle, Stdio::default());
        let error = world.create(&opts).await.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
