// SPDX-License-Identifier: Apache-2.0

//! What is done to Pods while figures are taken.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    cri::v1,
    node::{Node, NodeOpts},
    pod::{Container, GUEST, Pod},
};
use tokio::{task::JoinSet, time::sleep};

use crate::{cpu, figures, memory::Layer, results::Results, side::Side};

/// What containers print when they run.
const READY: &str = "ready";

/// A container that runs until it is killed.
const IDLE: &str = "echo ready; exec sleep 1000000";

/// Pause between two looks at a log, which is how exact the time of the first output is.
const LOOK: Duration = Duration::from_millis(1);

/// How long the first output may take.
const FIRST_OUTPUT: Duration = Duration::from_secs(60);

/// What a Pod has after its start to come to rest before its memory is read.
const REST: Duration = Duration::from_secs(1);

/// Execs and stats in a batch. CPU time is read around a batch, because other work of containerd
/// would blur that of a single call.
const BATCH: u32 = 10;

/// Payload of the container that writes a lot: a number of bytes, as the guest's `spam` wants it.
const LOG_BYTES: usize = 50_000_000;

/// Pods at a time.
const PODS: usize = 20;

/// Containers of the Pod that has many.
const CONTAINERS: usize = 4;

/// The node, ready to be measured.
#[derive(Debug)]
pub(crate) struct Bench {
    node: Arc<Node>,
}

impl Bench {
    /// Starts a node.
    ///
    /// # Errors
    /// The harness's.
    pub(crate) async fn start(opts: NodeOpts) -> Result<Self> {
        let node = Node::start(opts).await.context("start a node")?;
        cpu::account(&node)?;
        Ok(Self {
            node: Arc::new(node),
        })
    }

    /// The node.
    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// Takes the node away.
    ///
    /// # Errors
    /// What stays.
    pub(crate) async fn stop(self) -> Result<()> {
        Arc::into_inner(self.node)
            .context("the node is still in use")?
            .stop()
            .await
    }

    /// Notes what went wrong, if something did, and takes away what it has left, so that the next
    /// side finds an empty node.
    ///
    /// # Errors
    /// When the node cannot be emptied, and measuring on it makes no sense any more.
    pub(crate) async fn settle(
        &self,
        side: Side,
        what: &str,
        done: Result<()>,
        results: &mut Results,
    ) -> Result<()> {
        results.note(side, what, done);
        self.node.remove_all_pods().await.context("empty the node")
    }

    /// One Pod with one container: up, used, down.
    ///
    /// # Errors
    /// What failed.
    pub(crate) async fn lifecycle(&self, side: Side, results: &mut Results) -> Result<()> {
        let node = self.node();
        let mut add = |figure: &figures::Figure, sample| results.add(side, figure, sample);

        let timer = Timer::start(node)?;
        let pod = node.pod(side.handler()).run().await?;
        add(&figures::RUNP, timer.wall());
        add(&figures::RUNP_CPU, timer.cpu(node)?);

        let timer = Timer::start(node)?;
        let container = pod.script(IDLE).start().await?;
        add(&figures::CREATE_START, timer.wall());
        first_output(&container).await?;
        add(&figures::FIRST_OUTPUT, timer.wall());
        add(&figures::CREATE_START_CPU, timer.cpu(node)?);

        sleep(REST).await;
        let layer = Layer::of(node);
        ensure!(!layer.shims.is_empty(), "no shim is to be seen");
        let memory = layer.memory();
        add(&figures::RSS, memory.rss);
        add(&figures::PSS, memory.pss);
        add(&figures::ANON, memory.anonymous);
        add(&figures::SATELLITES, layer.satellites.len() as f64);

        for _ in 0..2 {
            let batch = Timer::start(node)?;
            for _ in 0..BATCH {
                let exec = Timer::start(node)?;
                let ran = container.exec(["true"]).await?;
                ensure!(
                    ran.code == 0,
                    "`true` ended with {}: {}",
                    ran.code,
                    ran.stderr
                );
                add(&figures::EXEC, exec.wall());
            }
            add(&figures::EXEC_CPU, batch.cpu(node)? / f64::from(BATCH));
        }
        add(&figures::RSS_EXECS, Layer::of(node).memory().rss);
        for _ in 0..2 {
            let batch = Timer::start(node)?;
            for _ in 0..BATCH {
                let stats = Timer::start(node)?;
                container.stats().await?;
                add(&figures::STATS, stats.wall());
            }
            add(&figures::STATS_CPU, batch.cpu(node)? / f64::from(BATCH));
        }

        let timer = Timer::start(node)?;
        container.stop(0).await?;
        add(&figures::STOP, timer.wall());
        container.remove().await?;
        pod.stop().await?;
        remove(&pod).await?;
        add(&figures::TEARDOWN, timer.wall());
        node.expect_gone(pod.id()).await?;
        add(&figures::TEARDOWN_CPU, timer.cpu(node)?);
        Ok(())
    }

    /// A container that writes a lot.
    ///
    /// # Errors
    /// What failed, or what is missing in the log.
    pub(crate) async fn log(&self, side: Side, results: &mut Results) -> Result<()> {
        let node = self.node();
        let pod = node.pod(side.handler()).run().await?;
        // The pause keeps the start of the container out of what is measured.
        let script = format!("echo {READY}; sleep 2; exec spam {LOG_BYTES}");
        let container = pod.script(&script).image(GUEST).start().await?;
        first_output(&container).await?;
        let shims = Layer::of(node).shims;
        let shims_used = || shims.iter().map(cpu::of_process).sum::<Result<f64>>();
        let (timer, before) = (Timer::start(node)?, shims_used()?);
        let code = container.exit_code().await?;
        ensure!(
            code == 0,
            "`spam` ended with {code}: {}",
            container.log_stream("stderr")
        );
        results.add(side, &figures::LOG_CPU, timer.cpu(node)?);
        // The Go shim of a container outlives it until the container is removed.
        results.add(side, &figures::LOG_SHIM_CPU, shims_used()? - before);
        let logged = container.log().len();
        let expected = READY.len() + 1 + LOG_BYTES;
        // Bytes are counted with the newline that the log adds to a last line without one.
        ensure!(
            (expected..=expected + 1).contains(&logged),
            "{logged} of {expected} bytes are in the log"
        );
        Ok(())
    }

    /// A Pod with several containers, idle and with an exec in flight.
    ///
    /// # Errors
    /// What failed.
    pub(crate) async fn containers(&self, side: Side, results: &mut Results) -> Result<()> {
        let node = self.node();
        let pod = node.pod(side.handler()).run().await?;
        let mut containers = Vec::new();
        for _ in 0..CONTAINERS {
            let container = pod.script(IDLE).start().await?;
            first_output(&container).await?;
            containers.push(container);
        }
        sleep(REST).await;
        results.add(side, &figures::RSS_4CTR, Layer::of(node).memory().rss);
        let container = containers.first().context("no container")?;
        let (ran, (layer, memory)) = tokio::join!(container.exec(["sleep", "3"]), async {
            sleep(REST * 2).await;
            let layer = Layer::of(node);
            let memory = layer.memory();
            (layer, memory)
        });
        ensure!(ran?.code == 0, "`sleep` failed");
        results.add(side, &figures::RSS_IN_EXEC, memory.rss);
        results.add(
            side,
            &figures::SATELLITES_IN_EXEC,
            layer.satellites.len() as f64,
        );
        Ok(())
    }

    /// Many Pods at the same time.
    ///
    /// # Errors
    /// The first Pod that failed.
    pub(crate) async fn parallel(&self, side: Side, results: &mut Results) -> Result<()> {
        let start = Instant::now();
        let mut starting = JoinSet::new();
        for _ in 0..PODS {
            let node = Arc::clone(&self.node);
            starting.spawn(async move {
                let pod = node.pod(side.handler()).run_cold_or_warm().await?;
                let container = pod.script(IDLE).start().await?;
                first_output(&container).await?;
                anyhow::Ok(pod.id().to_owned())
            });
        }
        let pods = starting
            .join_all()
            .await
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let up = start.elapsed();
        sleep(REST).await;
        let memory = Layer::of(&self.node).memory();

        let start = Instant::now();
        let mut ending = JoinSet::new();
        for pod in pods {
            let node = Arc::clone(&self.node);
            ending.spawn(async move { node.remove_pod(&pod).await });
        }
        ending
            .join_all()
            .await
            .into_iter()
            .collect::<Result<()>>()?;
        results.add(side, &figures::PARALLEL_UP, up.as_secs_f64());
        results.add(side, &figures::PARALLEL_DOWN, start.elapsed().as_secs_f64());
        results.add(side, &figures::PARALLEL_MEM, memory.pss);
        Ok(())
    }
}

/// Waits for the first line in the container's log.
///
/// # Errors
/// When it does not come.
pub(crate) async fn first_output(container: &Container<'_, '_>) -> Result<()> {
    let start = Instant::now();
    while !container.log().contains(READY) {
        ensure!(
            start.elapsed() < FIRST_OUTPUT,
            "no output after {} s",
            FIRST_OUTPUT.as_secs()
        );
        sleep(LOOK).await;
    }
    Ok(())
}

/// Removes a Pod that is stopped.
///
/// # Errors
/// containerd's.
pub(crate) async fn remove(pod: &Pod<'_>) -> Result<()> {
    let request = v1::RemovePodSandboxRequest {
        pod_sandbox_id: pod.id().to_owned(),
    };
    pod.node()
        .cri()
        .runtime()
        .remove_pod_sandbox(request)
        .await
        .context("remove the Pod")?;
    Ok(())
}

/// Wall and CPU time since its start, in milliseconds.
struct Timer {
    start: Instant,
    cpu: f64,
}

impl Timer {
    fn start(node: &Node) -> Result<Self> {
        let cpu = cpu::used(node)?;
        Ok(Self {
            start: Instant::now(),
            cpu,
        })
    }

    fn wall(&self) -> f64 {
        self.start.elapsed().as_secs_f64() * 1e3
    }

    fn cpu(&self, node: &Node) -> Result<f64> {
        Ok(cpu::used(node)? - self.cpu)
    }
}
