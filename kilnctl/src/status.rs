// SPDX-License-Identifier: Apache-2.0

//! What of Agent Sandbox is on a cluster, and works.

use std::{fmt::Write as _, process::ExitCode};

use anyhow::Result;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kiln_crds::{SandboxNode, SandboxWarmPool, keys};
use kube::ResourceExt;
use serde::Serialize;

use crate::{
    args::Format,
    cluster::Cluster,
    manifests::{self, Manifest, PART_OF, VERSION},
    output::{say, table, write},
    owner::Owner,
    rollout::{Progress, is_true, progress},
};

/// Seconds after which a node that reports nothing counts as one without warm sandboxes, as the
/// controller has it.
pub(crate) const SILENCE: i64 = 60;

/// What is there.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    /// Whether every definition is served and the controller works. Agents only make starts
    /// faster, and clients in the cluster need no router.
    enabled: bool,
    definitions: Vec<Definition>,
    controller: Option<Workload>,
    router: Option<Workload>,
    agents: Option<Workload>,
    nodes: Vec<Node>,
    pools: Vec<Pool>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Definition {
    name: String,
    established: bool,
    /// Absent where the definition is.
    owner: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Workload {
    image: String,
    /// Of the program that has put it there, if one has.
    version: Option<String>,
    wanted: i64,
    ready: i64,
    /// What it waits for.
    problem: Option<String>,
}

/// Warm sandboxes of a class on a node.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    name: String,
    class: String,
    runtime_version: Option<String>,
    ready: i64,
    warming: i64,
    adopted: i64,
    missed: i64,
    heartbeat_age_seconds: Option<i64>,
    /// Why there are no warm sandboxes.
    problem: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Pool {
    namespace: String,
    name: String,
    template: String,
    wanted: i32,
    ready: i32,
    /// Why it is not full.
    problem: Option<String>,
}

/// Prints what is there.
///
/// # Errors
/// When the cluster cannot be asked.
pub(crate) async fn run(cluster: &Cluster, format: Format) -> Result<ExitCode> {
    let status = look(cluster).await?;
    match format {
        Format::Table => write(&text(&status)),
        Format::Json => say(&serde_json::to_string_pretty(&status)?),
        Format::Value => say(if status.enabled { "True" } else { "False" }),
    }
    Ok(match status.enabled {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

async fn look(cluster: &Cluster) -> Result<Status> {
    let mut status = Status::default();
    for manifest in &manifests::all()? {
        if manifest.is_definition() {
            status
                .definitions
                .push(definition(cluster, manifest).await?);
        } else if manifest.kind.group == "apps" {
            let workload = workload(cluster, manifest).await?;
            match manifest.name.as_str() {
                manifests::CONTROLLER => status.controller = workload,
                manifests::AGENT => status.agents = workload,
                manifests::ROUTER => status.router = workload,
                _ => {}
            }
        }
    }
    let works = |w: &Workload| w.ready > 0;
    status.enabled = status.definitions.iter().all(|d| d.established)
        && status.controller.as_ref().is_some_and(works);
    let now = cluster.clock().await?.now();
    let nodes: Vec<SandboxNode> = cluster.all().await?;
    status.nodes = nodes
        .iter()
        .flat_map(|node| node_classes(node, now))
        .collect();
    let pools: Vec<SandboxWarmPool> = cluster.all().await?;
    status.pools = pools.iter().map(pool).collect();
    Ok(status)
}

async fn definition(cluster: &Cluster, manifest: &Manifest) -> Result<Definition> {
    let found = cluster.find(manifest).await?;
    let owner = found
        .as_ref()
        .map(|f| Owner::of(&f.metadata).name().to_owned());
    Ok(Definition {
        name: manifest.name.clone(),
        established: found.is_some_and(|f| is_true(&f, "Established")),
        owner,
    })
}

/// A workload of ours, whoever has put it there.
async fn workload(cluster: &Cluster, manifest: &Manifest) -> Result<Option<Workload>> {
    let Some(found) = cluster.find(manifest).await? else {
        return Ok(None);
    };
    if found.labels().get(PART_OF.0).map(String::as_str) != Some(PART_OF.1) {
        return Ok(None);
    }
    let status = &found.data["status"];
    let n = |key: &str| status[key].as_i64().unwrap_or(0);
    let (wanted, ready) = match found.data["spec"]["replicas"].as_i64() {
        Some(replicas) => (replicas, n("availableReplicas")),
        None => (n("desiredNumberScheduled"), n("numberAvailable")),
    };
    let image = &found.data["spec"]["template"]["spec"]["containers"][0]["image"];
    Ok(Some(Workload {
        image: image.as_str().unwrap_or_default().to_owned(),
        version: found.labels().get(VERSION).cloned(),
        wanted,
        ready,
        problem: match progress(&found) {
            Progress::Done(_) => None,
            Progress::Not(words) => Some(words),
        },
    }))
}

/// Seconds since a node's agent has last reported, where the apiserver's clock shows `now`;
/// nothing where it never has.
///
/// The heartbeat itself is by the node's clock, which may be another: the apiserver has noted by
/// its own when it was written.
pub(crate) fn age(node: &SandboxNode, now: Timestamp) -> Option<i64> {
    let heartbeat = node.status.as_ref()?.heartbeat.as_ref()?;
    let writes_it = |entry: &&ManagedFieldsEntry| {
        let fields = entry.fields_v1.as_ref();
        fields.is_some_and(|f| f.0.pointer("/f:status/f:heartbeat").is_some())
    };
    let writes = node.managed_fields().iter().filter(writes_it);
    let written = writes.filter_map(|entry| entry.time.as_ref()).max();
    let last = written.unwrap_or(heartbeat);
    Some((now.as_second() - last.0.as_second()).max(0))
}

/// What a node says, a line for each class; one line where it has none.
fn node_classes(node: &SandboxNode, now: Timestamp) -> Vec<Node> {
    let status = node.status.clone().unwrap_or_default();
    let age = age(node, now);
    let problem = match age {
        None => Some("it has never reported".to_owned()),
        Some(age) if age > SILENCE => Some(format!("no report for {age} s: does its agent run?")),
        Some(_) => {
            let broken = |kind: &str| {
                let mut broken = status.conditions.iter().filter(|c| c.status != "True");
                broken.find(|c| c.type_ == kind)
            };
            // Unknown is that of a containerd that does not run, or was started just now.
            let served = broken(keys::HANDLER_SERVED).filter(|c| c.status == "False");
            let found = broken(keys::INSTALLED).or(served);
            let found = found.or_else(|| broken("Ready"));
            found.map(|c| match c.message.as_str() {
                "" => c.reason.clone(),
                message => message.to_owned(),
            })
        }
    };
    let mut names: Vec<&String> = status.classes.iter().map(|c| &c.class).collect();
    names.extend(status.runtime_versions.keys());
    names.sort();
    names.dedup();
    let none = String::new();
    if names.is_empty() {
        names.push(&none);
    }
    let of_class = |class: &&String| {
        let shapes = || status.classes.iter().filter(|c| c.class == **class);
        Node {
            name: node.name_any(),
            class: (*class).clone(),
            runtime_version: status.runtime_versions.get(*class).cloned(),
            ready: shapes().map(|c| i64::from(c.ready)).sum(),
            warming: shapes().map(|c| i64::from(c.warming)).sum(),
            adopted: shapes().map(|c| c.adopted).sum(),
            missed: shapes().map(|c| c.missed).sum(),
            heartbeat_age_seconds: age,
            problem: problem.clone(),
        }
    };
    names.iter().map(of_class).collect()
}

fn pool(pool: &SandboxWarmPool) -> Pool {
    let status = pool.status.clone().unwrap_or_default();
    let broken = status
        .conditions
        .iter()
        .find(|c| c.type_ == "Ready" && c.status != "True");
    Pool {
        namespace: pool.namespace().unwrap_or_default(),
        name: pool.name_any(),
        template: pool.spec.sandbox_template_ref.name.clone(),
        wanted: pool.spec.replicas.unwrap_or(0),
        ready: status.ready_replicas,
        problem: broken.map(|c| format!("{}: {}", c.reason, c.message)),
    }
}

/// The tables for people.
fn text(status: &Status) -> String {
    let mut text = String::from("Agent Sandbox is ");
    text.push_str(match status.enabled {
        true => "enabled.\n\n",
        false => "not enabled.\n\n",
    });
    let mut rows = vec![row(["DEFINITION", "ESTABLISHED", "OWNER"])];
    rows.extend(status.definitions.iter().map(|d| {
        let owner = d.owner.as_deref().unwrap_or("-");
        row([&d.name, yes(d.established), owner])
    }));
    text.push_str(&table(&rows));
    let mut rows = vec![row(["PART", "READY", "IMAGE", "PROBLEM"])];
    for (name, workload) in [
        ("controller", &status.controller),
        ("router", &status.router),
        ("agents", &status.agents),
    ] {
        rows.push(match workload {
            Some(w) => {
                let ready = format!("{}/{}", w.ready, w.wanted);
                row([name, &ready, &w.image, or_dash(w.problem.as_deref())])
            }
            None => row([name, "-", "-", "not there"]),
        });
    }
    section(&mut text, &rows);
    let mut rows = vec![row([
        "NODE", "CLASS", "WARM", "WARMING", "ADOPTED", "MISSED", "RUNTIME", "REPORTED", "PROBLEM",
    ])];
    rows.extend(status.nodes.iter().map(node_row));
    section(&mut text, &rows);
    let mut rows = vec![row(["POOL", "READY", "TEMPLATE", "PROBLEM"])];
    rows.extend(status.pools.iter().map(|p| {
        let (name, ready) = (
            format!("{}/{}", p.namespace, p.name),
            format!("{}/{}", p.ready, p.wanted),
        );
        row([&name, &ready, &p.template, or_dash(p.problem.as_deref())])
    }));
    section(&mut text, &rows);
    text
}

fn node_row(node: &Node) -> [String; 9] {
    let age = node.heartbeat_age_seconds.map(|s| format!("{s} s ago"));
    row([
        &node.name,
        &node.class,
        &node.ready.to_string(),
        &node.warming.to_string(),
        &node.adopted.to_string(),
        &node.missed.to_string(),
        or_dash(node.runtime_version.as_deref()),
        or_dash(age.as_deref()),
        or_dash(node.problem.as_deref()),
    ])
}

/// Adds a table that has more than a head.
fn section<const N: usize>(text: &mut String, rows: &[[String; N]]) {
    if rows.len() > 1 {
        // Writing into a string cannot fail.
        write!(text, "\n{}", table(rows)).ok();
    }
}

fn row<const N: usize>(cells: [&str; N]) -> [String; N] {
    cells.map(str::to_owned)
}

fn yes(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

fn or_dash(words: Option<&str>) -> &str {
    words.filter(|w| !w.is_empty()).unwrap_or("-")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn node(status: &Value) -> SandboxNode {
        serde_json::from_value(json!({
            "apiVersion": "node.agents.x-k8s.io/v1alpha1", "kind": "SandboxNode",
            "metadata": {"name": "n"}, "spec": {}, "status": status,
        }))
        .unwrap()
    }

    #[test]
    fn shapes_of_a_class_are_summed_and_silence_is_a_problem() {
        let now: Timestamp = "2026-01-01T00:01:30Z".parse().unwrap();
        let shape = |ready| json!({"class": "gvisor", "ready": ready, "adopted": 4, "missed": 1});
        let report = json!({
            "heartbeat": "2026-01-01T00:01:20Z",
            "runtimeVersions": {"gvisor": "release-1"},
            "classes": [shape(2), shape(1)],
            "conditions": [{"type": "Ready", "status": "True", "reason": "R", "message": "",
                "lastTransitionTime": "2026-01-01T00:00:00Z"}],
        });
        let [found] = &node_classes(&node(&report), now)[..] else {
            panic!("not one class")
        };
        assert_eq!((found.ready, found.adopted, found.missed), (3, 8, 2));
        assert_eq!(found.heartbeat_age_seconds, Some(10));
        assert_eq!(found.problem, None);
        let late = now + jiff::SignedDuration::from_secs(60);
        let problem = node_classes(&node(&report), late)[0].problem.clone();
        assert!(problem.unwrap().contains("no report for 70 s"));
        let silent = &node_classes(&node(&json!({})), now)[0];
        assert_eq!(silent.problem.as_deref(), Some("it has never reported"));
    }

    #[test]
    fn a_handler_that_is_lost_is_a_problem_and_one_that_is_not_seen_is_none() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let problem = |status: &str| {
            let condition = json!({"type": "HandlerServed", "status": status, "reason": "R",
                "message": "containerd has no handler gvisor",
                "lastTransitionTime": "2026-01-01T00:00:00Z"});
            let report = json!({"heartbeat": "2026-01-01T00:00:00Z", "conditions": [condition]});
            node_classes(&node(&report), now)[0].problem.clone()
        };
        let words = "containerd has no handler gvisor";
        assert_eq!(problem("False").as_deref(), Some(words));
        assert_eq!(problem("Unknown"), None);
    }

    #[test]
    fn a_reports_age_is_by_the_apiservers_clock_alone() {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let aged = |heartbeat: &str, time: &str| {
            let mut node = node(&json!({"heartbeat": heartbeat}));
            let entry = |time: &str, fields: Value| json!({"time": time, "fieldsV1": fields});
            node.metadata.managed_fields = serde_json::from_value(json!([
                entry(time, json!({"f:status": {"f:heartbeat": {}}})),
                entry(
                    "2026-01-01T12:00:00Z",
                    json!({"f:status": {"f:conditions": {}}})
                ),
            ]))
            .unwrap();
            age(&node, now)
        };
        // The node's clock is behind, is ahead; its agent is silent whatever it said last.
        let just_now = "2026-01-01T11:59:58Z";
        assert_eq!(aged("2026-01-01T11:50:00Z", just_now), Some(2));
        assert_eq!(aged("2026-01-01T12:10:00Z", just_now), Some(2));
        assert_eq!(
            aged("2026-01-01T12:10:00Z", "2026-01-01T11:58:00Z"),
            Some(120)
        );
        assert_eq!(aged(just_now, "2026-01-01T12:00:01Z"), Some(0));
        assert_eq!(age(&node(&json!({"heartbeat": just_now})), now), Some(2));
    }

    #[test]
    fn a_table_names_what_is_missing() {
        let status = Status {
            definitions: vec![Definition {
                name: "sandboxes".to_owned(),
                established: false,
                owner: None,
            }],
            ..Status::default()
        };
        let text = text(&status);
        assert!(text.starts_with("Agent Sandbox is not enabled."));
        assert!(
            text.contains("controller   -       -       not there"),
            "{text}"
        );
        assert!(text.contains("router       -       -       not there"));
        assert!(!text.contains("POOL"));
    }
}
