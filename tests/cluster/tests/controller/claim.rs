// SPDX-License-Identifier: Apache-2.0

//! Claims.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use kiln_cluster::standin::FATE;
use kiln_crds::{Sandbox, SandboxClaim, SandboxTemplate, SandboxWarmPool, keys};
use kiln_tests::wait;
use kube::{ResourceExt, api::DeleteParams};
use serde_json::{Value, json};

use crate::env::{Env, Kind, Namespace, controller_of, line, same};

fn launch(sandbox: &Sandbox) -> &str {
    sandbox
        .labels()
        .get(keys::LAUNCH_TYPE)
        .map_or("", String::as_str)
}

pub(crate) async fn a_running_sandbox_changes_hands(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template(
        "t",
        json!({"podTemplate": {"metadata": {"labels": {"app": "x"}}}}),
    )
    .await?;
    ns.pool("p", "t", 2).await?;
    let before: BTreeSet<String> = ns
        .list::<Pod>()
        .await?
        .iter()
        .filter_map(ResourceExt::uid)
        .collect();
    let brings = json!({"warmPoolRef": {"name": "p"}, "additionalPodMetadata": {
        "labels": {"sandbox.users.io/team": "blue"}, "annotations": {"note": "y"},
    }});
    let claim: SandboxClaim = ns.claim_with("c", brings).await?;
    let sandbox = ns.claimed("c").await?;
    same("launch", &launch(&sandbox), &keys::WARM)?;
    let owner = (
        "extensions.agents.x-k8s.io/v1beta1".to_owned(),
        "SandboxClaim".to_owned(),
        "c".to_owned(),
    );
    same("owner", &controller_of(&sandbox), &Some(owner))?;
    ensure!(!sandbox.labels().contains_key(keys::WARM_POOL));
    same(
        "claim",
        &sandbox.labels().get(keys::CLAIM_UID).cloned(),
        &claim.uid(),
    )?;
    let uid = claim.uid();
    let pod: Pod = ns
        .until(&sandbox.name_any(), "the claim's labels", |pod: &Pod| {
            (pod.labels().get(keys::CLAIM_UID) == uid.as_ref()).then(|| pod.clone())
        })
        .await?;
    ensure!(
        before.contains(&pod.uid().context("no uid")?),
        "the Pod is a new one"
    );
    ensure!(!pod.labels().contains_key(keys::WARM_POOL));
    ensure!(!pod.annotations().contains_key(keys::SAFE_TO_EVICT));
    same(
        "brought",
        &pod.labels()
            .get("sandbox.users.io/team")
            .map(String::as_str),
        &Some("blue"),
    )?;
    same(
        "the template's",
        &pod.labels().get("app").map(String::as_str),
        &Some("x"),
    )?;
    let claim: SandboxClaim = ns.get("c").await?;
    let status = claim.status.context("no status")?;
    let ips = pod.status.and_then(|s| s.pod_ip).map(|ip| vec![ip]);
    same("addresses", &status.sandbox.and_then(|s| s.pod_ips), &ips)?;
    ns.until_ready("p", 2).await?;
    ns.delete::<SandboxClaim>("c").await?;
    ns.until_gone::<Pod>(&sandbox.name_any()).await
}

pub(crate) async fn the_words_of_v1alpha1_mean_what_they_meant(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    for template in ["t", "other"] {
        ns.template(template, json!({})).await?;
    }
    ns.pool("p", "t", 2).await?;
    ns.pool("q", "other", 1).await?;
    let of = |warmpool: Option<&str>| match warmpool {
        Some(pool) => json!({"sandboxTemplateRef": {"name": "t"}, "warmpool": pool}),
        None => json!({"sandboxTemplateRef": {"name": "t"}}),
    };
    for (name, warmpool, expected) in [
        ("any", None, "warm"),
        ("default", Some("default"), "warm"),
        ("none", Some("none"), "cold"),
    ] {
        ns.claim_with(name, of(warmpool)).await?;
        let sandbox = ns.claimed(name).await?;
        same(name, &launch(&sandbox), &expected)?;
        same(
            "template",
            &sandbox.annotations()[keys::TEMPLATE_REF].as_str(),
            &"t",
        )?;
    }
    ns.until_ready("p", 2).await?;
    ns.claim_with("named", of(Some("p"))).await?;
    let named = ns.claimed("named").await?;
    ensure!(launch(&named) == "warm" && named.name_any().starts_with("p-"));
    ns.claim_with("wrong", of(Some("q"))).await?;
    ns.until_condition::<SandboxClaim>("wrong", "Ready", "False WarmPoolNotFound")
        .await?;
    same(
        "the other pool",
        &ns.until_ready("q", 1).await?.status.unwrap().ready_replicas,
        &1,
    )
}

pub(crate) async fn a_hundred_at_once_get_a_hundred(env: &Env) -> Result<()> {
    const CLAIMS: usize = 100;
    const POOL: i32 = 20;
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", POOL).await?;
    let names: Vec<String> = (0..CLAIMS).map(|n| format!("c{n}")).collect();
    try_join_all(names.iter().map(|name| ns.claim(name, "p"))).await?;
    let sandboxes = ns.all_claimed(&names).await?;
    let distinct: BTreeSet<_> = sandboxes.iter().filter_map(ResourceExt::uid).collect();
    same("Sandboxes", &distinct.len(), &CLAIMS)?;
    let warm = sandboxes.iter().filter(|s| launch(s) == "warm").count();
    ensure!(warm >= usize::try_from(POOL)?, "{warm} of {POOL} were used");
    ns.until_ready("p", POOL).await?;
    Ok(())
}

pub(crate) async fn two_race_for_the_last(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    // The refill is never ready, so that there is one to race for.
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    let slow = json!({"spec": {"podTemplate": {"metadata": {"annotations": {FATE: "slow:2000"}}}}});
    ns.patch::<SandboxTemplate>("t", slow).await?;
    tokio::try_join!(ns.claim("a", "p"), ns.claim("b", "p"))?;
    let (a, b) = tokio::try_join!(ns.claimed("a"), ns.claimed("b"))?;
    ensure!(a.uid() != b.uid());
    for (sandbox, claim) in [(&a, "a"), (&b, "b")] {
        ensure!(controller_of(sandbox).is_some_and(|(_, _, name)| name == claim));
    }
    Ok(())
}

async fn outcome(ns: &Namespace<'_>, name: &str) -> Result<String> {
    ns.until(name, "an outcome", |claim: &SandboxClaim| {
        let line = line(&claim.status.as_ref()?.conditions, "Ready")?;
        let is_final = line.starts_with("True")
            || line.contains("Rejected")
            || line.contains("TemplatesError");
        is_final.then_some(line)
    })
    .await
}

pub(crate) async fn env_and_volumes_follow_the_policy(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let volume = |name: &str| json!([{"metadata": {"name": name}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}]);
    for policy in ["Allowed", "Overrides", "Disallowed"] {
        let lower = policy.to_lowercase();
        let template = json!({
            "envVarsInjectionPolicy": policy, "volumeClaimTemplatesPolicy": policy,
            "volumeClaimTemplates": volume("data"),
            "podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause", "env": [{"name": "A", "value": "1"}]}]}},
        });
        ns.template(&lower, template).await?;
        ns.pool(&lower, &lower, 1).await?;
    }
    let variable = |name: &str| json!({"env": [{"name": name, "value": "2"}]});
    let claims: [(&str, &str, Value, &str); 9] = [
        ("e1", "allowed", variable("B"), "True"),
        (
            "e2",
            "allowed",
            variable("A"),
            "False EnvVarsInjectionRejected",
        ),
        ("e3", "overrides", variable("A"), "True"),
        (
            "e4",
            "disallowed",
            variable("B"),
            "False EnvVarsInjectionRejected",
        ),
        (
            "v1",
            "allowed",
            json!({"volumeClaimTemplates": volume("more")}),
            "True",
        ),
        (
            "v2",
            "allowed",
            json!({"volumeClaimTemplates": volume("data")}),
            "False VolumeClaimTemplatesError",
        ),
        (
            "v3",
            "overrides",
            json!({"volumeClaimTemplates": volume("data")}),
            "True",
        ),
        (
            "v4",
            "disallowed",
            json!({"volumeClaimTemplates": volume("more")}),
            "False VolumeClaimTemplatesError",
        ),
        ("v5", "disallowed", json!({}), "True"),
    ];
    for (name, pool, mut spec, expected) in claims {
        spec["warmPoolRef"] = json!({"name": pool});
        let brings = spec.as_object().is_some_and(|s| s.len() > 1);
        ns.claim_with(name, spec).await?;
        let line = outcome(&ns, name).await?;
        ensure!(line.starts_with(expected), "{name}: {line}");
        if expected == "True" {
            let sandbox = ns.claimed(name).await?;
            same(
                name,
                &launch(&sandbox),
                &if brings { "cold" } else { "warm" },
            )?;
        }
    }
    let pod: Pod = ns.get("e3").await?;
    let env_of = pod.spec.context("no spec")?.containers[0].env.clone();
    same(
        "A",
        &env_of.context("no env")?[0].value.as_deref(),
        &Some("2"),
    )?;
    ns.get::<PersistentVolumeClaim>("more-v1").await?;
    Ok(())
}

pub(crate) async fn one_ends_as_its_policy_has_it(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 3).await?;
    let mut sandboxes = Vec::new();
    for policy in ["Delete", "DeleteForeground", "Retain"] {
        let name = policy.to_lowercase();
        let spec = json!({"warmPoolRef": {"name": "p"}, "lifecycle": {"shutdownPolicy": policy}});
        ns.claim_with(&name, spec).await?;
        let sandbox = ns.claimed(&name).await?.name_any();
        // A finalizer holds the Sandbox, so that the order of things can be seen.
        let held = json!({"metadata": {"finalizers": ["kiln.test/hold"]}});
        ns.patch::<Sandbox>(&sandbox, held).await?;
        let past = json!({"spec": {"lifecycle": {"shutdownTime": "2020-01-01T00:00:00Z"}}});
        ns.patch::<SandboxClaim>(&name, past).await?;
        sandboxes.push(sandbox);
    }
    ns.until_gone::<SandboxClaim>("delete").await?;
    ns.until("deleteforeground", "its deletion", |c: &SandboxClaim| {
        c.metadata.deletion_timestamp.as_ref().map(|_| ())
    })
    .await?;
    for sandbox in &sandboxes {
        ns.until(sandbox, "its deletion", |s: &Sandbox| {
            s.metadata.deletion_timestamp.as_ref().map(|_| ())
        })
        .await?;
    }
    ns.get::<SandboxClaim>("deleteforeground").await?;
    for sandbox in &sandboxes {
        ns.patch::<Sandbox>(sandbox, json!({"metadata": {"finalizers": null}}))
            .await?;
    }
    ns.until_gone::<SandboxClaim>("deleteforeground").await?;
    ns.until_gone::<Sandbox>(&sandboxes[2]).await?;
    let is = "False ClaimExpired: Claim expired. Sandbox cleanup initiated.";
    ns.until_condition::<SandboxClaim>("retain", "Ready", is)
        .await?;
    ns.until("retain", "no Sandbox", |c: &SandboxClaim| {
        c.status.as_ref()?.sandbox.is_none().then_some(())
    })
    .await?;
    // With a time that is yet to come it has one again.
    let later = json!({"spec": {"lifecycle": {"shutdownTime": "9999-12-31T23:59:59Z"}}});
    ns.patch::<SandboxClaim>("retain", later).await?;
    ns.claimed("retain").await?;
    Ok(())
}

pub(crate) async fn a_finished_one_goes_after_its_time(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template(
        "t",
        json!({"podTemplate": {"metadata": {"annotations": {FATE: "succeeded"}}}}),
    )
    .await?;
    let claim =
        |lifecycle: Value| json!({"sandboxTemplateRef": {"name": "t"}, "lifecycle": lifecycle});
    ns.claim_with(
        "soon",
        claim(json!({"ttlSecondsAfterFinished": 2, "shutdownPolicy": "Delete"})),
    )
    .await?;
    ns.claim_with("never", claim(json!({"shutdownPolicy": "Delete"})))
        .await?;
    ns.claim_with(
        "kept",
        claim(json!({"ttlSecondsAfterFinished": 0, "shutdownPolicy": "Retain"})),
    )
    .await?;
    // What comes first counts, and the claim goes last.
    ns.claim_with(
        "foreground",
        claim(json!({
            "ttlSecondsAfterFinished": 1, "shutdownTime": "9999-12-31T23:59:59Z",
            "shutdownPolicy": "DeleteForeground",
        })),
    )
    .await?;
    for name in ["soon", "foreground"] {
        ns.until_gone::<SandboxClaim>(name).await?;
        ns.until_gone::<Sandbox>(name).await?;
    }
    ns.until_gone::<Sandbox>("kept").await?;
    let kept: SandboxClaim = ns
        .until_condition("kept", "Ready", "False ClaimExpired")
        .await?;
    let conditions = kept.status.context("no status")?.conditions;
    ensure!(line(&conditions, "Finished").is_some_and(|l| l.starts_with("True PodSucceeded")));
    ns.until_condition::<SandboxClaim>("never", "Finished", "True PodSucceeded")
        .await?;
    Ok(())
}

pub(crate) async fn a_pod_that_goes_is_seen_in_the_claim(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    ns.claim("c", "p").await?;
    let sandbox = ns.claimed("c").await?;
    // The claim's next Sandbox is to be one of the template as it is now.
    ns.until_ready("p", 1).await?;
    // The next Pod is not ready, so that there is time to see it.
    let unready =
        json!({"spec": {"podTemplate": {"metadata": {"annotations": {FATE: "unready"}}}}});
    ns.patch::<SandboxTemplate>("t", unready).await?;
    // The template's word comes to a claimed Sandbox when its claim is looked at, which is when
    // that changes, and the controller may know the template as it was.
    let mut looks = 0_u32;
    wait::until("the template's word", wait::SOON, async || {
        looks += 1;
        let look = json!({"metadata": {"annotations": {"kiln.test/look": looks.to_string()}}});
        ns.patch::<SandboxClaim>("c", look).await.ok()?;
        let now: Sandbox = ns.get(&sandbox.name_any()).await.ok()?;
        let annotations = now.spec.pod_template.metadata.annotations?;
        (annotations.get(FATE)? == "unready").then_some(())
    })
    .await?;
    ns.delete::<Pod>(&sandbox.name_any()).await?;
    ns.until_condition::<SandboxClaim>("c", "Ready", "False DependenciesNotReady")
        .await?;
    // A claim whose Sandbox goes gets another one.
    let ready = json!({"spec": {"podTemplate": {"metadata": {"annotations": null}}}});
    ns.patch::<SandboxTemplate>("t", ready).await?;
    ns.api::<Sandbox>()
        .delete(&sandbox.name_any(), &DeleteParams::default())
        .await?;
    ns.until("c", "another Sandbox", |c: &SandboxClaim| {
        let status = c.status.as_ref()?;
        let now = status.sandbox.as_ref()?.name.as_deref()?;
        let is_ready = line(&status.conditions, "Ready")?.starts_with("True");
        (now != sandbox.name_any() && is_ready).then_some(())
    })
    .await
}

pub(crate) async fn one_waits_for_its_pool_and_its_template(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.claim("pooled", "p").await?;
    ns.claim_with("templated", json!({"sandboxTemplateRef": {"name": "t"}}))
        .await?;
    let is = "False WarmPoolNotFound: SandboxWarmPool \"p\" not found";
    ns.until_condition::<SandboxClaim>("pooled", "Ready", is)
        .await?;
    let is = "False TemplateNotFound: SandboxTemplate \"t\" not found";
    ns.until_condition::<SandboxClaim>("templated", "Ready", is)
        .await?;
    ns.until_warned("pooled", "not found").await?;
    ns.template("t", json!({})).await?;
    ns.claimed("templated").await?;
    ns.pool("p", "t", 1).await?;
    ns.claimed("pooled").await?;
    Ok(())
}

/// A claim whose client notes when it asked.
#[expect(clippy::needless_pass_by_value, reason = "callers read as tables")]
fn asked(source: Value) -> Value {
    json!({
        "metadata": {"annotations": {keys::CLIENT_REQUESTED_AT: "2026-01-01T00:00:00.000000001Z"}},
        "spec": source,
    })
}

pub(crate) async fn times_are_noted_for_clients_that_note_theirs(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    ns.make::<SandboxClaim>("c", asked(json!({"warmPoolRef": {"name": "p"}})))
        .await?;
    ns.claimed("c").await?;
    let claim: SandboxClaim = ns.get("c").await?;
    for key in [keys::CONTROLLER_OBSERVED_AT, keys::CLAIM_READY_AT] {
        let time = &claim.annotations()[key];
        let parsed: k8s_openapi::jiff::Timestamp = time.parse()?;
        ensure!(parsed.subsec_nanosecond() != 0, "{time}");
    }
    Ok(())
}

pub(crate) async fn one_names_the_sandbox_that_it_has_from_a_pool(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    let assigned = |claim: &SandboxClaim| claim.annotations().get(keys::ASSIGNED_SANDBOX).cloned();
    ns.make::<SandboxClaim>("warm", asked(json!({"warmPoolRef": {"name": "p"}})))
        .await?;
    let first = ns.claimed("warm").await?.name_any();
    same(
        "warm",
        &assigned(&ns.get("warm").await?),
        &Some(first.clone()),
    )?;
    let cold = json!({"sandboxTemplateRef": {"name": "t"}, "warmpool": "none"});
    ns.make::<SandboxClaim>("cold", asked(cold)).await?;
    ns.claimed("cold").await?;
    same("cold", &assigned(&ns.get("cold").await?), &None)?;
    // It follows: to another Sandbox of the pool, and to one that was made for the claim.
    for (replicas, expected) in [(1, "warm"), (0, "cold")] {
        let scale = json!({"spec": {"replicas": replicas}});
        ns.patch::<SandboxWarmPool>("p", scale).await?;
        ns.until_ready("p", replicas).await?;
        let before = ns.claimed("warm").await?.name_any();
        ns.delete::<Sandbox>(&before).await?;
        ns.until("warm", "the next Sandbox", |claim: &SandboxClaim| {
            let status = claim.status.as_ref()?;
            let now = status.sandbox.as_ref()?.name.clone()?;
            let is_ready = line(&status.conditions, "Ready")?.starts_with("True");
            let named = (expected == "warm").then(|| now.clone());
            (now != before && is_ready && assigned(claim) == named).then_some(())
        })
        .await?;
    }
    Ok(())
}

/// Brings an object back as a backup does: as it was, with another uid and without its owner.
async fn restore<K: Kind>(ns: &Namespace<'_>, old: &K) -> Result<()> {
    let meta = old.meta();
    let fields = json!({
        "metadata": {"labels": meta.labels, "annotations": meta.annotations},
        "spec": serde_json::to_value(old)?["spec"],
    });
    ns.make::<K>(&old.name_any(), fields).await?;
    Ok(())
}

pub(crate) async fn a_restored_sandbox_goes_to_nobody_by_itself(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    let mut kept = Vec::new();
    for name in ["mine", "gone"] {
        ns.claim(name, "p").await?;
        let sandbox = ns.claimed(name).await?;
        kept.push((ns.get::<SandboxClaim>(name).await?, sandbox));
        ns.until_ready("p", 1).await?;
    }
    for (claim, sandbox) in &kept {
        ns.delete::<SandboxClaim>(&claim.name_any()).await?;
        ns.until_gone::<Sandbox>(&sandbox.name_any()).await?;
    }
    for (claim, sandbox) in &kept {
        restore(&ns, sandbox).await?;
        let name = sandbox.name_any();
        ns.until_condition::<Sandbox>(&name, "Ready", "True")
            .await?;
        ns.until_told("Sandbox", &name, "owned by nobody").await?;
        restore(&ns, claim).await?;
        let why = format!("False ReconcilerError: Error seen: sandbox \"{name}\" was a claim's");
        ns.until_condition::<SandboxClaim>(&claim.name_any(), "Ready", &why)
            .await?;
    }
    let [(mine, sandbox), (gone, other)] = &kept[..] else {
        anyhow::bail!("{} claims", kept.len());
    };
    // Who writes its name on a claim gets another one.
    let annotations = json!({keys::ASSIGNED_SANDBOX: sandbox.name_any()});
    let spec = json!({"warmPoolRef": {"name": "p"}});
    let thief = json!({"metadata": {"annotations": annotations}, "spec": spec});
    ns.make::<SandboxClaim>("thief", thief).await?;
    ensure!(ns.claimed("thief").await?.name_any() != sandbox.name_any());
    for (_, sandbox) in &kept {
        let now: Sandbox = ns.get(&sandbox.name_any()).await?;
        ensure!(now.owner_references().is_empty(), "{now:?}");
    }
    // As docs/operations.md has an administrator do it.
    let claim: SandboxClaim = ns.get(&mine.name_any()).await?;
    let bind = json!({"metadata": {
        "labels": {keys::CLAIM_UID: claim.uid()},
        "ownerReferences": [{
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
            "name": claim.name_any(), "uid": claim.uid(), "controller": true,
            "blockOwnerDeletion": true,
        }],
    }});
    let restored = ns.patch::<Sandbox>(&sandbox.name_any(), bind).await?;
    let bound = ns.claimed(&mine.name_any()).await?;
    same("bound", &bound.uid(), &restored.uid())?;
    ns.delete::<Sandbox>(&other.name_any()).await?;
    let new = ns.claimed(&gone.name_any()).await?;
    ensure!(new.name_any() != other.name_any());
    Ok(())
}

/// Writes that the controller has made so far, by the labels of its metric.
async fn writes(env: &Env) -> Result<BTreeMap<String, u64>> {
    let controller = env.controller.lock().await;
    let text = controller
        .as_ref()
        .context("no controller")?
        .metrics()
        .await?;
    let counts = text
        .lines()
        .filter_map(|l| l.strip_prefix("kiln_controller_writes_total{"));
    let count = |line: &str| {
        let (labels, number) = line.rsplit_once(' ')?;
        Some((labels.to_owned(), number.parse().ok()?))
    };
    Ok(counts.filter_map(count).collect())
}

pub(crate) async fn warm_starts_take_few_writes(env: &Env) -> Result<()> {
    const CLAIMS: u64 = 10;
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 10).await?;
    let quiet = async || -> Result<BTreeMap<String, u64>> {
        let mut last = writes(env).await?;
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
            let now = writes(env).await?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
    };
    let before = quiet().await?;
    for n in 0..CLAIMS {
        ns.claim(&format!("c{n}"), "p").await?;
        ns.claimed(&format!("c{n}")).await?;
    }
    ns.until_ready("p", 10).await?;
    let mut spent = quiet().await?;
    for (what, number) in &mut spent {
        *number -= before.get(what).copied().unwrap_or_default();
    }
    // Of the Sandbox: made, adopted; of the Pod: made, labelled; of the claim: its status. How
    // often the status of Sandboxes and pools is written depends on how fast Pods are ready.
    let is_of_speed = |what: &str| {
        ["Sandbox", "SandboxWarmPool"]
            .iter()
            .any(|kind| what.contains(&format!("kind=\"{kind}\",subresource=\"status\"")))
    };
    let counted = spent.iter().filter(|(what, _)| !is_of_speed(what.as_str()));
    let total: u64 = counted.map(|(_, number)| number).sum();
    // Beside five each, what cases that have ended still cost.
    ensure!(total < 6 * CLAIMS + 5, "{total} writes: {spent:?}");
    Ok(())
}
