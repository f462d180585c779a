// SPDX-License-Identifier: Apache-2.0

//! More claims than there are warm Sandboxes, while the control plane fails.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kiln_cluster::system::System;
use kiln_crds::{Sandbox, SandboxClaim};
use kiln_tests::wait;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::json;

use crate::env::{Env, Namespace, PATIENCE};

const POOL: usize = 20;
/// Claims in all. Each costs this one node a Pod.
const CLAIMS: usize = 100;
/// Claims that are there at the same time.
const CLIENTS: usize = 10;

/// An agent that holds a few of the sandboxes that these Pods ask for.
const AGENT: &str = "overhead = 50331648\n[limits]\nboots = 1\n\
    [[class]]\nname = \"gvisor\"\nwarm = 4\nmemory = 117440512\n";

const MANIFESTS: &str = "apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxTemplate
metadata: {name: burst}
spec:
  podTemplate:
    spec:
      runtimeClassName: gvisor
      terminationGracePeriodSeconds: 0
      containers:
      - name: main
        image: busybox:1
        command: [sleep, \"1000000\"]
        resources: {requests: {cpu: 1m, memory: 8Mi}, limits: {memory: 64Mi}}
---
apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxWarmPool
metadata: {name: burst}
spec: {replicas: 20, sandboxTemplateRef: {name: burst}}
";

/// Each claim gets a Pod that no other has had, and in the end the pool is full again.
pub(crate) async fn claims_outlast_controller_and_apiserver(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, AGENT).await?;
    let ns = env.namespace().await?;
    ns.apply(MANIFESTS).await?;
    let ready = ".status.readyReplicas";
    ns.until_field("sandboxwarmpool/burst", ready, |n| n == POOL.to_string())
        .await?;
    let burst = Burst::new(env, &ns).await?;
    let faults = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let system = system.with_another_controller(&env.private).await?;
        env.private.cluster().restart("kube-apiserver").await?;
        wait::until("the apiserver", PATIENCE, async || {
            burst.pods.list(&ListParams::default()).await.ok().map(drop)
        })
        .await?;
        system.with_another_controller(&env.private).await
    };
    let (served, system) = tokio::try_join!(burst.live(), faults)?;
    let distinct: BTreeSet<_> = served.iter().collect();
    ensure!(distinct.len() == CLAIMS, "{} Pods", distinct.len());
    burst.expect_pods(POOL).await?;
    ns.until_field("sandboxwarmpool/burst", ready, |n| n == POOL.to_string())
        .await?;
    ns.kubectl(["delete", "--all", "sandboxwarmpool,sandboxtemplate"])
        .await?;
    burst.expect_pods(0).await?;
    system.end().await
}

/// What the claims of a namespace are about.
struct Burst {
    claims: Api<SandboxClaim>,
    sandboxes: Api<Sandbox>,
    pods: Api<Pod>,
}

impl Burst {
    async fn new(env: &Env, ns: &Namespace<'_>) -> Result<Self> {
        let client = env.private.cluster().client().await?;
        Ok(Self {
            claims: Api::namespaced(client.clone(), &ns.name),
            sandboxes: Api::namespaced(client.clone(), &ns.name),
            pods: Api::namespaced(client, &ns.name),
        })
    }

    /// Has all claims served, a few at a time, and returns the uids of their Pods.
    async fn live(&self) -> Result<Vec<String>> {
        let lives = stream::iter(0..CLAIMS).map(|n| async move {
            let claim = format!("claim-{n}");
            self.life(&claim).await.context(claim)
        });
        lives.buffer_unordered(CLIENTS).try_collect().await
    }

    /// One claim from its start to its end. Requests are made again until they are answered.
    async fn life(&self, name: &str) -> Result<String> {
        let claim: SandboxClaim = serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
            "metadata": {"name": name},
            "spec": {"warmPoolRef": {"name": "burst"}},
        }))?;
        wait::until("to be made", PATIENCE, async || {
            let made = self.claims.create(&PostParams::default(), &claim).await;
            is_done(&made, 409).then_some(())
        })
        .await?;
        let sandbox = wait::until("to be ready", PATIENCE, async || {
            let status = self.claims.get(name).await.ok()?.status?;
            let mut conditions = status.conditions.iter();
            let is_ready = conditions.any(|c| c.type_ == "Ready" && c.status == "True");
            is_ready.then_some(status.sandbox?.name?)
        })
        .await?;
        let pod = wait::until("to have a Pod", PATIENCE, async || {
            let pods = self.pods.list(&ListParams::default()).await.ok()?;
            let mut pods = pods.items.into_iter();
            pods.find(|p| owner(p).as_deref() == Some(sandbox.as_str()))
        })
        .await?;
        expect_on_gvisor(&pod)?;
        wait::until("to go", PATIENCE, async || {
            let gone = self.claims.delete(name, &DeleteParams::default()).await;
            is_done(&gone, 404).then_some(())
        })
        .await?;
        pod.uid().context("a Pod without a uid")
    }

    /// Waits until there are so many Pods, and as many Sandboxes.
    async fn expect_pods(&self, count: usize) -> Result<()> {
        wait::until(&format!("{count} Pods"), PATIENCE, async || {
            let pods = self.pods.list(&ListParams::default()).await.ok()?;
            let sandboxes = self.sandboxes.list(&ListParams::default()).await.ok()?;
            (pods.items.len() == count && sandboxes.items.len() == count).then_some(())
        })
        .await
    }
}

/// Whether a request has done its work: now, or before, when its answer was lost.
fn is_done<T>(answer: &kube::Result<T>, before: u16) -> bool {
    match answer {
        Ok(_) => true,
        Err(kube::Error::Api(status)) => status.code == before,
        Err(_) => false,
    }
}

fn expect_on_gvisor(pod: &Pod) -> Result<()> {
    let class = pod
        .spec
        .as_ref()
        .and_then(|s| s.runtime_class_name.as_deref());
    let status = pod.status.as_ref().context("no status")?;
    let runs = status.phase.as_deref() == Some("Running");
    ensure!(
        runs && class == Some("gvisor"),
        "{}: {class:?}, {status:?}",
        pod.name_any()
    );
    Ok(())
}

/// The Sandbox that a Pod is of.
fn owner(pod: &Pod) -> Option<String> {
    let owners = pod.metadata.owner_references.as_deref()?;
    let owner = owners.iter().find(|o| o.controller == Some(true))?;
    Some(owner.name.clone())
}
