// SPDX-License-Identifier: Apache-2.0

//! Runsc against a script in the program's place and a scripted sandbox at the control socket.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    sync::atomic::AtomicUsize,
};

use kiln_host::reap;
use serde_json::json;

use super::*;
use crate::config::Deadlines;

/// A root in which `c` runs in sandbox `s`, whose sentry is this very process.
struct Stage {
    dir: tempfile::TempDir,
    calls: Arc<AtomicUsize>,
}

impl Stage {
    /// `script` runs with the operation in `$op`; the arguments are recorded.
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("runsc");
        let text = format!(
            r#"#!/bin/sh
echo "$@" >>{0}/argv
for arg; do
    case $arg in
        --log=*) log=${{arg#--log=}} ;;
        --*) ;;
        *) op=$arg; break ;;
    esac
done
fail() {{ printf '{{"msg":"%s","level":"error"}}' "$1" >>$log; exit 128; }}
cd {0}
{script}
"#,
            dir.path().display()
        );
        fs::write(&program, text).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let stage = Self {
            dir,
            calls: Arc::default(),
        };
        for container in ["s", "c"] {
            stage.write_state(container, "running");
        }
        stage
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn write_state(&self, container: &str, status: &str) {
        let state = json!({
            "id": container, "status": status, "bundleDir": "/b",
            "spec": {"process": {"capabilities": {}}, "root": {"path": "/no/rootfs"}},
            "sandbox": {"id": "s", "pid": std::process::id(), "uid": 0, "gid": 0,
                "controlSocketPath": self.path().join("sock")},
        });
        let file = format!("root/{container}_sandbox:s.state");
        fs::write(self.path().join(file), state.to_string()).unwrap();
    }

    /// Answers calls with what `answer` makes of their method; an empty answer is a hang-up.
    fn serve(&self, answer: impl Fn(&str) -> String + Send + 'static) {
        let listener = UnixListener::bind(self.path().join("sock")).unwrap();
        let calls = self.calls.clone();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                calls.fetch_add(1, Ordering::Relaxed);
                let mut request = vec![0; 65536];
                let read = stream.read(&mut request).unwrap_or_default();
                let request: serde_json::Value =
                    serde_json::from_slice(&request[..read]).unwrap_or_default();
                let method = request["method"].as_str().unwrap_or_default();
                let answer = answer(method.trim_start_matches("containerManager."));
                // The client may have gone.
                let _ = stream.write_all(answer.as_bytes());
            }
        });
    }

    fn runsc(&self) -> Runsc {
        self.runsc_with(true)
    }

    fn runsc_with(&self, control_socket: bool) -> Runsc {
        let dir = self.path().display();
        let text = format!(
            "binary_name = '{dir}/runsc'\nroot = '{dir}/root'\n[runsc_config]\nplatform = 'systrap'\ndebug-log = '{dir}/logs/%ID%/'\n"
        );
        Runsc::new(Config {
            control_socket,
            deadlines: Deadlines {
                control: Duration::from_secs(60),
                ..Deadlines::default()
            },
            ..Config::parse(&text).unwrap()
        })
    }

    /// The files in the root that are named after a container.
    fn left_of(&self, container: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path().join("root")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains(container)).collect()
    }

    /// The recorded command lines, without the flags that all have.
    fn argv(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path().join("argv")).unwrap_or_default();
        let dir = self.path().display().to_string();
        let common = |line: &str| {
            let (head, tail) = line
                .split_once(" --platform=systrap ")
                .expect("flags are in order");
            assert!(
                head.starts_with(&format!("--root={dir}/root --log=/proc/self/fd/")),
                "{head}"
            );
            assert!(head.contains(" --log-format=json --debug-log="), "{head}");
            tail.replace(&dir, "DIR")
        };
        text.lines().map(common).collect()
    }
}

fn ok(result: &serde_json::Value) -> String {
    json!({"success": true, "err": "", "result": result}).to_string()
}

fn no(message: &str) -> String {
    json!({"success": false, "err": message, "result": null}).to_string()
}

fn id(id: &str) -> ContainerId {
    id.parse().unwrap()
}

fn create_opts(stage: &Stage, name: &str) -> CreateOpts {
    CreateOpts {
        id: id(name),
        sandbox: id(if name == "new" { "s" } else { name }),
        bundle: stage.path().join("bundle"),
        stdio: Stdio::default(),
        console_socket: Some("/console".into()),
        log_dir: Some("/logs".into()),
    }
}

fn exec_opts(stage: &Stage) -> ExecOpts {
    let scratch = stage.path().join("scratch");
    fs::create_dir_all(&scratch).unwrap();
    ExecOpts {
        container: id("c"),
        process: json!({"args": ["true"], "cwd": "/"}),
        stdio: Stdio::default(),
        console_socket: None,
        scratch,
    }
}

#[tokio::test]
async fn command_lines_are_what_runsc_expects() {
    let stage = Stage::new(
        "case $op in state) echo '{\"status\":\"running\"}';; ps) echo '[1,2]';; events) echo '{\"data\":{}}';; features) echo '{\"annotations\":{\"dev.gvisor.version\":\"v\"}}';; esac",
    );
    let runsc = stage.runsc_with(false);
    let c = id("c");
    runsc.start(&c, &Stdio::default()).await.unwrap();
    runsc
        .restore(&c, Path::new("/image"), &Stdio::default())
        .await
        .unwrap();
    assert_eq!(runsc.status(&c).await.unwrap(), Status::Running);
    assert_eq!(runsc.processes(&c).await.unwrap().len(), 2);
    runsc.stats(&c).await.unwrap();
    runsc.kill(&c, KillTarget::Init, 15).await.unwrap();
    runsc.kill(&c, KillTarget::All, 9).await.unwrap();
    runsc.kill(&c, KillTarget::Process(7), 9).await.unwrap();
    runsc.pause(&c).await.unwrap();
    runsc.resume(&c).await.unwrap();
    runsc
        .checkpoint(
            &c,
            &CheckpointOpts {
                image: "/i".into(),
                leave_running: true,
            },
        )
        .await
        .unwrap();
    runsc.features().await.unwrap();
    fs::remove_file(stage.path().join("root/c_sandbox:s.state")).unwrap();
    runsc.delete(&c).await.unwrap();
    assert_eq!(
        stage.argv(),
        [
            "start c",
            "restore --image-path /image --detach c",
            "state c",
            "ps --format json c",
            "events --stats c",
            "kill c 15",
            "kill --all c 9",
            "kill --pid 7 c 9",
            "pause c",
            "resume c",
            "checkpoint --image-path /i --compression=none --leave-running c",
            "features",
        ]
    );
}

#[tokio::test]
async fn features_that_name_no_release_get_it_from_the_version() {
    let stage = Stage::new(
        "case $op in features) echo '{\"ociVersionMax\":\"1.2.1\"}';; *) echo 'runsc version release-1';; esac",
    );
    let features = stage.runsc().features().await.unwrap();
    assert_eq!(features["ociVersionMax"], "1.2.1");
    assert_eq!(features["annotations"][VERSION], "release-1");
}

#[tokio::test]
async fn create_says_what_a_sandbox_needs_and_containers_do_not() {
    let stage = Stage::new("fail 'no'");
    let runsc = stage.runsc();
    for name in ["pod", "new"] {
        let error = runsc.create(&create_opts(&stage, name)).await.unwrap_err();
        assert!(
            matches!(error, RuntimeError::Failed { status: 128, ref message, .. } if message == "no"),
            "{error:?}"
        );
    }
    assert_eq!(
        stage.argv(),
        [
            "--panic-log=/logs/gvisor_panic.log create --bundle DIR/bundle --console-socket /console pod",
            "create --bundle DIR/bundle --console-socket /console new",
        ]
    );
    assert!(stage.path().join("logs/pod").is_dir());
    let again = runsc.create(&create_opts(&stage, "s")).await.unwrap_err();
    assert!(
        matches!(again, RuntimeError::AlreadyExists { .. }),
        "{again:?}"
    );
}

#[tokio::test]
async fn a_create_that_leaves_something_is_undone() {
    let script = "case $op in
        create) echo x >root/pod_sandbox:pod.lock; echo x >root/runsc-pod.sock; echo '{\"status\":\"created\"}' >root/pod_sandbox:pod.state; fail 'half way' ;;
        delete) rm root/pod_sandbox:pod.state ;;
    esac";
    let stage = Stage::new(script);
    let error = stage
        .runsc()
        .create(&create_opts(&stage, "pod"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("half way"), "{error}");
    assert_eq!(stage.argv()[1], "delete --force pod");
    assert_eq!(stage.left_of("pod"), [""; 0]);
}

#[tokio::test]
async fn a_create_that_was_killed_while_it_wrote_its_state_is_undone() {
    let script = "case $op in
        create) echo x >root/pod_sandbox:pod.lock; echo '{\"status' >root/pod_sandbox:pod.state; sleep 60 ;;
        *) fail 'unexpected end of JSON input' ;;
    esac";
    let stage = Stage::new(script);
    let mut config = stage.runsc().cli.config.clone();
    config.deadlines.create = Duration::from_millis(500);
    let bundle = stage.path().join("bundle");
    fs::create_dir(&bundle).unwrap();
    fs::write(bundle.join("config.json"), "{}").unwrap();
    let error = Runsc::new(config)
        .create(&create_opts(&stage, "pod"))
        .await
        .unwrap_err();
    assert!(matches!(error, RuntimeError::Timeout { .. }), "{error:?}");
    assert!(stage.argv().iter().all(|line| !line.starts_with("delete")));
    assert_eq!(stage.left_of("pod"), [""; 0]);
}

#[tokio::test]
async fn a_sandbox_that_answers_well_is_not_asked_by_command() {
    let stage = Stage::new("fail 'not to be run'");
    stage.serve(|method| match method {
        "ContainerRuntimeState" => ok(&json!(2)),
        "Processes" => ok(&json!([{"pid": 3, "cmd": "sh", "threads": [3]}])),
        "Event" => ok(&json!({
            "event": {"type": "stats", "data": {"pids": {"current": 4}, "memory": {"usage": {"usage": 5}},
                "network_interfaces": [{"Name": "eth0", "RxBytes": 6}]}},
            "containerUsage": {"c": 7, "s": 8},
        })),
        "Wait" => ok(&json!(0x300)),
        "ExecuteAsync" => ok(&json!(42)),
        "WaitPID" => ok(&json!(9)),
        "Signal" => no("signaling process in container \"c\" PID 0: no such process"),
        _ => ok(&json!({})),
    });
    let (runsc, c) = (stage.runsc(), id("c"));
    assert_eq!(runsc.status(&c).await.unwrap(), Status::Running);
    let processes = runsc.processes(&c).await.unwrap();
    assert_eq!((processes[0].pid, processes[0].command.as_str()), (3, "sh"));
    let stats = runsc.stats(&c).await.unwrap();
    assert_eq!((stats.cpu_ns, stats.pids, stats.memory_bytes), (7, 4, 5));
    assert_eq!(
        stats.sandbox_cpu_ns,
        [("c".to_owned(), 7), ("s".to_owned(), 8)]
    );
    assert_eq!(
        (stats.network[0].name.as_str(), stats.network[0].rx_bytes),
        ("eth0", 6)
    );
    assert_eq!(runsc.watch(&c).await.unwrap().await.unwrap().code, 3);
    let exec = runsc.exec(&exec_opts(&stage)).await.unwrap();
    assert_eq!(exec.pid, 42);
    assert_eq!(exec.exit.await.unwrap().code, 137);
    let error = runsc.kill(&c, KillTarget::Init, 15).await.unwrap_err();
    assert!(matches!(error, RuntimeError::NotFound { .. }), "{error:?}");
    runsc.pause(&c).await.unwrap();
    assert_eq!(runsc.status(&c).await.unwrap(), Status::Paused);
    assert!(runsc.pause(&c).await.is_err());
    runsc.resume(&c).await.unwrap();
    // A refusal is an answer like any other.
    assert_eq!(runsc.control_fallbacks(), 0);
    assert_eq!(stage.argv(), [""; 0]);
    // Who has only looked holds nothing of a sandbox that another deletes.
    assert!(!runsc.known().is_empty());
    runsc.forget(&c);
    assert!(runsc.known().is_empty());
}

#[tokio::test]
async fn any_strange_answer_moves_a_sandbox_to_the_command_line_for_good() {
    for strange in [
        "garbage",
        "{\"success\":true,\"result\":77}",
        "{\"success\":true",
        &no("unknown method"),
    ] {
        let stage = Stage::new(
            "case $op in state) echo '{\"status\":\"running\"}';; ps) echo '[1]';; esac",
        );
        let answer = strange.to_owned();
        stage.serve(move |_| answer.clone());
        let (runsc, c) = (stage.runsc(), id("c"));
        assert_eq!(runsc.status(&c).await.unwrap(), Status::Running);
        assert_eq!(runsc.control_fallbacks(), 1, "{strange}");
        assert_eq!(runsc.processes(&c).await.unwrap().len(), 1);
        assert_eq!(runsc.status(&id("s")).await.unwrap(), Status::Running);
        assert_eq!(stage.argv(), ["state c", "ps --format json c", "state s"]);
        // One probe, and never again.
        assert_eq!(stage.calls.load(Ordering::Relaxed), 1, "{strange}");
        assert_eq!(runsc.control_fallbacks(), 1);
    }
}

#[tokio::test]
async fn what_may_have_happened_is_not_done_again_by_command() {
    let stage = Stage::new("fail 'not to be run'");
    stage.serve(|method| match method {
        "ContainerRuntimeState" => ok(&json!(2)),
        _ => "garbage".to_owned(),
    });
    let runsc = stage.runsc();
    let error = runsc
        .exec(&exec_opts(&stage))
        .await
        .map(|_| ())
        .unwrap_err();
    assert!(matches!(error, RuntimeError::BadAnswer { .. }), "{error:?}");
    assert_eq!(runsc.control_fallbacks(), 1);
    assert_eq!(stage.argv(), [""; 0]);
}

#[tokio::test]
async fn a_wait_that_breaks_is_continued_by_command() {
    let stage =
        Stage::new("case $op in wait) sleep 0.2; echo '{\"id\":\"c\",\"exitStatus\":5}';; esac");
    stage.serve(|method| match method {
        "ContainerRuntimeState" => ok(&json!(2)),
        "ExecuteAsync" => ok(&json!(42)),
        // Hangs up, though the sandbox lives on.
        _ => String::new(),
    });
    let runsc = stage.runsc();
    let exec = runsc.exec(&exec_opts(&stage)).await.unwrap();
    assert_eq!(runsc.watch(&id("c")).await.unwrap().await.unwrap().code, 5);
    assert_eq!(exec.exit.await.unwrap().code, 5);
    assert_eq!(stage.argv(), ["wait c", "wait --pid 42 c"]);
    assert_eq!(runsc.control_fallbacks(), 1);
}

#[tokio::test]
async fn a_watch_waits_for_the_start() {
    let stage = Stage::new("touch started");
    stage.write_state("c", "created");
    let started = stage.path().join("started");
    stage.serve(move |method| match method {
        "Wait" if started.exists() => ok(&json!(0x700)),
        "Wait" => no("container \"c\" not started"),
        _ => ok(&json!(1)),
    });
    let (runsc, c) = (stage.runsc(), id("c"));
    let exit = tokio::spawn(runsc.watch(&c).await.unwrap());
    // Longer than it takes to look by itself.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(!exit.is_finished());
    runsc.start(&c, &Stdio::default()).await.unwrap();
    assert_eq!(exit.await.unwrap().unwrap().code, 7);
}

#[tokio::test]
async fn a_waiter_dies_with_its_watch() {
    let stage = Stage::new("case $op in wait) echo $$ >pid; exec sleep 100;; esac");
    let runsc = stage.runsc_with(false);
    let exit = tokio::spawn(runsc.watch(&id("c")).await.unwrap());
    let file = stage.path().join("pid");
    let pid = loop {
        match fs::read_to_string(&file)
            .ok()
            .and_then(|text| text.trim().parse::<u32>().ok())
        {
            Some(pid) => break pid,
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    };
    exit.abort();
    for _ in 0..3000 {
        if !Path::new(&format!("/proc/{pid}")).exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the waiter lives on");
}

#[tokio::test]
async fn a_delete_that_fails_after_its_work_is_done_is_one() {
    let stage = Stage::new("rm root/c_sandbox:s.state; fail 'failed to delete filestore file'");
    stage.runsc_with(false).delete(&id("c")).await.unwrap();
    let stage = Stage::new("fail 'failed to delete filestore file'");
    let error = stage.runsc_with(false).delete(&id("c")).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Failed { .. }), "{error:?}");
}

#[tokio::test]
async fn a_process_that_has_got_a_dead_sandboxs_pid_is_left_alone() {
    let stage = Stage::new("fail 'not to be run'");
    let mut stranger = tokio::process::Command::new("/bin/sleep");
    let (mut stranger, _owned) = reap::spawn(stranger.arg("1000").kill_on_drop(true)).unwrap();
    // Its arguments are not there yet in its very first moment.
    let args = format!("/proc/{}/cmdline", stranger.id().unwrap());
    while fs::read(&args).unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let name = "ffff0123456789";
    let state = json!({
        "id": name, "status": "running", "spec": {},
        "sandbox": {"id": name, "pid": stranger.id().unwrap(), "uid": 0, "gid": 0},
    });
    let files = ["state", "lock"].map(|end| format!("root/{name}_sandbox:{name}.{end}"));
    for file in &files {
        fs::write(stage.path().join(file), state.to_string()).unwrap();
    }
    let (runsc, pod) = (stage.runsc(), id(name));
    assert_eq!(runsc.status(&pod).await.unwrap(), Status::Stopped);
    assert_eq!(runsc.watch(&pod).await.unwrap().await.unwrap().code, 137);
    assert!(runsc.kill(&pod, KillTarget::All, 9).await.is_err());
    runsc.delete(&pod).await.unwrap();
    assert!(files.iter().all(|file| !stage.path().join(file).exists()));
    assert_eq!(stage.argv(), [""; 0]);
    assert!(stranger.try_wait().unwrap().is_none(), "it was killed");
    stranger.kill().await.unwrap();
}
