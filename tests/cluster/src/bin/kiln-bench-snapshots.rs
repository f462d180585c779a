// SPDX-License-Identifier: Apache-2.0

//! `make bench-snapshots`: what a suspension with memory and a resume cost on a Kubernetes of one
//! node, beside cold starts of the same applications, in turns. The figures are in
//! `target/bench/snapshots.json`.
//!
//! Times of a Sandbox end with the first answer of its application to a client on the node, who asks
//! all the time, or with the Pod's condition Ready.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{core::v1::Pod, node::v1::RuntimeClass};
use kiln_cluster::{
    cluster::{Private, replace_line},
    system::System,
};
use kiln_crds::{PodSnapshot, Sandbox};
use kiln_tests::{
    bench::{self, file, median, ms, progress, save},
    netns::Netns,
    tools, wait,
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Rounds, of which medians are taken. The first does not count.
const ROUNDS: usize = 5;

/// How many sandboxes the agent holds.
const WARM: u32 = 2;

/// Longest wait for one step.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a Sandbox's Pods start, by their RuntimeClass.
const CLASSES: [(&str, &str); 2] = [("warm", "gvisor"), ("cold", "gvisor-cold")];

const IMAGE: &str = "registry.k8s.io/agent-sandbox/python-runtime-sandbox:v0.1.0";

/// The port of the applications.
const PORT: u16 = 8000;

/// An application.
struct Application {
    name: &'static str,
    /// MiB that it fills, a quarter at random.
    heap: u32,
    /// Seconds that it takes to start, busy.
    start: u32,
}

const APPLICATIONS: [Application; 4] = [
    Application {
        name: "small",
        heap: 0,
        start: 0,
    },
    Application {
        name: "100_mb",
        heap: 100,
        start: 0,
    },
    Application {
        name: "500_mb",
        heap: 500,
        start: 0,
    },
    Application {
        name: "slow_start",
        heap: 0,
        start: 5,
    },
];

impl Application {
    fn script(&self) -> String {
        let Self { heap, start, .. } = self;
        format!(
            "import http.server, os, time\n\
             heap = [os.urandom(1 << 18) + b'x' * (3 << 18) for _ in range({heap})]\n\
             end = time.monotonic() + {start}\n\
             while time.monotonic() < end: pass\n\
             class H(http.server.BaseHTTPRequestHandler):\n\
             \x20   def do_GET(self):\n\
             \x20       self.send_response(200)\n\
             \x20       self.end_headers()\n\
             \x20   def log_message(self, *_): pass\n\
             http.server.HTTPServer(('', {PORT}), H).serve_forever()\n"
        )
    }
}

/// Measurements by figure, application and class.
#[derive(Default)]
struct Figures(BTreeMap<(&'static str, &'static str, &'static str), Vec<f64>>);

impl Figures {
    fn median(&self, figure: &'static str, app: &'static str, class: &'static str) -> Option<f64> {
        self.0
            .get(&(figure, app, class))
            .and_then(|all| median(all))
    }

    fn rows(&self) -> Vec<Value> {
        let mut rows = Vec::new();
        for app in APPLICATIONS.map(|app| app.name) {
            let cold_start = self.median("start_first_answer_ms", app, "cold");
            for (class, _) in CLASSES {
                for (figure, of_cold) in [
                    ("start_first_answer_ms", true),
                    ("start_ready_ms", false),
                    ("suspend_ms", false),
                    ("paused_ms", true),
                    ("resume_first_answer_ms", true),
                    ("resume_ready_ms", false),
                    ("image_mb", false),
                ] {
                    let value = self.median(figure, app, class);
                    // Of a Sandbox that starts in a sandbox of its own, and has no memory.
                    let base = match figure {
                        "resume_ready_ms" => self.median("start_ready_ms", app, "cold"),
                        _ => cold_start.filter(|_| of_cold),
                    };
                    rows.push(json!({
                        "figure": figure, "application": app, "class": class, "ours": value,
                        "ratio_to_cold_start": value.zip(base).map(|(value, base)| value / base),
                    }));
                }
            }
        }
        for ((figure, app, class), samples) in &self.0 {
            if *figure == "failed_restores" {
                rows.push(json!({
                    "figure": figure, "application": app, "class": class,
                    "ours": samples.iter().sum::<f64>(),
                }));
            }
        }
        rows
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    bench::end("kiln-bench-snapshots", run().await)
}

async fn run() -> Result<()> {
    let cluster = Private::start(&tools::ours("kiln-cluster")?).await?;
    let measured = measure(&cluster).await;
    let log = cluster.log();
    cluster.end().await.context("end the cluster")?;
    let rows = measured.with_context(|| log)?.rows();
    print(&rows);
    save(&file("snapshots")?, &rows)
}

#[allow(clippy::print_stdout)] // it is what one runs a benchmark for
fn print(rows: &[Value]) {
    println!("{:<12} {:<6} {:<24} {:>9} {:>7}", "", "", "", "", "ratio");
    for row in rows {
        let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let number = |key: &str| {
            row[key]
                .as_f64()
                .map_or_else(String::new, |n| format!("{n:.2}"))
        };
        println!(
            "{:<12} {:<6} {:<24} {:>9} {:>7}",
            text("application"),
            text("class"),
            text("figure"),
            number("ours"),
            number("ratio_to_cold_start")
        );
    }
}

async fn measure(cluster: &Private) -> Result<Figures> {
    let client = cluster.cluster().client().await?;
    add_cold_handler(cluster, &client).await?;
    let system = System::enable(cluster, &agent(cluster)).await?;
    let mut figures = Figures::default();
    for round in 0..=ROUNDS {
        for app in &APPLICATIONS {
            for (class, runtime_class) in CLASSES {
                system.agent.expect_ready(WARM).await?;
                let bench = Bench {
                    client: &client,
                    netns: cluster.cluster().netns()?,
                    name: format!("{}-{class}-{round}", app.name.replace('_', "-")),
                };
                let measured = bench.life(app, runtime_class).await;
                let measured =
                    measured.with_context(|| format!("{}\n{}", bench.name, system.agent.log()))?;
                if round > 0 {
                    for (figure, value) in measured {
                        let samples = figures.0.entry((figure, app.name, class));
                        samples.or_default().push(value);
                    }
                }
            }
        }
        progress(&format!("round {round} of {ROUNDS}"));
    }
    system.end().await?;
    Ok(figures)
}

fn agent(cluster: &Private) -> String {
    let store = cluster.dir().join("snapshots");
    let pods = cluster.cluster().kubelet_pods();
    format!(
        "[snapshots]\ndir = {:?}\nkubelet_pods = {:?}\n[[class]]\nname = \"gvisor\"\nwarm = {WARM}\n",
        store.display().to_string(),
        pods.display().to_string()
    )
}

/// Adds a handler whose Pods ask the agent for snapshots, and get none of its sandboxes.
async fn add_cold_handler(cluster: &Private, client: &Client) -> Result<()> {
    let etc = cluster.cluster().dir().join("etc");
    let config = fs::read_to_string(etc.join("runsc.toml")).context("read runsc.toml")?;
    let config = replace_line(&config, "timer_slack_us = ", "timer_slack_us = 0")?;
    fs::write(etc.join("runsc.toml"), &config)?;
    // A flag that the agent's sandboxes do not have: none of them is of this handler's shape.
    let cold = config.replace(
        "[runsc_config]\n",
        "[runsc_config]\noverlay2 = \"root:self\"\n",
    );
    fs::write(etc.join("cold.toml"), cold)?;
    let mut drop_in = fs::read_to_string(etc.join("kiln.toml")).context("read kiln.toml")?;
    let table = "plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.gvisor-cold";
    drop_in += &format!(
        "\n[{table}]\nruntime_type = \"io.containerd.kiln.v2\"\n\
         pod_annotations = [\"kiln.dev/restore-snapshot\"]\n[{table}.options]\n\
         TypeUrl = \"io.containerd.runsc.v1.options\"\nConfigPath = {:?}\n",
        etc.join("cold.toml")
    );
    fs::write(etc.join("kiln.toml"), drop_in)?;
    cluster.run("restart-containerd").await?;
    let classes: Api<RuntimeClass> = Api::all(client.clone());
    let class = json!({"metadata": {"name": "gvisor-cold"}, "handler": "gvisor-cold"});
    let class = serde_json::from_value(class)?;
    classes.create(&PostParams::default(), &class).await?;
    Ok(())
}

/// A Sandbox that is measured.
struct Bench<'a> {
    client: &'a Client,
    netns: Netns,
    name: String,
}

impl Bench<'_> {
    fn sandboxes(&self) -> Api<Sandbox> {
        Api::default_namespaced(self.client.clone())
    }

    /// Starts, suspends, resumes and deletes it.
    async fn life(&self, app: &Application, class: &str) -> Result<Vec<(&'static str, f64)>> {
        let mut figures = Vec::new();
        let begun = Instant::now();
        let sandbox = serde_json::from_value(self.sandbox(app, class))?;
        self.sandboxes()
            .create(&PostParams::default(), &sandbox)
            .await?;
        let (answer, ready) = self.until_it_answers(begun).await?;
        figures.push(("start_first_answer_ms", ms(answer)));
        figures.push(("start_ready_ms", ms(ready)));

        let begun = Instant::now();
        self.mode("Suspended").await?;
        self.until_condition("Suspended").await?;
        figures.push(("suspend_ms", ms(begun.elapsed())));
        let snapshots: Api<PodSnapshot> = Api::default_namespaced(self.client.clone());
        let snapshots = snapshots.list(&kube::api::ListParams::default()).await?;
        let snapshot = snapshots
            .items
            .into_iter()
            .find(|s| s.spec.sandbox.name == self.name);
        let status = snapshot
            .and_then(|s| s.status)
            .context("no snapshot was taken")?;
        let number = |n: Option<i64>| n.unwrap_or_default() as f64;
        figures.push(("paused_ms", number(status.paused_milliseconds)));
        figures.push(("image_mb", number(status.size_bytes) / 1e6));

        let begun = Instant::now();
        self.mode("Running").await?;
        let (answer, ready) = self.until_it_answers(begun).await?;
        // One that has started cold says nothing about restores, but that it failed.
        let is_restored = self.is_restored().await?;
        figures.push(("failed_restores", f64::from(u8::from(!is_restored))));
        if is_restored {
            figures.push(("resume_first_answer_ms", ms(answer)));
            figures.push(("resume_ready_ms", ms(ready)));
        }
        self.sandboxes()
            .delete(&self.name, &DeleteParams::default())
            .await?;
        wait::until("the end of its Pod", PATIENCE, async || {
            self.pod().await.is_none().then_some(())
        })
        .await?;
        Ok(figures)
    }

    fn sandbox(&self, app: &Application, class: &str) -> Value {
        json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {
                "name": self.name,
                "annotations": {"kiln.dev/on-suspend": "snapshot-required"},
            },
            "spec": {"podTemplate": {"spec": {
                "runtimeClassName": class, "terminationGracePeriodSeconds": 0,
                "automountServiceAccountToken": false,
                "containers": [{
                    "name": "c", "image": IMAGE, "imagePullPolicy": "IfNotPresent",
                    "command": ["python3", "-c", app.script()],
                }],
            }}},
        })
    }

    async fn mode(&self, mode: &str) -> Result<()> {
        let patch = Patch::Merge(json!({"spec": {"operatingMode": mode}}));
        let params = PatchParams::default();
        self.sandboxes().patch(&self.name, &params, &patch).await?;
        Ok(())
    }

    async fn pod(&self) -> Option<Pod> {
        let pods: Api<Pod> = Api::default_namespaced(self.client.clone());
        let pod = pods.get_opt(&self.name).await.ok().flatten()?;
        pod.metadata.deletion_timestamp.is_none().then_some(pod)
    }

    /// Waits until the Pod has answered and is ready, and returns when both were seen.
    async fn until_it_answers(&self, begun: Instant) -> Result<(Duration, Duration)> {
        let (mut answered, mut ready) = (None, None);
        loop {
            let pod = self.pod().await;
            let status = pod.as_ref().and_then(|pod| pod.status.as_ref());
            if let Some(ip) = status.and_then(|s| s.pod_ip.as_ref())
                && answered.is_none()
                && self.answers(SocketAddr::new(ip.parse()?, PORT)).await
            {
                answered = Some(begun.elapsed());
            }
            let conditions = status.and_then(|s| s.conditions.as_ref());
            let is_ready = conditions.into_iter().flatten();
            if ready.is_none()
                && is_ready
                    .into_iter()
                    .any(|c| c.type_ == "Ready" && c.status == "True")
            {
                ready = Some(begun.elapsed());
            }
            if let (Some(answered), Some(ready)) = (answered, ready) {
                return Ok((answered, ready));
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "answered after {answered:?}, ready after {ready:?}: {status:#?}"
            );
            sleep(Duration::from_millis(3)).await;
        }
    }

    async fn answers(&self, address: SocketAddr) -> bool {
        use std::io::{Read as _, Write as _};
        let netns = &self.netns;
        let ask = || {
            let timeout = Duration::from_millis(200);
            let mut stream = std::net::TcpStream::connect_timeout(&address, timeout)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = [0; 12];
            stream.read_exact(&mut answer)?;
            anyhow::Ok(answer.ends_with(b"200"))
        };
        tokio::task::block_in_place(|| netns.run(ask)).unwrap_or(false)
    }

    /// Waits until it is known whether the memory was kept.
    async fn is_restored(&self) -> Result<bool> {
        wait::until("condition MemoryKept", PATIENCE, async || {
            let conditions = self
                .sandboxes()
                .get(&self.name)
                .await
                .ok()?
                .status?
                .conditions;
            let kept = conditions.iter().find(|c| c.type_ == "MemoryKept")?;
            (kept.status != "Unknown").then_some(kept.status == "True")
        })
        .await
    }

    async fn until_condition(&self, name: &str) -> Result<()> {
        wait::until(&format!("condition {name}"), PATIENCE, async || {
            let sandbox = self.sandboxes().get(&self.name).await.ok()?;
            let conditions = sandbox.status?.conditions;
            let is = conditions
                .iter()
                .any(|c| c.type_ == name && c.status == "True");
            is.then_some(())
        })
        .await
    }
}
