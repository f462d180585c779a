// SPDX-License-Identifier: Apache-2.0

//! The Task service over a real ttrpc connection, on a runtime that runs nothing.
#![allow(missing_docs, clippy::unwrap_used, clippy::needless_pass_by_value)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{
        CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest,
        KillRequest, PauseRequest, PidsRequest, ResumeRequest, ShutdownRequest, StartRequest,
        StateRequest, Status, UpdateTaskRequest, WaitRequest,
    },
    events::task as events,
    protobuf::{Message, well_known_types::any::Any},
    shim_async::{Client, Task, TaskClient, create_task},
    ttrpc::{self, Code, r#async::Server, context},
};
use kiln_shim::{events::EventSink, host_dirs::HostDirs, pod::Pod, task::TaskService};
use nix::{sys::stat::Mode, unistd::mkfifo};
use runsc_wrapper::{RuntimeError, fake::FakeRuntime};
use serde_json::{Value, json};

const TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";

/// More than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Keeps events as `topic container/exec`.
#[derive(Default)]
struct Recorder(Mutex<Vec<String>>);

impl EventSink for Recorder {
    fn publish(&self, topic: String, event: Any) {
        assert!(event.type_url.starts_with("containerd.events.Task"));
        let bytes = event.value;
        let what = match topic.as_str() {
            "/tasks/exit" => {
                let e = events::TaskExit::parse_from_bytes(&bytes).unwrap();
                format!("{}/{} {}", e.container_id, e.id, e.exit_status)
            }
            // Every other task event has the container's id first.
            _ => {
                events::TaskStart::parse_from_bytes(&bytes)
                    .unwrap()
                    .container_id
            }
        };
        self.0
            .lock()
            .unwrap()
            .push(format!("{} {what}", topic.trim_start_matches("/tasks/")));
    }
}

struct Shim {
    dir: tempfile::TempDir,
    runtime: Arc<FakeRuntime>,
    events: Arc<Recorder>,
    pod: Arc<Pod>,
    address: String,
    task: TaskClient,
    _server: Server,
}

impl Shim {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Arc::new(FakeRuntime::new());
        let events = Arc::new(Recorder::default());
        let made = Arc::clone(&runtime);
        let host = HostDirs {
            cgroups: dir.path().join("cgroup"),
            run: dir.path().join("run"),
        };
        let pod = Pod::new(
            "k8s.io".into(),
            host,
            dir.path().join("sock"),
            Box::new(move |_, _| Ok(Arc::clone(&made) as _)),
            Arc::clone(&events) as _,
        );
        let address = format!("unix://{}", dir.path().join("sock").display());
        let service: Arc<dyn Task + Send + Sync> = Arc::new(TaskService::new(Arc::clone(&pod)));
        let server = Server::new().bind(&address).unwrap();
        let mut server = server.register_service(create_task(service));
        server.start().await.unwrap();
        let task = TaskClient::new(Client::connect(&address).await.unwrap());
        Self {
            dir,
            runtime,
            events,
            pod,
            address,
            task,
            _server: server,
        }
    }

    /// A bundle for `id`, of the sandbox `pod` unless it is that itself.
    fn bundle(&self, id: &str, extra: Value) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let kind = if id == "pod" { "sandbox" } else { "container" };
        let mut spec = json!({
            "annotations": {TYPE: kind, SANDBOX: "pod"},
            "process": {"args": ["sh"]},
            "linux": {"cgroupsPath": format!("/pods/{id}"), "namespaces": [{"type": "network"}, {"type": "pid"}]},
        });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn request(&self, id: &str) -> CreateTaskRequest {
        let bundle = self.bundle(id, json!({}));
        CreateTaskRequest {
            id: id.into(),
            bundle: path(&bundle),
            ..CreateTaskRequest::default()
        }
    }

    async fn create(&self, id: &str) -> ttrpc::Result<u32> {
        let request = self.request(id);
        self.task
            .create(context::with_timeout(0), &request)
            .await
            .map(|r| r.pid)
    }

    async fn start(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..StartRequest::default()
        };
        self.task
            .start(context::with_timeout(0), &request)
            .await
            .map(|r| r.pid)
    }

    async fn exec(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        self.exec_in(id, exec_id, "/").await
    }

    async fn exec_in(&self, id: &str, exec_id: &str, cwd: &str) -> ttrpc::Result<()> {
        let spec = Any {
            value: json!({"args": ["true"], "cwd": cwd})
                .to_string()
                .into_bytes(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        };
        self.task
            .exec(context::with_timeout(0), &request)
            .await
            .map(drop)
    }

    async fn wait(&self, id: &str, exec_id: &str) -> u32 {
        let request = WaitRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..WaitRequest::default()
        };
        let reply = self.task.wait(context::with_timeout(0), &request);
        tokio::time::timeout(PATIENCE, reply)
            .await
            .unwrap()
            .unwrap()
            .exit_status
    }

    async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..KillRequest::default()
        };
        self.task
            .kill(context::with_timeout(0), &request)
            .await
            .map(drop)
    }

    async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest {
            id: id.into(),
            exec_id: exec_id.into(),
            ..DeleteRequest::default()
        };
        self.task
            .delete(context::with_timeout(0), &request)
            .await
            .map(|r| r.exit_status)
    }

    async fn shutdown(&self, now: bool) {
        let request = ShutdownRequest {
            now,
            ..ShutdownRequest::default()
        };
        let done = self.task.shutdown(context::with_timeout(0), &request).await;
        done.unwrap();
    }

    async fn expect_end(&self) {
        tokio::time::timeout(PATIENCE, self.pod.done())
            .await
            .unwrap();
    }

    async fn status(&self, id: &str) -> Status {
        let request = StateRequest {
            id: id.into(),
            ..StateRequest::default()
        };
        let reply = self
            .task
            .state(context::with_timeout(0), &request)
            .await
            .unwrap();
        reply.status.enum_value().unwrap()
    }

    fn events(&self) -> Vec<String> {
        self.events.0.lock().unwrap().clone()
    }

    /// Brings a container up, with the Pod's sandbox around it.
    async fn up(&self, id: &str) {
        self.create("pod").await.unwrap();
        self.start("pod", "").await.unwrap();
        self.create(id).await.unwrap();
        self.start(id, "").await.unwrap();
    }
}

fn path(p: &Path) -> String {
    p.to_str().unwrap().to_owned()
}

#[track_caller]
fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("no status: {other}"),
    }
}

async fn until(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_whole_life_announces_itself_in_order() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    shim.exec("c1", "e1").await.unwrap();
    let exec_pid = shim.start("c1", "e1").await.unwrap();
    shim.runtime.end_exec("c1", exec_pid, 3);
    assert_eq!(shim.wait("c1", "e1").await, 3);
    assert_eq!(shim.delete("c1", "e1").await.unwrap(), 3);
    shim.runtime.end("c1", 7);
    assert_eq!(shim.wait("c1", "").await, 7);
    assert_eq!(shim.delete("c1", "").await.unwrap(), 7);
    shim.kill("pod", "", 9).await.unwrap();
    assert_eq!(shim.wait("pod", "").await, 137);
    shim.delete("pod", "").await.unwrap();
    shim.task
        .shutdown(context::with_timeout(0), &ShutdownRequest::default())
        .await
        .unwrap();
    shim.pod.done().await;
    let expected = [
        "create pod",
        "start pod",
        "create c1",
        "start c1",
        "exec-added c1",
        "exec-started c1",
        "exit c1/e1 3",
        "exit c1/c1 7",
        "delete c1",
        "exit pod/pod 137",
        "delete pod",
    ];
    assert_eq!(shim.events(), expected);
    assert!(shim.runtime.containers().is_empty());
    let left: Vec<_> = fs::read_dir(shim.dir.path().join("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    // Where the sandboxes of all shims queue.
    assert_eq!(left, [".turns"]);
    assert!(!shim.dir.path().join("pod/kiln.json").exists());
}

#[tokio::test]
async fn a_process_that_ends_at_once_still_starts_before_it_exits() {
    let shim = Shim::new().await;
    shim.create("pod").await.unwrap();
    shim.start("pod", "").await.unwrap();
    for n in 0..50 {
        let id = format!("c{n}");
        shim.create(&id).await.unwrap();
        let held = shim.runtime.hold("start");
        let runtime = Arc::clone(&shim.runtime);
        let ends = tokio::spawn({
            let id = id.clone();
            async move {
                until(|| runtime.ops(&id).contains(&"start")).await;
                runtime.end(&id, 5);
                drop(held);
            }
        });
        // The runtime may say that a process which is gone has started, or that it has not.
        let started = shim.start(&id, "").await;
        ends.await.unwrap();
        if started.is_ok() {
            assert_eq!(shim.wait(&id, "").await, 5);
            let events = shim.events();
            let at = |what: String| events.iter().position(|e| *e == what).unwrap();
            assert!(at(format!("start {id}")) < at(format!("exit {id}/{id} 5")));
        }
        shim.delete(&id, "").await.unwrap();
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_nothing_half_made() {
    for op in ["create", "start", "exec", "kill", "delete"] {
        let shim = Shim::new().await;
        shim.create("pod").await.unwrap();
        shim.start("pod", "").await.unwrap();
        if op != "create" {
            shim.create("c1").await.unwrap();
        }
        if ["exec", "kill", "delete"].contains(&op) {
            shim.start("c1", "").await.unwrap();
            shim.exec("c1", "e1").await.unwrap();
        }
        if op == "delete" {
            shim.runtime.end("c1", 0);
            shim.wait("c1", "").await;
        }
        let held = shim.runtime.hold(op);
        let other = TaskClient::new(Client::connect(&shim.address).await.unwrap());
        let create = shim.request("c1");
        let call = tokio::spawn(async move {
            let id = "c1".to_owned();
            let ctx = context::with_timeout(0);
            match op {
                "create" => drop(other.create(ctx, &create).await),
                "start" => drop(
                    other
                        .start(
                            ctx,
                            &StartRequest {
                                id,
                                ..Default::default()
                            },
                        )
                        .await,
                ),
                "exec" => drop(
                    other
                        .start(
                            ctx,
                            &StartRequest {
                                id,
                                exec_id: "e1".into(),
                                ..Default::default()
                            },
                        )
                        .await,
                ),
                "kill" => drop(
                    other
                        .kill(
                            ctx,
                            &KillRequest {
                                id,
                                signal: 9,
                                ..Default::default()
                            },
                        )
                        .await,
                ),
                _ => drop(
                    other
                        .delete(
                            ctx,
                            &DeleteRequest {
                                id,
                                ..Default::default()
                            },
                        )
                        .await,
                ),
            }
        });
        let runtime = Arc::clone(&shim.runtime);
        until(|| runtime.ops("c1").contains(&op)).await;
        call.abort();
        drop(call.await);
        drop(held);
        match op {
            "create" => until(|| shim.events().contains(&"create c1".to_owned())).await,
            "start" => until(|| shim.events().contains(&"start c1".to_owned())).await,
            "exec" => until(|| shim.events().contains(&"exec-started c1".to_owned())).await,
            "kill" => assert_eq!(shim.wait("c1", "").await, 137),
            _ => until(|| shim.events().contains(&"delete c1".to_owned())).await,
        }
        let runtime = Arc::clone(&shim.runtime);
        until(|| runtime.containers().contains(&"c1".to_owned()) == (op != "delete")).await;
    }
}

#[tokio::test]
async fn a_create_that_fails_leaves_nothing_and_can_be_tried_again() {
    let shim = Shim::new().await;
    for id in ["pod", "c1"] {
        let failure = RuntimeError::Failed {
            op: "create",
            id: id.into(),
            status: 128,
            message: "the runtime's own words".into(),
        };
        shim.runtime.fail_next("create", failure);
        let error = shim.create(id).await.unwrap_err().to_string();
        assert!(error.contains("the runtime's own words"), "{error}");
        assert!(!shim.dir.path().join(id).join("kiln.json").exists());
        assert_eq!(code(shim.start(id, "").await), Code::NOT_FOUND);
        shim.create(id).await.unwrap();
    }
}

#[tokio::test]
async fn nothing_joins_a_sandbox_that_is_being_booted() {
    let shim = Shim::new().await;
    let held = shim.runtime.hold("create");
    let (task, request) = (shim.task.clone(), shim.request("pod"));
    let booted = tokio::spawn(async move { task.create(context::with_timeout(0), &request).await });
    let runtime = Arc::clone(&shim.runtime);
    until(|| runtime.ops("pod").contains(&"create")).await;
    assert_eq!(code(shim.create("c1").await), Code::INVALID_ARGUMENT);
    assert_eq!(code(shim.create("pod").await), Code::ALREADY_EXISTS);
    drop(held);
    booted.await.unwrap().unwrap();
    shim.create("c1").await.unwrap();
    assert_eq!(shim.runtime.containers(), ["c1", "pod"]);
}

#[tokio::test]
async fn the_runtime_is_told_of_clean_paths() {
    let shim = Shim::new().await;
    let mounts = json!([{"destination": "/data/certs/", "type": "tmpfs"}]);
    let bundle = shim.bundle(
        "pod",
        json!({"process": {"args": ["sh"], "cwd": "/made/"}, "mounts": mounts}),
    );
    let request = CreateTaskRequest {
        id: "pod".into(),
        bundle: path(&bundle),
        ..CreateTaskRequest::default()
    };
    let made = shim.task.create(context::with_timeout(0), &request).await;
    made.unwrap();
    let spec = fs::read(bundle.join("config.json")).unwrap();
    let spec: Value = serde_json::from_slice(&spec).unwrap();
    assert_eq!(spec["process"]["cwd"], "/made");
    assert_eq!(spec["mounts"][0]["destination"], "/data/certs");
    shim.start("pod", "").await.unwrap();
    shim.exec_in("pod", "e", "/made//.").await.unwrap();
    shim.start("pod", "e").await.unwrap();
    let mut calls = shim.runtime.calls().into_iter();
    let exec = calls.find(|call| call.op == "exec").unwrap();
    let process: Value = serde_json::from_str(&exec.detail).unwrap();
    assert_eq!(process["cwd"], "/made");
}

#[tokio::test]
async fn calls_that_do_not_fit_the_state_are_refused() {
    let shim = Shim::new().await;
    shim.create("pod").await.unwrap();
    assert_eq!(code(shim.create("pod").await), Code::ALREADY_EXISTS);
    assert_eq!(code(shim.exec("pod", "e").await), Code::FAILED_PRECONDITION);
    shim.start("pod", "").await.unwrap();
    assert_eq!(code(shim.start("pod", "").await), Code::FAILED_PRECONDITION);
    assert_eq!(
        code(shim.delete("pod", "").await),
        Code::FAILED_PRECONDITION
    );
    shim.exec("pod", "e").await.unwrap();
    assert_eq!(code(shim.exec("pod", "e").await), Code::ALREADY_EXISTS);
    assert_eq!(code(shim.exec("pod", "../e").await), Code::INVALID_ARGUMENT);
    assert_eq!(code(shim.start("pod", "nosuch").await), Code::NOT_FOUND);
    assert_eq!(
        code(shim.kill("pod", "", 4711).await),
        Code::INVALID_ARGUMENT
    );
    shim.runtime.end("pod", 0);
    shim.wait("pod", "").await;
    assert_eq!(code(shim.kill("pod", "", 9).await), Code::NOT_FOUND);
    assert_eq!(
        code(shim.start("pod", "e").await),
        Code::FAILED_PRECONDITION
    );
    shim.delete("pod", "").await.unwrap();
    assert_eq!(code(shim.delete("pod", "").await), Code::NOT_FOUND);
}

#[tokio::test]
async fn a_container_that_never_ran_can_be_killed_and_deleted() {
    let shim = Shim::new().await;
    shim.create("pod").await.unwrap();
    shim.kill("pod", "", 9).await.unwrap();
    assert_eq!(shim.wait("pod", "").await, 137);
    assert_eq!(shim.delete("pod", "").await.unwrap(), 137);
    assert!(shim.runtime.containers().is_empty());
}

#[tokio::test]
async fn a_kill_waits_for_the_start_that_is_under_way() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    shim.create("c2").await.unwrap();
    shim.exec("c1", "e1").await.unwrap();
    for (id, exec_id, op) in [("c2", "", "start"), ("c1", "e1", "exec")] {
        let held = shim.runtime.hold(op);
        let kill = async {
            until(|| shim.runtime.ops(id).last() == Some(&op)).await;
            let kill = shim.kill(id, exec_id, 9);
            tokio::pin!(kill);
            let early = tokio::time::timeout(Duration::from_millis(100), &mut kill).await;
            assert!(early.is_err(), "{early:?}");
            drop(held);
            kill.await
        };
        let (started, killed) = tokio::join!(shim.start(id, exec_id), kill);
        started.unwrap();
        killed.unwrap();
        assert_eq!(shim.wait(id, exec_id).await, 137);
        assert_eq!(shim.runtime.ops(id).last(), Some(&"kill"));
    }
}

#[tokio::test]
async fn a_lost_sandbox_ends_every_container_in_it() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    shim.runtime.kill_sandbox("pod");
    assert_eq!(shim.wait("c1", "").await, 137);
    assert_eq!(shim.wait("pod", "").await, 137);
    shim.delete("c1", "").await.unwrap();
    shim.delete("pod", "").await.unwrap();
}

#[tokio::test]
async fn pausing_stops_the_whole_sandbox_and_a_kill_still_works() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    let pause = PauseRequest {
        id: "c1".into(),
        ..PauseRequest::default()
    };
    shim.task
        .pause(context::with_timeout(0), &pause)
        .await
        .unwrap();
    assert_eq!(
        (shim.status("c1").await, shim.status("pod").await),
        (Status::PAUSED, Status::PAUSED)
    );
    let resume = ResumeRequest {
        id: "c1".into(),
        ..ResumeRequest::default()
    };
    shim.task
        .resume(context::with_timeout(0), &resume)
        .await
        .unwrap();
    assert_eq!(shim.status("pod").await, Status::RUNNING);
    shim.task
        .pause(context::with_timeout(0), &pause)
        .await
        .unwrap();
    shim.kill("c1", "", 9).await.unwrap();
    assert_eq!(shim.wait("c1", "").await, 137);
    let events = shim.events();
    assert!(events.contains(&"paused c1".to_owned()) && events.contains(&"resumed c1".to_owned()));
}

#[tokio::test]
async fn pids_name_the_execs() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    shim.exec("c1", "e1").await.unwrap();
    let pid = shim.start("c1", "e1").await.unwrap();
    let request = PidsRequest {
        id: "c1".into(),
        ..PidsRequest::default()
    };
    let reply = shim
        .task
        .pids(context::with_timeout(0), &request)
        .await
        .unwrap();
    let exec = reply.processes.iter().find(|p| p.pid == pid).unwrap();
    assert!(String::from_utf8_lossy(&exec.info.value).contains("e1"));
    assert_eq!(reply.processes.len(), 2);
}

/// containerd takes an answer without processes for a leak.
#[tokio::test]
async fn a_container_that_the_runtime_does_not_find_still_has_its_first_process() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    let lost = RuntimeError::NotFound {
        op: "ps",
        id: "c1".to_owned(),
        message: String::new(),
    };
    shim.runtime.fail_next("ps", lost);
    let request = PidsRequest {
        id: "c1".into(),
        ..PidsRequest::default()
    };
    let reply = shim.task.pids(context::with_timeout(0), &request).await;
    assert_eq!(reply.unwrap().processes.len(), 1);
}

/// containerd deletes sandboxes first when it comes back.
#[tokio::test]
async fn the_end_of_a_container_is_known_after_its_sandbox_is_deleted() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    shim.runtime.end("c1", 3);
    assert_eq!(shim.wait("c1", "").await, 3);
    shim.runtime.kill_sandbox("pod");
    shim.wait("pod", "").await;
    shim.delete("pod", "").await.unwrap();
    assert!(shim.runtime.containers().is_empty());
    shim.shutdown(false).await;
    assert_eq!(shim.delete("c1", "").await.unwrap(), 3);
    shim.shutdown(false).await;
    shim.expect_end().await;
}

#[tokio::test]
async fn a_shim_ends_before_its_containers_only_if_it_must() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    shim.shutdown(false).await;
    let ended = tokio::time::timeout(Duration::from_millis(100), shim.pod.done());
    ended.await.unwrap_err();
    shim.shutdown(true).await;
    shim.expect_end().await;
}

#[tokio::test]
async fn output_is_delivered_before_the_exit_is_announced() {
    let shim = Shim::new().await;
    shim.create("pod").await.unwrap();
    shim.start("pod", "").await.unwrap();
    let fifo = shim.dir.path().join("out");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let request = CreateTaskRequest {
        stdout: path(&fifo),
        ..shim.request("c1")
    };
    shim.task
        .create(context::with_timeout(0), &request)
        .await
        .unwrap();
    let reader = tokio::spawn(tokio::fs::read(fifo));
    shim.start("c1", "").await.unwrap();
    shim.runtime.write_output("c1", None, b"last words");
    shim.runtime.end("c1", 0);
    shim.wait("c1", "").await;
    // The shim has let go of the FIFO, so that the reader sees its end.
    let text = tokio::time::timeout(PATIENCE, reader)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(text, b"last words");
}

#[tokio::test]
async fn a_spec_that_reaches_for_the_host_is_refused_and_leaves_nothing() {
    let shim = Shim::new().await;
    shim.create("pod").await.unwrap();
    shim.start("pod", "").await.unwrap();
    let cases = [
        (
            json!({"hooks": {"prestart": [{"path": "/bin/sh"}]}}),
            Code::INVALID_ARGUMENT,
        ),
        (
            json!({"linux": {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}]}}),
            Code::INVALID_ARGUMENT,
        ),
        (
            json!({"linux": {"resources": {"devices": [{"allow": true, "access": "rwm"}]}}}),
            Code::PERMISSION_DENIED,
        ),
        (
            json!({"linux": {"cgroupsPath": "/../../x"}}),
            Code::INVALID_ARGUMENT,
        ),
        (
            json!({"annotations": {TYPE: "container", SANDBOX: "other"}}),
            Code::INVALID_ARGUMENT,
        ),
        (
            json!({"annotations": {TYPE: "sandbox"}}),
            Code::INVALID_ARGUMENT,
        ),
    ];
    for (extra, expected) in cases {
        let bundle = shim.bundle("bad", extra.clone());
        let request = CreateTaskRequest {
            id: "bad".into(),
            bundle: path(&bundle),
            ..Default::default()
        };
        let reply = shim.task.create(context::with_timeout(0), &request).await;
        assert_eq!(code(reply), expected, "{extra}");
    }
    assert_eq!(shim.runtime.containers(), ["pod"]);
    shim.create("c1").await.unwrap();
}

#[tokio::test]
async fn reads_answer_what_containerd_asks() {
    let shim = Shim::new().await;
    shim.up("c1").await;
    let connect = ConnectRequest {
        id: "c1".into(),
        ..ConnectRequest::default()
    };
    let reply = shim
        .task
        .connect(context::with_timeout(0), &connect)
        .await
        .unwrap();
    assert_eq!(reply.shim_pid, std::process::id());
    assert!(reply.task_pid > 0);
    let close = CloseIORequest {
        id: "c1".into(),
        stdin: true,
        ..CloseIORequest::default()
    };
    shim.task
        .close_io(context::with_timeout(0), &close)
        .await
        .unwrap();
    let resources = Any {
        value: json!({"memory": {"limit": 1 << 20}})
            .to_string()
            .into_bytes(),
        ..Any::default()
    };
    let update = UpdateTaskRequest {
        id: "c1".into(),
        resources: Some(resources).into(),
        ..Default::default()
    };
    shim.task
        .update(context::with_timeout(0), &update)
        .await
        .unwrap();
}
