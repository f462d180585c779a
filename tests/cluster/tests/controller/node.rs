// SPDX-License-Identifier: Apache-2.0

//! What nodes hold ready below the Pods. The cases speak for the agents of nodes.

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    core::v1::{Pod, ResourceQuota},
    node::v1::RuntimeClass,
};
use kiln_crds::{NodeClassStatus, NodeTotal, Sandbox, SandboxNode, SandboxWarmPool};
use kiln_tests::wait;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::env::{Env, Namespace, line, same};

/// A case's own class, and its nodes.
struct Fleet {
    class: String,
    classes: Api<RuntimeClass>,
    nodes: Api<SandboxNode>,
    names: Vec<String>,
}

impl Fleet {
    async fn new(env: &Env, ns: &Namespace<'_>) -> Result<Self> {
        let class = format!("warm-{}", ns.name);
        let classes: Api<RuntimeClass> = Api::all(env.plane.client());
        let object = json!({"metadata": {"name": class}, "handler": "none"});
        classes
            .create(&PostParams::default(), &serde_json::from_value(object)?)
            .await?;
        Ok(Self {
            class,
            classes,
            nodes: Api::all(env.plane.client()),
            names: Vec::new(),
        })
    }

    /// A node whose agent has reported `held` so many seconds ago.
    async fn node(&mut self, name: &str, age: i64, held: &[NodeClassStatus]) -> Result<String> {
        let name = format!("{name}-{}", self.class);
        let node = SandboxNode::new(&name, Default::default());
        self.nodes.create(&PostParams::default(), &node).await?;
        self.names.push(name.clone());
        self.report(&name, age, held).await?;
        Ok(name)
    }

    /// Reports as an agent does.
    async fn report(&self, name: &str, age: i64, held: &[NodeClassStatus]) -> Result<()> {
        let heartbeat = Timestamp::now() - SignedDuration::from_secs(age);
        let status = json!({
            "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": name},
            "status": {
                "heartbeat": format!("{heartbeat:.0}"),
                "runtimeVersions": {&self.class: "release-1"},
                "classes": held,
                "total": NodeTotal::of(held),
                "conditions": [{
                    "type": "Ready", "status": "True", "reason": "SandboxesBoot", "message": "",
                    "lastTransitionTime": format!("{heartbeat:.0}"),
                }],
            },
        });
        let agent = PatchParams::apply("kiln-node-agent").force();
        self.nodes
            .patch_status(name, &agent, &Patch::Apply(status))
            .await?;
        Ok(())
    }

    fn held(&self, ready: i32, room: i32) -> NodeClassStatus {
        NodeClassStatus {
            class: self.class.clone(),
            memory_bytes: 64 << 20,
            ready,
            room,
            ..NodeClassStatus::default()
        }
    }

    /// Fields of a template of the class.
    fn template(&self) -> Value {
        let limits = json!({"memory": "64Mi", "cpu": "500m"});
        let container = json!({"name": "main", "image": "pause", "resources": {"limits": limits}});
        json!({"podTemplate": {"spec": {"runtimeClassName": self.class, "containers": [container]}}})
    }

    /// The wishes of all nodes: memory, CPUs and number of each.
    async fn wishes(&self) -> Result<Vec<Vec<(i64, i64, i32)>>> {
        let mut all = Vec::new();
        for name in &self.names {
            let classes = self.nodes.get(name).await?.spec.classes;
            ensure!(classes.iter().all(|c| c.class == self.class), "{classes:?}");
            let wish = |c: &kiln_crds::NodeClassSpec| (c.memory_bytes, c.cpu_milli, c.warm);
            all.push(classes.iter().map(wish).collect());
        }
        Ok(all)
    }

    async fn until_wishes(&self, warm: &[i32]) -> Result<()> {
        let mut found = Vec::new();
        let is = wait::until("the wishes of nodes", wait::SOON, async || {
            found = self.wishes().await.ok()?;
            let mut counts: Vec<i32> = found.iter().flatten().map(|wish| wish.2).collect();
            counts.sort_unstable();
            let shape = |wish: &(i64, i64, i32)| (wish.0, wish.1) == (64 << 20, 500);
            (counts == warm && found.iter().flatten().all(shape)).then_some(())
        });
        is.await.with_context(|| format!("{found:?}, not {warm:?}"))
    }

    async fn clean(self) -> Result<()> {
        for name in &self.names {
            self.nodes.delete(name, &DeleteParams::default()).await?;
        }
        self.classes
            .delete(&self.class, &DeleteParams::default())
            .await?;
        Ok(())
    }
}

pub(crate) async fn nodes_are_asked_for_what_pools_and_claims_need(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let mut fleet = Fleet::new(env, &ns).await?;
    let first = fleet.node("a", 0, &[]).await?;
    fleet.node("b", 0, &[]).await?;
    let silent = fleet.node("silent", 600, &[]).await?;
    ns.template("t", fleet.template()).await?;
    ns.pool("p", "t", 6).await?;
    // Two for a quiet pool of six, one on each node that reports.
    fleet.until_wishes(&[1, 1]).await?;
    // Somebody else's wish stays, and is not fought about.
    let theirs = json!({
        "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
        "spec": {"classes": [{"class": fleet.class, "memoryBytes": 64 << 20, "cpuMilli": 500, "warm": 1}]},
    });
    let operator = PatchParams::apply("operator").force();
    fleet
        .nodes
        .patch(&first, &operator, &Patch::Apply(theirs))
        .await?;
    let before = fleet.nodes.get(&first).await?.metadata.generation;
    let start = std::time::Instant::now();
    // All at once: claims that come slowly are no burst.
    let names: Vec<String> = (0..5).map(|n| format!("c{n}")).collect();
    try_join_all(names.iter().map(|name| ns.claim(name, "p"))).await?;
    ns.all_claimed(&names).await?;
    fleet.until_wishes(&[2, 3]).await?;
    let writes = fleet
        .nodes
        .get(&first)
        .await?
        .metadata
        .generation
        .zip(before);
    let writes = writes.map_or(0, |(now, before)| now - before);
    let seconds = i64::try_from(start.elapsed().as_secs())?;
    ensure!(writes <= seconds + 1, "{writes} writes in {seconds} s");
    let node = fleet.nodes.get(&first).await?;
    let managers: Vec<&str> = node
        .managed_fields()
        .iter()
        .filter_map(|f| f.manager.as_deref())
        .collect();
    for manager in ["kiln-controller", "kiln-node-agent"] {
        ensure!(managers.contains(&manager), "{managers:?}");
    }
    ensure!(node.status.is_some_and(|s| s.heartbeat.is_some()));
    same(
        "the wish of a silent node",
        &fleet.nodes.get(&silent).await?.spec.classes.len(),
        &0,
    )?;
    // Heard again it takes its share, whatever its clock says.
    fleet.report(&silent, 500, &[]).await?;
    fleet.until_wishes(&[1, 2, 2]).await?;
    fleet.clean().await
}

/// A namespace whose pools ask for more than there is, and have no Pods or many, takes from nobody.
pub(crate) async fn room_is_for_what_runs_and_is_shared_between_namespaces(
    env: &Env,
) -> Result<()> {
    let modest = env.namespace().await?;
    let greedy = env.namespace().await?;
    let mut fleet = Fleet::new(env, &modest).await?;
    let node = fleet.node("a", 0, &[fleet.held(0, 4)]).await?;
    let counts = async || -> Result<Vec<(i64, i32)>> {
        let classes = fleet.nodes.get(&node).await?.spec.classes;
        Ok(classes.iter().map(|c| (c.memory_bytes, c.warm)).collect())
    };
    // No Pod comes of the largest pool that can be asked for.
    greedy
        .make::<ResourceQuota>("q", json!({"spec": {"hard": {"pods": "0"}}}))
        .await?;
    let quota_counts = |q: &ResourceQuota| q.status.as_ref()?.used.as_ref().map(|_| ());
    greedy
        .until("q", "the quota to count", quota_counts)
        .await?;
    let limits = json!({"memory": "1Mi", "cpu": "500m"});
    let mut small = fleet.template();
    small["podTemplate"]["spec"]["containers"][0]["resources"]["limits"] = limits;
    greedy.template("t", small).await?;
    let most = json!({"replicas": i32::MAX, "sandboxTemplateRef": {"name": "t"}});
    greedy
        .make::<SandboxWarmPool>("p", json!({ "spec": most }))
        .await?;
    modest.template("t", fleet.template()).await?;
    modest.pool("p", "t", 1).await?;
    fleet.until_wishes(&[1]).await?;
    // And many Pods take no more than their share.
    greedy.delete::<SandboxWarmPool>("p").await?;
    greedy.delete::<ResourceQuota>("q").await?;
    greedy.pool("many", "t", 24).await?;
    let mut found = Vec::new();
    wait::until("shares", wait::SOON, async || {
        found = counts().await.ok()?;
        found.sort_unstable();
        (found == [(1 << 20, 3), (64 << 20, 1)]).then_some(())
    })
    .await
    .with_context(|| format!("{found:?}"))?;
    fleet.clean().await
}

pub(crate) async fn a_pod_prefers_a_node_that_holds_its_sandbox(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let mut fleet = Fleet::new(env, &ns).await?;
    let few = fleet.node("few", 0, &[fleet.held(1, 3)]).await?;
    let many = fleet.node("many", 0, &[fleet.held(4, 3)]).await?;
    fleet.node("empty", 0, &[fleet.held(0, 9)]).await?;
    fleet.node("silent", 600, &[fleet.held(9, 0)]).await?;
    let other = NodeClassStatus {
        memory_bytes: 1,
        ..fleet.held(9, 0)
    };
    fleet.node("other", 0, &[other]).await?;
    let own = json!({"weight": 7, "preference": {"matchExpressions": [{"key": "zone", "operator": "Exists"}]}});
    let required = json!({"nodeSelectorTerms": [{"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}]});
    let anti = json!({"preferredDuringSchedulingIgnoredDuringExecution": [{
        "weight": 1, "podAffinityTerm": {"topologyKey": "zone"},
    }]});
    let mut spec = fleet.template();
    spec["podTemplate"]["spec"]["affinity"] = json!({
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [own],
            "requiredDuringSchedulingIgnoredDuringExecution": required,
        },
        "podAntiAffinity": anti,
    });
    // The controller learns of nodes by a watch.
    fleet.until_known(&ns).await?;
    ns.make::<Sandbox>("picky", json!({ "spec": spec })).await?;
    let affinity = affinity_of(&ns, "picky").await?;
    let prefers = |node: &str| {
        json!({"weight": 50, "preference": {"matchFields": [
            {"key": "metadata.name", "operator": "In", "values": [node]},
        ]}})
    };
    same(
        "preferences",
        &affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"],
        &json!([own, prefers(&many), prefers(&few)]),
    )?;
    same(
        "requirements",
        &affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"],
        &required,
    )?;
    same("other affinity", &affinity["podAntiAffinity"], &anti)?;
    // The Sandbox stays what its user wrote, and a Pod without a class gets nothing.
    let sandbox: Sandbox = ns.get("picky").await?;
    let spec = serde_json::to_value(&sandbox.spec.pod_template.spec)?;
    same(
        "the Sandbox",
        &spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"],
        &json!([own]),
    )?;
    let plain =
        json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}});
    ns.make::<Sandbox>("plain", json!({ "spec": plain }))
        .await?;
    same("no class", &affinity_of(&ns, "plain").await?, &Value::Null)?;
    fleet.clean().await
}

impl Fleet {
    /// Waits until a Pod of the class prefers a node.
    async fn until_known(&self, ns: &Namespace<'_>) -> Result<()> {
        wait::until("the controller to know the nodes", wait::SOON, async || {
            let name = format!("probe-{}", Timestamp::now().as_nanosecond());
            let spec = json!({ "spec": self.template() });
            ns.make::<Sandbox>(&name, spec).await.ok()?;
            let affinity = affinity_of(ns, &name).await.ok()?;
            let terms =
                &affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"];
            (terms.as_array()?.len() == 2).then_some(())
        })
        .await
    }
}

async fn affinity_of(ns: &Namespace<'_>, pod: &str) -> Result<Value> {
    let pod: Pod = ns
        .until(pod, "a Pod", |pod: &Pod| Some(pod.clone()))
        .await?;
    Ok(serde_json::to_value(
        pod.spec.context("a Pod without a spec")?.affinity,
    )?)
}

pub(crate) async fn pools_say_what_nodes_hold_while_there_are_nodes(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let mut fleet = Fleet::new(env, &ns).await?;
    let class = fleet.class.clone();
    ns.template("t", fleet.template()).await?;
    ns.template("plain", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    ns.pool("q", "plain", 1).await?;
    let types = async |pool: &str| -> Result<Vec<String>> {
        let pool: SandboxWarmPool = ns.get(pool).await?;
        let conditions = pool.status.context("no status")?.conditions;
        Ok(conditions.into_iter().map(|c| c.type_).collect())
    };
    same(
        "without nodes",
        &types("p").await?,
        &vec!["Ready".to_owned()],
    )?;
    let (a, b) = (fleet.held(1, 4), fleet.held(2, 8));
    let name = fleet.node("a", 0, &[a]).await?;
    fleet.node("b", 0, &[b]).await?;
    let is = format!("True WarmSandboxes: 3 warm {class} sandboxes on 2 nodes, room for 12");
    ns.until_condition::<SandboxWarmPool>("p", "NodeCapacity", &is)
        .await?;
    same(
        "another class",
        &types("q").await?,
        &vec!["Ready".to_owned()],
    )?;
    let listed = env.plane.kubectl(&["get", "sbn", &name]).await?;
    let columns = [
        "READY",
        "WARM",
        "WARMING",
        "ROOM",
        "ADOPTED",
        "MISSED",
        "HEARTBEAT",
    ];
    ensure!(columns.iter().all(|c| listed.contains(c)), "{listed}");
    ensure!(listed.contains(&format!("{class} 1")), "{listed}");
    // It follows what nodes report, without a write for each report.
    let version = |pool: &SandboxWarmPool| pool.resource_version();
    let before: SandboxWarmPool = ns.get("p").await?;
    for ready in (0..20).rev() {
        fleet.report(&name, 0, &[fleet.held(ready, 4)]).await?;
    }
    let now: SandboxWarmPool = ns.get("p").await?;
    same("at once", &version(&now), &version(&before))?;
    let is = format!("True WarmSandboxes: 2 warm {class} sandboxes on 2 nodes, room for 12");
    ns.until_condition::<SandboxWarmPool>("p", "NodeCapacity", &is)
        .await?;
    let last: SandboxWarmPool = ns.get("p").await?;
    let ready = |pool: &SandboxWarmPool| {
        let status = pool.status.as_ref()?;
        line(&status.conditions, "Ready")
    };
    same("the rest", &ready(&last), &ready(&before))?;
    fleet.clean().await?;
    wait::until("the condition to go", wait::SOON, async || {
        (types("p").await.ok()? == ["Ready"]).then_some(())
    })
    .await
}
