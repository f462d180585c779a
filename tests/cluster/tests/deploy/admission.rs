// SPDX-License-Identifier: Apache-2.0

//! The admission policies: each rule refuses what it is for, with its own words, and allows what
//! is next to it.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{admissionregistration::v1::ValidatingAdmissionPolicy, core::v1::Pod};
use kiln_cluster::account::deploy;
use kiln_crds::keys;
use kiln_tests::wait;
use kube::{
    Api,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::env::{Env, merge, pod};

const POLICIES: [&str; 6] = [
    "agent-sandbox-controller",
    "kiln-node-agent",
    "kiln-sandbox-baseline",
    "kiln-sandbox-restricted",
    "kiln-sandbox-class",
    "kiln-sandbox-marks",
];

/// A rule by words of its message, what it refuses, and what it allows.
type Rule = (&'static str, Value, Value);

#[expect(clippy::needless_pass_by_value, reason = "callers read as tables")]
fn context(fields: Value) -> Value {
    json!({"container": {"securityContext": fields}})
}

#[expect(clippy::needless_pass_by_value, reason = "callers read as tables")]
fn init(fields: Value) -> Value {
    let mut container = json!({"name": "i", "image": "busybox"});
    merge(&mut container, &fields);
    json!({"initContainers": [container]})
}

fn baseline() -> Vec<Rule> {
    let port = |host: u16| json!({"ports": [{"containerPort": 80, "hostPort": host}]});
    let adds = |capability: &str| json!({"capabilities": {"add": [capability]}});
    let sysctl =
        |name: &str| json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
    let volume = |source: Value| {
        let mut volume = json!({"name": "v"});
        merge(&mut volume, &source);
        json!({"volumes": [volume]})
    };
    vec![
        (
            "hostNetwork",
            json!({"hostNetwork": true}),
            json!({"hostNetwork": false}),
        ),
        (
            "hostPID",
            json!({"hostPID": true}),
            json!({"shareProcessNamespace": true}),
        ),
        (
            "hostIPC",
            json!({"hostIPC": true}),
            json!({"hostIPC": false}),
        ),
        (
            "hostPort",
            json!({"container": port(80)}),
            json!({"container": port(0)}),
        ),
        ("hostPort", init(port(80)), init(port(0))),
        (
            "privileged",
            context(json!({"privileged": true})),
            context(json!({"privileged": false})),
        ),
        (
            "privileged",
            init(json!({"securityContext": {"privileged": true}})),
            init(json!({"securityContext": {"privileged": false}})),
        ),
        (
            "procMount",
            json!({"hostUsers": false, "container": {"securityContext": {"procMount": "Unmasked"}}}),
            context(json!({"procMount": "Default"})),
        ),
        (
            "add capabilities",
            context(adds("SYS_ADMIN")),
            context(adds("NET_BIND_SERVICE")),
        ),
        (
            "add capabilities",
            context(adds("ALL")),
            context(adds("SETUID")),
        ),
        (
            "add capabilities",
            context(adds("NET_RAW")),
            context(json!({"capabilities": {"drop": ["ALL"]}})),
        ),
        (
            "sysctls",
            sysctl("kernel.msgmax"),
            sysctl("net.ipv4.tcp_syncookies"),
        ),
        (
            "hostPath",
            volume(json!({"hostPath": {"path": "/run/containerd"}})),
            volume(json!({"nfs": {"server": "s", "path": "/"}})),
        ),
    ]
}

/// What is added to a Pod for restricted namespaces.
fn proper() -> Value {
    json!({
        "automountServiceAccountToken": false,
        "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
        "container": {
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": {"drop": ["ALL"]},
            },
            "resources": {"limits": {"cpu": "500m", "memory": "1Gi"}},
        },
    })
}

fn restricted() -> Vec<Rule> {
    let volume = |source: Value| {
        let mut volume = json!({"name": "v"});
        merge(&mut volume, &source);
        json!({"volumes": [volume]})
    };
    let projects = |source: Value| {
        let mut fields = volume(json!({"projected": {"sources": [source]}}));
        fields["serviceAccountName"] = json!("default");
        fields
    };
    let token = json!({"serviceAccountToken": {"path": "token"}});
    let limits = |fields: Value| json!({"container": {"resources": {"limits": fields}}});
    let tolerates = |fields: Value| json!({"tolerations": [fields]});
    let limited = json!({"resources": {"limits": {"cpu": "1", "memory": "1Gi"}}});
    let mut whole_init = json!({"securityContext": {
        "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}});
    let unlimited_init = init(whole_init.clone());
    merge(&mut whole_init, &limited);
    vec![
        (
            "runAsNonRoot",
            json!({"securityContext": {"runAsNonRoot": null}}),
            context(json!({"runAsNonRoot": true})),
        ),
        (
            "runAsNonRoot",
            context(json!({"runAsNonRoot": false})),
            context(json!({"runAsUser": 1000})),
        ),
        (
            "runAsNonRoot",
            context(json!({"runAsUser": 0})),
            json!({"securityContext": {"runAsUser": 1000}}),
        ),
        (
            "runAsNonRoot",
            json!({"securityContext": {"runAsUser": 0}}),
            context(json!({"runAsUser": 1000})),
        ),
        (
            "drop capability ALL",
            context(json!({"capabilities": null})),
            json!({}),
        ),
        (
            "add no capability",
            context(json!({"capabilities": {"add": ["CHOWN"]}})),
            context(json!({"capabilities": {"add": ["NET_BIND_SERVICE"]}})),
        ),
        (
            "allowPrivilegeEscalation",
            context(json!({"allowPrivilegeEscalation": null})),
            json!({}),
        ),
        (
            "allowPrivilegeEscalation",
            context(json!({"allowPrivilegeEscalation": true})),
            json!({}),
        ),
        (
            "seccompProfile",
            json!({"securityContext": {"seccompProfile": null}}),
            context(json!({"seccompProfile": {"type": "Localhost", "localhostProfile": "p.json"}})),
        ),
        (
            "seccompProfile",
            context(json!({"seccompProfile": {"type": "Unconfined"}})),
            json!({}),
        ),
        (
            "limits of cpu and memory",
            limits(json!({"cpu": null})),
            limits(json!({"cpu": "2"})),
        ),
        (
            "limits of cpu and memory",
            limits(json!({"memory": null})),
            json!({}),
        ),
        ("limits of cpu and memory", unlimited_init, init(whole_init)),
        (
            "automountServiceAccountToken",
            json!({"automountServiceAccountToken": null}),
            json!({}),
        ),
        (
            "automountServiceAccountToken",
            json!({"automountServiceAccountToken": true}),
            json!({}),
        ),
        (
            "projected serviceAccountToken",
            projects(token),
            projects(json!({"secret": {"name": "s"}})),
        ),
        (
            "volumes of these types",
            volume(json!({"nfs": {"server": "s", "path": "/"}})),
            volume(json!({"emptyDir": {}})),
        ),
        (
            "nodeName",
            json!({"nodeName": "node-0"}),
            json!({"nodeSelector": {"pool": "a"}}),
        ),
        (
            "tolerations",
            tolerates(json!({"operator": "Exists"})),
            tolerates(json!({"key": "sandbox.gke.io/runtime", "operator": "Exists"})),
        ),
        (
            "tolerations",
            tolerates(
                json!({"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"}),
            ),
            json!({}),
        ),
    ]
}

pub(crate) async fn the_expressions_have_no_type_errors(env: &Env) -> Result<()> {
    let api: Api<ValidatingAdmissionPolicy> = Api::all(env.plane.client());
    for name in POLICIES {
        let checked = wait::until(name, wait::SOON, async || {
            let status = api.get(name).await.ok()?.status?;
            let is_seen = status.observed_generation.is_some();
            is_seen.then_some(status.type_checking).flatten()
        });
        let warnings = checked.await?.expression_warnings.unwrap_or_default();
        ensure!(warnings.is_empty(), "{name}: {warnings:#?}");
    }
    Ok(())
}

pub(crate) async fn every_rule_for_all_sandboxes_refuses_and_allows(env: &Env) -> Result<()> {
    for (words, bad, good) in baseline() {
        env.refuses(&env.plain, &pod(&bad), words).await?;
        env.allows(&env.plain, &pod(&good)).await?;
        let mut kata = pod(&bad);
        kata["spec"]["runtimeClassName"] = json!("kata");
        env.refuses(&env.plain, &kata, words).await?;
    }
    // By the names of handlers alone, the labels being the provider's.
    for class in ["runsc", "kata-qemu"] {
        let mut host = pod(&json!({"hostNetwork": true}));
        host["spec"]["runtimeClassName"] = json!(class);
        env.refuses(&env.plain, &host, "hostNetwork").await?;
    }
    env.allows(&env.plain, &pod(&json!({}))).await
}

pub(crate) async fn every_rule_of_restricted_namespaces_refuses_and_allows(
    env: &Env,
) -> Result<()> {
    let with = |fields: &Value| {
        let mut pod = pod(&proper());
        merge(&mut pod["spec"], fields);
        pod
    };
    env.allows(&env.restricted, &with(&json!({}))).await?;
    for (words, bad, good) in restricted() {
        env.refuses(&env.restricted, &with(&bad), words).await?;
        env.allows(&env.restricted, &with(&good)).await?;
        if words != "add no capability" {
            env.allows(&env.plain, &with(&bad)).await?;
        }
    }
    let host = with(&json!({"hostNetwork": true}));
    env.refuses(&env.restricted, &host, "hostNetwork").await
}

pub(crate) async fn classes_that_are_no_sandboxes_are_left_alone(env: &Env) -> Result<()> {
    for (_, bad, _) in baseline() {
        for class in [json!("trusted"), json!("out"), json!(null)] {
            let mut pod = pod(&bad);
            merge(&mut pod["spec"], &json!({"runtimeClassName": class}));
            env.allows(&env.plain, &pod).await?;
        }
    }
    Ok(())
}

pub(crate) async fn a_class_can_allow_its_pods_more(env: &Env) -> Result<()> {
    let generous = |fields: Value| {
        let mut pod = pod(&fields);
        pod["spec"]["runtimeClassName"] = json!("generous");
        pod
    };
    let adds = |capability: &str| context(json!({"capabilities": {"add": [capability]}}));
    let sysctl = |name: &str| {
        generous(json!({"securityContext": {"sysctls": [{"name": name, "value": "1"}]}}))
    };
    let path = json!({"volumes": [{"name": "v", "hostPath": {"path": "/data"}}]});
    for pod in [
        generous(adds("SYS_PTRACE")),
        sysctl("net.core.somaxconn"),
        generous(path),
    ] {
        env.allows(&env.plain, &pod).await?;
    }
    let plain = &env.plain;
    env.refuses(plain, &generous(adds("SYS_ADMIN")), "add capabilities")
        .await?;
    env.refuses(plain, &sysctl("kernel.msgmax"), "sysctls")
        .await?;
    let mut nfs = proper();
    merge(
        &mut nfs,
        &json!({"volumes": [{"name": "v", "nfs": {"server": "s", "path": "/"}}]}),
    );
    env.allows(&env.restricted, &generous(nfs)).await
}

pub(crate) async fn sandboxes_have_a_class_in_restricted_namespaces(env: &Env) -> Result<()> {
    let class = |class: Value| {
        let mut pod = pod(&proper());
        merge(&mut pod["spec"], &json!({"runtimeClassName": class}));
        pod
    };
    let words = "must have a runtimeClassName";
    for other in [json!(null), json!("trusted"), json!("out")] {
        let mut pod = class(other);
        env.refuses(&env.restricted, &pod, words).await?;
        env.allows(&env.plain, &pod).await?;
        // Only Pods of Sandboxes have to.
        pod["metadata"]["labels"] = json!({});
        env.allows(&env.restricted, &pod).await?;
    }
    for sandbox in ["gvisor", "kata", "generous"] {
        env.allows(&env.restricted, &class(json!(sandbox))).await?;
    }
    Ok(())
}

/// Also against who may do anything with the Sandboxes of a namespace.
pub(crate) async fn what_a_snapshot_is_of_is_the_controllers(env: &Env) -> Result<()> {
    let namespace = env.plane.namespace("snapshots").await?;
    for arguments in [
        "create role keeper --verb=* --resource=podsnapshots.podsnapshot.gke.io",
        "create rolebinding keeper --role=keeper --user=tenant",
    ] {
        let words: Vec<&str> = arguments.split(' ').collect();
        let all = [&["-n", &namespace], words.as_slice()].concat();
        env.plane.kubectl(&all).await?;
    }
    let snapshot = |name: &str| {
        json!({"apiVersion": "podsnapshot.gke.io/v1", "kind": "PodSnapshot",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"nodeName": "n", "podSpecDigest": "d",
                "pod": {"name": "p", "uid": "p1"}, "sandbox": {"name": "b", "uid": "b1"}}})
    };
    let create = ["--as=tenant", "create", "--dry-run=server", "-f", "-"];
    let forged = snapshot("forged").to_string();
    let why = wait::until("the policy", wait::SOON, async || {
        env.plane.kubectl_with(&create, &forged).await.err()
    })
    .await?;
    ensure!(
        format!("{why:#}").contains("PodSnapshotManualTrigger"),
        "{why:#}"
    );
    env.make(&snapshot("s")).await?;
    let change = async |patch: &str| {
        let target = ["--as=tenant", "patch", "podsnapshot", "s", "-n", &namespace];
        let last = ["--type=merge", "-p", patch];
        env.plane.kubectl(&[&target[..], &last].concat()).await
    };
    change(r#"{"metadata": {"labels": {"a": "b"}}}"#).await?;
    for patch in [
        r#"{"spec": {"restore": {"podUID": "mine"}}}"#,
        r#"{"spec": {"sandbox": {"uid": "mine"}}}"#,
    ] {
        let error = change(patch).await.err();
        let error = error.with_context(|| format!("allowed: {patch}"))?;
        ensure!(
            format!("{error:#}").contains("only the controller"),
            "{error:#}"
        );
    }
    let delete = [
        "--as=tenant",
        "delete",
        "podsnapshot",
        "s",
        "-n",
        &namespace,
    ];
    env.plane.kubectl(&delete).await.map(drop)
}

pub(crate) async fn marks_of_sandboxes_are_the_controllers(env: &Env) -> Result<()> {
    let namespace = env.plane.namespace("tenant").await?;
    for arguments in [
        "create role tenant --verb=* --resource=sandboxes.agents.x-k8s.io",
        "create rolebinding tenant --role=tenant --user=tenant",
    ] {
        let words: Vec<&str> = arguments.split(' ').collect();
        let all = [&["-n", &namespace], words.as_slice()].concat();
        env.plane.kubectl(&all).await?;
    }
    let sandbox = |name: &str, metadata: Value| {
        let mut object = json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"podTemplate": {"spec": {"containers": [{"name": "c", "image": "i"}]}}},
        });
        merge(&mut object["metadata"], &metadata);
        object
    };
    let owner = |group: &str, kind: &str| {
        json!({"ownerReferences": [{"apiVersion": group, "kind": kind, "name": "o",
            "uid": "00000000-0000-0000-0000-000000000001", "controller": true}]})
    };
    let label = |key: &str, value: &str| json!({"labels": {key: value}});
    let refused = [
        (
            owner("extensions.agents.x-k8s.io/v1beta1", "SandboxWarmPool"),
            "belong to",
        ),
        (
            owner("extensions.agents.x-k8s.io/v99", "SandboxClaim"),
            "belong to",
        ),
        (owner("agents.x-k8s.io/v1alpha1", "Sandbox"), "belong to"),
        (label(keys::WARM_POOL, "0"), "set labels"),
        (label(keys::TEMPLATE_HASH, "0"), "set labels"),
        (label(keys::TEMPLATE_REF_HASH, "0"), "set labels"),
        (label(keys::CLAIM_UID, "0"), "set labels"),
        (label(keys::LAUNCH_TYPE, keys::WARM), "set labels"),
        (label("extensions.agents.x-k8s.io/any", "0"), "set labels"),
    ];
    let allowed = [
        json!({}),
        label("app", "x"),
        label("agents.x-k8s.io.example.com/app", "x"),
        label(keys::CREATED_BY, "go-client"),
        owner("v1", "ConfigMap"),
    ];
    let tenant = ["--as=tenant", "create", "--dry-run=server", "-f", "-"];
    let create = async |object: &Value| {
        let text = object.to_string();
        env.plane.kubectl_with(&tenant, &text).await
    };
    for metadata in &allowed {
        create(&sandbox("new", metadata.clone())).await?;
    }
    // Policies come to an apiserver's admission a moment after they are made.
    let forged = sandbox("new", label(keys::CLAIM_UID, "0"));
    wait::until("the policy", wait::SOON, async || {
        create(&forged).await.err()
    })
    .await?;
    // Of an object that is there: what it has stays as it is, or goes.
    let before = label(keys::WARM_POOL, "1");
    env.make(&sandbox("old", before)).await?;
    let replace = async |metadata: &Value| {
        let replace = ["--as=tenant", "patch", "sandbox", "old", "-n", &namespace];
        let patch = json!({"metadata": metadata}).to_string();
        let last = ["--type=merge", "--dry-run=server", "-p", &patch];
        env.plane
            .kubectl(&[replace.as_slice(), &last].concat())
            .await
    };
    for metadata in &allowed {
        replace(metadata).await?;
    }
    replace(&json!({"labels": {keys::WARM_POOL: null}})).await?;
    for (metadata, words) in &refused {
        for answer in [
            create(&sandbox("new", metadata.clone())).await,
            replace(metadata).await,
        ] {
            let error = answer
                .err()
                .with_context(|| format!("allowed: {metadata}"))?;
            ensure!(
                format!("{error:#}").contains(words),
                "{metadata}: {error:#}"
            );
        }
    }
    // Nor does an owner come to control it.
    let get = ["get", "sandbox", "old", "-n", &namespace];
    let uid = [get.as_slice(), &["-ojsonpath={.metadata.uid}"]].concat();
    let uid = env.plane.kubectl(&uid).await?;
    let owned = |controller: bool| {
        json!({"ownerReferences": [{"apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "name": "old", "uid": uid.trim(), "controller": controller}]})
    };
    env.make(&sandbox("owned", owned(false))).await?;
    let patch = json!({ "metadata": owned(true) }).to_string();
    let change = ["--as=tenant", "patch", "sandbox", "owned", "-n", &namespace];
    let change = [&change[..], &["--type=merge", "-p", &patch]].concat();
    let error = env.plane.kubectl(&change).await.err();
    let error = error.context("an owner was made the controller")?;
    ensure!(format!("{error:#}").contains("belong to"), "{error:#}");
    // Who may do anything may restore a backup.
    let mut restored = Vec::new();
    for (number, (metadata, _)) in refused.iter().enumerate() {
        let name = format!("restored-{number}");
        env.make(&sandbox(&name, metadata.clone())).await?;
        restored.push(name);
    }
    // The garbage collector looks for owners of unknown versions again and again.
    let delete = [
        "-n",
        &namespace,
        "delete",
        "sandbox",
        "--ignore-not-found",
        "--wait=false",
    ];
    let restored: Vec<&str> = restored.iter().map(String::as_str).collect();
    env.plane
        .kubectl(&[&delete[..], &restored].concat())
        .await?;
    Ok(())
}

pub(crate) async fn an_ephemeral_container_is_looked_at_too(env: &Env) -> Result<()> {
    let proper_context = &proper()["container"]["securityContext"];
    for (namespace, fields, bad, good, words) in [
        (
            &env.plain,
            json!({}),
            json!({"privileged": true}),
            json!({"privileged": false}),
            "must not set privileged",
        ),
        (
            &env.restricted,
            proper(),
            json!({"allowPrivilegeEscalation": false}),
            proper_context.clone(),
            "must drop capability ALL",
        ),
    ] {
        let pods: Api<Pod> = Api::namespaced(env.plane.client(), namespace);
        let mut pod = pod(&fields);
        pod["metadata"]["name"] = json!("debugged");
        let params = PostParams::default();
        pods.create(&params, &serde_json::from_value(pod)?).await?;
        let debug = async |name: &str, context: &Value| {
            let container = json!({"name": name, "image": "busybox", "securityContext": context});
            let patch = Patch::Strategic(json!({"spec": {"ephemeralContainers": [container]}}));
            let params = PatchParams::default();
            pods.patch_ephemeral_containers("debugged", &params, &patch)
                .await
        };
        let refused = debug("bad", &bad).await.err();
        let refused = refused.with_context(|| format!("let in: {bad}"))?;
        ensure!(refused.to_string().contains(words), "{refused}");
        debug("good", &good).await?;
    }
    Ok(())
}

/// Objects of the mission, as they are, and the Pods that come of them.
pub(crate) async fn the_examples_pass(env: &Env) -> Result<()> {
    for example in [
        "sandbox",
        "sandbox-template",
        "sandbox-warmpool",
        "sandbox-claim",
    ] {
        let file = deploy().join(format!("examples/{example}.yaml"));
        let file = file.display().to_string();
        env.plane
            .kubectl(&["apply", "-n", "default", "-f", &file])
            .await?;
    }
    for (kind, name) in [
        ("sandbox", "sandbox-example-2"),
        ("sandboxclaim", "sandbox-claim"),
        ("sandboxwarmpool", "python-runtime-warmpool"),
    ] {
        env.ready("default", &format!("{kind}/{name}")).await?;
    }
    let pods: Api<Pod> = Api::namespaced(env.plane.client(), "default");
    let of_class = |pod: &&Pod| {
        let spec = pod.spec.as_ref();
        spec.is_some_and(|s| s.runtime_class_name.as_deref() == Some("gvisor"))
    };
    // The Sandbox, the claim, and two for the pool, which may not have made the second again yet.
    let mut made = Vec::new();
    let all = wait::until("four Pods", wait::SOON, async || {
        made = pods.list(&ListParams::default()).await.ok()?.items;
        (made.iter().filter(of_class).count() == 4).then_some(())
    });
    all.await.with_context(|| format!("{made:#?}"))
}
