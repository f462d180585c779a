// SPDX-License-Identifier: Apache-2.0

//! Containers whose gofer was started before them.

use std::{fs, path::Path, time::Instant};

use runsc_wrapper::{KillTarget, PrestartedGofer, Runtime, Status, WarmRuntime};
use serde_json::json;

use crate::{
    for_flavors,
    world::{World, end_of, id, is_alive, piped, until},
};

for_flavors! { [Runsc Runsc202602]:
    a_container_in_slots_is_like_any_other
    what_does_not_fit_is_made_by_command
    slots_nobody_takes_go_with_their_connections
}

async fn gofer(world: &World) -> PrestartedGofer {
    let dir = world.dir.path().join("slots");
    PrestartedGofer::prepare(&dir).unwrap();
    let runtime = &world.runtime;
    let gofer = runtime
        .start_gofer(&dir, &id("box"), Box::new(|_| Ok(())))
        .await;
    gofer.unwrap()
}

/// Reaps a gofer when it has ended.
async fn expect_end(pid: u32) {
    let watch = kiln_host::reap::watch(pid).unwrap();
    watch.end().await.unwrap();
    assert!(!is_alive(pid));
}

async fn a_container_in_slots_is_like_any_other(world: World) {
    let root = world.run("box", "box", &["/bin/sleep", "1000"]).await;
    let gofer = gofer(&world).await;
    let gofer_pid = gofer.pid();
    let volume = world.dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("from-host"), "hello").unwrap();
    let hosts = world.dir.path().join("hosts");
    fs::write(&hosts, "of the Pod\n").unwrap();
    let script = "cat /data/new/from-host /etc/hosts; echo x > /data/new/out; echo y > /etc/hosts; \
        echo z > /root-file; cat /root-file; ls -a / | grep -c filestore; \
        echo no > /locked/from-host || echo locked; exec sleep 1000";
    let bundle = world.bundle_with("app", "box", &["/bin/sh", "-c", script], |spec| {
        let bind = |source: &Path, target: &str, mode: &str| {
            json!({"destination": target, "type": "bind", "source": source,
                   "options": ["rbind", "rprivate", mode]})
        };
        spec["process"]["oomScoreAdj"] = 500.into();
        spec["root"]["readonly"] = false.into();
        spec["mounts"].as_array_mut().unwrap().extend([
            bind(&volume, "/data/new", "rw"),
            bind(&volume, "/locked", "ro"),
            bind(&hosts, "/etc/hosts", "ro"),
        ]);
    });
    let (stdio, mut output) = piped();
    let opts = world.create_opts("app", "box", bundle, stdio);
    let before = Instant::now();
    let pid = world.runtime.create_with_gofer(&opts, gofer).await.unwrap();
    assert_eq!(pid, Some(root.pid));
    let app = id("app");
    let exit = world.runtime.watch(&app).await.unwrap();
    assert_eq!(world.runtime.status(&app).await.unwrap(), Status::Created);
    world.runtime.start(&app, &opts.stdio).await.unwrap();
    println!("made and started in {} us", before.elapsed().as_micros());
    drop(opts);
    let state = fs::read(world.config.root.join("app_sandbox:box.state")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    assert_eq!(state["goferPid"], gofer_pid, "another gofer serves it");
    let mut said = String::new();
    until("all is said", async || {
        said += &output.some().await;
        said.ends_with("locked\n")
    })
    .await;
    assert!(
        said.starts_with("helloof the Pod\n") && said.contains("z\n0\n"),
        "{said}"
    );
    assert_eq!(fs::read_to_string(volume.join("out")).unwrap(), "x\n");
    assert_eq!(fs::read_to_string(&hosts).unwrap(), "of the Pod\n");
    for pid in [root.pid, gofer_pid] {
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
        assert_eq!(score.trim(), "500");
    }
    // Its files are nowhere to be seen in the host's mounts.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&*world.dir.path().join("slots").to_string_lossy()));
    // Whoever comes later finds it by what runsc knows, also by command.
    let (code, words) = world
        .exec_to_end("app", &["/bin/cat", "/data/new/out"])
        .await;
    assert_eq!((code, words.as_str()), (0, "x\n"));
    assert_eq!(world.another().status(&app).await.unwrap(), Status::Running);
    assert_eq!(world.another().processes(&app).await.unwrap().len(), 1);
    world
        .runtime
        .kill(&app, KillTarget::Init, libc::SIGKILL)
        .await
        .unwrap();
    assert_eq!(end_of(exit).await.code, 137);
    let reaped = tokio::spawn(expect_end(gofer_pid));
    world.runtime.delete(&app).await.unwrap();
    reaped.await.unwrap();
    world.delete_all().await;
}

async fn what_does_not_fit_is_made_by_command(world: World) {
    world.run("box", "box", &["/bin/sleep", "1000"]).await;
    let gofer = gofer(&world).await;
    let gofer_pid = gofer.pid();
    // The container's own files are not below it: each mount would double what is mounted.
    let volume = world.dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    let bundle = world.bundle_with("app", "box", &["/bin/echo", "by command"], |spec| {
        let many = (0..20).map(|n| {
            json!({"destination": format!("/v{n}"), "type": "bind", "source": volume,
                   "options": ["rbind"]})
        });
        spec["mounts"].as_array_mut().unwrap().extend(many);
    });
    let (stdio, output) = piped();
    let opts = world.create_opts("app", "box", bundle, stdio);
    let made = world.runtime.create_with_gofer(&opts, gofer).await.unwrap();
    assert_eq!(made, None);
    expect_end(gofer_pid).await;
    world.create(&opts).await.unwrap();
    world.runtime.start(&id("app"), &opts.stdio).await.unwrap();
    drop(opts);
    assert_eq!(output.all().await, "by command\n");
    world.delete_all().await;
}

async fn slots_nobody_takes_go_with_their_connections(world: World) {
    world.run("box", "box", &["/bin/sleep", "1000"]).await;
    let gofer = gofer(&world).await;
    let gofer_pid = gofer.pid();
    assert!(is_alive(gofer_pid));
    drop(gofer);
    expect_end(gofer_pid).await;
    // One that is put nowhere does not start.
    let dir = world.dir.path().join("slots");
    let refuse = Box::new(|_| Err(std::io::Error::other("no")));
    assert!(
        world
            .runtime
            .start_gofer(&dir, &id("box"), refuse)
            .await
            .is_err()
    );
    world.delete_all().await;
}
