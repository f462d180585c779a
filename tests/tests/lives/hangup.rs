// SPDX-License-Identifier: Apache-2.0

//! Clients that leave in the middle of a call, as a containerd that is restarted or a CRI call
//! that reaches its deadline does. ttrpc drops the handler then; the work must go on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{api, shim_async::TaskClient, ttrpc::Code};
use kiln_tests::{
    mini::{Mini, Runtime, Shim, code, connect, ctx, fifo::Output},
    wait,
};

use crate::{end, gone, sandbox};

/// When to leave: before the runtime runs, while it does, and about when it is done.
const MOMENTS: [u64; 4] = [2, 30, 120, 300];

/// Makes a call on a connection of its own, and leaves `moment` milliseconds after the shim has read
/// it, which is when it answers what is asked after it on that connection.
async fn leave<T>(
    shim: &Shim,
    moment: u64,
    call: impl AsyncFnOnce(&TaskClient) -> T,
) -> Result<()> {
    let client = TaskClient::new(connect(shim.address()).await?);
    let later = async {
        let request = api::ConnectRequest::default();
        // There is no such container, which is an answer too.
        client.connect(ctx(), &request).await.ok();
        tokio::time::sleep(Duration::from_millis(moment)).await;
    };
    tokio::select! {
        biased; // the call is sent first
        _ = call(&client) => {} // whether it was left in time is not the question
        () = later => {}
    }
    Ok(())
}

async fn until_status(shim: &Shim, id: &str, status: api::Status) -> Result<()> {
    wait::until(&format!("{id} to be {status:?}"), wait::SOON, async || {
        let state = shim.state(id, "").await.ok()?;
        (state.status.enum_value() == Ok(status)).then_some(())
    })
    .await
}

pub(crate) async fn a_client_that_leaves_create_leaves_nothing_half_made(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    for moment in MOMENTS {
        let id = format!("create-{moment}-{runtime:?}").to_lowercase();
        let (bundle, shim) = sandbox(mini, runtime, &id, "echo here; sleep 3600").await?;
        let output = Output::new(&id, bundle.io_dir())?;
        let request = api::CreateTaskRequest {
            stdout: output.stdout.path(),
            ..shim.create_request(&bundle)
        };
        leave(&shim, moment, async |task| {
            task.create(ctx(), &request).await.map(drop)
        })
        .await?;
        until_status(&shim, &id, api::Status::CREATED)
            .await
            .with_context(|| shim.log())?;
        shim.start(&id, "").await?;
        output.stdout.read_until("here\n").await?;
        end(mini, &shim, bundle).await?;
        mini.events()
            .expect(&id, &["create", "start", "exit", "delete"])
            .await?;
    }
    Ok(())
}

pub(crate) async fn a_client_that_leaves_start_leaves_it_started(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    for moment in MOMENTS {
        let id = format!("start-{moment}-{runtime:?}").to_lowercase();
        let (bundle, shim) = sandbox(mini, runtime, &id, "echo here; sleep 3600").await?;
        let output = shim.create(&bundle).await?;
        let request = api::StartRequest {
            id: id.clone(),
            ..api::StartRequest::default()
        };
        leave(&shim, moment, async |task| {
            task.start(ctx(), &request).await.map(drop)
        })
        .await?;
        until_status(&shim, &id, api::Status::RUNNING)
            .await
            .with_context(|| shim.log())?;
        output.stdout.read_until("here\n").await?;
        end(mini, &shim, bundle).await?;
        mini.events()
            .expect(&id, &["create", "start", "exit", "delete"])
            .await?;
    }
    Ok(())
}

pub(crate) async fn a_client_that_leaves_delete_leaves_it_deleted(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    for moment in MOMENTS {
        let id = format!("delete-{moment}-{runtime:?}").to_lowercase();
        let (bundle, shim) = sandbox(mini, runtime, &id, "sleep 3600").await?;
        shim.run(&bundle).await?;
        ensure!(code(shim.kill(&id, "", libc::SIGKILL).await)?.is_none());
        shim.wait(&id, "").await?;
        let request = api::DeleteRequest {
            id: id.clone(),
            ..api::DeleteRequest::default()
        };
        leave(&shim, moment, async |task| {
            task.delete(ctx(), &request).await.map(drop)
        })
        .await?;
        wait::until("the deletion", wait::SOON, async || {
            let state = code(shim.state(&id, "").await).ok()?;
            (state == Some(Code::NOT_FOUND)).then_some(())
        })
        .await?;
        mini.events()
            .expect(&id, &["create", "start", "exit", "delete"])
            .await?;
        shim.shutdown().await?;
        gone(mini, bundle).await?;
    }
    Ok(())
}
