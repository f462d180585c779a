// SPDX-License-Identifier: Apache-2.0

//! Checkpoints: what ran goes on in another sandbox, on the image that the node allows.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::api;
use kiln_tests::mini::{
    Config, Mini, Runtime, Shim,
    bundle::{Bundle, BundleBuilder},
    ctx,
    fifo::Output,
};
use serde_json::{Value, json};

use crate::{end, gone};

/// Counts for ever.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.1; done";

/// Name of a container, by which an image knows it.
const NAME: &str = "io.kubernetes.cri.container-name";

async fn checkpoint(shim: &Shim, id: &str, image: &Path) -> Result<()> {
    std::fs::create_dir_all(image)?;
    let request = api::CheckpointTaskRequest {
        id: id.to_owned(),
        path: image.display().to_string(),
        ..api::CheckpointTaskRequest::default()
    };
    let done = shim.task().checkpoint(ctx(), &request).await;
    done.map(drop).context("checkpoint")
}

async fn shim_of(mini: &Mini, runtime: Runtime, bundle: &Bundle) -> Result<Shim> {
    let images = mini.dir().join("images");
    let config = Config {
        kiln: format!("restore_dirs = [\"{}\"]\n", images.display()),
        ..Config::default()
    };
    mini.shim(bundle, &mini.config(runtime, &config)?).await
}

fn from(image: Option<&Path>, name: &str, bundle: BundleBuilder<'_>) -> Result<Bundle> {
    let bundle = bundle.script(COUNTS).edit(|spec| {
        spec["annotations"][NAME] = name.into();
        if let Some(image) = image {
            let image = image.display().to_string();
            spec["annotations"]["kiln.dev/restore-image"] = image.into();
        }
    });
    bundle.write()
}

/// The first number that was counted, once there is one.
async fn first(output: &Output) -> Result<u32> {
    let text = output.stdout.read_until("\n").await?;
    let number = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("tick "));
    let number = number.with_context(|| format!("no number in {text:?}"))?;
    number
        .parse()
        .with_context(|| format!("no number: {number:?}"))
}

pub(crate) async fn a_container_goes_on_from_its_checkpoint(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let name = format!("restore-{runtime:?}").to_lowercase();
    let image = mini.dir().join("images").join(&name);
    let old = from(None, "app", mini.bundle(&name).sandbox())?;
    let shim = shim_of(mini, runtime, &old).await?;
    let output = shim.run(&old).await?;
    output.stdout.read_until("tick 5\n").await?;
    checkpoint(&shim, &name, &image).await?;
    // It was left running.
    output.stdout.read_until("tick").await?;
    end(mini, &shim, old).await?;

    let new = from(
        Some(&image),
        "app",
        mini.bundle(&format!("{name}-2")).sandbox(),
    )?;
    let shim = shim_of(mini, runtime, &new).await?;
    let output = shim.run(&new).await?;
    let first = first(&output).await?;
    ensure!(first >= 5, "counted from {first} on");
    ensure!(look(&shim, &new, "echo in").await? == "in\n");
    end(mini, &shim, new).await?;
    mini.events()
        .expect(
            &name,
            &["create", "start", "checkpointed", "exit", "delete"],
        )
        .await
}

pub(crate) async fn a_pod_goes_on_from_its_checkpoint(mini: &Mini, runtime: Runtime) -> Result<()> {
    let name = format!("restored-{runtime:?}").to_lowercase();
    let image = mini.dir().join("images").join(&name);
    let (old, shim, output) = pod(mini, runtime, &name, None).await?;
    output.stdout.read_until("tick 5\n").await?;
    let left = look(
        &shim,
        &old[1],
        "echo left > /dev/shm/file; cat /dev/shm/file",
    );
    ensure!(left.await? == "left\n");
    checkpoint(&shim, &name, &image).await?;
    end_pod(mini, &shim, old).await?;

    let (new, shim, output) = pod(mini, runtime, &format!("{name}-2"), Some(&image)).await?;
    let first = first(&output).await?;
    ensure!(first >= 5, "counted from {first} on");
    let found = look(&shim, &new[1], "cat /dev/shm/file").await?;
    ensure!(found == "left\n", "shared memory: {found:?}");
    end_pod(mini, &shim, new).await
}

/// What `script` says in a container.
async fn look(shim: &Shim, bundle: &Bundle, script: &str) -> Result<String> {
    let ran = shim.exec(bundle, "look", &["sh", "-c", script]).await?;
    shim.start(bundle.id(), "look").await?;
    shim.wait(bundle.id(), "look").await?;
    let (said, _) = ran.read_to_end().await?;
    shim.remove(bundle.id(), "look").await?;
    Ok(said)
}

/// A sandbox with one member, which share memory, and the member's output.
async fn pod(
    mini: &Mini,
    runtime: Runtime,
    id: &str,
    image: Option<&Path>,
) -> Result<([Bundle; 2], Shim, Output)> {
    let memory = mini.dir().join(format!("shm-of-{id}"));
    std::fs::create_dir_all(&memory)?;
    let share = |spec: &mut Value| {
        let mount = json!({
            "destination": "/dev/shm", "type": "bind", "source": memory, "options": ["rbind", "rw"],
        });
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(mount);
        }
    };
    let sandbox = mini.bundle(id).sandbox().edit(share);
    let sandbox = from(image, "sandbox", sandbox)?;
    // runsc takes an id that begins another one for ambiguous.
    let member = mini.bundle(&format!("app-of-{id}")).member_of(id);
    let member = member.edit(share);
    let member = from(image, "app", member)?;
    let shim = shim_of(mini, runtime, &sandbox).await?;
    shim.run(&sandbox).await?;
    let output = shim.run(&member).await?;
    Ok(([sandbox, member], shim, output))
}

async fn end_pod(mini: &Mini, shim: &Shim, [sandbox, member]: [Bundle; 2]) -> Result<()> {
    shim.end(member.id()).await?;
    member.remove()?;
    shim.end(sandbox.id()).await?;
    shim.shutdown().await?;
    gone(mini, sandbox).await
}
