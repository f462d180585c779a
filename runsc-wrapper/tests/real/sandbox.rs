// SPDX-License-Identifier: Apache-2.0

//! What concerns a sandbox as a whole: pause, statistics, checkpoints, its network, its cost.

use std::{
    ffi::CString,
    fs,
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use runsc_wrapper::{CheckpointOpts, KillTarget, Runtime, RuntimeError, Status, Stdio};
use serde_json::json;

use crate::{
    for_flavors,
    world::{Flavor, PATIENCE, World, end_of, piped, until},
};

for_flavors! { [Runsc RunscCli Runsc202602 Runsc2024]:
    pause_stops_and_resume_goes_on
    statistics_count
    features_are_told
}

const TICKING: &str = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.1; done";

async fn pause_stops_and_resume_goes_on(world: World) {
    let (_root, mut app) = world.run_in_sandbox(&["/bin/sh", "-c", TICKING]).await;
    let runtime = &world.runtime;
    app.output.some().await;
    runtime.pause(&app.id).await.unwrap();
    assert_eq!(runtime.status(&app.id).await.unwrap(), Status::Paused);
    let again = runtime.pause(&app.id).await.unwrap_err();
    assert!(
        matches!(
            again,
            RuntimeError::NotRunning { .. } | RuntimeError::Failed { .. }
        ),
        "{again:?}"
    );
    // What was written before is read, then nothing comes.
    until("nothing is written", async || {
        app.output.drain();
        tokio::time::sleep(Duration::from_millis(700)).await;
        app.output.drain().is_empty()
    })
    .await;
    runtime.resume(&app.id).await.unwrap();
    assert_eq!(runtime.status(&app.id).await.unwrap(), Status::Running);
    until("it ticks again", async || {
        app.output.some().await.contains("tick")
    })
    .await;
    let extra = runtime.resume(&app.id).await.unwrap_err();
    assert!(
        matches!(
            extra,
            RuntimeError::NotRunning { .. } | RuntimeError::Failed { .. }
        ),
        "{extra:?}"
    );
    assert_eq!(runtime.status(&app.id).await.unwrap(), Status::Running);
    // A paused one can be removed.
    runtime.pause(&app.id).await.unwrap();
    world.delete_all().await;
}

async fn statistics_count(world: World) {
    let busy = "echo ready; while :; do :; done";
    let (_root, mut app) = world.run_in_sandbox(&["/bin/sh", "-c", busy]).await;
    app.output.some().await;
    let mut last = 0;
    until("cpu time grows", async || {
        let stats = world.runtime.stats(&app.id).await.unwrap();
        assert_eq!(stats.pids, 1);
        let grows = last != 0 && stats.cpu_ns > last;
        last = stats.cpu_ns;
        if grows && matches!(world.flavor, Flavor::Runsc | Flavor::Runsc2024) {
            let share = stats
                .sandbox_cpu_ns
                .iter()
                .find(|(id, _)| id == app.id.as_str());
            assert_eq!(share.unwrap().1, stats.cpu_ns);
        }
        grows && stats.memory_bytes > 0
    })
    .await;
    world.delete_all().await;
}

async fn features_are_told(world: World) {
    let features = world.runtime.features().await.unwrap();
    assert!(
        features["ociVersionMax"]
            .as_str()
            .unwrap()
            .starts_with("1."),
        "{features}"
    );
}

for_flavors! { [Runsc RunscCli Runsc202602 Runsc2024]:
    a_sandbox_is_saved_and_restored
}

async fn a_sandbox_is_saved_and_restored(world: World) {
    let (root, mut app) = world.run_in_sandbox(&["/bin/sh", "-c", TICKING]).await;
    until("it ticks", async || {
        app.output.some().await.contains("tick 3")
    })
    .await;
    let image = world.dir.path().join("image");
    fs::create_dir(&image).unwrap();
    let opts = CheckpointOpts {
        image: image.clone(),
        leave_running: true,
    };
    world.runtime.checkpoint(&root.id, &opts).await.unwrap();
    assert_eq!(
        world.runtime.status(&app.id).await.unwrap(),
        Status::Running
    );
    drop(app.output);
    world.delete_all().await;

    // Made anew with the same specifications, but continued instead of started.
    let mut restored = Vec::new();
    for name in ["pod", "app"] {
        let (stdio, output) = piped();
        let bundle = world.dir.path().join("bundles").join(name);
        let opts = world.create_opts(name, "pod", bundle, stdio);
        world.create(&opts).await.unwrap();
        let exit = world.runtime.watch(&opts.id).await.unwrap();
        restored.push((opts, exit, output));
    }
    for (opts, ..) in &restored {
        world
            .runtime
            .restore(&opts.id, &image, &opts.stdio)
            .await
            .unwrap();
    }
    let (app, exit, mut output) = restored.pop().unwrap();
    let first = output.some().await;
    let tick: u32 = first
        .lines()
        .next()
        .unwrap()
        .trim_start_matches("tick ")
        .parse()
        .unwrap();
    assert!(tick >= 3, "{first}");
    world
        .runtime
        .kill(&app.id, KillTarget::Init, libc::SIGKILL)
        .await
        .unwrap();
    assert_eq!(end_of(exit).await.code, 137);
    world.delete_all().await;
}

for_flavors! { [Runsc RunscCli Runsc202602 Runsc2024]:
    ports_inside_can_be_reached
}

async fn ports_inside_can_be_reached(world: World) {
    let flavor = world.flavor;
    drop(world);
    let Some(world) = World::with(flavor, "network = 'sandbox'") else {
        return;
    };
    let netns = Netns::new(world.dir.path());
    let script = "echo ready; nc -l -p 8080 -e /bin/cat";
    let mut started = Vec::new();
    for name in ["pod", "app"] {
        let bundle = world.bundle_with(name, "pod", &["/bin/sh", "-c", script], |spec| {
            for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(netns.0);
                }
            }
            if name == "pod" {
                spec["process"]["args"] = json!(["/bin/sleep", "1000"]);
            }
        });
        started.push(world.run_bundle(name, "pod", bundle).await);
    }
    let mut app = started.pop().unwrap();
    app.output.some().await;
    let forward = async || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        world
            .runtime
            .port_forward(&app.id, 8080, OwnedFd::from(theirs))
            .await
            .map(|()| ours)
    };
    if flavor == Flavor::RunscCli {
        let error = forward().await.unwrap_err();
        assert!(
            matches!(error, RuntimeError::Unsupported { .. }),
            "{error:?}"
        );
        return world.delete_all().await;
    }
    let mut stream = None;
    until("somebody listens", async || {
        let forwarded = forward().await;
        if let Err(e) = &forwarded {
            println!("{e}");
        }
        stream = forwarded.ok();
        stream.is_some()
    })
    .await;
    let mut stream = stream.unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"there and back").unwrap();
    let back = tokio::task::spawn_blocking(move || {
        let mut text = [0; 14];
        stream.read_exact(&mut text).unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    });
    assert_eq!(back.await.unwrap(), "there and back");
    assert_eq!(world.runtime.control_fallbacks(), 0);
    world.delete_all().await;
}

/// A network namespace with nothing but its loopback, which is up.
struct Netns(PathBuf);

impl Netns {
    fn new(dir: &Path) -> Self {
        let path = dir.join("netns");
        fs::write(&path, "").unwrap();
        let mount_at = path.clone();
        // On a thread of its own, which takes the namespace with it.
        let made = std::thread::spawn(move || {
            // SAFETY: takes integers only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            // SAFETY: an ifreq is plain data for which all-zeroes is valid.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            request.ifr_name[0] = b'l'.cast_signed();
            request.ifr_name[1] = b'o'.cast_signed();
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            // SAFETY: `request` outlives the call.
            let up =
                unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
            assert_eq!(up, 0);
            let target = CString::new(mount_at.as_os_str().as_bytes()).unwrap();
            let source = c"/proc/thread-self/ns/net".as_ptr();
            // SAFETY: both paths are strings that outlive the call, the rest may be null.
            let mounted = unsafe {
                libc::mount(
                    source,
                    target.as_ptr(),
                    std::ptr::null(),
                    libc::MS_BIND,
                    std::ptr::null(),
                )
            };
            assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        });
        made.join().unwrap();
        Self(path)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let path = CString::new(self.0.as_os_str().as_bytes()).unwrap();
        // SAFETY: the path is a string that outlives the call.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
}

for_flavors! { [Runsc]:
    calls_are_cheap
}

/// Prints what calls cost; asserts only that they are not those of a process start.
async fn calls_are_cheap(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let mut times = Vec::new();
    for _ in 0..50 {
        let start = Instant::now();
        world.runtime.stats(&app.id).await.unwrap();
        times.push(start.elapsed());
    }
    times.sort();
    println!("stats: p50 {:?}", times[25]);
    assert!(times[0] < Duration::from_millis(100));
    let mut times = Vec::new();
    for _ in 0..30 {
        let opts = world.exec_opts(app.id.as_str(), &["true"], Stdio::default());
        let start = Instant::now();
        let exec = world.runtime.exec(&opts).await.unwrap();
        assert_eq!(end_of(exec.exit).await.code, 0);
        times.push(start.elapsed());
    }
    times.sort();
    println!("exec and wait: p50 {:?}", times[15]);
    world.delete_all().await;
}
