// SPDX-License-Identifier: Apache-2.0

//! Calls at the wrong time, on the wrong thing, with arguments that make no sense.

use anyhow::{Result, ensure};
use containerd_shim_protos::{
    api,
    protobuf::{MessageField, well_known_types::any::Any},
    ttrpc::Code,
};
use kiln_tests::mini::{Mini, ctx, exec_request};

use crate::{end, ended, refused, running, shim, state_of};

pub(crate) async fn signals_that_do_not_exist(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "signals").await?;
    for signal in [65, 4711, i32::MAX] {
        refused(
            &signal.to_string(),
            shim.kill("signals", "", signal).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    let request = api::KillRequest {
        id: "signals".to_owned(),
        signal: u32::MAX,
        ..api::KillRequest::default()
    };
    refused(
        "-1",
        shim.task().kill(ctx(), &request).await,
        Code::INVALID_ARGUMENT,
    )?;
    // 0 asks whether there is somebody.
    ensure!(shim.kill("signals", "", 0).await.is_ok());
    end(mini, &shim, bundle).await
}

pub(crate) async fn twice_is_once_too_often(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "twice").await?;
    let start = api::StartRequest {
        id: "twice".to_owned(),
        ..api::StartRequest::default()
    };
    refused(
        "start",
        shim.task().start(ctx(), &start).await,
        Code::FAILED_PRECONDITION,
    )?;
    refused(
        "create",
        shim.task()
            .create(ctx(), &shim.create_request(&bundle))
            .await,
        Code::ALREADY_EXISTS,
    )?;
    let exec = exec_request("twice", "e", &["sleep", "3600"]);
    shim.task().exec(ctx(), &exec).await?;
    refused(
        "exec",
        shim.task().exec(ctx(), &exec).await,
        Code::ALREADY_EXISTS,
    )?;
    shim.start("twice", "e").await?;
    let start = api::StartRequest {
        exec_id: "e".to_owned(),
        ..start
    };
    refused(
        "start of an exec",
        shim.task().start(ctx(), &start).await,
        Code::FAILED_PRECONDITION,
    )?;
    ensure!(shim.kill("twice", "e", libc::SIGKILL).await.is_ok());
    ensure!(shim.wait("twice", "e").await? == 137);
    refused(
        "kill of the dead",
        shim.kill("twice", "e", libc::SIGKILL).await,
        Code::NOT_FOUND,
    )?;
    shim.remove("twice", "e").await?;
    let delete = api::DeleteRequest {
        id: "twice".to_owned(),
        exec_id: "e".to_owned(),
        ..api::DeleteRequest::default()
    };
    refused(
        "delete",
        shim.task().delete(ctx(), &delete).await,
        Code::NOT_FOUND,
    )?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn calls_in_the_wrong_order(mini: &Mini) -> Result<()> {
    let (bundle, shim) = shim(mini, mini.bundle("order").sandbox()).await?;
    let id = "order".to_owned();
    shim.create(&bundle).await?;
    refused(
        "exec before start",
        shim.task()
            .exec(ctx(), &exec_request("order", "e", &["true"]))
            .await,
        Code::FAILED_PRECONDITION,
    )?;
    let pause = api::PauseRequest {
        id: id.clone(),
        ..api::PauseRequest::default()
    };
    refused(
        "pause before start",
        shim.task().pause(ctx(), &pause).await,
        Code::FAILED_PRECONDITION,
    )?;
    shim.start("order", "").await?;
    let resume = api::ResumeRequest {
        id: id.clone(),
        ..api::ResumeRequest::default()
    };
    refused(
        "resume of what runs",
        shim.task().resume(ctx(), &resume).await,
        Code::FAILED_PRECONDITION,
    )?;
    let delete = api::DeleteRequest {
        id: id.clone(),
        ..api::DeleteRequest::default()
    };
    refused(
        "delete of what runs",
        shim.task().delete(ctx(), &delete).await,
        Code::FAILED_PRECONDITION,
    )?;
    // It goes on with containers in it.
    shim.shutdown().await?;
    ensure!(shim.kill("order", "", libc::SIGKILL).await.is_ok());
    ensure!(shim.wait("order", "").await? == 137);
    refused(
        "exec after the end",
        shim.task()
            .exec(ctx(), &exec_request("order", "e", &["true"]))
            .await,
        Code::FAILED_PRECONDITION,
    )?;
    let start = api::StartRequest {
        id: id.clone(),
        ..api::StartRequest::default()
    };
    refused(
        "start after the end",
        shim.task().start(ctx(), &start).await,
        Code::FAILED_PRECONDITION,
    )?;
    refused(
        "pause after the end",
        shim.task().pause(ctx(), &pause).await,
        Code::FAILED_PRECONDITION,
    )?;
    refused(
        "kill after the end",
        shim.kill("order", "", libc::SIGKILL).await,
        Code::NOT_FOUND,
    )?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn nobody_knows_the_unknown(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "known").await?;
    let task = shim.task();
    for (id, exec) in [("unknown", ""), ("unknown", "e"), ("known", "unknown")] {
        let what = format!("{id}/{exec}");
        let (id, exec_id) = (id.to_owned(), exec.to_owned());
        refused(
            &what,
            task.state(ctx(), &state_of(&id, &exec_id)).await,
            Code::NOT_FOUND,
        )?;
        let start = api::StartRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            ..api::StartRequest::default()
        };
        refused(&what, task.start(ctx(), &start).await, Code::NOT_FOUND)?;
        refused(
            &what,
            shim.kill(&id, &exec_id, libc::SIGTERM).await,
            Code::NOT_FOUND,
        )?;
        let wait = api::WaitRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            ..api::WaitRequest::default()
        };
        refused(&what, task.wait(ctx(), &wait).await, Code::NOT_FOUND)?;
        let delete = api::DeleteRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            ..api::DeleteRequest::default()
        };
        refused(&what, task.delete(ctx(), &delete).await, Code::NOT_FOUND)?;
        let resize = api::ResizePtyRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            width: 80,
            height: 24,
            ..api::ResizePtyRequest::default()
        };
        refused(
            &what,
            task.resize_pty(ctx(), &resize).await,
            Code::NOT_FOUND,
        )?;
        let close = api::CloseIORequest {
            id: id.clone(),
            exec_id,
            stdin: true,
            ..api::CloseIORequest::default()
        };
        refused(&what, task.close_io(ctx(), &close).await, Code::NOT_FOUND)?;
        if id == "unknown" {
            refused(
                &what,
                task.exec(ctx(), &exec_request(&id, "new", &["true"])).await,
                Code::NOT_FOUND,
            )?;
            refused(
                &what,
                task.pids(
                    ctx(),
                    &api::PidsRequest {
                        id: id.clone(),
                        ..api::PidsRequest::default()
                    },
                )
                .await,
                Code::NOT_FOUND,
            )?;
            refused(
                &what,
                task.stats(
                    ctx(),
                    &api::StatsRequest {
                        id: id.clone(),
                        ..api::StatsRequest::default()
                    },
                )
                .await,
                Code::NOT_FOUND,
            )?;
            refused(
                &what,
                task.connect(
                    ctx(),
                    &api::ConnectRequest {
                        id: id.clone(),
                        ..api::ConnectRequest::default()
                    },
                )
                .await,
                Code::NOT_FOUND,
            )?;
            refused(
                &what,
                task.pause(
                    ctx(),
                    &api::PauseRequest {
                        id,
                        ..api::PauseRequest::default()
                    },
                )
                .await,
                Code::NOT_FOUND,
            )?;
        }
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn an_exec_needs_a_program(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "programs").await?;
    for text in [
        "",
        "null",
        "[]",
        "{",
        "{}",
        r#"{"args": []}"#,
        r#"{"args": "sh"}"#,
        r#"{"args": null}"#,
    ] {
        let mut request = exec_request("programs", "e", &[]);
        request.spec = MessageField::some(Any {
            value: text.as_bytes().to_owned(),
            ..Any::default()
        });
        refused(
            text,
            shim.task().exec(ctx(), &request).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    for args in [&["/no/such/program"][..], &["/"], &["/etc/passwd"]] {
        shim.task()
            .exec(ctx(), &exec_request("programs", "e", args))
            .await?;
        ensure!(shim.start("programs", "e").await.is_err(), "{args:?} runs");
        shim.remove("programs", "e").await?;
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn limits_that_make_no_sense(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "limits").await?;
    for text in ["", "[", "nonsense"] {
        let resources = Any {
            value: text.as_bytes().to_owned(),
            ..Any::default()
        };
        let request = api::UpdateTaskRequest {
            id: "limits".to_owned(),
            resources: MessageField::some(resources),
            ..api::UpdateTaskRequest::default()
        };
        refused(
            text,
            shim.task().update(ctx(), &request).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    for (width, height) in [(70_000, 24), (80, u32::MAX)] {
        let request = api::ResizePtyRequest {
            id: "limits".to_owned(),
            width,
            height,
            ..api::ResizePtyRequest::default()
        };
        refused(
            "size",
            shim.task().resize_pty(ctx(), &request).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn a_checkpoint_path_is_absolute(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "checkpoint").await?;
    for path in ["", "relative", "../up"] {
        let request = api::CheckpointTaskRequest {
            id: "checkpoint".to_owned(),
            path: path.to_owned(),
            ..api::CheckpointTaskRequest::default()
        };
        refused(
            path,
            shim.task().checkpoint(ctx(), &request).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    end(mini, &shim, bundle).await
}

/// Its members are ended with it, and still there to be deleted.
pub(crate) async fn a_sandbox_that_goes_first_takes_its_members(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "first").await?;
    let created = mini.bundle("first-created").member_of("first").write()?;
    shim.create(&created).await?;
    let started = mini.bundle("first-started").member_of("first").write()?;
    shim.run(&started).await?;
    ensure!(shim.kill("first", "", libc::SIGKILL).await.is_ok());
    shim.wait("first", "").await?;
    shim.remove("first", "").await?;
    ensure!(shim.wait("first-started", "").await? == 137);
    shim.remove("first-started", "").await?;
    shim.remove("first-created", "").await?;
    started.remove()?;
    created.remove()?;
    ended(mini, &shim, bundle).await
}
