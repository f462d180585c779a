// SPDX-License-Identifier: Apache-2.0

//! Stdio that is no FIFO.

use std::{
    fs,
    os::unix::{fs::symlink, net::UnixListener},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{CreateTaskRequest, ExecProcessRequest},
    ttrpc::Code,
};
use kiln_tests::{
    mini::{Mini, code, ctx, exec_request, fifo::Fifo},
    wait::SOON,
};

use crate::{end, running};

/// Paths that a shim must not open, with whether they are even there.
fn bad_paths(dir: &Path, fifo: &Fifo) -> Result<Vec<String>> {
    fs::create_dir_all(dir.join("directory"))?;
    fs::write(dir.join("file"), "kept")?;
    symlink(fifo.path(), dir.join("link"))?;
    drop(UnixListener::bind(dir.join("socket"))?);
    let at = |name: &str| dir.join(name).display().to_string();
    Ok(vec![
        at("file"),
        at("directory"),
        at("link"),
        at("socket"),
        at("missing"),
        "/dev/null".to_owned(),
        "/dev/zero".to_owned(),
        "/proc/self/fd/1".to_owned(),
        "relative".to_owned(),
        "binary:///bin/sh?-c=touch".to_owned(),
        "npipe:////./pipe/x".to_owned(),
        "file://relative".to_owned(),
        format!("file://{}", at("directory")),
        format!("file://{}", at("link")),
        "fifo\0.x".to_owned(),
    ])
}

pub(crate) async fn only_fifos_and_log_files_are_taken(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "streams").await?;
    let member = mini.bundle("streams-member").member_of("streams").write()?;
    let fifo = Fifo::new(&bundle.io_dir(), "real")?;
    let dir = mini.dir().join("stdio-of-create");
    for path in bad_paths(&dir, &fifo)? {
        let base = shim.create_request(&member);
        let requests = [
            (
                "stdin",
                CreateTaskRequest {
                    stdin: path.clone(),
                    ..base.clone()
                },
            ),
            (
                "stdout",
                CreateTaskRequest {
                    stdout: path.clone(),
                    ..base.clone()
                },
            ),
            (
                "stderr",
                CreateTaskRequest {
                    stderr: path.clone(),
                    ..base
                },
            ),
        ];
        for (stream, request) in requests {
            let answer = code(shim.task().create(ctx(), &request).await)?;
            let expected = matches!(
                answer,
                Some(Code::INVALID_ARGUMENT | Code::INTERNAL | Code::NOT_FOUND)
            );
            ensure!(expected, "{stream} {path:?}: {answer:?}");
            ensure!(
                kiln_tests::mounts::below(member.dir())?.is_empty(),
                "{stream} {path:?}: still mounted"
            );
        }
    }
    ensure!(fs::read_to_string(dir.join("file"))? == "kept");
    shim.run(&member).await.context("after all")?;
    shim.end(member.id()).await?;
    member.remove()?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn an_exec_takes_no_more(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "exec-output").await?;
    let fifo = Fifo::new(&bundle.io_dir(), "real")?;
    let dir = mini.dir().join("stdio-of-exec");
    for (n, path) in bad_paths(&dir, &fifo)?.into_iter().enumerate() {
        let exec = format!("e{n}");
        let request = ExecProcessRequest {
            stdout: path.clone(),
            ..exec_request(bundle.id(), &exec, &["echo", "written"])
        };
        // A shim may look at the paths when it adds the exec, or when it starts it.
        if code(shim.task().exec(ctx(), &request).await)?.is_none() {
            ensure!(
                shim.start(bundle.id(), &exec).await.is_err(),
                "{path:?} was taken"
            );
            shim.remove(bundle.id(), &exec)
                .await
                .with_context(|| path.clone())?;
        }
    }
    ensure!(fs::read_to_string(dir.join("file"))? == "kept");
    let ran = shim.exec(&bundle, "good", &["echo", "fine"]).await?;
    shim.start(bundle.id(), "good").await?;
    ensure!(shim.wait(bundle.id(), "good").await? == 0);
    ensure!(ran.read_to_end().await?.0 == "fine\n");
    end(mini, &shim, bundle).await
}

/// A process whose output nobody reads waits; others do not.
pub(crate) async fn a_reader_that_stalls_stalls_nobody_else(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "stalled").await?;
    let stalled = shim
        .exec(&bundle, "stalled", &["sh", "-c", "yes | head -c 1000000"])
        .await?;
    shim.start(bundle.id(), "stalled").await?;
    for n in 0..10 {
        let exec = format!("e{n}");
        let output = shim.exec(&bundle, &exec, &["echo", "fine"]).await?;
        shim.start(bundle.id(), &exec).await?;
        let done = tokio::time::timeout(SOON, shim.wait(bundle.id(), &exec)).await;
        ensure!(done.context("it waits for the other's reader")?? == 0);
        ensure!(output.read_to_end().await?.0 == "fine\n");
    }
    let memory = mini
        .shims_of(bundle.id())
        .first()
        .and_then(|s| s.status("VmRSS"))
        .context("no shim")?;
    ensure!(memory < 32 << 10, "the shim holds {memory} KiB");
    let (out, _) = stalled.read_to_end().await?;
    ensure!(out.len() == 1_000_000, "{} bytes", out.len());
    end(mini, &shim, bundle).await
}
