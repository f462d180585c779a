// SPDX-License-Identifier: Apache-2.0

//! What users and attackers get wrong: they read what, and nobody else notices.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{
    core::v1::{Pod, ResourceQuota},
    networking::v1::NetworkPolicy,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_cluster::standin::FATE;
use kiln_crds::{Sandbox, SandboxClaim, SandboxTemplate, SandboxWarmPool, keys};
use kiln_tests::wait;
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::env::{Conditions, Env, Namespace, controller_of, line, merge, same};

pub(crate) async fn a_pod_that_is_refused_is_explained(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let class = json!({"podTemplate": {"spec": {"runtimeClassName": "nowhere"}}});
    ns.sandbox("class", class.clone()).await?;
    let is = "False ReconcilerError: Error seen: ";
    let sandbox: Sandbox = ns.until_condition("class", "Ready", is).await?;
    let message = &sandbox
        .status
        .unwrap()
        .conditions
        .iter()
        .find(|c| c.type_ == "Ready")
        .unwrap()
        .message
        .clone();
    ensure!(
        message.contains("RuntimeClass \"nowhere\" not found"),
        "{message}"
    );
    ns.until_warned("class", "RuntimeClass \"nowhere\" not found")
        .await?;
    let twice =
        json!({"podTemplate": {"spec": {"volumes": [{"name": "Not A Name", "emptyDir": {}}]}}});
    ns.sandbox("name", twice.clone()).await?;
    ns.until_warned("name", "spec.volumes[0].name").await?;
    let never = "False InvalidConfiguration: Error seen: ";
    ns.until_condition::<Sandbox>("name", "Ready", never)
        .await?;
    // Those who wait for it learn of it, too.
    ns.template("t", class).await?;
    ns.template("never", twice).await?;
    for (name, template, is) in [("c", "t", is), ("d", "never", never)] {
        ns.claim_with(name, json!({"sandboxTemplateRef": {"name": template}}))
            .await?;
        ns.until_condition::<SandboxClaim>(name, "Ready", is)
            .await?;
    }
    Ok(())
}

pub(crate) async fn a_quota_is_explained_and_recovered_from(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.make::<ResourceQuota>("q", json!({"spec": {"hard": {"pods": "1"}}}))
        .await?;
    ns.until("q", "the quota to count", |q: &ResourceQuota| {
        q.status.as_ref()?.used.as_ref().map(|_| ())
    })
    .await?;
    ns.sandbox("first", json!({})).await?;
    ns.until_condition::<Sandbox>("first", "Ready", "True")
        .await?;
    ns.sandbox("second", json!({})).await?;
    ns.until_warned("second", "exceeded quota").await?;
    ns.delete::<Sandbox>("first").await?;
    ns.until_condition::<Sandbox>("second", "Ready", "True")
        .await?;
    Ok(())
}

pub(crate) async fn what_a_pod_could_not_be_is_refused_at_once(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    for (port, text) in [
        (json!(99_999_999_999_i64), "int32"),
        (json!("http"), "must be of type integer"),
    ] {
        let template = json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1",
            "kind": "SandboxTemplate",
            "metadata": {"name": "t", "namespace": ns.name},
            "spec": {"podTemplate": {"spec": {"containers": [
                {"name": "c", "image": "i", "ports": [{"containerPort": port}]},
            ]}}},
        });
        let create = ["create", "-f", "-"];
        let refused = env.plane.kubectl_with(&create, &template.to_string()).await;
        let refused = format!("{:#}", refused.unwrap_err());
        ensure!(refused.contains(text), "{refused}");
    }
    Ok(())
}

pub(crate) async fn a_forged_member_is_given_to_nobody(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    let pool: SandboxWarmPool = ns.pool("p", "t", 1).await?;
    let owner = json!([{
        "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
        "name": "p", "uid": pool.uid(), "controller": true,
    }]);
    let spec =
        json!({"podTemplate": {"spec": {"containers": [{"name": "evil", "image": "evil"}]}}});
    // By its owner alone, or by its labels alone.
    let by_owner = json!({"metadata": {"ownerReferences": owner}, "spec": spec});
    ns.make::<Sandbox>("a-forged", by_owner).await?;
    let labels = json!({keys::WARM_POOL: keys::name_hash("p"), keys::TEMPLATE_REF_HASH: keys::name_hash("t")});
    let by_labels = json!({"metadata": {"labels": labels, "annotations": {keys::TEMPLATE_REF: "t"}}, "spec": spec});
    ns.make::<Sandbox>("b-forged", by_labels).await?;
    ns.until_condition::<Sandbox>("b-forged", "Ready", "True")
        .await?;
    for n in 0..3 {
        ns.claim(&format!("c{n}"), "p").await?;
        let sandbox = ns.claimed(&format!("c{n}")).await?;
        same("image", &image_of(&sandbox), &Some("pause"))?;
    }
    // A Sandbox that only says that it is a pool's does not get the pool's labels onto its Pod.
    let pod: Pod = ns.get("b-forged").await?;
    ensure!(
        !pod.labels().contains_key(keys::WARM_POOL),
        "{:?}",
        pod.labels()
    );
    ensure!(!pod.labels().contains_key(keys::TEMPLATE_REF_HASH));
    Ok(())
}

/// A reference to an owner of this version, which the garbage collector does not know: it deletes
/// nothing because of it.
fn owned_by(kind: &str, name: &str, uid: Option<&str>) -> Value {
    json!([{
        "apiVersion": "extensions.agents.x-k8s.io/v99", "kind": kind,
        "name": name, "uid": uid, "controller": true,
    }])
}

/// All marks of a Sandbox of pool `p`, copied from one that is there.
async fn marks_of_a_member(ns: &Namespace<'_>, pool: &SandboxWarmPool) -> Result<Value> {
    let members = ns.list::<Sandbox>().await?;
    let of_pool = |s: &&Sandbox| controller_of(*s).is_some_and(|(_, _, name)| name == "p");
    let member = members.iter().find(of_pool).context("an empty pool")?;
    Ok(json!({
        "labels": member.labels(),
        "annotations": {keys::TEMPLATE_REF: "t"},
        "ownerReferences": owned_by("SandboxWarmPool", "p", pool.uid().as_deref()),
    }))
}

fn image_of(sandbox: &Sandbox) -> Option<&str> {
    sandbox.spec.pod_template.spec.containers[0]
        .image
        .as_deref()
}

/// Without the admission policy, and with each strategy: whoever may write Sandboxes writes all that
/// marks a pool's member, and gets one ready before the pool's own.
pub(crate) async fn a_member_that_was_something_else_is_given_to_nobody(env: &Env) -> Result<()> {
    for strategy in ["OnReplenish", "Recreate"] {
        let ns = env.namespace().await?;
        ns.template("t", json!({})).await?;
        // Older than the pool's own, which would go first of what is too much.
        let evil =
            json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "evil"}]}}});
        for name in ["forged", "later"] {
            ns.sandbox(name, evil.clone()).await?;
            ns.until_condition::<Sandbox>(name, "Ready", "True").await?;
        }
        let spec = json!({"replicas": 1, "sandboxTemplateRef": {"name": "t"},
            "updateStrategy": {"type": strategy}});
        ns.make::<SandboxWarmPool>("p", json!({ "spec": spec }))
            .await?;
        let pool = ns.until_ready("p", 1).await?;
        let marks = marks_of_a_member(&ns, &pool).await?;
        let members = ns.list::<Sandbox>().await?;
        let is_member = |s: &&Sandbox| s.labels().contains_key(keys::WARM_POOL);
        let member = members.iter().find(is_member).context("an empty pool")?;
        ns.patch::<Sandbox>("forged", json!({"metadata": marks}))
            .await?;
        // Its Pod stays what it was when the spec becomes the pool's.
        ns.patch::<Sandbox>("later", json!({"metadata": marks, "spec": member.spec}))
            .await?;
        for name in ["forged", "later"] {
            ns.until_gone::<Sandbox>(name).await?;
        }
        for n in 0..3 {
            ns.claim(&format!("c{n}"), "p").await?;
            let sandbox = ns.claimed(&format!("c{n}")).await?;
            same("image", &image_of(&sandbox), &Some("pause"))?;
            let pod: Pod = ns.get(&sandbox.name_any()).await?;
            let image = pod.spec.and_then(|s| s.containers[0].image.clone());
            same("the Pod's image", &image.as_deref(), &Some("pause"))?;
        }
        // The pool has what it is to have.
        ns.until_ready("p", 1).await?;
    }
    Ok(())
}

/// Objects of an attacker's namespace that name the uids of objects of the victim's.
pub(crate) async fn nobody_is_served_from_another_namespace(env: &Env) -> Result<()> {
    let victim = env.namespace().await?;
    let evil = env.namespace().await?;
    victim.template("t", json!({})).await?;
    let pool = victim.pool("p", "t", 1).await?;
    let bound = victim.claim("bound", "p").await?;
    let own = victim.claimed("bound").await?;
    let waiting = victim.claim("waiting", "later").await?;
    victim.sandbox("box", json!({})).await?;
    let single: Sandbox = victim.until_condition("box", "Ready", "True").await?;

    let marks = marks_of_a_member(&victim, &victim.until_ready("p", 1).await?).await?;
    evil.template("t", json!({})).await?;
    let spec =
        json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}});
    for name in ["bait-0", "bait-1"] {
        let bait = json!({"metadata": marks, "spec": spec});
        evil.make::<Sandbox>(name, bait).await?;
    }
    // One of the same name as the claim's, and one that the claim has not got yet.
    let of_claim = |claim: &SandboxClaim| {
        json!({"ownerReferences": owned_by("SandboxClaim", &claim.name_any(), claim.uid().as_deref()),
            "labels": {keys::CLAIM_UID: claim.uid()}})
    };
    for (name, claim) in [(own.name_any(), &bound), ("waiting".to_owned(), &waiting)] {
        evil.make::<Sandbox>(&name, json!({"metadata": of_claim(claim), "spec": spec}))
            .await?;
    }
    let hash = keys::name_hash("box");
    let mut of_box = owned_by("Sandbox", "box", single.uid().as_deref());
    of_box[0]["apiVersion"] = json!("agents.x-k8s.io/v99");
    let pod = json!({
        "metadata": {"labels": {keys::SANDBOX_NAME_HASH: hash}, "ownerReferences": of_box},
        "spec": {"containers": [{"name": "main", "image": "evil"}]},
    });
    evil.make::<Pod>("evil", pod).await?;
    for name in ["bait-0", "bait-1", "waiting"] {
        evil.until_condition::<Sandbox>(name, "Ready", "True")
            .await?;
    }
    // Every claim has a Sandbox of its own namespace, and so has the one that was served before.
    let image = json!({"metadata": {"annotations": {"look": "again"}}});
    victim.patch::<SandboxClaim>("bound", image.clone()).await?;
    victim.patch::<Sandbox>("box", image).await?;
    for n in 0..2 {
        victim.claim(&format!("c{n}"), "p").await?;
    }
    for name in ["bound", "c0", "c1"] {
        victim.claimed(name).await?;
        let claim: SandboxClaim = victim.get(name).await?;
        let status = claim.status.and_then(|s| s.sandbox).context("no Sandbox")?;
        let sandbox: Sandbox = victim.get(&status.name.context("no name")?).await?;
        let ips = sandbox.status.and_then(|s| s.pod_ips);
        same("addresses", &status.pod_ips, &ips)?;
    }
    let still = victim.claimed("bound").await?;
    same("the claim's", &still.uid(), &own.uid())?;
    victim
        .until_condition::<SandboxClaim>("waiting", "Ready", "False WarmPoolNotFound")
        .await?;
    victim
        .until_condition::<Sandbox>("box", "Ready", "True")
        .await?;
    // The pool has its own, and none of the baits has become its.
    victim.until_ready("p", 1).await?;
    let pool: SandboxWarmPool = victim.get(&pool.name_any()).await?;
    same("replicas", &pool.status.map(|s| s.replicas), &Some(1))?;
    for name in ["bait-0", "bait-1"] {
        let bait: Sandbox = evil.get(name).await?;
        ensure!(
            !bait.labels().contains_key(keys::CLAIM_UID),
            "{name} was adopted"
        );
    }
    // The garbage collector would look for their owners again and again, and for little else.
    for sandbox in evil.list::<Sandbox>().await? {
        evil.delete::<Sandbox>(&sandbox.name_any()).await?;
    }
    evil.delete::<Pod>("evil").await
}

pub(crate) async fn metadata_of_the_system_is_refused(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 1).await?;
    for (name, metadata) in [
        ("router", json!({"labels": {"app": "sandbox-router"}})),
        ("victim", json!({"labels": {keys::SANDBOX_NAME_HASH: "0"}})),
        (
            "system",
            json!({"annotations": {"container.apparmor.security.beta.kubernetes.io/main": "unconfined"}}),
        ),
        (
            "network",
            json!({"annotations": {"k8s.v1.cni.cncf.io/networks": "[{\"name\": \"other\"}]"}}),
        ),
        (
            "kernel",
            json!({"annotations": {"io.katacontainers.config.hypervisor.kernel_params": "x"}}),
        ),
    ] {
        let spec = json!({"warmPoolRef": {"name": "p"}, "additionalPodMetadata": metadata});
        ns.claim_with(name, spec).await?;
        ns.until_condition::<SandboxClaim>(name, "Ready", "False InvalidMetadata")
            .await?;
    }
    same(
        "the pool",
        &ns.until_ready("p", 1).await?.status.unwrap().replicas,
        &1,
    )
}

/// What the template's Pod mounts, and what is somebody else's.
pub(crate) async fn a_claim_replaces_and_names_no_volume(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let volumes = json!([{"name": "policy", "configMap": {"name": "policy"}}]);
    ns.template(
        "t",
        json!({"volumeClaimTemplatesPolicy": "Allowed", "podTemplate": {"spec": {"volumes": volumes}}}),
    )
    .await?;
    let storage =
        json!({"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}});
    let scheduling = json!({"volume.kubernetes.io/selected-node": "n"});
    for (name, metadata, spec, reason) in [
        (
            "policy",
            json!({"name": "policy"}),
            json!({}),
            "VolumeClaimTemplatesError",
        ),
        (
            "named",
            json!({"name": "v"}),
            json!({"volumeName": "pv"}),
            "VolumeClaimTemplatesError",
        ),
        (
            "copied",
            json!({"name": "v"}),
            json!({"dataSource": {"kind": "PersistentVolumeClaim", "name": "others"}}),
            "VolumeClaimTemplatesError",
        ),
        (
            "placed",
            json!({"name": "v", "annotations": scheduling}),
            json!({}),
            "InvalidMetadata",
        ),
    ] {
        let mut whole = storage.clone();
        merge(&mut whole, &spec);
        let brings = json!([{"metadata": metadata, "spec": whole}]);
        let spec = json!({"sandboxTemplateRef": {"name": "t"}, "volumeClaimTemplates": brings});
        ns.claim_with(name, spec).await?;
        ns.until_condition::<SandboxClaim>(name, "Ready", &format!("False {reason}"))
            .await?;
        ensure!(
            ns.api::<Sandbox>().get_opt(name).await?.is_none(),
            "{name} has a Sandbox"
        );
    }
    Ok(())
}

/// A template that changes later says what new claims get; who has a Sandbox keeps it.
pub(crate) async fn a_bound_claim_is_not_judged_anew(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 2).await?;
    let label = "sandbox.users.io/team";
    let brings = json!({"warmPoolRef": {"name": "p"},
        "additionalPodMetadata": {"labels": {label: "blue"}}});
    let mut before = Vec::new();
    for name in ["conflict", "refused"] {
        ns.claim_with(name, brings.clone()).await?;
        before.push(ns.claimed(name).await?);
    }
    let other = json!({"spec": {"podTemplate": {"metadata": {"labels": {label: "red"}}}}});
    ns.patch::<SandboxTemplate>("t", other).await?;
    let again = json!({"metadata": {"labels": {"look": "again"}}});
    ns.patch::<SandboxClaim>("conflict", again).await?;
    // Nor does what a claim may not bring reach its Pod.
    let bad = json!({"spec": {"additionalPodMetadata": {"labels": {"app": "x"}}}});
    ns.patch::<SandboxClaim>("refused", bad).await?;
    for (name, words, before) in [
        ("conflict", "metadata override conflict", &before[0]),
        ("refused", "must have a domain prefix", &before[1]),
    ] {
        ns.until_told("SandboxClaim", name, words).await?;
        let after = ns.claimed(name).await?;
        same("the Sandbox", &after.uid(), &before.uid())?;
        let labels = after.spec.pod_template.metadata.labels.unwrap_or_default();
        same(
            "team",
            &labels.get(label).map(String::as_str),
            &Some("blue"),
        )?;
        ensure!(!labels.contains_key("app"), "{labels:?}");
    }
    Ok(())
}

pub(crate) async fn a_strangers_network_policy_is_not_touched(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let theirs = json!({"spec": {"podSelector": {"matchLabels": {"a": "b"}}}});
    ns.make::<NetworkPolicy>("t-network-policy", theirs).await?;
    ns.template("t", json!({})).await?;
    ns.until_warned("t", "not controlled by SandboxTemplate")
        .await?;
    let policy: NetworkPolicy = ns.get("t-network-policy").await?;
    ensure!(controller_of(&policy).is_none());
    let selector = policy
        .spec
        .unwrap()
        .pod_selector
        .unwrap()
        .match_labels
        .unwrap();
    same("selector", &selector["a"].as_str(), &"b")?;
    // Nor does a Pod of the template run without a policy of its own.
    let words = "refusing to update NetworkPolicy";
    cannot_run(&ns, "t", words).await?;
    ns.delete::<NetworkPolicy>("t-network-policy").await?;
    ns.until_ready("p-t", 1).await?;
    ns.claimed("c-t").await?;
    // Where the policy goes and cannot come back, the pool says so.
    let none = json!({"spec": {"hard": {"count/networkpolicies.networking.k8s.io": "0"}}});
    ns.make::<ResourceQuota>("q", none).await?;
    let quota_counts = |q: &ResourceQuota| q.status.as_ref()?.used.as_ref().map(|_| ());
    ns.until("q", "the quota to count", quota_counts).await?;
    ns.template("u", json!({})).await?;
    ns.until_warned("u", "exceeded quota").await?;
    cannot_run(&ns, "u", "exceeded quota").await?;
    ns.delete::<SandboxTemplate>("t").await
}

/// Makes a pool and a claim of a template, and waits until they say why they have no Pod.
async fn cannot_run(ns: &Namespace<'_>, template: &str, words: &str) -> Result<()> {
    let (pool, claim) = (format!("p-{template}"), format!("c-{template}"));
    let reference = json!({"name": template});
    let spec = json!({"replicas": 1, "sandboxTemplateRef": reference});
    ns.make::<SandboxWarmPool>(&pool, json!({ "spec": spec }))
        .await?;
    ns.claim_with(&claim, json!({"sandboxTemplateRef": reference}))
        .await?;
    let says = |conditions: &[Condition]| {
        let line = line(conditions, "Ready")?;
        (line.starts_with("False") && line.contains(words)).then_some(())
    };
    ns.until(&pool, words, |p: &SandboxWarmPool| says(p.conditions()))
        .await?;
    ns.until(&claim, words, |c: &SandboxClaim| says(c.conditions()))
        .await?;
    let of_template = |s: &Sandbox| {
        s.annotations()
            .get(keys::TEMPLATE_REF)
            .is_some_and(|t| t == template)
    };
    let sandboxes = ns.list::<Sandbox>().await?;
    ensure!(
        !sandboxes.iter().any(of_template),
        "{template} has a Sandbox"
    );
    Ok(())
}

pub(crate) async fn a_claim_has_one_source(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    for spec in [
        json!({}),
        json!({"warmPoolRef": {"name": "p"}, "sandboxTemplateRef": {"name": "t"}}),
    ] {
        let refused = ns.claim_with("c", spec).await.unwrap_err();
        let text = format!("{refused:#}");
        ensure!(
            text.contains("exactly one of warmPoolRef and sandboxTemplateRef"),
            "{text}"
        );
    }
    Ok(())
}

/// The one keeps what it has, and the other one gets another.
pub(crate) async fn an_edited_owner_brings_nobody_anothers(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.template("t", json!({})).await?;
    ns.pool("p", "t", 2).await?;
    let thief = ns.claim("thief", "p").await?;
    ns.claim("victim", "p").await?;
    let (own, lost) = (ns.claimed("thief").await?, ns.claimed("victim").await?);
    let owner = json!([{
        "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
        "name": "thief", "uid": thief.uid(), "controller": true,
    }]);
    let edited = json!({"metadata": {"ownerReferences": owner}});
    ns.patch::<Sandbox>(&lost.name_any(), edited).await?;
    let other = ns
        .until("victim", "another Sandbox", |claim: &SandboxClaim| {
            let status = claim.status.as_ref()?;
            let name = status.sandbox.as_ref()?.name.clone()?;
            let is_ready = line(&status.conditions, "Ready")?.starts_with("True");
            (is_ready && name != lost.name_any()).then_some(name)
        })
        .await?;
    let still = ns.claimed("thief").await?;
    same("the thief's", &still.uid(), &own.uid())?;
    ensure!(other != own.name_any(), "both have {other}");
    Ok(())
}

/// A claim that has nothing yet does not get what somebody has made its own by hand.
pub(crate) async fn an_owner_reference_alone_gives_nothing(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let claim = ns.claim("c", "later").await?;
    ns.sandbox("mine", json!({})).await?;
    ns.until_condition::<Sandbox>("mine", "Ready", "True")
        .await?;
    let owner = json!([{
        "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
        "name": "c", "uid": claim.uid(), "controller": true,
    }]);
    ns.patch::<Sandbox>("mine", json!({"metadata": {"ownerReferences": owner}}))
        .await?;
    ns.template("t", json!({})).await?;
    ns.pool("later", "t", 1).await?;
    let given = ns.claimed("c").await?;
    ensure!(given.name_any() != "mine", "the claim has taken it");
    Ok(())
}

pub(crate) async fn a_claim_without_a_node_is_explained(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let homeless = json!({"podTemplate": {"metadata": {"annotations": {FATE: "unschedulable"}}}});
    ns.template("t", homeless).await?;
    ns.claim_with("c", json!({"sandboxTemplateRef": {"name": "t"}}))
        .await?;
    let is = "False DependenciesNotReady: Pod exists with phase: Pending; Unschedulable: 0/4 nodes are available";
    ns.until_condition::<SandboxClaim>("c", "Ready", is).await?;
    let is = "False Unschedulable: 0/4 nodes are available";
    ns.until_condition::<Sandbox>("c", "PodScheduled", is)
        .await?;
    // Claim and Sandbox have the same name.
    for kind in ["SandboxClaim", "Sandbox"] {
        ns.until_told(kind, "c", "0/4 nodes are available").await?;
    }
    Ok(())
}

/// What a condition of a Sandbox cannot say in the same words.
pub(crate) async fn another_schedulers_words_are_passed_on(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let stays = json!({"podTemplate": {"metadata": {"annotations": {FATE: "pending"}}}});
    ns.sandbox("box", stays).await?;
    ns.until("box", "a Pod", |pod: &Pod| pod.uid()).await?;
    let scheduled = json!({"type": "PodScheduled", "status": "False",
        "reason": "pod-group not ready", "message": "1 of 2 members"});
    let status = Patch::Merge(json!({"status": {"conditions": [scheduled]}}));
    let params = PatchParams::default();
    ns.api::<Pod>()
        .patch_status("box", &params, &status)
        .await?;
    let is = "False PodSchedulingUnknown: pod-group not ready: 1 of 2 members";
    ns.until_condition::<Sandbox>("box", "PodScheduled", is)
        .await?;
    Ok(())
}

/// An image that is not there, say, as a kubelet tells of it.
pub(crate) async fn a_container_that_does_not_start_is_explained(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let stays = json!({"podTemplate": {"metadata": {"annotations": {FATE: "pending"}}}});
    ns.template("t", stays).await?;
    let pool = json!({"spec": {"replicas": 1, "sandboxTemplateRef": {"name": "t"}}});
    ns.make::<SandboxWarmPool>("p", pool).await?;
    ns.claim_with("c", json!({"sandboxTemplateRef": {"name": "t"}}))
        .await?;
    let pods = wait::until("two Pods", wait::SOON, async || {
        ns.list::<Pod>().await.ok().filter(|pods| pods.len() == 2)
    });
    let waiting = json!({"reason": "ErrImagePull", "message": "no such image"});
    let status = json!({"status": {"containerStatuses": [{
        "name": "main", "image": "gone", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"waiting": waiting},
    }]}});
    for pod in pods.await? {
        let params = PatchParams::default();
        let status = Patch::Merge(&status);
        ns.api::<Pod>()
            .patch_status(&pod.name_any(), &params, &status)
            .await?;
    }
    let why = "container main is waiting: ErrImagePull: no such image";
    for (kind, name) in [("SandboxClaim", "c"), ("SandboxWarmPool", "p")] {
        ns.until_told(kind, name, why).await?;
    }
    let is = format!("False ContainerWaiting: {why}");
    ns.until_condition::<SandboxWarmPool>("p", "Ready", &is)
        .await?;
    Ok(())
}

/// As large as the apiserver takes them, and larger.
pub(crate) async fn objects_may_be_large(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let with = |size: usize| {
        let value = "x".repeat(size);
        json!({"podTemplate": {"spec": {"containers": [
            {"name": "main", "image": "pause", "env": [{"name": "LARGE", "value": value}]},
        ]}}})
    };
    ns.template("t", with(1 << 20)).await?;
    ns.pool("p", "t", 1).await?;
    ns.claim("c", "p").await?;
    let sandbox = ns.claimed("c").await?;
    let pod: Pod = ns.get(&sandbox.name_any()).await?;
    let env = pod.spec.and_then(|s| s.containers[0].env.clone());
    let value = env.and_then(|e| e[0].value.clone());
    same("size", &value.map(|v| v.len()), &Some(1 << 20))?;
    let refused = ns.template("u", with(4 << 20)).await.unwrap_err();
    ensure!(format!("{refused:#}").contains("too large"), "{refused:#}");
    Ok(())
}
