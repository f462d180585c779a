// SPDX-License-Identifier: Apache-2.0

//! Sandboxes.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    core::v1::{Event, PersistentVolumeClaim, Pod, Service},
    networking::v1::NetworkPolicy,
};
use kiln_cluster::{controller::Controller, standin::FATE};
use kiln_crds::{Sandbox, SandboxClaim, SandboxWarmPool, keys};
use kiln_tests::wait;
use kube::{ResourceExt, api::ListParams};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::env::{Env, FLAGS, Namespace, controller_of, line, merge, same};

const V1BETA1: &str = "agents.x-k8s.io/v1beta1";

pub(crate) async fn one_gets_its_pod_its_service_and_its_whole_status(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let spec = json!({"service": true, "podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause", "ports": [{"containerPort": 80}]}]}}});
    ns.sandbox("box", spec).await?;
    let sandbox: Sandbox = ns.until_condition("box", "Ready", "True").await?;
    let status = sandbox.status.clone().context("no status")?;
    let ready = line(&status.conditions, "Ready");
    same(
        "Ready",
        &ready,
        &Some("True DependenciesReady: Pod is Ready; Service Exists".to_owned()),
    )?;
    let suspended = line(&status.conditions, "Suspended");
    same(
        "Suspended",
        &suspended,
        &Some("False NotSuspended: Sandbox is not suspended".to_owned()),
    )?;
    let scheduled = line(&status.conditions, "PodScheduled");
    same(
        "PodScheduled",
        &scheduled,
        &Some("True PodScheduled: ".to_owned()),
    )?;
    ensure!(
        status
            .conditions
            .iter()
            .all(|c| c.observed_generation == Some(1))
    );
    same("service", &status.service, &Some("box".to_owned()))?;
    same(
        "FQDN",
        &status.service_fqdn,
        &Some(format!("box.{}.svc.cluster.local", ns.name)),
    )?;

    let hash = keys::name_hash("box");
    same(
        "selector",
        &status.selector,
        &Some(format!(
            "{}={},{}={}",
            keys::SANDBOX_NAME_HASH,
            keys::name_hash("box"),
            keys::SANDBOX_NAME_DIGEST,
            keys::name_digest("box")
        )),
    )?;
    let owner = Some((V1BETA1.to_owned(), "Sandbox".to_owned(), "box".to_owned()));
    let pod: Pod = ns.get("box").await?;
    same("the Pod's owner", &controller_of(&pod), &owner)?;
    same(
        "the Pod's hash",
        &pod.labels().get(keys::SANDBOX_NAME_HASH),
        &Some(&hash),
    )?;
    let node = pod.spec.and_then(|s| s.node_name);
    same("node", &status.node_name, &node)?;
    let ips = pod.status.and_then(|s| s.pod_ip).map(|ip| vec![ip]);
    same("addresses", &status.pod_ips, &ips)?;
    same(
        "noted Pod",
        &sandbox
            .annotations()
            .get(keys::POD_NAME)
            .map(String::as_str),
        &Some("box"),
    )?;

    let service: Service = ns.get("box").await?;
    same("the Service's owner", &controller_of(&service), &owner)?;
    let spec = service.spec.context("no spec")?;
    same(
        "cluster address",
        &spec.cluster_ip.as_deref(),
        &Some("None"),
    )?;
    same(
        "selected",
        &spec
            .selector
            .and_then(|s| s.get(keys::SANDBOX_NAME_HASH).cloned()),
        &Some(hash),
    )?;
    same(
        "port",
        &spec.ports.and_then(|p| p[0].name.clone()).as_deref(),
        &Some("p-80-tcp"),
    )?;

    ns.patch::<Sandbox>("box", json!({"spec": {"service": false}}))
        .await?;
    ns.until_gone::<Service>("box").await?;
    ns.delete::<Sandbox>("box").await?;
    ns.until_gone::<Pod>("box").await
}

pub(crate) async fn one_is_suspended_and_resumed_in_the_words_of_either_version(
    env: &Env,
) -> Result<()> {
    let ns = env.namespace().await?;
    ns.sandbox("box", json!({})).await?;
    ns.until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    for (suspend, resume) in [
        (
            json!({"operatingMode": "Suspended"}),
            json!({"operatingMode": "Running"}),
        ),
        (json!({"replicas": 0}), json!({"replicas": 1})),
    ] {
        let old: Pod = ns.get("box").await?;
        ns.patch::<Sandbox>("box", json!({ "spec": suspend }))
            .await?;
        let is = "True PodTerminated: Pod has been terminated. Sandbox is suspended";
        let sandbox: Sandbox = ns.until_condition("box", "Suspended", is).await?;
        let ready = line(&sandbox.status.context("no status")?.conditions, "Ready");
        same(
            "Ready",
            &ready,
            &Some("False SandboxSuspended: Sandbox is suspended".to_owned()),
        )?;
        ns.until_gone::<Pod>("box").await?;
        ns.patch::<Sandbox>("box", json!({ "spec": resume }))
            .await?;
        ns.until_condition::<Sandbox>("box", "Ready", "True")
            .await?;
        let new: Pod = ns.get("box").await?;
        ensure!(old.uid() != new.uid());
    }
    // The scale subresource of v1alpha1, as an autoscaler uses it.
    let scale = [
        "scale",
        "--replicas=0",
        "sandboxes.v1alpha1.agents.x-k8s.io/box",
        "-n",
        &ns.name,
    ];
    env.plane.kubectl(&scale).await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "True")
        .await?;
    Ok(())
}

/// Reasons of the events about a Sandbox, each once.
async fn reasons(ns: &Namespace<'_>, sandbox: &str) -> Result<BTreeSet<String>> {
    let events = ns.list::<Event>().await?.into_iter();
    let about = events.filter(|e| {
        let object = &e.involved_object;
        object.name.as_deref() == Some(sandbox) && object.kind.as_deref() == Some("Sandbox")
    });
    Ok(about.filter_map(|e| e.reason).collect())
}

/// Goes through what a Sandbox can become, and returns the reasons of the events when all of
/// `expected` are there.
async fn told(ns: &Namespace<'_>, expected: &[&str]) -> Result<BTreeSet<String>> {
    ns.sandbox("box", json!({})).await?;
    ns.until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    let suspend = json!({"spec": {"operatingMode": "Suspended"}});
    ns.patch::<Sandbox>("box", suspend).await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "True")
        .await?;
    let end = json!({"podTemplate": {"metadata": {"annotations": {FATE: "failed"}}}});
    let resume = json!({"spec": {"operatingMode": "Running"}});
    let mut resume_to_fail = json!({ "spec": end });
    merge(&mut resume_to_fail, &resume);
    ns.patch::<Sandbox>("box", resume_to_fail).await?;
    ns.until_condition::<Sandbox>("box", "Finished", "True PodFailed")
        .await?;
    let over = json!({"spec": {"shutdownTime": "2020-01-01T00:00:00Z"}});
    ns.patch::<Sandbox>("box", over).await?;
    ns.until_condition::<Sandbox>("box", "Ready", "False SandboxExpired")
        .await?;
    // Of a Pod that cannot be, it is told always.
    let no_node = json!({"podTemplate": {"spec": {"containers": [{"name": "-", "image": "i"}]}}});
    ns.sandbox("wrong", no_node).await?;
    let all = wait::until("events of refusals", wait::SOON, async || {
        let refused = reasons(ns, "wrong").await.ok()?;
        let told = reasons(ns, "box").await.ok()?;
        let is_all = expected.iter().all(|reason| told.contains(*reason));
        (refused.contains("SandboxPodCreateFailed") && is_all).then_some(told)
    });
    all.await
        .with_context(|| format!("of {expected:?}, in {}", ns.name))
}

pub(crate) async fn what_becomes_of_one_is_told_where_that_is_wanted(env: &Env) -> Result<()> {
    let quiet = told(&env.namespace().await?, &[]).await?;
    ensure!(quiet.is_empty(), "{quiet:?}");
    let mut held = env.controller.lock().await;
    let old = held.take().context("no controller")?;
    old.signal(Signal::SIGTERM)?;
    old.ended().await?;
    let flags = [&FLAGS[..], &["--disable-sandbox-events=false"]].concat();
    let talks = Controller::start(&env.plane, &flags).await?;
    let expected = [
        "SandboxPodCreated",
        "SandboxReady",
        "SandboxSuspended",
        "PodFailed",
        "SandboxExpired",
    ];
    told(&env.namespace().await?, &expected).await?;
    talks.signal(Signal::SIGTERM)?;
    talks.ended().await?;
    *held = Some(Controller::start(&env.plane, &FLAGS).await?);
    Ok(())
}

/// Suspended is what has no Pod any more.
pub(crate) async fn a_pod_that_takes_its_time_is_waited_for(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.sandbox("box", json!({})).await?;
    ns.until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    let held = json!({"metadata": {"finalizers": ["kiln.test/hold"]}});
    ns.patch::<Pod>("box", held).await?;
    ns.patch::<Sandbox>("box", json!({"spec": {"operatingMode": "Suspended"}}))
        .await?;
    let is = "False PodTerminating: Pod is terminating. Sandbox is suspending";
    ns.until_condition::<Sandbox>("box", "Suspended", is)
        .await?;
    ns.patch::<Pod>("box", json!({"metadata": {"finalizers": null}}))
        .await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "True PodTerminated")
        .await?;
    Ok(())
}

pub(crate) async fn a_pod_that_is_deleted_comes_back(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.sandbox("box", json!({})).await?;
    ns.until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    let old: Pod = ns.get("box").await?;
    ns.delete::<Pod>("box").await?;
    ns.until("box", "another Pod", |pod: &Pod| {
        (pod.uid() != old.uid()).then_some(())
    })
    .await?;
    let sandbox: Sandbox = ns.until_condition("box", "Ready", "True").await?;
    let suspended = line(
        &sandbox.status.context("no status")?.conditions,
        "Suspended",
    );
    ensure!(suspended.is_some_and(|s| s.starts_with("False NotSuspended")));
    Ok(())
}

pub(crate) async fn a_strangers_pod_is_left_alone(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let stranger: Pod = ns
        .make(
            "box",
            json!({"spec": {"containers": [{"name": "x", "image": "x"}]}}),
        )
        .await?;
    ns.sandbox("box", json!({})).await?;
    let is = "False ReconcilerError: Error seen: cannot adopt unowned pod \"box\"";
    ns.until_condition::<Sandbox>("box", "Ready", is).await?;
    ns.until_warned("box", "cannot adopt unowned pod").await?;
    ns.patch::<Sandbox>("box", json!({"spec": {"operatingMode": "Suspended"}}))
        .await?;
    ns.until_condition::<Sandbox>("box", "Suspended", "False PodNotOwned")
        .await?;
    let still: Pod = ns.get("box").await?;
    same("the stranger", &still.uid(), &stranger.uid())?;
    // With leave it is taken over.
    ns.patch::<Sandbox>("box", json!({"spec": {"operatingMode": "Running"}}))
        .await?;
    ns.patch::<Pod>(
        "box",
        json!({"metadata": {"labels": {keys::ADOPTABLE: "true"}}}),
    )
    .await?;
    ns.until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    let adopted: Pod = ns.get("box").await?;
    same("the stranger", &adopted.uid(), &stranger.uid())?;
    ensure!(controller_of(&adopted).is_some_and(|(_, kind, _)| kind == "Sandbox"));
    Ok(())
}

/// Who collects Pods that have ended takes no work back.
pub(crate) async fn what_has_finished_runs_no_second_time(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let ends = json!({"podTemplate": {"metadata": {"annotations": {FATE: "succeeded"}}}});
    ns.sandbox("box", ends).await?;
    ns.until_condition::<Sandbox>("box", "Finished", "True PodSucceeded")
        .await?;
    ns.delete::<Pod>("box").await?;
    ns.until_gone::<Pod>("box").await?;
    let has_seen = |sandbox: &Sandbox| {
        let status = sandbox.status.as_ref()?;
        (status.replicas == Some(0)).then(|| status.conditions.clone())
    };
    let conditions = ns.until("box", "no Pod", has_seen).await?;
    for (kind, begins) in [
        ("Finished", "True PodSucceeded"),
        ("Ready", "False PodSucceeded"),
    ] {
        let line = line(&conditions, kind);
        ensure!(
            line.as_ref().is_some_and(|l| l.starts_with(begins)),
            "{line:?}"
        );
    }
    ensure!(
        ns.api::<Pod>().get_opt("box").await?.is_none(),
        "it runs again"
    );
    // Unless its user says so.
    ns.patch::<Sandbox>("box", json!({"spec": {"operatingMode": "Suspended"}}))
        .await?;
    ns.until("box", "an end of the end", |sandbox: &Sandbox| {
        let conditions = &sandbox.status.as_ref()?.conditions;
        line(conditions, "Finished").is_none().then_some(())
    })
    .await?;
    ns.patch::<Sandbox>("box", json!({"spec": {"operatingMode": "Running"}}))
        .await?;
    ns.until("box", "a Pod", |pod: &Pod| pod.uid()).await?;
    Ok(())
}

pub(crate) async fn a_pod_that_terminates_is_ready_for_nobody(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 2).await?;
    let members = ns.list::<Sandbox>().await?;
    let going = members.first().context("an empty pool")?.name_any();
    let held = json!({"metadata": {"finalizers": ["kiln.test/hold"]}});
    ns.patch::<Pod>(&going, held).await?;
    ns.delete::<Pod>(&going).await?;
    let is = "False DependenciesNotReady: Pod is terminating";
    ns.until_condition::<Sandbox>(&going, "Ready", is).await?;
    ns.until("p", "one that is ready", |pool: &SandboxWarmPool| {
        (pool.status.as_ref()?.ready_replicas == 1).then_some(())
    })
    .await?;
    for name in ["first", "second"] {
        ns.claim(name, "p").await?;
        let sandbox = ns.claimed(name).await?.name_any();
        ensure!(sandbox != going, "{name} has got a Pod that terminates");
    }
    ns.patch::<Pod>(&going, json!({"metadata": {"finalizers": null}}))
        .await?;
    ns.until_condition::<Sandbox>(&going, "Ready", "True")
        .await?;
    Ok(())
}

/// Its Service would have the name.
pub(crate) async fn a_long_name_and_a_service_do_not_go_together(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let long = "x".repeat(64);
    let refused = ns.sandbox(&long, json!({"service": true})).await;
    let words = format!("{:#}", refused.unwrap_err());
    ensure!(words.contains("no more than 63 characters"), "{words}");
    ns.sandbox(&long, json!({})).await?;
    let later = json!({"spec": {"service": true}});
    let refused = ns.patch::<Sandbox>(&long, later).await;
    ensure!(format!("{:#}", refused.unwrap_err()).contains("no more than 63 characters"));
    ns.until_condition::<Sandbox>(&long, "Ready", "True")
        .await?;
    ns.sandbox(&"y".repeat(63), json!({"service": true}))
        .await?;
    Ok(())
}

/// Names of one hash, which are found in a second.
pub(crate) async fn no_name_leads_to_anothers_pod(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let names = ["agent-jen08m1", "agent-znis702"];
    same(
        "hash",
        &keys::name_hash(names[0]),
        &keys::name_hash(names[1]),
    )?;
    let selects = async |selector: &BTreeMap<String, String>| -> Result<Vec<String>> {
        let terms: Vec<String> = selector.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let params = ListParams::default().labels(&terms.join(","));
        let pods = ns.api::<Pod>().list(&params).await?;
        Ok(pods.items.iter().map(ResourceExt::name_any).collect())
    };
    for name in names {
        ns.template(name, json!({})).await?;
        ns.claim_with(name, json!({"sandboxTemplateRef": {"name": name}}))
            .await?;
    }
    for name in names {
        ns.claimed(name).await?;
        ns.patch::<Sandbox>(name, json!({"spec": {"service": true}}))
            .await?;
    }
    for name in names {
        let selector = ns
            .until(name, "a Service", |s: &Service| {
                s.spec.as_ref()?.selector.clone()
            })
            .await?;
        same(
            "Pods of the Service",
            &selects(&selector).await?,
            &vec![name.to_owned()],
        )?;
        let policy: NetworkPolicy = ns.get(&format!("{name}-network-policy")).await?;
        let of_policy = policy.spec.and_then(|s| s.pod_selector?.match_labels);
        let of_policy = of_policy.context("a policy for all")?;
        same(
            "Pods of the policy",
            &selects(&of_policy).await?,
            &vec![name.to_owned()],
        )?;
    }
    // A Pod of an earlier controller has its policy until it has the label.
    let policy = format!("{}-network-policy", names[0]);
    let unlabelled = json!({"metadata": {"labels": {keys::TEMPLATE_NAME_DIGEST: null}}});
    ns.patch::<Pod>(names[0], unlabelled).await?;
    let digest = keys::name_digest(names[0]);
    ns.until(names[0], "its label", |pod: &Pod| {
        (pod.labels().get(keys::TEMPLATE_NAME_DIGEST) == Some(&digest)).then_some(())
    })
    .await?;
    ns.until(&policy, "its selector", |p: &NetworkPolicy| {
        let labels = p
            .spec
            .as_ref()?
            .pod_selector
            .as_ref()?
            .match_labels
            .as_ref()?;
        labels
            .contains_key(keys::TEMPLATE_NAME_DIGEST)
            .then_some(())
    })
    .await
}

/// Disruption budgets and `kubectl scale` ask for it.
pub(crate) async fn every_sandbox_has_a_scale(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.sandbox("box", json!({})).await?;
    ns.until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    for version in ["v1alpha1", "v1beta1"] {
        let path = format!(
            "/apis/agents.x-k8s.io/{version}/namespaces/{}/sandboxes/box/scale",
            ns.name
        );
        let scale = env.plane.kubectl(&["get", "--raw", &path]).await?;
        let scale: Value = serde_json::from_str(&scale)?;
        same("spec", &scale["spec"]["replicas"], &json!(1))?;
        same("status", &scale["status"]["replicas"], &json!(1))?;
    }
    Ok(())
}

pub(crate) async fn one_ends_at_its_time(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let never = json!({"service": true, "shutdownTime": "9999-12-31T23:59:59Z"});
    ns.sandbox("stays", never.clone()).await?;
    let mut goes = never;
    goes["shutdownPolicy"] = json!("Delete");
    ns.sandbox("goes", goes).await?;
    for name in ["stays", "goes"] {
        ns.until_condition::<Sandbox>(name, "Ready", "True").await?;
        let soon = Timestamp::now() + SignedDuration::from_secs(2);
        ns.patch::<Sandbox>(name, json!({"spec": {"shutdownTime": soon.to_string()}}))
            .await?;
    }
    let stays: Sandbox = ns
        .until_condition(
            "stays",
            "Ready",
            "False SandboxExpired: Sandbox has expired",
        )
        .await?;
    ensure!(stays.metadata.deletion_timestamp.is_none());
    ns.until_gone::<Pod>("stays").await?;
    ns.until_gone::<Service>("stays").await?;
    ns.until_gone::<Sandbox>("goes").await?;
    ns.until_gone::<Pod>("goes").await
}

pub(crate) async fn one_that_is_retained_keeps_that_it_has_finished(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let template = json!({"podTemplate": {"metadata": {"annotations": {FATE: "succeeded"}}}});
    ns.sandbox("box", template).await?;
    ns.until_condition::<Sandbox>(
        "box",
        "Finished",
        "True PodSucceeded: Pod completed successfully",
    )
    .await?;
    ns.patch::<Sandbox>(
        "box",
        json!({"spec": {"shutdownTime": "2020-01-01T00:00:00Z"}}),
    )
    .await?;
    ns.until_gone::<Pod>("box").await?;
    let sandbox: Sandbox = ns
        .until_condition("box", "Ready", "False SandboxExpired")
        .await?;
    let conditions = sandbox.status.context("no status")?.conditions;
    ensure!(line(&conditions, "Finished").is_some_and(|l| l.starts_with("True PodSucceeded")));
    ensure!(line(&conditions, "PodScheduled").is_none());
    Ok(())
}

pub(crate) async fn volume_claims_are_made_and_immutable(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let template = |name: &str| json!([{"metadata": {"name": name, "labels": {"a": "b"}}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}]);
    ns.sandbox("box", json!({"volumeClaimTemplates": template("data")}))
        .await?;
    let pod: Pod = ns
        .until("box", "a Pod", |pod: &Pod| Some(pod.clone()))
        .await?;
    let volumes = pod.spec.and_then(|s| s.volumes).unwrap_or_default();
    let claim = volumes
        .iter()
        .find_map(|v| v.persistent_volume_claim.as_ref());
    same(
        "claim",
        &claim.map(|c| c.claim_name.as_str()),
        &Some("data-box"),
    )?;
    let claim: PersistentVolumeClaim = ns.get("data-box").await?;
    ensure!(controller_of(&claim).is_some_and(|(_, kind, _)| kind == "Sandbox"));
    same(
        "label",
        &claim.labels().get(keys::SANDBOX_NAME_HASH),
        &Some(&keys::name_hash("box")),
    )?;
    ns.sandbox("plain", json!({})).await?;
    for (name, change) in [
        ("box", json!({"volumeClaimTemplates": template("other")})),
        ("box", json!({"volumeClaimTemplates": null})),
        ("plain", json!({"volumeClaimTemplates": template("new")})),
    ] {
        let refused = ns
            .patch::<Sandbox>(name, json!({ "spec": change }))
            .await
            .unwrap_err();
        ensure!(
            format!("{refused:#}").contains("volumeClaimTemplates is immutable"),
            "{refused:#}"
        );
    }
    Ok(())
}

/// A Pod would mount them, whoever they belong to: those of a StatefulSet have names of this form and
/// no owner.
pub(crate) async fn a_pod_waits_for_its_volume_claims(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let storage =
        json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}});
    let templates = json!([{"metadata": {"name": "data"}, "spec": storage}]);
    ns.template("t", json!({"volumeClaimTemplates": templates}))
        .await?;
    // Nobody's, and one of another Sandbox: "data-a" of "b", and "data" of "a-b".
    for name in ["data-postgres-0", "data-postgres-1"] {
        ns.make::<PersistentVolumeClaim>(name, json!({ "spec": storage }))
            .await?;
    }
    let other = json!([{"metadata": {"name": "data-a"}, "spec": storage}]);
    ns.sandbox("b", json!({"volumeClaimTemplates": other}))
        .await?;
    ns.until_condition::<Sandbox>("b", "Ready", "True").await?;
    let reference = json!({"sandboxTemplateRef": {"name": "t"}});
    for name in ["postgres-0", "a-b"] {
        ns.claim_with(name, reference.clone()).await?;
    }
    ns.sandbox("postgres-1", json!({"volumeClaimTemplates": templates}))
        .await?;
    for (name, words) in [
        ("postgres-0", "cannot adopt unowned PVC \"data-postgres-0\""),
        ("postgres-1", "cannot adopt unowned PVC \"data-postgres-1\""),
        ("a-b", "PVC \"data-a-b\""),
    ] {
        let is = "False ReconcilerError: Error seen: ";
        let sandbox: Sandbox = ns.until_condition(name, "Ready", is).await?;
        let ready = line(&sandbox.status.context("no status")?.conditions, "Ready");
        ensure!(
            ready.as_ref().is_some_and(|l| l.contains(words)),
            "{ready:?}"
        );
        ns.until_told("Sandbox", name, words).await?;
        ensure!(
            ns.api::<Pod>().get_opt(name).await?.is_none(),
            "{name} has a Pod"
        );
    }
    ns.until_condition::<SandboxClaim>("postgres-0", "Ready", "False ReconcilerError")
        .await?;
    // The Pod comes when the volume claim is given to the Sandbox.
    for name in ["postgres-0", "postgres-1"] {
        let given = json!({"metadata": {"labels": {keys::ADOPTABLE: "true"}}});
        ns.patch::<PersistentVolumeClaim>(&format!("data-{name}"), given)
            .await?;
        ns.until_condition::<Sandbox>(name, "Ready", "True").await?;
    }
    // A Pod that is there stays when its volume claim is somebody else's later.
    let before: Pod = ns.get("postgres-1").await?;
    ns.patch::<PersistentVolumeClaim>(
        "data-postgres-1",
        json!({"metadata": {"ownerReferences": null, "labels": null}}),
    )
    .await?;
    ns.patch::<Sandbox>(
        "postgres-1",
        json!({"metadata": {"labels": {"look": "again"}}}),
    )
    .await?;
    ns.until_condition::<Sandbox>("postgres-1", "Ready", "False ReconcilerError")
        .await?;
    let after: Pod = ns.get("postgres-1").await?;
    same("the Pod", &after.uid(), &before.uid())
}

pub(crate) async fn metadata_of_the_template_reaches_the_pod(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let metadata = |label: &str| json!({"podTemplate": {"metadata": {"labels": {"team": label}, "annotations": {"note": label}}}});
    ns.sandbox("box", metadata("a")).await?;
    let labelled = |team: &'static str| {
        move |pod: &Pod| {
            let is = pod.labels().get("team").map(String::as_str) == Some(team)
                && pod.annotations().get("note").map(String::as_str) == Some(team);
            is.then_some(())
        }
    };
    ns.until("box", "labels", labelled("a")).await?;
    ns.patch::<Sandbox>("box", json!({ "spec": metadata("b") }))
        .await?;
    ns.until("box", "new labels", labelled("b")).await?;
    let none = json!({"podTemplate": {"metadata": {"labels": null, "annotations": null}}});
    ns.patch::<Sandbox>("box", json!({ "spec": none })).await?;
    ns.until("box", "no labels", |pod: &Pod| {
        (!pod.labels().contains_key("team") && !pod.annotations().contains_key("note"))
            .then_some(())
    })
    .await
}
