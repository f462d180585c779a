// SPDX-License-Identifier: Apache-2.0

//! Sandboxes that are suspended and resumed with their memory.

use std::{fs, path::Path, time::Duration};

use anyhow::{Result, bail, ensure};
use kiln_cluster::{python, system::System};

use crate::env::{Env, NOTHING_WARM, Namespace};

/// How long upstream's client may take for its whole workflow.
const WORKFLOW: Duration = Duration::from_secs(600);

/// Objects that an administrator makes once, and a pool.
const MANIFESTS: &str = "apiVersion: podsnapshot.gke.io/v1
kind: PodSnapshotStorageConfig
metadata: {name: on-the-node}
spec: {snapshotStorageConfig: {local: {}}}
---
apiVersion: podsnapshot.gke.io/v1
kind: PodSnapshotPolicy
metadata: {name: all}
spec:
  storageConfigName: on-the-node
  selector: {matchLabels: {keeps: memory}}
---
apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxTemplate
metadata: {name: kept}
spec:
  podTemplate:
    metadata: {labels: {keeps: memory}}
    spec:
      runtimeClassName: gvisor
      containers:
      - name: runtime
        image: registry.k8s.io/agent-sandbox/python-runtime-sandbox:v0.1.0
        ports: [{containerPort: 8888}]
        readinessProbe: {httpGet: {path: /, port: 8888}, periodSeconds: 1}
        resources: {requests: {cpu: 20m, memory: 64Mi}, limits: {cpu: \"1\", memory: 512Mi}}
---
apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxWarmPool
metadata: {name: kept}
spec: {replicas: 1, sandboxTemplateRef: {name: kept}}
";

/// A Sandbox that counts in memory, and keeps that when it is suspended.
const COUNTS: &str = "apiVersion: agents.x-k8s.io/v1beta1
kind: Sandbox
metadata:
  name: counts
  annotations: {kiln.dev/on-suspend: snapshot}
spec:
  podTemplate:
    spec:
      runtimeClassName: gvisor
      terminationGracePeriodSeconds: 1
      containers:
      - name: counter
        image: busybox:1
        command: [sh, -c, 'n=0; while :; do n=$((n+1)); echo $n > /work/n; sleep 0.1; done']
        volumeMounts: [{name: work, mountPath: /work}]
      volumes: [{name: work, emptyDir: {}}]
";

/// Configuration of an agent that keeps snapshots.
fn keeps_snapshots(env: &Env) -> String {
    let at = |name: &str| env.private.dir().join(name).display().to_string();
    format!(
        "{NOTHING_WARM}[snapshots]\ndir = {:?}\nkubelet_pods = {:?}\nfree = 0\n",
        at("snapshots"),
        env.private.cluster().kubelet_pods().display().to_string(),
    )
}

pub(crate) async fn upstreams_client_suspends_and_resumes(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, &keeps_snapshots(env)).await?;
    let ns = env.namespace().await?;
    ns.apply(MANIFESTS).await?;
    ns.until_field("sandboxwarmpool/kept", ".status.readyReplicas", |n| {
        n == "1"
    })
    .await?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/client_snapshots.py");
    let (kubeconfig, home) = (env.private.cluster().kubeconfig(), env.private.dir());
    let workflow = python::client("1.0.8", &script, &kubeconfig, home)?
        .args([&ns.name, "kept"])
        .netns(&env.private.cluster().netns()?)
        .deadline(WORKFLOW)
        .run()
        .await;
    if let Err(e) = workflow {
        bail!("{e:#}\n{}", explain(&ns, &system).await);
    }
    ensure!(stored(env)? == 0, "files of snapshots are left");
    ns.kubectl([
        "delete",
        "--wait",
        "sandboxwarmpool,sandboxtemplate",
        "--all",
    ])
    .await?;
    system.end().await
}

pub(crate) async fn a_suspended_sandbox_keeps_its_memory(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, &keeps_snapshots(env)).await?;
    keeps_memory(env, system).await
}

pub(crate) async fn an_adopted_sandbox_keeps_its_memory(env: &Env) -> Result<()> {
    let warm = "[[class]]\nname = \"gvisor\"\nwarm = 1\n";
    let config = keeps_snapshots(env) + warm;
    let system = System::enable(&env.private, &config).await?;
    system.agent.expect_ready(1).await?;
    keeps_memory(env, system).await
}

async fn keeps_memory(env: &Env, system: System) -> Result<()> {
    let ns = env.namespace().await?;
    if let Err(e) = suspends_and_resumes(env, &ns).await {
        bail!("{e:#}\n{}", explain(&ns, &system).await);
    }
    system.end().await
}

/// Describes what there is, and what the agent has said.
async fn explain(ns: &Namespace<'_>, system: &System) -> String {
    let objects = [
        "get",
        "-oyaml",
        "sandbox,podsnapshot,podsnapshotmanualtrigger,pod",
    ];
    let objects = ns.kubectl(objects).await.unwrap_or_default();
    format!("{objects}\n{}", system.agent.log())
}

async fn suspends_and_resumes(env: &Env, ns: &Namespace<'_>) -> Result<()> {
    ns.apply(COUNTS).await?;
    ns.until_field("sandbox/counts", READY, |is| is == "True")
        .await?;
    let mut last = 0;
    for _ in 0..2 {
        let before = count_after(ns, last).await?;
        mode(ns, "Suspended").await?;
        ns.until_field("sandbox/counts", &status_of("Suspended"), |is| is == "True")
            .await?;
        ensure!(stored(env)? > 0, "no snapshot is stored");
        mode(ns, "Running").await?;
        ns.until_field("sandbox/counts", READY, |is| is == "True")
            .await?;
        ns.until_field("sandbox/counts", &status_of("MemoryKept"), |is| {
            is == "True"
        })
        .await?;
        last = count_after(ns, before).await?;
        // It went on, and did not begin anew and catch up.
        ensure!(last < before + 100, "it counted from {before} to {last}");
    }
    ns.kubectl(["delete", "--wait", "sandbox/counts"]).await?;
    kiln_tests::wait::until("the files are gone", kiln_tests::wait::SOON, async || {
        (stored(env).ok()? == 0).then_some(())
    })
    .await
}

const READY: &str = ".status.conditions[?(@.type=='Ready')].status";

fn status_of(condition: &str) -> String {
    format!(".status.conditions[?(@.type=='{condition}')].status")
}

async fn mode(ns: &Namespace<'_>, mode: &str) -> Result<()> {
    let patch = format!("{{\"spec\":{{\"operatingMode\":\"{mode}\"}}}}");
    let patch = ["patch", "sandbox/counts", "--type=merge", "-p", &patch];
    ns.kubectl(patch).await.map(drop)
}

/// Waits until the Sandbox has counted to more than `than`, and returns to what.
async fn count_after(ns: &Namespace<'_>, than: u64) -> Result<u64> {
    kiln_tests::wait::until("it counts", kiln_tests::wait::SOON, async || {
        let count = ns.shell("counts", "cat /work/n").await.ok()?;
        count.parse().ok().filter(|n| *n > than)
    })
    .await
}

/// How many snapshots are on the node.
fn stored(env: &Env) -> Result<usize> {
    let entries = fs::read_dir(env.private.dir().join("snapshots"))?;
    Ok(entries.flatten().filter(|e| e.path().is_dir()).count())
}
