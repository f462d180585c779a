// SPDX-License-Identifier: Apache-2.0

//! What our own Pods are given by `deploy/base`: docs/security.md promises it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use kiln_cluster::account::deploy;
use serde_json::{Value, json};

use crate::env::Env;

const CONTROLLER: &str = "Deployment/agent-sandbox-controller";
const ROUTER: &str = "Deployment/sandbox-router-deployment";
const AGENT: &str = "DaemonSet/kiln-node-agent";

/// Directories of the node that the agent is given, and whether to read only.
const OF_THE_NODE: [(&str, bool); 9] = [
    ("/etc/kiln", true),
    ("/usr/local/bin", true),
    ("/opt/kiln", true),
    ("/run/kiln-agent", false),
    ("/run/containerd", false),
    ("/run/kiln", true),
    ("/var/lib/kiln", false),
    ("/var/lib/kubelet/pods", false),
    ("/sys/fs/cgroup", false),
];

/// All objects.
async fn objects(env: &Env) -> Result<Vec<Value>> {
    let base = deploy().join("base").display().to_string();
    let text = env.plane.kubectl(&["kustomize", &base]).await?;
    Ok(serde_saphyr::from_multiple(&text)?)
}

/// The templates of the Pods of all workloads, by `KIND/NAME`.
fn templates(objects: &[Value]) -> Result<BTreeMap<String, &Value>> {
    let mut pods = BTreeMap::new();
    for object in objects {
        let kind = object["kind"].as_str().unwrap_or_default();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        if let Some(pod) = object.pointer("/spec/template") {
            pods.insert(format!("{kind}/{name}"), pod);
        }
    }
    // Another one needs a word here of what it may be given.
    let names: Vec<&str> = pods.keys().map(String::as_str).collect();
    ensure!(names == [AGENT, CONTROLLER, ROUTER], "{names:?}");
    Ok(pods)
}

/// What their Pods are.
async fn pods(env: &Env) -> Result<BTreeMap<String, Value>> {
    let objects = objects(env).await?;
    let templates = templates(&objects)?.into_iter();
    Ok(templates
        .map(|(title, template)| (title, template["spec"].clone()))
        .collect())
}

fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    let lists = ["initContainers", "containers"];
    lists
        .into_iter()
        .filter_map(move |l| pod[l].as_array())
        .flatten()
}

/// Namespaces of the host's that a Pod runs in.
fn host_namespaces(pod: &Value) -> Vec<&'static str> {
    let all = ["hostNetwork", "hostPID", "hostIPC"];
    all.into_iter().filter(|key| pod[*key] == true).collect()
}

/// Directories of the host's that a Pod is given, by volume.
fn host_paths(pod: &Value) -> BTreeMap<&str, &str> {
    let volumes = pod["volumes"].as_array().into_iter().flatten();
    volumes
        .filter_map(|v| Some((v["name"].as_str()?, v["hostPath"]["path"].as_str()?)))
        .collect()
}

pub(crate) async fn controller_and_router_are_nobody(env: &Env) -> Result<()> {
    let pods = pods(env).await?;
    // All that there is, so that a container takes back nothing of what its Pod says.
    let expected = json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
    });
    let elsewhere = json!([{"key": "kiln.dev/gvisor", "operator": "DoesNotExist"}]);
    for title in [CONTROLLER, ROUTER] {
        let pod = &pods[title];
        let affinity = "/affinity/nodeAffinity/preferredDuringSchedulingIgnoredDuringExecution/0";
        let preferred = pod.pointer(&format!("{affinity}/preference/matchExpressions"));
        ensure!(preferred == Some(&elsewhere), "{title}: {preferred:?}");
        let all = &pod["securityContext"];
        ensure!(
            all["runAsNonRoot"] == true
                && all["runAsUser"].as_u64().is_some_and(|uid| uid > 0)
                && all["seccompProfile"] == json!({"type": "RuntimeDefault"}),
            "{title}: {all}"
        );
        for container in containers(pod) {
            let own = &container["securityContext"];
            ensure!(*own == expected, "{title}: {own}");
        }
        let (namespaces, paths) = (host_namespaces(pod), host_paths(pod));
        ensure!(
            namespaces.is_empty() && paths.is_empty(),
            "{title}: {namespaces:?} {paths:?}"
        );
    }
    Ok(())
}

pub(crate) async fn the_agent_is_given_these_directories_of_its_node(env: &Env) -> Result<()> {
    let pods = pods(env).await?;
    let pod = &pods[AGENT];
    let namespaces = host_namespaces(pod);
    ensure!(namespaces == ["hostPID"], "{namespaces:?}");
    let paths = host_paths(pod);
    let volumes: BTreeSet<&str> = paths.values().copied().collect();
    let expected: BTreeSet<&str> = OF_THE_NODE.iter().map(|(path, _)| *path).collect();
    ensure!(volumes == expected, "{volumes:?}");
    let mounts = containers(pod).flat_map(|c| c["volumeMounts"].as_array().into_iter().flatten());
    let mut mounted = BTreeSet::new();
    for mount in mounts {
        let volume = mount["name"].as_str().context("a mount of no volume")?;
        if let Some(path) = paths.get(volume) {
            mounted.insert((*path, mount["readOnly"] == true));
        }
    }
    ensure!(mounted == BTreeSet::from(OF_THE_NODE), "{mounted:?}");
    Ok(())
}

pub(crate) async fn no_sandbox_reaches_our_pods(env: &Env) -> Result<()> {
    let objects = objects(env).await?;
    let policies = objects.iter().filter(|o| o["kind"] == "NetworkPolicy");
    let policies: Vec<&Value> = policies.map(|p| &p["spec"]).collect();
    // Whoever is no sandbox, in any namespace.
    let others = json!([{"from": [{
        "namespaceSelector": {},
        "podSelector": {"matchExpressions": [
            {"key": "agents.x-k8s.io/sandbox-name-hash", "operator": "DoesNotExist"},
        ]},
    }]}]);
    for (title, template) in templates(&objects)? {
        // A policy says nothing of Pods on their node's network.
        let spec = &template["spec"];
        ensure!(spec["hostNetwork"] != true, "{title}: {spec}");
        let label = &template["metadata"]["labels"]["app"];
        let of_it = |p: &&&Value| p["podSelector"] == json!({"matchLabels": {"app": label}});
        let own: Vec<_> = policies.iter().filter(of_it).collect();
        ensure!(own.len() == 1 && label.is_string(), "{title}: {own:?}");
        let types = own[0]["policyTypes"].as_array().context("no types")?;
        ensure!(types.contains(&json!("Ingress")), "{title}: {types:?}");
        ensure!(own[0]["ingress"] == others, "{title}: {}", own[0]);
    }
    Ok(())
}
