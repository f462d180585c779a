// SPDX-License-Identifier: Apache-2.0

//! The second half of `make bench-warm`: from a Pod that is applied to a Kubernetes of one node to
//! the first output of its container, for Pods that adopt a warm sandbox, that boot their own, and
//! that gVisor's Go shim runs, in turns. Adds its figure to `target/bench/warm.json`.

#![forbid(unsafe_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{core::v1::Pod, node::v1::RuntimeClass};
use kiln_cluster::{
    cluster::{Private, replace_line},
    system::System,
};
use kiln_tests::{
    bench::{self, Samples, file, ms, print, progress, save},
    tools, wait,
};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::time::sleep;

/// Rounds, of which medians are taken. The first of each side pulls images and does not count.
const ROUNDS: usize = 11;

/// Who is compared, each with its RuntimeClass.
const SIDES: [(&str, &str); 3] = [
    ("warm", "gvisor"),
    ("cold", "gvisor-cold"),
    ("go_shim", "runsc-go"),
];

/// How many sandboxes the agent holds.
const WARM: u32 = 2;

const FIGURE: &str = "apply_first_output_ms";

/// Longest wait for an output, and for the end of a Pod.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    bench::end("kiln-bench-apply", run().await)
}

async fn run() -> Result<()> {
    let cluster = Private::start(&tools::ours("kiln-cluster")?).await?;
    let measured = measure(&cluster).await;
    cluster.end().await.context("end the cluster")?;
    let row = measured?.row(FIGURE);
    print(std::slice::from_ref(&row));
    let file = file("warm")?;
    let mut rows: Vec<Value> = match fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).context("read the other figures")?,
        Err(_) => Vec::new(),
    };
    rows.retain(|row| row["figure"] != FIGURE);
    rows.push(row);
    save(&file, &rows)
}

async fn measure(cluster: &Private) -> Result<Samples> {
    let client = cluster.cluster().client().await?;
    add_handlers(cluster, &client).await?;
    let agent = format!("[[class]]\nname = \"gvisor\"\nwarm = {WARM}\n");
    let system = System::enable(cluster, &agent).await?;
    let mut samples = Samples::default();
    for round in 0..=ROUNDS {
        for (side, class) in SIDES {
            // So that no boot runs beside what is measured.
            system.agent.expect_ready(WARM).await?;
            let took = first_output(cluster, &client, class, round).await?;
            if round > 0 {
                samples.add(FIGURE, side, ms(took));
            }
        }
        progress(&format!("round {round} of {ROUNDS}"));
    }
    let adopted = system.agent.adopted().await?;
    ensure!(
        usize::try_from(adopted)? > ROUNDS,
        "only {adopted} Pods have adopted a sandbox\n{}",
        system.agent.log()
    );
    system.end().await?;
    Ok(samples)
}

/// The handlers that the cluster does not have: ours without an agent, and the Go shim's. The
/// handler `gvisor` of the cluster is the warm one.
async fn add_handlers(cluster: &Private, client: &Client) -> Result<()> {
    let etc = cluster.cluster().dir().join("etc");
    let warm = fs::read_to_string(etc.join("runsc.toml")).context("read runsc.toml")?;
    // As nodes have it that are not for many idle Pods; the Go shim cannot do otherwise.
    let warm = replace_line(&warm, "timer_slack_us = ", "timer_slack_us = 0")?;
    let cold = replace_line(&warm, "agent = ", "agent = \"\"")?;
    fs::write(etc.join("runsc.toml"), warm)?;
    let go = format!(
        "binary_name = \"{}\"\nroot = \"{}\"\n[runsc_config]\nplatform = \"systrap\"\n",
        tools::runsc()?.display(),
        cluster.cluster().dir().join("runsc-go").display(),
    );
    let mut drop_in = fs::read_to_string(etc.join("kiln.toml")).context("read kiln.toml")?;
    let bin = cluster.cluster().dir().join("bin");
    for (name, kind, shim, config) in [
        (
            "gvisor-cold",
            "kiln.v2",
            bin.join("containerd-shim-kiln-v2"),
            cold,
        ),
        (
            "runsc-go",
            "runsc.v1",
            tools::program("containerd-shim-runsc-v1")?,
            go,
        ),
    ] {
        let file = etc.join(format!("{name}.toml"));
        fs::write(&file, config)?;
        drop_in += &handler(name, kind, &shim, &file);
    }
    fs::write(etc.join("kiln.toml"), drop_in)?;
    cluster.run("restart-containerd").await?;
    let classes: Api<RuntimeClass> = Api::all(client.clone());
    for name in ["gvisor-cold", "runsc-go"] {
        let class = json!({"metadata": {"name": name}, "handler": name});
        let class = serde_json::from_value(class)?;
        classes.create(&PostParams::default(), &class).await?;
    }
    Ok(())
}

fn handler(name: &str, kind: &str, shim: &Path, config: &Path) -> String {
    format!(
        "\n[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{name}]\n\
         runtime_type = \"io.containerd.{kind}\"\nruntime_path = {shim:?}\n\
         [plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.{name}.options]\n\
         TypeUrl = \"io.containerd.runsc.v1.options\"\nConfigPath = {config:?}\n"
    )
}

/// Applies a Pod, and returns after which time its output is in the node's log of it. The Pod is
/// gone then.
async fn first_output(
    cluster: &Private,
    client: &Client,
    class: &str,
    round: usize,
) -> Result<Duration> {
    // kubelet keeps the logs of a Pod for a while after its end.
    let name = format!("bench-{class}-{round}");
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "runtimeClassName": class, "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": false,
            "containers": [{
                "name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", "echo ready; exec sleep 1000000"],
            }],
        },
    });
    let begun = Instant::now();
    pods.patch(&name, &PatchParams::apply("bench"), &Patch::Apply(pod))
        .await?;
    let logs = cluster.cluster().dir().join("log/pods");
    while !has_output(&logs, &name) {
        ensure!(
            begun.elapsed() < PATIENCE,
            "no output of {name}\n{}",
            cluster.log()
        );
        sleep(Duration::from_millis(2)).await;
    }
    let took = begun.elapsed();
    pods.delete(&name, &DeleteParams::default().grace_period(0))
        .await?;
    wait::until("the end of the Pod", PATIENCE, async || {
        pods.get_opt(&name).await.ok()?.is_none().then_some(())
    })
    .await?;
    Ok(took)
}

/// Where kubelet has a Pod's logs written: `NAMESPACE_NAME_UID`.
fn log_dir(logs: &Path, pod: &str) -> Option<PathBuf> {
    let start = format!("default_{pod}_");
    let mut entries = fs::read_dir(logs).ok()?.flatten();
    let found = entries.find(|e| e.file_name().to_string_lossy().starts_with(&start));
    found.map(|entry| entry.path())
}

fn has_output(logs: &Path, pod: &str) -> bool {
    let log = log_dir(logs, pod).and_then(|dir| fs::read_to_string(dir.join("c/0.log")).ok());
    log.is_some_and(|text| text.contains("ready"))
}
