// SPDX-License-Identifier: Apache-2.0

//! How fast claims get their Sandboxes, and what that costs.
//!
//! One apiserver for all; Pods are ready at once, so that the controller is what is measured.
//! With `$KILN_UPSTREAM_CONTROLLER`, upstream's controller takes turns with ours. The medians go
//! to `target/bench/claims.json`.

#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, HashMap},
    io::Write as _,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_cluster::{
    control_plane::ControlPlane,
    controller::{self, Controller},
    standin::Standin,
};
use kiln_crds::{Sandbox, SandboxClaim, SandboxTemplate, SandboxWarmPool};
use kiln_tests::{
    bench::{file, median, ms, progress, save},
    wait,
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// Claims one after the other, and at once.
const SINGLE: usize = 100;
const BURST: usize = 200;
/// Sandboxes at which memory is read.
const MANY: i32 = 1_000;
/// Rounds of each controller.
const ROUNDS: usize = 3;
/// Clients that make a burst.
const CLIENTS: usize = 32;
/// Objects that another tenant makes at once, and claims of ours that come beside them.
const FLOOD: usize = 5_000;
const BESIDE: usize = 40;
/// Writes per second of a cluster in which nothing is left to do.
const IDLE: u64 = 20;
/// How long a pool may take to fill, and a flood to be worked off.
const FILLS: Duration = Duration::from_secs(180);

#[tokio::main]
async fn main() -> Result<()> {
    let upstream = std::env::var_os("KILN_UPSTREAM_CONTROLLER").map(PathBuf::from);
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for round in 1..=ROUNDS {
        progress(&format!("round {round} of {ROUNDS}"));
        ours.push(measure(None).await?);
        if let Some(program) = &upstream {
            theirs.push(measure(Some(program)).await?);
        }
    }
    report(&ours, &theirs)
}

/// The figures of one run, by name, with their units.
type Figures = Vec<(String, &'static str, f64)>;

async fn measure(program: Option<&Path>) -> Result<Figures> {
    let plane = ControlPlane::start().await?;
    let _standin = Standin::start(plane.client());
    let controller = match program {
        Some(program) => {
            // In which it keeps the certificates of its webhooks.
            let words = ["create", "namespace", "agent-sandbox-system"];
            plane.kubectl(&words).await?;
            Controller::start_program(&plane, program, &[]).await?
        }
        None => Controller::start_program(&plane, &controller::program()?, &[]).await?,
    };
    let figures = measure_one(&plane, &controller).await;
    let figures = figures.with_context(|| controller.log())?;
    for (name, unit, value) in &figures {
        progress(&format!("{name} {value:.2} {unit}"));
    }
    plane.stop()?;
    Ok(figures)
}

async fn measure_one(plane: &ControlPlane, controller: &Controller) -> Result<Figures> {
    let namespace = plane.namespace("bench").await?;
    let bench = Bench::new(plane.client(), &namespace);
    bench.pool(20).await?;
    let writes = writes(controller).await?;
    let mut single = bench.one_by_one().await?;
    bench.filled(20).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let spent = self::writes(controller).await?.since(&writes);
    single.sort_by(f64::total_cmp);
    progress(&format!("one by one:\n{}", spent.text()));

    let size = i32::try_from(BURST)?;
    bench.scale(size).await?;
    let before = self::writes(controller).await?;
    let burst = bench.burst().await?;
    let during = self::writes(controller).await?.since(&before);
    progress(&format!("burst:\n{}", during.text()));
    let start = Instant::now();
    bench.refilled(BURST).await?;
    let refill = start.elapsed();
    bench.end_burst().await?;
    // With the Sandboxes of the single claims, which stay.
    bench.scale(MANY - i32::try_from(SINGLE)?).await?;
    let memory = controller.memory()?;
    let mut figures = [
        ("claim_ready_p50_ms", "ms", percentile(&single, 50)),
        ("claim_ready_p99_ms", "ms", percentile(&single, 99)),
        ("claims_per_s", "1/s", count(BURST) / burst.as_secs_f64()),
        ("replenish_ms", "ms", ms(refill)),
        (
            "controller_rss_mb",
            "MB",
            count(usize::try_from(memory >> 10)?) / 1024.0,
        ),
    ]
    .map(|(name, unit, value)| (name.to_owned(), unit, value))
    .to_vec();
    if spent.total() > 0.0 {
        let name = "requests_per_claim".to_owned();
        figures.push((name, "", spent.total() / count(SINGLE)));
    }
    for (request, number) in spent.0 {
        let name = format!("- {request}");
        figures.push((name, "", number.requests / count(SINGLE)));
    }
    figures.extend(beside_floods(plane, controller).await?);
    Ok(figures)
}

/// What another tenant makes thousands of at once.
#[derive(Clone, Copy)]
enum Flood {
    Claims,
    Pools,
    Templates,
}

/// Measures claims of one tenant alone, and while another has a backlog of thousands of objects. Making
/// these objects is not measured, as no controller can slow down a tenant's own requests: it is stopped
/// meanwhile. The backlog of one flood is worked off before the next.
async fn beside_floods(plane: &ControlPlane, controller: &Controller) -> Result<Figures> {
    let bench = Bench::new(plane.client(), &plane.namespace("other").await?);
    bench.pool(20).await?;
    bench.idle().await?;
    let alone = bench.beside("alone").await?;
    let mut parts = Vec::new();
    for (flood, name) in [
        (Flood::Claims, "claims"),
        (Flood::Pools, "pools"),
        (Flood::Templates, "templates"),
    ] {
        let tenant = Bench::new(plane.client(), &plane.namespace("flood").await?);
        bench.idle().await?;
        controller.signal(Signal::SIGSTOP)?;
        let made = tenant.flood(flood).await;
        controller.signal(Signal::SIGCONT)?;
        made?;
        parts.push((format!("- beside {name}"), "ms", bench.beside(name).await?));
    }
    let worst = parts.iter().map(|(.., ms)| *ms).fold(alone, f64::max);
    let mut figures = vec![
        ("claim_ready_without_flood_ms".to_owned(), "ms", alone),
        ("claim_ready_beside_flood_ms".to_owned(), "ms", worst),
    ];
    figures.extend(parts);
    Ok(figures)
}

/// Requests of one kind, and how long they took in all.
#[derive(Clone, Copy, Default)]
struct Number {
    requests: f64,
    seconds: f64,
}

/// What the controller has written, by verb and kind.
struct Writes(BTreeMap<String, Number>);

impl Writes {
    fn since(self, before: &Self) -> Self {
        let less = |(name, now): (String, Number)| {
            let before = before.0.get(&name).copied().unwrap_or_default();
            let number = Number {
                requests: now.requests - before.requests,
                seconds: now.seconds - before.seconds,
            };
            (name, number)
        };
        let all = self.0.into_iter().map(less);
        Self(all.filter(|(_, n)| n.requests > 0.0).collect())
    }

    fn total(&self) -> f64 {
        self.0.values().map(|n| n.requests).sum()
    }

    /// Each with its mean time.
    fn text(&self) -> String {
        let line = |(name, n): (&String, &Number)| {
            format!(
                "  {name}: {} of {:.1} ms\n",
                n.requests,
                n.seconds / n.requests * 1e3
            )
        };
        self.0.iter().map(line).collect()
    }
}

/// Writes of our controller so far; another does not count them.
async fn writes(controller: &Controller) -> Result<Writes> {
    let mut writes = BTreeMap::<String, Number>::new();
    for line in controller.metrics().await?.lines() {
        let Some((name, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let Some((metric, labels)) = name.split_once('{') else {
            continue;
        };
        let label = |name: &str| {
            let from = labels.split_once(&format!("{name}=\""))?.1;
            from.split_once('"').map(|(value, _)| value)
        };
        let key = || {
            let names = ["verb", "kind", "subresource"].map(|l| label(l).unwrap_or_default());
            names.join(" ").trim_end().to_owned()
        };
        match metric {
            "kiln_controller_writes_total" => {
                writes.entry(key()).or_default().requests = value.parse()?;
            }
            "kiln_controller_write_seconds_sum" => {
                writes.entry(key()).or_default().seconds = value.parse()?;
            }
            _ => {}
        }
    }
    Ok(Writes(writes))
}

struct Bench {
    claims: Api<SandboxClaim>,
    pools: Api<SandboxWarmPool>,
    sandboxes: Api<Sandbox>,
    templates: Api<SandboxTemplate>,
    /// When a claim was seen to be ready.
    ready: Arc<Mutex<HashMap<String, Instant>>>,
    watch: JoinHandle<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Bench {
    fn new(client: Client, namespace: &str) -> Self {
        let claims: Api<SandboxClaim> = Api::namespaced(client.clone(), namespace);
        let ready = Arc::default();
        Self {
            watch: tokio::spawn(follow(claims.clone(), Arc::clone(&ready))),
            claims,
            pools: Api::namespaced(client.clone(), namespace),
            sandboxes: Api::namespaced(client.clone(), namespace),
            templates: Api::namespaced(client, namespace),
            ready,
        }
    }

    async fn pool(&self, replicas: i32) -> Result<()> {
        let template = json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxTemplate",
            "metadata": {"name": "t"},
            "spec": {"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}},
        });
        let pool = json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": "p"},
            "spec": {"replicas": replicas, "sandboxTemplateRef": {"name": "t"}},
        });
        let params = PostParams::default();
        self.templates
            .create(&params, &serde_json::from_value(template)?)
            .await?;
        self.pools
            .create(&params, &serde_json::from_value(pool)?)
            .await?;
        self.filled(replicas).await
    }

    async fn scale(&self, replicas: i32) -> Result<()> {
        let patch = json!({"spec": {"replicas": replicas}});
        self.pools
            .patch("p", &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        self.filled(replicas).await
    }

    async fn filled(&self, replicas: i32) -> Result<()> {
        wait::until("a full pool", FILLS, async || {
            let status = self.pools.get("p").await.ok()?.status?;
            (status.ready_replicas == replicas && status.replicas == replicas).then_some(())
        })
        .await
    }

    /// Waits until a pool holds so many Sandboxes that are ready: its status says so later.
    async fn refilled(&self, replicas: usize) -> Result<()> {
        wait::until("a full pool", FILLS, async || {
            let all = self.sandboxes.list(&ListParams::default()).await.ok()?;
            let pools = all.iter().filter(|s| is_pools(s));
            let ready = pools.filter_map(|s| s.status.as_ref());
            let ready = ready.filter(|s| is_ready(&s.conditions)).count();
            (ready == replicas).then_some(())
        })
        .await
    }

    /// Waits until nothing is left to do: resource versions count the writes of a whole cluster.
    async fn idle(&self) -> Result<()> {
        let mut last = 0;
        wait::until("an idle cluster", FILLS, async || {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let list = self
                .pools
                .list(&ListParams::default().limit(1))
                .await
                .ok()?;
            let now: u64 = list.metadata.resource_version?.parse().ok()?;
            let before = std::mem::replace(&mut last, now);
            (now - before < IDLE).then_some(())
        })
        .await
    }

    async fn claim(&self, name: &str) -> Result<()> {
        let claim: SandboxClaim = serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
            "metadata": {"name": name}, "spec": {"warmPoolRef": {"name": "p"}},
        }))?;
        self.claims.create(&PostParams::default(), &claim).await?;
        Ok(())
    }

    async fn ready_at(&self, name: &str) -> Result<Instant> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let ready = self
                .ready
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get(name)
                .copied();
            if let Some(at) = ready {
                return Ok(at);
            }
            anyhow::ensure!(Instant::now() < deadline, "claim {name} is not ready");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Milliseconds from the request to readiness, of claims that come with pauses.
    async fn one_by_one(&self) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for n in 0..SINGLE {
            let name = format!("single-{n}");
            let start = Instant::now();
            self.claim(&name).await?;
            let ready = self.ready_at(&name).await?;
            times.push(ms(ready.duration_since(start)));
            tokio::time::sleep(Duration::from_millis(100)).await;
            // The pool must not run out, and the cluster not fill up.
            if n % 10 == 9 {
                self.filled(20).await?;
            }
        }
        Ok(times)
    }

    /// The median of milliseconds from the request to readiness, of claims one after the other.
    async fn beside(&self, what: &str) -> Result<f64> {
        let mut times = Vec::new();
        for n in 0..BESIDE {
            let name = format!("{what}-{n}");
            let start = Instant::now();
            self.claim(&name).await?;
            let ready = self.ready_at(&name).await?;
            times.push(ms(ready.duration_since(start)));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        median(&times).context("no claims")
    }

    /// Makes thousands of objects: claims and pools of what is not there, and templates.
    async fn flood(&self, flood: Flood) -> Result<()> {
        let spec =
            json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}});
        let made = stream::iter(0..FLOOD).map(async |n| {
            let metadata = json!({"name": format!("f{n}")});
            let params = PostParams::default();
            match flood {
                Flood::Claims => {
                    let spec = json!({"warmPoolRef": {"name": "none"}});
                    let claim = object("SandboxClaim", &metadata, &spec)?;
                    drop(self.claims.create(&params, &claim).await?);
                }
                Flood::Pools => {
                    let spec = json!({"sandboxTemplateRef": {"name": "none"}});
                    let pool = object("SandboxWarmPool", &metadata, &spec)?;
                    drop(self.pools.create(&params, &pool).await?);
                }
                Flood::Templates => {
                    let template = object("SandboxTemplate", &metadata, &spec)?;
                    drop(self.templates.create(&params, &template).await?);
                }
            }
            anyhow::Ok(())
        });
        made.buffer_unordered(CLIENTS).try_collect().await
    }

    /// Time from the first request to the last readiness.
    async fn burst(&self) -> Result<Duration> {
        let start = Instant::now();
        let names = burst_names();
        let made = stream::iter(&names)
            .map(|name| self.claim(name))
            .buffer_unordered(CLIENTS);
        made.try_collect::<Vec<()>>().await?;
        let mut last = start;
        for name in &names {
            last = last.max(self.ready_at(name).await?);
        }
        Ok(last.duration_since(start))
    }

    async fn end_burst(&self) -> Result<()> {
        for name in burst_names() {
            self.claims.delete(&name, &DeleteParams::default()).await?;
        }
        Ok(())
    }
}

fn object<K: DeserializeOwned>(kind: &str, metadata: &Value, spec: &Value) -> Result<K> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": kind,
        "metadata": metadata, "spec": spec,
    }))?)
}

fn burst_names() -> Vec<String> {
    (0..BURST).map(|n| format!("burst-{n}")).collect()
}

fn is_pools(sandbox: &Sandbox) -> bool {
    let owners = sandbox.owner_references();
    owners.iter().any(|o| o.kind == "SandboxWarmPool")
}

fn is_ready(conditions: &[Condition]) -> bool {
    let mut conditions = conditions.iter();
    conditions.any(|c| c.type_ == "Ready" && c.status == "True")
}

async fn follow(claims: Api<SandboxClaim>, ready: Arc<Mutex<HashMap<String, Instant>>>) {
    let mut events = pin!(watcher(claims, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        let Ok(watcher::Event::Apply(claim) | watcher::Event::InitApply(claim)) = event else {
            continue;
        };
        let status = claim.status.as_ref();
        if status.is_some_and(|s| is_ready(&s.conditions)) {
            let mut ready = ready.lock().unwrap_or_else(PoisonError::into_inner);
            ready.entry(claim.name_any()).or_insert_with(Instant::now);
        }
    }
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted
        .get((last * percent).div_ceil(100))
        .copied()
        .unwrap_or(f64::NAN)
}

fn median_of(runs: &[Figures], figure: &str) -> Option<f64> {
    let values = runs
        .iter()
        .filter_map(|run| Some(run.iter().find(|(name, ..)| name == figure)?.2));
    median(&values.collect::<Vec<_>>())
}

#[expect(clippy::cast_precision_loss, reason = "counts of a bench are small")]
fn count(n: usize) -> f64 {
    n as f64
}

fn report(ours: &[Figures], theirs: &[Figures]) -> Result<()> {
    let first = ours.first().context("no runs")?;
    let mut rows = Vec::new();
    let mut table = format!(
        "{:<30}{:>10}{:>10}{:>8}\n",
        "figure", "ours", "upstream", "ratio"
    );
    for (figure, unit, _) in first {
        let (our, their) = (median_of(ours, figure), median_of(theirs, figure));
        let ratio = our.zip(their).filter(|(_, t)| *t > 0.0).map(|(o, t)| o / t);
        let text = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.2}"));
        table += &format!(
            "{figure:<30}{:>10}{:>10}{:>8}\n",
            text(our),
            text(their),
            text(ratio)
        );
        rows.push(json!({
            "figure": figure, "unit": unit, "ours": our, "upstream": their, "ratio": ratio,
        }));
    }
    save(&file("claims")?, &rows)?;
    std::io::stdout().write_all(table.as_bytes())?;
    Ok(())
}
