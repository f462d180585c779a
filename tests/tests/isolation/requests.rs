// SPDX-License-Identifier: Apache-2.0

//! S6, S7, A2 and C1: calls that containerd would never make, on the socket of the shim of a Pod
//! that runs. More of them, on a shim without a Pod, are in the suite `badinput`.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest, StartRequest},
    shim_async::TaskClient,
    ttrpc::{self, Code},
};
use kiln_tests::{
    mini::{self, ctx, exec_request},
    node::Node,
    pod::Pod,
    process::{Cmd, Output},
    tools,
    wait::{self, SOON},
};
use serde_json::{Value, json};

/// The bundle of a container or Pod.
pub(crate) fn bundle(node: &Node, id: &str) -> PathBuf {
    let bundles = node
        .dir()
        .join("state/io.containerd.runtime.v2.task/k8s.io");
    bundles.join(id)
}

/// The path of the socket of a Pod's shim.
fn socket(pod: &Pod<'_>) -> Result<PathBuf> {
    let bundle = bundle(pod.node(), pod.id());
    let text = fs::read_to_string(bundle.join("bootstrap.json")).context("read bootstrap.json")?;
    let reply: Value = serde_json::from_str(&text)?;
    let address = reply["address"].as_str().context("no address")?;
    let path = address
        .strip_prefix("unix://")
        .with_context(|| address.to_owned())?;
    ensure!(path.starts_with('/'), "an abstract name: {address}");
    Ok(path.into())
}

async fn task(pod: &Pod<'_>) -> Result<TaskClient> {
    let address = format!("unix://{}", socket(pod)?.display());
    Ok(TaskClient::new(mini::connect(&address).await?))
}

/// Checks that a call was refused as a wrong one, with these words.
fn refused<T>(what: &str, answer: Result<T, ttrpc::Error>, words: &str) -> Result<()> {
    let said = answer
        .as_ref()
        .err()
        .map(ToString::to_string)
        .unwrap_or_default();
    let code = mini::code(answer)?;
    ensure!(
        matches!(code, Some(Code::INVALID_ARGUMENT | Code::PERMISSION_DENIED))
            && said.contains(words),
        "{what}: {code:?} {said}"
    );
    Ok(())
}

/// Names that would be paths are refused before anything is looked for by them.
pub(crate) async fn s6_an_id_is_no_path(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let task = task(&pod).await?;
    let long = "x".repeat(300);
    for id in [
        "../x", "..", "a/b", "/etc", "a\0b", "-rf", "a b", "a\nb", &long,
    ] {
        let create = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle(node, pod.id()).display().to_string(),
            ..CreateTaskRequest::default()
        };
        refused(id, task.create(ctx(), &create).await, "id")?;
        let exec = exec_request(container.id(), id, &["true"]);
        refused(id, task.exec(ctx(), &exec).await, "id")?;
    }
    ensure!(container.sh("echo well").await? == "well\n");
    pod.remove().await
}

/// What is no FIFO of containerd's is neither opened nor run.
pub(crate) async fn s7_streams_are_fifos(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let task = task(&pod).await?;
    let dir = node.volume()?;
    fs::write(dir.join("file"), "kept")?;
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
    symlink(dir.join("fifo"), dir.join("link"))?;
    let at = |name: &str| dir.join(name).display().to_string();
    let proof = at("a-logger-ran");
    let paths = [
        at("file"),
        at("link"),
        at("missing"),
        at(""),
        "/dev/null".to_owned(),
        "/dev/kmsg".to_owned(),
        "/proc/self/fd/1".to_owned(),
        "relative".to_owned(),
        format!("binary:///bin/sh?-c=touch%20{proof}"),
        format!("file://{}", at("link")),
    ];
    for (n, path) in paths.iter().enumerate() {
        let id = format!("e{n}");
        let exec = ExecProcessRequest {
            stdout: path.clone(),
            ..exec_request(container.id(), &id, &["echo", "written"])
        };
        if mini::code(task.exec(ctx(), &exec).await)?.is_none() {
            let start = StartRequest {
                id: container.id().to_owned(),
                exec_id: id,
                ..StartRequest::default()
            };
            let started = mini::code(task.start(ctx(), &start).await)?;
            ensure!(started.is_some(), "{path:?} was taken");
        }
    }
    ensure!(fs::read_to_string(dir.join("file"))? == "kept");
    ensure!(!Path::new(&proof).exists(), "a logger ran");
    ensure!(container.sh("echo well").await? == "well\n");
    pod.remove().await
}

/// What a spec asks for outside of the sandbox is refused, and the Pod is none the worse.
pub(crate) async fn a2_a_spec_cannot_reach_out(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().start().await?;
    let task = task(&pod).await?;
    let proof = node.dir().join(node.unique("a-hook-ran"));
    let hook =
        json!([{"path": "/bin/sh", "args": ["sh", "-c", format!("touch {}", proof.display())]}]);
    let namespace = |kind: &str, path: &str| json!([{"type": kind, "path": path}]);
    let wrong: [(&str, Value, &str); 10] = [
        ("/hooks", json!({"prestart": hook}), "hooks"),
        ("/hooks", json!({"createRuntime": hook}), "hooks"),
        ("/hooks", json!({"poststop": hook}), "hooks"),
        (
            "/linux/namespaces",
            namespace("network", "/proc/1/ns/net"),
            "namespace",
        ),
        (
            "/linux/namespaces",
            namespace("mount", "/proc/1/ns/mnt"),
            "namespace",
        ),
        (
            "/linux/namespaces",
            namespace("pid", "/proc/1/ns/pid"),
            "namespace",
        ),
        (
            "/linux/namespaces",
            namespace("user", "/proc/self/ns/user"),
            "namespace",
        ),
        (
            "/linux/seccomp",
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
            "listener",
        ),
        ("/linux/intelRdt", json!({"closID": "x"}), "intelRdt"),
        (
            "/linux/resources",
            json!({"devices": [{"allow": true, "access": "rwm"}]}),
            "privileged",
        ),
    ];
    for (n, (path, value, words)) in wrong.into_iter().enumerate() {
        let mut spec = member_of(pod.id());
        let (parent, key) = path.rsplit_once('/').context("a path")?;
        spec.pointer_mut(parent).context("a parent")?[key] = value;
        let dir = node.volume()?;
        fs::create_dir(dir.join("rootfs"))?;
        fs::write(dir.join("config.json"), spec.to_string())?;
        let create = CreateTaskRequest {
            id: format!("wrong-{n}"),
            bundle: dir.display().to_string(),
            ..CreateTaskRequest::default()
        };
        refused(path, task.create(ctx(), &create).await, words)?;
    }
    ensure!(!proof.exists(), "a hook ran");
    ensure!(container.sh("echo well").await? == "well\n");
    pod.remove().await
}

/// A spec in which nothing is wrong.
fn member_of(sandbox: &str) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [],
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": sandbox,
        },
        "linux": {"namespaces": [{"type": "mount"}], "resources": {}},
    })
}

/// The socket is a file of root's that nobody else can connect to, and goes with the Pod.
pub(crate) async fn c1_only_root_reaches_a_shim(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let socket = socket(&pod)?;
    let meta = fs::metadata(&socket)?;
    ensure!(
        meta.uid() == 0 && meta.mode() & 0o777 == 0o600,
        "{:o}",
        meta.mode()
    );
    let dir = fs::metadata(socket.parent().context("no directory")?)?;
    ensure!(
        dir.uid() == 0 && dir.mode() & 0o077 == 0,
        "{:o}",
        dir.mode()
    );
    ensure!(
        dial_as(0, &socket).await?.contains("\"done\":true"),
        "root is refused"
    );
    let nobody = dial_as(65534, &socket).await?;
    ensure!(nobody.contains("EACCES"), "{nobody}");
    pod.remove().await?;
    wait::until_true("the socket to be gone", SOON, || !socket.exists()).await
}

/// What the probe reports that connects to a socket of the host as user `uid`.
pub(crate) async fn dial_as(uid: u32, socket: &Path) -> Result<String> {
    let probe = run_as(uid, &tools::probe()?, ["dial".as_ref(), socket]).await?;
    ensure!(probe.status.success(), "{probe:?}");
    Ok(probe.text())
}

/// Runs one of our programs as user `uid`.
pub(crate) async fn run_as<const N: usize>(
    uid: u32,
    program: &Path,
    arguments: [&Path; N],
) -> Result<Output> {
    // Somebody must be able to reach the program.
    let dir = tempfile::Builder::new().tempdir_in("/run")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    let own = dir.path().join("program");
    fs::copy(program, &own)?;
    let who = [
        format!("--reuid={uid}"),
        format!("--regid={uid}"),
        "--clear-groups".to_owned(),
    ];
    let command = Cmd::new(&tools::program("setpriv")?).args(who);
    command.args([own.as_path()]).args(arguments).output().await
}
