// SPDX-License-Identifier: Apache-2.0

//! Snapshots as the node's agent asks for them: the Pod stands still, goes on or is stopped, and comes
//! back from the image that the agent gives. A stand-in of the agent gives it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use containerd_shim_protos::ttrpc::{
    self,
    asynchronous::{Server, TtrpcContext},
};
use kiln_agent_api::api::{
    Agent, CheckpointRequest, CheckpointResponse, FinishRequest, Image, RestoreRequest,
    RestoreResponse, RestoredRequest, RestoredResponse, SnapshotsClient, create_agent,
};
use kiln_tests::{
    mini::{
        Config, Mini, Runtime, Shim,
        bundle::{Bundle, BundleBuilder},
        ctx, exec_request,
        fifo::Output,
    },
    wait,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::gone;

/// Counts for ever, with what it counts in memory alone.
const COUNTS: &str = "n=0; while :; do n=$((n+1)); echo tick $n; sleep 0.1; done";

/// UID of every Pod here.
const UID: &str = "11111111-2222-3333-4444-555555555555";

/// Longer than a case.
const LONG: Duration = Duration::from_secs(600);

/// Gives one image, and notes what it is told.
#[derive(Default)]
struct StandIn {
    image: Mutex<Option<Image>>,
    told: Mutex<Vec<String>>,
}

#[async_trait]
impl Agent for StandIn {
    async fn restore(
        &self,
        _: &TtrpcContext,
        request: RestoreRequest,
    ) -> ttrpc::Result<RestoreResponse> {
        let mut answer = RestoreResponse::new();
        let is_named = (&*request.pod_uid, &*request.snapshot) == (UID, "snap");
        match self.image.lock().ok().and_then(|mut image| image.take()) {
            Some(image) if is_named => answer.image = Some(image).into(),
            _ => answer.refusal = "there is none".to_owned(),
        }
        Ok(answer)
    }

    async fn restored(
        &self,
        _: &TtrpcContext,
        request: RestoredRequest,
    ) -> ttrpc::Result<RestoredResponse> {
        if let Ok(mut told) = self.told.lock() {
            told.push(request.failure);
        }
        Ok(RestoredResponse::new())
    }
}

impl StandIn {
    /// Waits for what it is told of a restore: nothing, or a failure.
    async fn told(&self) -> Result<String> {
        wait::until("word of the restore", wait::SOON, async || {
            self.told.lock().ok()?.first().cloned()
        })
        .await
    }
}

/// A Pod of two containers whose shim asks the agent at `agent`.
struct Pod {
    shim: Shim,
    sandbox: Bundle,
    app: Bundle,
    output: Output,
}

fn of_pod(bundle: BundleBuilder<'_>) -> BundleBuilder<'_> {
    bundle.edit(|spec| {
        let annotations = &mut spec["annotations"];
        annotations["io.kubernetes.cri.sandbox-uid"] = UID.into();
        annotations["io.kubernetes.cri.sandbox-namespace"] = "ns".into();
        annotations["kiln.dev/restore-snapshot"] = "snap".into();
    })
}

impl Pod {
    /// Makes and starts the sandbox, and makes its container.
    async fn make(mini: &Mini, runtime: Runtime, id: &str, agent: &Path) -> Result<Self> {
        let sandbox = of_pod(mini.bundle(id).sandbox()).write()?;
        let app = mini.bundle(&format!("app-of-{id}")).member_of(id);
        let app = of_pod(app).script(COUNTS).edit(|spec| {
            spec["annotations"]["io.kubernetes.cri.container-name"] = "app".into();
        });
        let app = app.write()?;
        let config = Config {
            kiln: format!("agent = \"{}\"\n", agent.display()),
            ..Config::default()
        };
        let shim = mini.shim(&sandbox, &mini.config(runtime, &config)?).await?;
        shim.run(&sandbox).await?;
        let output = shim.create(&app).await?;
        Ok(Self {
            shim,
            sandbox,
            app,
            output,
        })
    }

    async fn run(mini: &Mini, runtime: Runtime, id: &str, agent: &Path) -> Result<Self> {
        let pod = Self::make(mini, runtime, id, agent).await?;
        pod.shim.start(pod.app.id(), "").await?;
        Ok(pod)
    }

    fn agents(&self) -> SnapshotsClient {
        SnapshotsClient::new(self.shim.client().clone())
    }

    async fn checkpoint(&self, dir: &Path, hold: Duration) -> ttrpc::Result<CheckpointResponse> {
        let request = CheckpointRequest {
            pod_uid: UID.to_owned(),
            dir: dir.display().to_string(),
            hold_milliseconds: u64::try_from(hold.as_millis()).unwrap_or(u64::MAX),
            room_bytes: 1 << 30,
            ..CheckpointRequest::default()
        };
        self.agents().checkpoint(ctx(), &request).await
    }

    async fn finish(&self, stop: bool) -> ttrpc::Result<()> {
        let request = FinishRequest {
            pod_uid: UID.to_owned(),
            stop,
            ..FinishRequest::default()
        };
        self.agents().finish(ctx(), &request).await.map(drop)
    }

    /// The next number that is counted.
    async fn count(&self) -> Result<u64> {
        let text = self.output.stdout.read_until("\n").await?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("tick "));
        let number = lines.next_back().context("no number")?;
        number
            .parse()
            .with_context(|| format!("no number: {text:?}"))
    }

    async fn end(self, mini: &Mini) -> Result<()> {
        self.shim.end(self.app.id()).await?;
        self.app.remove()?;
        self.shim.end(self.sandbox.id()).await?;
        self.shim.shutdown().await?;
        gone(mini, self.sandbox).await
    }
}

fn new_dir(mini: &Mini, name: &str) -> Result<PathBuf> {
    let dir = mini.dir().join("snapshots").join(name);
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

fn name_of(case: &str, runtime: Runtime) -> String {
    format!("{case}-{runtime:?}").to_lowercase()
}

pub(crate) async fn a_pod_goes_on_after_its_snapshot(mini: &Mini, runtime: Runtime) -> Result<()> {
    let name = name_of("goes-on", runtime);
    let pod = Pod::run(mini, runtime, &name, Path::new("")).await?;
    pod.count().await?;
    let taken = pod.checkpoint(&new_dir(mini, &name)?, LONG).await?;
    ensure!(!taken.adopted && taken.containers == ["app"], "{taken:?}");
    let again = pod.checkpoint(&new_dir(mini, &name)?, LONG).await;
    ensure!(again.is_err(), "it was paused twice");
    pod.finish(false).await?;
    ensure!(pod.finish(false).await.is_err(), "it went on twice");
    let before = pod.count().await?;
    ensure!(pod.count().await? > before);

    // Nobody finishes the next one.
    let dir = new_dir(mini, &format!("{name}-2"))?;
    pod.checkpoint(&dir, Duration::from_millis(100)).await?;
    let before = pod.count().await?;
    ensure!(pod.count().await? > before);
    ensure!(
        pod.finish(true).await.is_err(),
        "it is stopped after it went on"
    );
    pod.end(mini).await
}

pub(crate) async fn a_stopped_pod_is_told_to_run_until_its_end_is_asked_for(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let name = name_of("stopped", runtime);
    let pod = Pod::run(mini, runtime, &name, Path::new("")).await?;
    pod.count().await?;
    pod.checkpoint(&new_dir(mini, &name)?, LONG).await?;
    pod.finish(true).await?;
    pod.finish(true).await?;
    for id in [pod.app.id(), pod.sandbox.id()] {
        let state = pod.shim.state(id, "").await?;
        let status = state.status.enum_value_or_default();
        ensure!(format!("{status:?}") == "RUNNING", "{id}: {status:?}");
    }
    let look = exec_request(pod.app.id(), "look", &["true"]);
    let refused = pod.shim.task().exec(ctx(), &look).await.err();
    let refused = refused.context("an exec in a Pod that was stopped")?;
    ensure!(format!("{refused:?}").contains("suspended"), "{refused:?}");
    pod.shim.kill(pod.app.id(), "", libc::SIGTERM).await?;
    for id in [pod.app.id(), pod.sandbox.id()] {
        let code = pod.shim.wait(id, "").await?;
        ensure!(code == 0, "{id} ended with {code}");
    }
    pod.end(mini).await
}

pub(crate) async fn a_checkpoint_that_fails_leaves_the_pod_running(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let name = name_of("full", runtime);
    let pod = Pod::run(mini, runtime, &name, Path::new("")).await?;
    pod.count().await?;
    let dir = new_dir(mini, &name)?;
    let size = Some("size=16k");
    mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), size)?;
    let failed = pod.checkpoint(&dir, LONG).await.err();
    // The sentry may still hold a file there.
    umount2(&dir, MntFlags::MNT_DETACH)?;
    let failed = failed.context("an image on a full disk")?;
    ensure!(
        format!("{failed:?}").contains("no space left"),
        "{failed:?}"
    );
    let before = pod.count().await?;
    ensure!(pod.count().await? > before);
    pod.end(mini).await
}

pub(crate) async fn what_could_not_come_back_is_not_snapshotted(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let name = name_of("refused", runtime);
    let pod = Pod::make(mini, runtime, &name, Path::new("")).await?;
    let dir = new_dir(mini, &name)?;
    let refused = async |why: &str| -> Result<()> {
        let refused = pod.checkpoint(&dir, LONG).await.err();
        let refused = refused.with_context(|| format!("allowed: {why}"))?;
        ensure!(format!("{refused:?}").contains(why), "{refused:?}");
        Ok(())
    };
    refused("is created").await?;
    pod.shim.start(pod.app.id(), "").await?;
    pod.count().await?;
    let large = CheckpointRequest {
        pod_uid: UID.to_owned(),
        dir: dir.display().to_string(),
        room_bytes: 1,
        ..CheckpointRequest::default()
    };
    let full = pod.agents().checkpoint(ctx(), &large).await.err();
    ensure!(format!("{full:?}").contains("room for 1"), "{full:?}");
    let other = CheckpointRequest {
        pod_uid: "another".to_owned(),
        ..large
    };
    let other = pod.agents().checkpoint(ctx(), &other).await.err();
    ensure!(format!("{other:?}").contains("not found"), "{other:?}");
    pod.end(mini).await
}

pub(crate) async fn a_pod_comes_back_from_what_the_agent_gives(
    mini: &Mini,
    runtime: Runtime,
) -> Result<()> {
    let name = name_of("back", runtime);
    let image = new_dir(mini, &name)?;
    let old = Pod::run(mini, runtime, &format!("{name}-1"), Path::new("")).await?;
    old.output.stdout.read_until("tick 5\n").await?;
    let taken = old.checkpoint(&image, LONG).await?;
    old.finish(true).await?;
    old.end(mini).await?;

    let stand_in = Arc::new(StandIn::default());
    let socket = mini.dir().join(format!("{name}.sock"));
    let mut server = Server::new()
        .bind(&format!("unix://{}", socket.display()))?
        .register_service(create_agent(
            Arc::clone(&stand_in) as Arc<dyn Agent + Send + Sync>
        ));
    server.start().await?;
    let give = || {
        let given = Image {
            dir: image.display().to_string(),
            containers: taken.containers.clone(),
            ..Image::default()
        };
        if let Ok(mut image) = stand_in.image.lock() {
            *image = Some(given);
        }
    };
    give();
    let new = Pod::run(mini, runtime, &format!("{name}-2"), &socket).await?;
    let count = new.count().await?;
    ensure!((5..100).contains(&count), "it counts from {count} on");
    ensure!(stand_in.told().await?.is_empty(), "told of a failure");
    new.end(mini).await?;

    // One that is damaged is told of, and the next Pod starts cold.
    let file = image.join("checkpoint.img");
    let bytes = fs::read(&file)?;
    fs::write(&file, &bytes[..bytes.len() / 2])?;
    if let Ok(mut told) = stand_in.told.lock() {
        told.clear();
    }
    give();
    let broken = Pod::make(mini, runtime, &format!("{name}-3"), &socket).await?;
    // All is restored with the last container.
    let started = broken.shim.start(broken.app.id(), "").await;
    ensure!(started.is_err(), "half an image is taken up");
    ensure!(
        !stand_in.told().await?.is_empty(),
        "not told of the failure"
    );
    broken.end(mini).await?;
    let cold = Pod::run(mini, runtime, &format!("{name}-4"), &socket).await?;
    ensure!(cold.count().await? < 5, "it did not begin anew");
    cold.end(mini).await?;
    server.shutdown().await?;
    Ok(())
}
