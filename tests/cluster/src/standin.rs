// SPDX-License-Identifier: Apache-2.0

//! Takes the place of scheduler and kubelets: Pods are bound and ready at once, and gone as soon
//! as they are deleted.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    runtime::{WatchStreamExt, watcher},
};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinHandle};

/// Annotation of a Pod that says what becomes of it: `ready` (as without it), `unready`,
/// `pending` (nothing happens), `unschedulable`, `succeeded`, `failed`, or `slow:MILLISECONDS`.
pub const FATE: &str = "kiln.test/fate";

/// Requests that are under way at the same time.
const AT_ONCE: usize = 32;
/// How often, and with which pause, the apiserver is tried when it is away.
const TRIES: u32 = 60;
const PAUSE: Duration = Duration::from_millis(500);
/// Nodes that Pods are put on in turn.
const NODES: u32 = 4;

/// Ends when it is dropped.
pub struct Standin {
    task: JoinHandle<()>,
}

impl Drop for Standin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Standin {
    /// Starts it for all Pods of a cluster.
    #[must_use]
    pub fn start(client: Client) -> Self {
        Self {
            task: tokio::spawn(follow(client)),
        }
    }
}

struct Shared {
    client: Client,
    turns: Semaphore,
    pods: AtomicU32,
}

async fn follow(client: Client) {
    let api: Api<Pod> = Api::all(client.clone());
    let shared = Arc::new(Shared {
        client,
        turns: Semaphore::new(AT_ONCE),
        pods: AtomicU32::new(0),
    });
    let mut events = pin!(watcher(api, watcher::Config::default()).default_backoff());
    while let Some(event) = events.next().await {
        let Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) = event else {
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            for _ in 0..TRIES {
                match shared.look_at(&pod).await {
                    // A Pod may change at any moment; what is left to do comes with its next event.
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409 | 422) => {
                        break;
                    }
                    // The apiserver is away.
                    Err(_) => tokio::time::sleep(PAUSE).await,
                    Ok(()) => break,
                }
            }
        });
    }
}

impl Shared {
    async fn look_at(&self, pod: &Pod) -> kube::Result<()> {
        let api: Api<Pod> =
            Api::namespaced(self.client.clone(), &pod.namespace().unwrap_or_default());
        let name = pod.name_any();
        let fate = pod.annotations().get(FATE).map_or("ready", String::as_str);
        if let Some(pause) = fate.strip_prefix("slow:").and_then(|ms| ms.parse().ok()) {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        let Ok(_turn) = self.turns.acquire().await else {
            return Ok(());
        };
        if pod.metadata.deletion_timestamp.is_some() {
            let now = DeleteParams {
                grace_period_seconds: Some(0),
                // Not another one of its name.
                preconditions: Some(Preconditions {
                    uid: pod.uid(),
                    resource_version: None,
                }),
                ..DeleteParams::default()
            };
            return api.delete(&name, &now).await.map(drop);
        }
        if fate == "pending" {
            return Ok(());
        }
        let is_bound = pod.spec.as_ref().is_some_and(|s| s.node_name.is_some());
        let status = pod.status.as_ref();
        if !is_bound && fate == "unschedulable" {
            let is_told = status.is_some_and(|s| s.conditions.is_some());
            return if is_told {
                Ok(())
            } else {
                set(&api, &name, unschedulable()).await
            };
        }
        if !is_bound {
            let node = wanted_node(pod).unwrap_or_else(|| {
                let number = self.pods.fetch_add(1, Ordering::Relaxed);
                format!("node-{}", number % NODES)
            });
            let binding = json!({
                "apiVersion": "v1",
                "kind": "Binding",
                "metadata": {"name": name},
                "target": {"kind": "Node", "name": node},
            });
            let params = PostParams::default();
            let bound = api.create_subresource::<_, Value>("binding", &name, &params, &binding);
            return bound.await.map(drop);
        }
        if status.is_some_and(|s| s.phase.as_deref() != Some("Pending")) {
            return Ok(());
        }
        let number = self.pods.fetch_add(1, Ordering::Relaxed);
        set(&api, &name, running(fate, number)).await
    }
}

/// The node that the Pod of a DaemonSet is for.
fn wanted_node(pod: &Pod) -> Option<String> {
    let affinity = pod
        .spec
        .as_ref()?
        .affinity
        .as_ref()?
        .node_affinity
        .as_ref()?;
    let required = affinity
        .required_during_scheduling_ignored_during_execution
        .as_ref()?;
    let fields = required
        .node_selector_terms
        .iter()
        .filter_map(|t| t.match_fields.as_ref());
    let name = fields.flatten().find(|f| f.key == "metadata.name")?;
    name.values.as_ref()?.first().cloned()
}

async fn set(api: &Api<Pod>, name: &str, status: Value) -> kube::Result<()> {
    let patch = Patch::Merge(json!({ "status": status }));
    api.patch_status(name, &PatchParams::default(), &patch)
        .await
        .map(drop)
}

fn unschedulable() -> Value {
    json!({"conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": "0/4 nodes are available",
    }]})
}

fn running(fate: &str, number: u32) -> Value {
    let ip = format!(
        "10.{}.{}.{}",
        1 + (number >> 16),
        (number >> 8) & 0xff,
        number & 0xff
    );
    let (phase, ready) = match fate {
        "succeeded" => ("Succeeded", "False"),
        "failed" => ("Failed", "False"),
        "unready" => ("Running", "False"),
        _ => ("Running", "True"),
    };
    json!({
        "phase": phase,
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": ready},
        ],
    })
}
