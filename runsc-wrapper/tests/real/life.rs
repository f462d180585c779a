// SPDX-License-Identifier: Apache-2.0

//! Lives of containers: made, started, watched, signalled, removed.

use std::time::Duration;

use runsc_wrapper::{KillTarget, Runtime, RuntimeError, Status, Stdio};

use crate::{
    for_flavors,
    world::{World, end_of, id, is_alive, piped, until},
};

for_flavors! { [Runsc RunscCli Runsc202602 Runsc2024]:
    a_container_lives_in_a_sandbox
    exit_codes_come_through
    processes_that_end_at_once_are_not_missed
    signals_end_processes
    states_follow_the_life
    a_new_process_can_take_over
    unknown_containers_are_not_found
    a_container_that_exists_is_not_made_again
    standard_input_is_given
}

async fn a_container_lives_in_a_sandbox(world: World) {
    let (root, app) = world
        .run_in_sandbox(&["/bin/sh", "-c", "echo hello; echo oops >&2"])
        .await;
    assert_eq!(root.pid, app.pid, "one sandbox");
    assert!(is_alive(root.pid));
    assert_eq!(end_of(app.exit).await.code, 0);
    assert_eq!(app.output.all().await, "hello\noops\n");
    world.runtime.delete(&app.id).await.unwrap();
    assert_eq!(
        world.runtime.status(&root.id).await.unwrap(),
        Status::Running
    );
    world
        .runtime
        .kill(&root.id, KillTarget::Init, libc::SIGKILL)
        .await
        .unwrap();
    assert_eq!(end_of(root.exit).await.code, 137);
    world.runtime.delete(&root.id).await.unwrap();
    world.assert_nothing_left().await;
}

async fn exit_codes_come_through(world: World) {
    let _root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    for code in [0, 7, 255] {
        let name = format!("c{code}");
        let app = world
            .run(
                &name,
                "pod",
                &["/bin/sh", "-c", &format!("sleep 0.3; exit {code}")],
            )
            .await;
        assert_eq!(end_of(app.exit).await.code, code);
    }
    world.delete_all().await;
}

async fn processes_that_end_at_once_are_not_missed(world: World) {
    for round in 0..4 {
        let name = format!("root{round}");
        let root = world.run(&name, &name, &["/bin/sh", "-c", "exit 7"]).await;
        assert_eq!(
            end_of(root.exit).await.code,
            7,
            "root container, round {round}"
        );
        world.runtime.delete(&root.id).await.unwrap();
    }
    let _root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    for round in 0..4 {
        let app = world
            .run(&format!("app{round}"), "pod", &["/bin/sh", "-c", "exit 3"])
            .await;
        assert_eq!(end_of(app.exit).await.code, 3, "container, round {round}");
    }
    world.delete_all().await;
}

async fn signals_end_processes(world: World) {
    let _root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    let trap = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut app = world.run("trap", "pod", &["/bin/sh", "-c", trap]).await;
    assert_eq!(app.output.some().await, "ready\n");
    world
        .runtime
        .kill(&app.id, KillTarget::Init, libc::SIGTERM)
        .await
        .unwrap();
    assert_eq!(end_of(app.exit).await.code, 9);
    let app = world
        .run("all", "pod", &["/bin/sh", "-c", "sleep 1000 & sleep 1000"])
        .await;
    world
        .runtime
        .kill(&app.id, KillTarget::All, libc::SIGKILL)
        .await
        .unwrap();
    assert_eq!(end_of(app.exit).await.code, 137);
    // Whoever is dead is not found.
    let again = world
        .runtime
        .kill(&app.id, KillTarget::Init, libc::SIGKILL)
        .await;
    assert!(
        matches!(
            again,
            Err(RuntimeError::NotFound { .. } | RuntimeError::NotRunning { .. })
        ),
        "{again:?}"
    );
    world.delete_all().await;
}

async fn states_follow_the_life(world: World) {
    let (stdio, _output) = piped();
    let bundle = world.bundle("pod", "pod", &["/bin/sleep", "1000"]);
    let opts = world.create_opts("pod", "pod", bundle, stdio);
    world.create(&opts).await.unwrap();
    let status = async || world.runtime.status(&opts.id).await.unwrap();
    assert_eq!(status().await, Status::Created);
    world.runtime.start(&opts.id, &opts.stdio).await.unwrap();
    assert_eq!(status().await, Status::Running);
    let again = world
        .runtime
        .start(&opts.id, &opts.stdio)
        .await
        .unwrap_err();
    assert!(matches!(again, RuntimeError::NotRunning { .. }), "{again}");
    world
        .runtime
        .kill(&opts.id, KillTarget::Init, libc::SIGKILL)
        .await
        .unwrap();
    until("stopped", async || status().await == Status::Stopped).await;
    world.delete_all().await;
    let gone = world.runtime.status(&opts.id).await.unwrap_err();
    assert!(matches!(gone, RuntimeError::NotFound { .. }), "{gone}");
}

async fn a_new_process_can_take_over(world: World) {
    let (root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let other = world.another();
    let exit = other.watch(&app.id).await.unwrap();
    assert_eq!(other.status(&app.id).await.unwrap(), Status::Running);
    other
        .kill(&app.id, KillTarget::Init, libc::SIGKILL)
        .await
        .unwrap();
    assert_eq!(end_of(exit).await.code, 137);
    assert_eq!(end_of(app.exit).await.code, 137);
    other.delete(&app.id).await.unwrap();
    other.delete(&root.id).await.unwrap();
    world.assert_nothing_left().await;
}

async fn unknown_containers_are_not_found(world: World) {
    let nobody = id("nobody");
    let runtime = &world.runtime;
    runtime.delete(&nobody).await.unwrap();
    for error in [
        runtime.start(&nobody, &Stdio::default()).await.unwrap_err(),
        runtime
            .kill(&nobody, KillTarget::Init, 9)
            .await
            .unwrap_err(),
        runtime.status(&nobody).await.unwrap_err(),
        runtime.processes(&nobody).await.unwrap_err(),
        runtime.stats(&nobody).await.unwrap_err(),
        runtime.pause(&nobody).await.unwrap_err(),
        runtime.watch(&nobody).await.map(|_| ()).unwrap_err(),
        world
            .exec("nobody", &["true"])
            .await
            .map(|_| ())
            .unwrap_err(),
    ] {
        assert!(matches!(error, RuntimeError::NotFound { .. }), "{error:?}");
    }
}

async fn a_container_that_exists_is_not_made_again(world: World) {
    let root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    let bundle = world.bundle("pod", "pod", &["/bin/true"]);
    let opts = world.create_opts("pod", "pod", bundle, Stdio::default());
    let error = world.runtime.create(&opts).await.unwrap_err();
    assert!(
        matches!(error, RuntimeError::AlreadyExists { .. }),
        "{error}"
    );
    assert_eq!(
        world.runtime.status(&root.id).await.unwrap(),
        Status::Running
    );
    world.delete_all().await;
}

async fn standard_input_is_given(world: World) {
    let _root = world.run("pod", "pod", &["/bin/sleep", "1000"]).await;
    let (stdin, mut writer) = std::io::pipe().unwrap();
    let (stdio, output) = piped();
    let stdio = Stdio {
        stdin: Some(stdin.into()),
        ..stdio
    };
    let bundle = world.bundle("app", "pod", &["/bin/cat"]);
    let opts = world.create_opts("app", "pod", bundle, stdio);
    world.create(&opts).await.unwrap();
    let exit = world.runtime.watch(&opts.id).await.unwrap();
    world.runtime.start(&opts.id, &opts.stdio).await.unwrap();
    drop(opts);
    tokio::time::sleep(Duration::from_millis(100)).await;
    std::io::Write::write_all(&mut writer, b"through the pipe").unwrap();
    drop(writer);
    assert_eq!(end_of(exit).await.code, 0);
    assert_eq!(output.all().await, "through the pipe");
    world.delete_all().await;
}
