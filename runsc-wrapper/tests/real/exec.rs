// SPDX-License-Identifier: Apache-2.0

//! Further processes in running containers.

use std::{
    fs::File,
    io::{IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{fs::MetadataExt, net::UnixListener},
    },
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use runsc_wrapper::{KillTarget, Runtime, RuntimeError, Stdio};
use serde_json::json;

use crate::{
    for_flavors,
    world::{Flavor, World, end_of, piped, until},
};

for_flavors! { [Runsc RunscCli Runsc202602 Runsc2024]:
    codes_and_output_come_back
    a_process_is_what_its_spec_says
    input_is_read_and_ends
    a_program_that_is_not_there_is_said_to_be_missing
    processes_are_listed_and_signalled
    many_at_once
    a_container_that_has_stopped_runs_nothing
    a_terminal_is_one
    ones_that_end_at_once_are_not_missed
    nothing_is_left_in_the_scratch_directory
}

async fn codes_and_output_come_back(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    for code in [0, 1, 7, 255] {
        let script = format!("echo out; echo err >&2; exit {code}");
        let (got, text) = world
            .exec_to_end(app.id.as_str(), &["sh", "-c", &script])
            .await;
        assert_eq!((got, text.as_str()), (code, "out\nerr\n"));
    }
    // In the sandbox's root container too.
    assert_eq!(
        world.exec_to_end("pod", &["/bin/echo", "hi"]).await,
        (0, "hi\n".to_owned())
    );
    world.delete_all().await;
}

async fn a_process_is_what_its_spec_says(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let (stdio, output) = piped();
    let script = "id -u; id -g; id -G; echo $A; pwd; cat /proc/self/status; echo again >/dev/stdout; ls /proc/self/fd";
    let mut opts = world.exec_opts(app.id.as_str(), &["sh", "-c", script], stdio);
    opts.process["env"] = json!(["PATH=/bin", "A=b c"]);
    opts.process["cwd"] = json!("/tmp");
    opts.process["noNewPrivileges"] = json!(true);
    opts.process["user"] = json!({"uid": 1234, "gid": 99, "additionalGids": [5, 6]});
    opts.process["capabilities"] =
        json!({"bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"]});
    let exec = world.runtime.exec(&opts).await.unwrap();
    drop(opts);
    assert_eq!(end_of(exec.exit).await.code, 0);
    let text = output.all().await;
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(
        &lines[..5],
        ["1234", "99", "99 5 6", "b c", "/tmp"],
        "{text}"
    );
    assert!(text.contains("CapBnd:\t0000000000000001"), "{text}");
    // A user other than root can open its own streams again.
    assert!(text.contains("again\n"), "{text}");
    // `sh` and `ls` have their streams, the script and the directory, nothing of ours.
    let fds = text
        .split("again\n")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .count();
    assert!(fds <= 4, "{text}");
    world.delete_all().await;
}

async fn input_is_read_and_ends(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let (stdin, mut writer) = std::io::pipe().unwrap();
    let (stdio, output) = piped();
    let stdio = Stdio {
        stdin: Some(stdin.into()),
        ..stdio
    };
    let opts = world.exec_opts(app.id.as_str(), &["cat"], stdio);
    let exec = world.runtime.exec(&opts).await.unwrap();
    drop(opts);
    writer.write_all(b"some input").unwrap();
    drop(writer);
    assert_eq!(end_of(exec.exit).await.code, 0);
    assert_eq!(output.all().await, "some input");
    // Without input there is nothing to read, and without output nobody to write to.
    let opts = world.exec_opts(
        app.id.as_str(),
        &["sh", "-c", "cat; echo lost; exit 4"],
        Stdio::default(),
    );
    let exec = world.runtime.exec(&opts).await.unwrap();
    assert_eq!(end_of(exec.exit).await.code, 4);
    world.delete_all().await;
}

async fn a_program_that_is_not_there_is_said_to_be_missing(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    for program in ["no-such-program", "/no/such/program"] {
        let error = world
            .exec(app.id.as_str(), &[program])
            .await
            .map(|_| ())
            .unwrap_err();
        let RuntimeError::Failed { message, .. } = &error else {
            panic!("{error:?}")
        };
        assert!(message.contains(program), "{message}");
        assert!(
            message.contains("no such file") || message.contains("not found"),
            "{message}"
        );
    }
    // The way that was used stays open.
    assert_eq!(world.runtime.control_fallbacks(), 0);
    assert_eq!(world.exec_to_end(app.id.as_str(), &["true"]).await.0, 0);
    world.delete_all().await;
}

async fn processes_are_listed_and_signalled(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let (exec, _output) = world
        .exec(app.id.as_str(), &["sleep", "2000"])
        .await
        .unwrap();
    let list = world.runtime.processes(&app.id).await.unwrap();
    assert_eq!(list.len(), 2, "{list:?}");
    assert!(
        list.iter().any(|process| process.pid == exec.pid),
        "{list:?} without {}",
        exec.pid
    );
    if world.flavor != Flavor::RunscCli {
        assert!(
            list.iter().all(|process| process.command == "sleep"),
            "{list:?}"
        );
    }
    let target = KillTarget::Process(exec.pid);
    world
        .runtime
        .kill(&app.id, target, libc::SIGTERM)
        .await
        .unwrap();
    assert_eq!(end_of(exec.exit).await.code, 143);
    let again = world
        .runtime
        .kill(&app.id, target, libc::SIGTERM)
        .await
        .unwrap_err();
    assert!(matches!(again, RuntimeError::NotFound { .. }), "{again:?}");
    // Nor can a process of another container be hit.
    let (other, _output) = world.exec("pod", &["sleep", "3000"]).await.unwrap();
    let foreign = world
        .runtime
        .kill(&app.id, KillTarget::Process(other.pid), 9)
        .await
        .unwrap_err();
    assert!(
        matches!(foreign, RuntimeError::NotFound { .. }),
        "{foreign:?}"
    );
    until("one left", async || {
        world.runtime.processes(&app.id).await.unwrap().len() == 1
    })
    .await;
    world.delete_all().await;
    // With its container, an exec ends too.
    assert_eq!(end_of(other.exit).await.code, 137);
}

async fn many_at_once(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let mut execs = Vec::new();
    for n in 0..8 {
        let script = format!("sleep 0.2; echo {n}; exit {n}");
        execs.push(
            world
                .exec(app.id.as_str(), &["sh", "-c", &script])
                .await
                .unwrap(),
        );
    }
    for (n, (exec, output)) in execs.into_iter().enumerate() {
        assert_eq!(end_of(exec.exit).await.code, u32::try_from(n).unwrap());
        assert_eq!(output.all().await, format!("{n}\n"));
    }
    world.delete_all().await;
}

async fn a_container_that_has_stopped_runs_nothing(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/true"]).await;
    end_of(app.exit).await;
    let error = world
        .exec(app.id.as_str(), &["true"])
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(error, RuntimeError::NotRunning { .. }),
        "{error:?}"
    );
    world.delete_all().await;
}

async fn ones_that_end_at_once_are_not_missed(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    for _ in 0..10 {
        assert_eq!(world.exec_to_end(app.id.as_str(), &["true"]).await.0, 0);
        assert_eq!(world.exec_to_end(app.id.as_str(), &["false"]).await.0, 1);
    }
    world.delete_all().await;
}

async fn nothing_is_left_in_the_scratch_directory(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let opts = world.exec_opts(app.id.as_str(), &["true"], Stdio::default());
    let exec = world.runtime.exec(&opts).await.unwrap();
    // The environment of a process may hold secrets.
    assert_eq!(std::fs::read_dir(&opts.scratch).unwrap().count(), 0);
    end_of(exec.exit).await;
    world.delete_all().await;
}

async fn a_terminal_is_one(world: World) {
    let (_root, app) = world.run_in_sandbox(&["/bin/sleep", "1000"]).await;
    let console = world.dir.path().join("console.sock");
    let listener = UnixListener::bind(&console).unwrap();
    let script = "test -t 0 && echo is-a-tty; trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.1; done";
    let mut opts = world.exec_opts(app.id.as_str(), &["sh", "-c", script], Stdio::default());
    opts.process["terminal"] = json!(true);
    opts.console_socket = Some(console);
    let exec = world.runtime.exec(&opts).await.unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut terminal = File::from(received(&stream));
    let mut text = String::new();
    // ^C goes through the terminal to the process in the sandbox.
    let code = tokio::task::spawn_blocking(move || {
        let mut chunk = [0; 1024];
        let mut interrupted = false;
        // The end of a terminal is an error: EIO.
        while let Ok(read @ 1..) = terminal.read(&mut chunk) {
            text.push_str(&String::from_utf8_lossy(&chunk[..read]));
            if text.contains("ready") && !interrupted {
                interrupted = true;
                terminal.write_all(b"\x03").unwrap();
            }
        }
        text
    });
    assert_eq!(end_of(exec.exit).await.code, 5);
    let text = code.await.unwrap();
    assert!(
        text.contains("is-a-tty") && text.contains("caught"),
        "{text:?}"
    );
    world.delete_all().await;
}

fn received(stream: &std::os::unix::net::UnixStream) -> OwnedFd {
    let mut name = [0; 64];
    let mut parts = [IoSliceMut::new(&mut name)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message =
        recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags).unwrap();
    for message in message.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: the kernel has just made this descriptor for us.
            return unsafe { OwnedFd::from_raw_fd(fds[0]) };
        }
    }
    panic!("no descriptor came");
}

for_flavors! { [Runsc RunscCli]:
    the_hosts_null_device_keeps_its_owner
}

async fn the_hosts_null_device_keeps_its_owner(world: World) {
    drop(world);
    // Without direct access to files the sentry runs as nobody, and owns what it is given.
    for flavor in [Flavor::Runsc, Flavor::RunscCli] {
        let Some(world) = World::with(flavor, "directfs = false") else {
            return;
        };
        let bundle = world.bundle("pod", "pod", &["/bin/sleep", "1000"]);
        let opts = world.create_opts("pod", "pod", bundle, Stdio::default());
        world.create(&opts).await.unwrap();
        world.runtime.start(&opts.id, &opts.stdio).await.unwrap();
        let opts = world.exec_opts("pod", &["true"], Stdio::default());
        end_of(world.runtime.exec(&opts).await.unwrap().exit).await;
        world.delete_all().await;
    }
    assert_eq!(std::fs::metadata("/dev/null").unwrap().uid(), 0);
}
