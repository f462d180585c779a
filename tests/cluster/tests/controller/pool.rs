// SPDX-License-Identifier: Apache-2.0

//! Pools and templates.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kiln_cluster::standin::FATE;
use kiln_crds::{Sandbox, SandboxTemplate, SandboxWarmPool, keys};
use kiln_tests::wait;
use kube::ResourceExt;
use serde_json::json;

use crate::env::{Conditions, Env, Namespace, controller_of, line, merge, same};

async fn uids(ns: &Namespace<'_>, pool: &str) -> Result<BTreeSet<String>> {
    let all = ns.list::<Sandbox>().await?;
    let of_pool = all.iter().filter(|s| {
        s.metadata.deletion_timestamp.is_none()
            && controller_of(*s).is_some_and(|(_, _, name)| name == pool)
    });
    Ok(of_pool.filter_map(ResourceExt::uid).collect())
}

pub(crate) async fn one_holds_what_its_spec_says(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    let pool = ns.pool("p", "t", 3).await?;
    let status = pool.status.clone().unwrap();
    let selector = format!("{}={}", keys::WARM_POOL, keys::name_hash("p"));
    same("selector", &status.selector, &Some(selector))?;
    same(
        "condition",
        &status.conditions[0].reason.as_str(),
        &"PoolReady",
    )?;
    for sandbox in ns.list::<Sandbox>().await? {
        ensure!(sandbox.name_any().starts_with("p-"));
        same(
            "pool",
            &sandbox.labels()[keys::WARM_POOL],
            &keys::name_hash("p"),
        )?;
        same(
            "template",
            &sandbox.labels()[keys::TEMPLATE_REF_HASH],
            &keys::name_hash("t"),
        )?;
        let pod: k8s_openapi::api::core::v1::Pod = ns.get(&sandbox.name_any()).await?;
        same(
            "the Pod's pool",
            &pod.labels()[keys::WARM_POOL],
            &keys::name_hash("p"),
        )?;
        same(
            "eviction",
            &pod.annotations()[keys::SAFE_TO_EVICT].as_str(),
            &"true",
        )?;
        let spec = pod.spec.unwrap();
        same("token", &spec.automount_service_account_token, &Some(false))?;
        same("DNS", &spec.dns_policy.as_deref(), &Some("None"))?;
    }
    // One that is deleted is made anew.
    let first = ns.list::<Sandbox>().await?.remove(0);
    ns.delete::<Sandbox>(&first.name_any()).await?;
    wait::until("another", wait::SOON, async || {
        let now = uids(&ns, "p").await.ok()?;
        (now.len() == 3 && !now.contains(&first.uid()?)).then_some(())
    })
    .await?;
    ns.delete::<SandboxWarmPool>("p").await?;
    ns.until_gone::<Sandbox>(&first.name_any()).await
}

/// The next ones have more time, and those that wait behind a gate have no end.
pub(crate) async fn one_that_is_never_ready_in_time_is_not_made_without_end(
    env: &Env,
) -> Result<()> {
    let ns = env.namespace().await?;
    let pending = json!({"podTemplate": {"metadata": {"annotations": {FATE: "pending"}}}});
    let mut gated = pending.clone();
    gated["podTemplate"]["spec"]["schedulingGates"] = json!([{"name": "kiln.test/gate"}]);
    for (name, template) in [("slow", pending), ("gated", gated)] {
        ns.template(name, template).await?;
        let spec = json!({"replicas": 2, "readinessGracePeriodSeconds": 30,
            "sandboxTemplateRef": {"name": name}});
        ns.make::<SandboxWarmPool>(name, json!({ "spec": spec }))
            .await?;
    }
    let too_short = json!({"spec": {"readinessGracePeriodSeconds": 29}});
    let refused = ns.patch::<SandboxWarmPool>("slow", too_short).await;
    ensure!(format!("{:#}", refused.unwrap_err()).contains("greater than or equal to 30"));
    let full = async |pool: &str| {
        let two = async || uids(&ns, pool).await.ok().filter(|uids| uids.len() == 2);
        wait::until("two Sandboxes", wait::SOON, two).await
    };
    let (slow, gates) = (full("slow").await?, full("gated").await?);
    let words = "Sandboxes that are not ready within 30 s are replaced";
    ns.until_told("SandboxWarmPool", "slow", words).await?;
    wait::until("others", wait::SOON, async || {
        let now = uids(&ns, "slow").await.ok()?;
        (now.len() == 2 && now.is_disjoint(&slow)).then_some(())
    })
    .await?;
    same("gated Sandboxes", &uids(&ns, "gated").await?, &gates)?;
    let gated = ns.list::<Sandbox>().await?;
    let of_gated = |s: &&Sandbox| {
        s.metadata
            .uid
            .as_ref()
            .is_some_and(|uid| gates.contains(uid))
    };
    for sandbox in gated.iter().filter(of_gated) {
        let why = line(sandbox.conditions(), "PodScheduled");
        ensure!(
            why.as_ref()
                .is_some_and(|w| w.starts_with("False SchedulingGated")),
            "{why:?}"
        );
    }
    Ok(())
}

pub(crate) async fn one_takes_in_what_a_former_pool_has_left(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 3).await?;
    let left = uids(&ns, "p").await?;
    let orphan = ["delete", "swp/p", "--cascade=orphan", "-n", &ns.name];
    env.plane.kubectl(&orphan).await?;
    wait::until("orphans", wait::SOON, async || {
        let all = ns.list::<Sandbox>().await.ok()?;
        let are = all.len() == 3 && all.iter().all(|s| controller_of(s).is_none());
        are.then_some(())
    })
    .await?;
    // Of a former state, of another Pod, with more on it: these are nobody's any more.
    let strays = ns.list::<Sandbox>().await?.remove(0);
    let labels = json!(strays.labels());
    let annotations = json!({keys::TEMPLATE_REF: "t"});
    let stray = |name: &str, change: serde_json::Value| {
        let mut spec = json!({"podTemplate": {"spec": {
            "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "pause"}],
            "dnsConfig": {"nameservers": ["8.8.8.8", "1.1.1.1"]}, "dnsPolicy": "None",
        }}});
        merge(&mut spec, &change);
        let fields =
            json!({"metadata": {"labels": labels, "annotations": annotations}, "spec": spec});
        let name = name.to_owned();
        let ns = &ns;
        async move { ns.make::<Sandbox>(&name, fields).await }
    };
    let other =
        json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "evil"}]}}});
    stray("stray-image", other).await?;
    let marked = json!({"podTemplate": {"metadata": {"annotations": {"opt": "in"}}}});
    stray("stray-mark", marked).await?;
    let twin = stray("twin", json!({})).await?;
    // Whoever has seen so much of it has also seen that the others are nobody's.
    ns.until_condition::<Sandbox>("twin", "Ready", "True")
        .await?;
    ns.pool("p", "t", 4).await?;
    let mut wanted = left;
    wanted.extend(twin.uid());
    same("members", &uids(&ns, "p").await?, &wanted)?;
    for name in ["stray-image", "stray-mark"] {
        let stray: Sandbox = ns.get(name).await?;
        ensure!(controller_of(&stray).is_none(), "{name} was taken in");
    }
    // What comes back can be claimed.
    ns.claim("c", "p").await?;
    ensure!(wanted.contains(&ns.claimed("c").await?.uid().unwrap()));
    Ok(())
}

pub(crate) async fn one_follows_its_scale(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 2).await?;
    for replicas in [5, 1, 0] {
        let scale = format!("--replicas={replicas}");
        env.plane
            .kubectl(&["scale", &scale, "swp/p", "-n", &ns.name])
            .await?;
        ns.until_ready("p", replicas).await?;
        let count = usize::try_from(replicas)?;
        wait::until("the rest to go", wait::SOON, async || {
            let left = ns.list::<Sandbox>().await.ok()?;
            (left.len() == count).then_some(())
        })
        .await?;
    }
    Ok(())
}

pub(crate) async fn what_has_ended_is_replaced(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let ends = json!({"podTemplate": {"metadata": {"annotations": {FATE: "succeeded"}}, "spec": {"restartPolicy": "OnFailure"}}});
    ns.template("t", ends).await?;
    let spec = json!({"replicas": 1, "sandboxTemplateRef": {"name": "t"}});
    ns.make::<SandboxWarmPool>("p", json!({ "spec": spec }))
        .await?;
    let mut seen = BTreeSet::new();
    wait::until("a second one", wait::SOON, async || {
        seen.extend(uids(&ns, "p").await.ok()?);
        (seen.len() > 1).then_some(())
    })
    .await?;
    // It takes its time: a program that ends at once must not make the pool spin.
    ensure!(seen.len() == 2, "{} at once", seen.len());
    // Else it goes on, and who counts writes counts its, too.
    ns.delete::<SandboxWarmPool>("p").await
}

pub(crate) async fn a_changed_template_replaces_or_waits(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    for (pool, strategy) in [("eager", "Recreate"), ("lazy", "OnReplenish")] {
        let spec = json!({"replicas": 2, "sandboxTemplateRef": {"name": "t"}, "updateStrategy": {"type": strategy}});
        ns.make::<SandboxWarmPool>(pool, json!({ "spec": spec }))
            .await?;
        ns.until_ready(pool, 2).await?;
    }
    let (eager, lazy) = (uids(&ns, "eager").await?, uids(&ns, "lazy").await?);
    // What is only about the template itself changes nothing.
    ns.patch::<SandboxTemplate>("t", json!({"metadata": {"annotations": {"a": "b"}}}))
        .await?;
    let image = json!({"spec": {"podTemplate": {"spec": {"containers": [{"name": "main", "image": "newer"}]}}}});
    ns.patch::<SandboxTemplate>("t", image).await?;
    wait::until("all to be replaced", wait::SOON, async || {
        let now = uids(&ns, "eager").await.ok()?;
        (now.len() == 2 && now.is_disjoint(&eager)).then_some(())
    })
    .await?;
    ns.until_ready("eager", 2).await?;
    same("the lazy pool", &uids(&ns, "lazy").await?, &lazy)?;
    // Used up ones come back new.
    ns.claim("c", "lazy").await?;
    let claimed = ns.claimed("c").await?;
    ensure!(lazy.contains(&claimed.uid().unwrap()));
    ns.until_ready("lazy", 2).await?;
    let images: BTreeSet<String> = ns
        .list::<Sandbox>()
        .await?
        .iter()
        .filter(|s| controller_of(*s).is_some_and(|(_, _, name)| name == "lazy"))
        .filter_map(|s| s.spec.pod_template.spec.containers[0].image.clone())
        .collect();
    same(
        "images",
        &images,
        &BTreeSet::from(["newer".to_owned(), "pause".to_owned()]),
    )
}

pub(crate) async fn another_template_is_followed_and_other_pools_are_left_alone(
    env: &Env,
) -> Result<()> {
    let ns = env.namespace().await?;
    for template in ["a", "b"] {
        ns.template(template, json!({})).await?;
    }
    let recreate = json!({"replicas": 2, "sandboxTemplateRef": {"name": "a"}, "updateStrategy": {"type": "Recreate"}});
    for pool in ["moves", "stays"] {
        ns.make::<SandboxWarmPool>(pool, json!({ "spec": recreate }))
            .await?;
        ns.until_ready(pool, 2).await?;
    }
    let (moves, stays) = (uids(&ns, "moves").await?, uids(&ns, "stays").await?);
    ns.patch::<SandboxWarmPool>(
        "moves",
        json!({"spec": {"sandboxTemplateRef": {"name": "b"}}}),
    )
    .await?;
    wait::until("all to be replaced", wait::SOON, async || {
        let now = uids(&ns, "moves").await.ok()?;
        (now.len() == 2 && now.is_disjoint(&moves)).then_some(())
    })
    .await?;
    same("the other pool", &uids(&ns, "stays").await?, &stays)
}

pub(crate) async fn one_says_why_it_is_not_ready(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let spec =
        |template: &str| json!({"spec": {"replicas": 1, "sandboxTemplateRef": {"name": template}}});
    ns.make::<SandboxWarmPool>("p", spec("missing")).await?;
    let is = "False TemplateNotFound: SandboxTemplate \"missing\" not found";
    ns.until_condition::<SandboxWarmPool>("p", "Ready", is)
        .await?;
    ns.until_warned("p", "SandboxTemplate \"missing\" not found")
        .await?;
    ns.template("missing", json!({})).await?;
    ns.until_condition::<SandboxWarmPool>("p", "Ready", "True PoolReady")
        .await?;
    let homeless = json!({"podTemplate": {"metadata": {"annotations": {FATE: "unschedulable"}}}});
    ns.template("homeless", homeless).await?;
    ns.make::<SandboxWarmPool>("q", spec("homeless")).await?;
    let is = "False Unschedulable: 0/4 nodes are available";
    ns.until_condition::<SandboxWarmPool>("q", "Ready", is)
        .await?;
    // Without its template a pool keeps what it has.
    ns.delete::<SandboxTemplate>("missing").await?;
    ns.until_condition::<SandboxWarmPool>("p", "Ready", "False TemplateNotFound")
        .await?;
    same("kept", &uids(&ns, "p").await?.len(), &1)
}

pub(crate) async fn a_template_has_its_network_policy(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    let name = "t-network-policy";
    let policy: NetworkPolicy = ns
        .until(name, "a policy", |p: &NetworkPolicy| Some(p.clone()))
        .await?;
    ensure!(controller_of(&policy).is_some_and(|(_, kind, _)| kind == "SandboxTemplate"));
    let spec = serde_json::to_value(policy.spec)?;
    same("types", &spec["policyTypes"], &json!(["Ingress", "Egress"]))?;
    let except = spec["egress"][0]["to"][0]["ipBlock"]["except"].as_array();
    for net in ["169.254.0.0/16", "100.64.0.0/10"] {
        ensure!(
            except.is_some_and(|all| all.contains(&json!(net))),
            "{spec}"
        );
    }
    // What somebody changes by hand is put right.
    ns.patch::<NetworkPolicy>(name, json!({"spec": {"egress": []}}))
        .await?;
    ns.until(name, "the rule again", |p: &NetworkPolicy| {
        p.spec
            .as_ref()?
            .egress
            .as_ref()
            .filter(|rules| !rules.is_empty())
            .map(|_| ())
    })
    .await?;
    let rules = json!({"spec": {"networkPolicy": {"ingress": [{"ports": [{"port": 8888, "protocol": "TCP"}]}]}}});
    ns.patch::<SandboxTemplate>("t", rules).await?;
    ns.until(name, "its own rules", |p: &NetworkPolicy| {
        let spec = p.spec.as_ref()?;
        (spec.egress.is_none() && spec.ingress.as_ref()?[0].ports.is_some()).then_some(())
    })
    .await?;
    // What somebody adds by hand goes, where nothing else is said either.
    ns.patch::<NetworkPolicy>(name, json!({"spec": {"egress": [{}]}}))
        .await?;
    ns.until(name, "no rule of others", |p: &NetworkPolicy| {
        p.spec.as_ref()?.egress.is_none().then_some(())
    })
    .await?;
    let unmanaged = json!({"spec": {"networkPolicyManagement": "Unmanaged"}});
    ns.patch::<SandboxTemplate>("t", unmanaged).await?;
    ns.until_gone::<NetworkPolicy>(name).await
}
