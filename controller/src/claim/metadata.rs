// SPDX-License-Identifier: Apache-2.0

//! Labels and annotations that a claim brings for its Pod, and which of them it may.

use std::collections::BTreeMap;

use kiln_crds::{PodMetadata, SandboxClaim, keys};
use kube::ResourceExt;

use crate::{
    error::{Error, Result},
    options::Allowed,
};

/// Domains of annotations that only the system sets.
const RESTRICTED: [&str; 3] = ["kubernetes.io", "k8s.io", "agents.x-k8s.io"];

/// Annotations that every claim may bring.
const OPEN: [&str; 3] = [keys::SAFE_TO_EVICT, keys::SNAPSHOT_NAME, keys::ON_SUSPEND];

/// Refuses what a claim may not bring for its Pod and its volume claims.
pub(super) fn check_claim(claim: &SandboxClaim, allowed: &Allowed) -> Result<()> {
    if let Some(brought) = &claim.spec.additional_pod_metadata {
        check(brought, allowed)?;
    }
    for volume in claim.spec.volume_claim_templates.iter().flatten() {
        check_annotations(volume.metadata.annotations.as_ref(), allowed)?;
    }
    Ok(())
}

/// Refuses what could make a Pod pass for part of the system, opt it into somebody's policy, or have
/// an operator of the cluster do something to it: give it a second network, a role, or secrets.
fn check(metadata: &PodMetadata, allowed: &Allowed) -> Result<()> {
    for (key, value) in metadata.labels.iter().flatten() {
        check_label(key, value, &allowed.labels)
            .map_err(|why| Error::Metadata(format!("failed to validate label \"{key}\": {why}")))?;
    }
    check_annotations(metadata.annotations.as_ref(), allowed)
}

fn check_annotations(
    annotations: Option<&BTreeMap<String, String>>,
    allowed: &Allowed,
) -> Result<()> {
    for key in annotations.into_iter().flatten().map(|(key, _)| key) {
        check_annotation(key, allowed.annotations.as_deref()).map_err(|why| {
            Error::Metadata(format!("failed to validate annotation \"{key}\": {why}"))
        })?;
    }
    Ok(())
}

fn check_label(key: &str, value: &str, domains: &[String]) -> std::result::Result<(), String> {
    check_key(key, "label")?;
    if key.eq_ignore_ascii_case("app") && value.eq_ignore_ascii_case("sandbox-router") {
        return Err(format!(
            "restricted system label value: \"{key}\"=\"{value}\" is not allowed in AdditionalPodMetadata"
        ));
    }
    let Some((domain, _)) = key.split_once('/') else {
        return Err(format!(
            "label \"{key}\" must have a domain prefix (e.g. 'sandbox.users.io/my-label') to prevent opting into unintended policy domains"
        ));
    };
    let domain = domain.to_lowercase();
    if !domains.iter().any(|allowed| is_within(&domain, allowed)) {
        return Err(format!("label domain \"{domain}\" is not in the allowlist"));
    }
    if !is_label_value(value) {
        return Err(format!(
            "invalid label value: \"{value}\" does not match allowed pattern"
        ));
    }
    Ok(())
}

/// Refuses an annotation of the system's domains, and of any that is not in `domains`. One without a
/// domain is its user's own, unless it has dots: container runtimes are configured by such
/// (`io.katacontainers.config.…`, `dev.gvisor.…`).
fn check_annotation(key: &str, domains: Option<&[String]>) -> std::result::Result<(), String> {
    check_key(key, "annotation")?;
    let Some((domain, _)) = key.split_once('/') else {
        if domains.is_some() && key.contains('.') {
            return Err(format!(
                "annotation \"{key}\" must have a domain prefix (e.g. 'sandbox.users.io/my-annotation'), or no dots"
            ));
        }
        return Ok(());
    };
    if OPEN.contains(&key) {
        return Ok(());
    }
    let domain = domain.to_lowercase();
    if RESTRICTED.iter().any(|system| is_within(&domain, system)) {
        return Err(format!(
            "restricted system domain: \"{key}\" is not allowed in AdditionalPodMetadata"
        ));
    }
    if domains.is_some_and(|all| !all.iter().any(|allowed| is_within(&domain, allowed))) {
        return Err(format!(
            "annotation domain \"{domain}\" is not in the allowlist"
        ));
    }
    Ok(())
}

fn check_key(key: &str, kind: &str) -> std::result::Result<(), String> {
    let (domain, name) = match key.split_once('/') {
        Some((domain, name)) => (Some(domain), name),
        None => (None, key),
    };
    let domain_is_good = domain.is_none_or(is_dns_subdomain);
    if domain_is_good && !name.is_empty() && is_label_value(name) {
        return Ok(());
    }
    Err(format!("invalid {kind} key: \"{key}\""))
}

fn is_within(domain: &str, of: &str) -> bool {
    domain == of
        || domain
            .strip_suffix(of)
            .is_some_and(|rest| rest.ends_with('.'))
}

/// At most 63 letters, digits, `-`, `_` and `.`, a letter or digit at either end (Kubernetes
/// "Labels and selectors", syntax).
fn is_label_value(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        && ends(text.chars().next())
        && ends(text.chars().last())
}

/// RFC 1123, as Kubernetes "Object names and IDs" has it.
fn is_dns_subdomain(text: &str) -> bool {
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(is_label)
}

/// The metadata of a claimed Pod: the template's, and what the claim brings. Whose it is follows
/// from its owner, and need not be said here.
pub(super) fn merge(template: &PodMetadata, claim: &SandboxClaim) -> Result<PodMetadata> {
    let mut merged = template.clone();
    let Some(brought) = &claim.spec.additional_pod_metadata else {
        return Ok(merged);
    };
    for (kind, from, into) in [
        ("label", &brought.labels, &mut merged.labels),
        ("annotation", &brought.annotations, &mut merged.annotations),
    ] {
        for (key, value) in from.iter().flatten() {
            let into = into.get_or_insert_default();
            if let Some(templates) = into.get(key).filter(|t| *t != value) {
                return Err(Error::Metadata(format!(
                    "metadata override conflict: {kind} \"{key}\" is defined in template with value \"{templates}\", but claim requests \"{value}\""
                )));
            }
            into.insert(key.clone(), value.clone());
        }
    }
    Ok(merged)
}

/// Marks something as a claim's.
pub(super) fn identify(labels: &mut BTreeMap<String, String>, claim: &SandboxClaim) {
    labels.insert(keys::CLAIM_UID.to_owned(), claim.uid().unwrap_or_default());
    match claim
        .labels()
        .get(keys::CREATED_BY)
        .filter(|by| !by.is_empty())
    {
        Some(by) => labels.insert(keys::CREATED_BY.to_owned(), by.clone()),
        None => labels.remove(keys::CREATED_BY),
    };
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn verdict_with(
        annotation_domains: Option<&str>,
        labels: &Value,
        annotations: &Value,
    ) -> String {
        let metadata =
            serde_json::from_value(json!({"labels": labels, "annotations": annotations})).unwrap();
        let allowed = Allowed {
            labels: vec!["sandbox.users.io".to_owned()],
            annotations: annotation_domains.map(|domain| vec![domain.to_owned()]),
        };
        match check(&metadata, &allowed) {
            Ok(()) => "fine".to_owned(),
            Err(e) => e.to_string(),
        }
    }

    fn verdict(labels: &Value, annotations: &Value) -> String {
        verdict_with(Some("sandbox.users.io"), labels, annotations)
    }

    #[test]
    fn labels_come_from_allowed_domains_alone() {
        for (key, value, text) in [
            ("sandbox.users.io/team", "a", "fine"),
            ("x.sandbox.users.io/team", "a", "fine"),
            ("evilsandbox.users.io/team", "a", "not in the allowlist"),
            ("agents.x-k8s.io/claim-uid", "a", "not in the allowlist"),
            ("team", "a", "must have a domain prefix"),
            ("APP", "Sandbox-Router", "restricted system label value"),
            ("sandbox.users.io/", "a", "invalid label key"),
            ("a b/c", "a", "invalid label key"),
            ("sandbox.users.io/team", "-a", "invalid label value"),
        ] {
            let verdict = verdict(&json!({key: value}), &json!({}));
            assert!(verdict.contains(text), "{key}={value}: {verdict}");
        }
    }

    #[test]
    fn annotations_of_the_system_are_refused() {
        for (key, text) in [
            ("note", "fine"),
            ("sandbox.users.io/note", "fine"),
            ("cluster-autoscaler.kubernetes.io/safe-to-evict", "fine"),
            (
                "cluster-autoscaler.kubernetes.io/other",
                "restricted system domain",
            ),
            (
                "seccomp.security.alpha.kubernetes.io/pod",
                "restricted system domain",
            ),
            ("Agents.x-k8s.io/pod-name", "invalid annotation key"),
            ("agents.x-k8s.io/pod-name", "restricted system domain"),
        ] {
            for domains in [Some("sandbox.users.io"), None] {
                let verdict = verdict_with(domains, &json!({}), &json!({key: "x"}));
                assert!(verdict.contains(text), "{key}: {verdict}");
            }
        }
    }

    #[test]
    fn annotations_that_others_in_the_cluster_act_on_are_refused() {
        for key in [
            "k8s.v1.cni.cncf.io/networks",
            "cni.projectcalico.org/ipAddrs",
            "sidecar.istio.io/inject",
            "vault.hashicorp.com/role",
            "iam.amazonaws.com/role",
            "io.katacontainers.config.hypervisor.kernel_params",
            "io.katacontainers.config.hypervisor/kernel_params",
            "dev.gvisor.flag.network/x",
            "evilsandbox.users.io/note",
        ] {
            let with = |domains| verdict_with(domains, &json!({}), &json!({key: "x"}));
            let refused = with(Some("sandbox.users.io"));
            let why = match key.contains('/') {
                true => "not in the allowlist",
                false => "must have a domain prefix",
            };
            assert!(refused.contains(why), "{key}: {refused}");
            // As upstream has it.
            assert_eq!(with(None), "fine", "{key}");
        }
    }

    #[test]
    fn a_claim_adds_and_never_overrides() {
        let claim: SandboxClaim = serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
            "metadata": {"name": "c", "uid": "u1", "labels": {keys::CREATED_BY: "go-client"}},
            "spec": {"warmPoolRef": {"name": "p"}, "additionalPodMetadata": {"labels": {"d/a": "1"}}},
        }))
        .unwrap();
        let of = |labels: Value| {
            let template = serde_json::from_value(json!({ "labels": labels })).unwrap();
            merge(&template, &claim)
        };
        let merged = of(json!({"app": "x"})).unwrap().labels.unwrap();
        assert_eq!(
            serde_json::to_value(merged).unwrap(),
            json!({"app": "x", "d/a": "1"})
        );
        assert!(of(json!({"d/a": "1"})).is_ok());
        let e = of(json!({"d/a": "2"})).unwrap_err().to_string();
        assert!(e.contains("metadata override conflict"), "{e}");
    }

    /// Keys and values made of pieces that matter.
    fn text(pieces: &[u8]) -> String {
        let all = [
            "a",
            "Z",
            "7",
            "-",
            "_",
            ".",
            "/",
            " ",
            "é",
            "app",
            "sandbox-router",
            "x",
            "sandbox.users.io",
            "kubernetes.io",
            "k8s.io",
            "agents.x-k8s.io",
            "io",
            "cluster-autoscaler.kubernetes.io/safe-to-evict",
            "sandbox.users.io/",
            "",
        ];
        let piece = |n: &u8| all[usize::from(*n) % all.len()];
        pieces.iter().take(8).map(piece).collect()
    }

    /// What the apiserver takes for a key: an optional domain in lower case, and a name.
    fn is_key(key: &str) -> bool {
        let plain = |c: char| c.is_ascii_alphanumeric();
        let name = key.rsplit('/').next().unwrap_or_default();
        let domain = key.strip_suffix(name).unwrap_or_default().strip_suffix('/');
        let is_name = !name.is_empty()
            && name.len() < 64
            && name.starts_with(plain)
            && name.ends_with(plain)
            && name.chars().all(|c| plain(c) || "-_.".contains(c));
        let is_part = |part: &str| {
            let part_is = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
            part.starts_with(part_is)
                && part.ends_with(part_is)
                && part.chars().all(|c| part_is(c) || c == '-')
        };
        is_name && domain.is_none_or(|domain| domain.split('.').all(is_part))
    }

    #[test]
    fn any_label_that_is_taken_is_valid_and_of_an_allowed_domain() {
        bolero::check!()
            .with_type::<(Vec<u8>, Vec<u8>)>()
            .for_each(|(key, value)| {
                let (key, value) = (text(key), text(value));
                let is_taken = verdict(&json!({&key: value}), &json!({})) == "fine";
                let domain = key.split_once('/').map_or("", |(domain, _)| domain);
                let is_ours = format!(".{domain}").ends_with(".sandbox.users.io");
                let is_value = value.is_empty() || (is_key(&value) && !value.contains('/'));
                assert_eq!(
                    is_taken,
                    is_key(&key) && is_ours && is_value,
                    "{key}={value}"
                );
            });
    }

    #[test]
    fn any_annotation_that_is_taken_is_valid_and_not_the_systems() {
        bolero::check!().with_type::<Vec<u8>>().for_each(|key| {
            let key = text(key);
            let is_taken = verdict(&json!({}), &json!({&key: "any text"})) == "fine";
            let domain = key.split_once('/').map(|(domain, _)| format!(".{domain}"));
            let is_open = match domain {
                Some(domain) => domain.ends_with(".sandbox.users.io"),
                None => !key.contains('.'),
            };
            let is_open = is_open || key == keys::SAFE_TO_EVICT;
            assert_eq!(is_taken, is_key(&key) && is_open, "{key}");
        });
    }

    #[test]
    fn any_merge_keeps_all_or_names_the_conflict() {
        type Pairs = Vec<(u8, u8)>;
        let map = |pairs: &Pairs| -> BTreeMap<String, String> {
            let pair =
                |(key, value): &(u8, u8)| (format!("d/{}", key % 8), (value % 3).to_string());
            pairs.iter().map(pair).collect()
        };
        bolero::check!()
            .with_type::<(Pairs, Pairs)>()
            .for_each(|(template, brought)| {
                let (template, brought) = (map(template), map(brought));
                let claim: SandboxClaim = serde_json::from_value(json!({
                    "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
                    "metadata": {"name": "c"},
                    "spec": {"warmPoolRef": {"name": "p"}, "additionalPodMetadata": {"labels": brought}},
                }))
                .unwrap();
                let of_template = PodMetadata {
                    labels: Some(template.clone()),
                    ..PodMetadata::default()
                };
                let clash = brought.iter().find(|(k, v)| template.get(*k).is_some_and(|t| t != *v));
                match merge(&of_template, &claim) {
                    Ok(merged) => {
                        let mut all = template.clone();
                        all.extend(brought.clone());
                        assert_eq!(merged.labels, Some(all));
                        assert!(clash.is_none());
                    }
                    Err(e) => {
                        let key = clash.map(|(key, _)| format!("label \"{key}\"")).unwrap();
                        assert!(e.to_string().contains(&key), "{e}");
                    }
                }
            });
    }
}
