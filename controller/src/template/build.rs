// SPDX-License-Identifier: Apache-2.0

//! The NetworkPolicy of a template, and the defaults that make its Pods safe.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use k8s_openapi::{
    api::{
        core::v1::PodSpec,
        networking::v1::{
            IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule,
            NetworkPolicyPeer, NetworkPolicySpec,
        },
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};
use kiln_crds::{NetworkPolicyManagement, SandboxTemplate, SandboxTemplateSpec, keys};
use kube::ResourceExt;
use serde_json::{Value, json};

use crate::{cache::Key, error::Result, owner, patch};

/// Most characters of an object's name (RFC 1123, as Kubernetes "Object names and IDs" has it).
const LONGEST_NAME: usize = 253;
/// What a NetworkPolicy has in its name behind its template's.
pub(super) const POLICY_SUFFIX: &str = "-network-policy";
/// Label `app` of the sandbox router.
const ROUTER_APP: &str = "sandbox-router";
/// Networks that are no part of the Internet (IANA's registry of special-purpose addresses), and the
/// address at which Azure serves its virtual machines (168.63.129.16). Clouds put Pods and Services in
/// 100.64.0.0/10, 198.18.0.0/15 and 240.0.0.0/4, too.
const NOT_PUBLIC_V4: [(Ipv4Addr, u8); 11] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
];
/// The same of IPv6, with the prefix that a network has for its own NAT64 (RFC 8215).
const NOT_PUBLIC_V6: [&str; 3] = ["fc00::/7", "fe80::/10", "64:ff9b:1::/48"];

/// Whether the controller looks after the NetworkPolicy of a template.
pub(super) fn is_managed(template: &SandboxTemplateSpec) -> bool {
    template.network_policy_management.unwrap_or_default() == NetworkPolicyManagement::Managed
}

/// The policy has the template's name in its own, as upstream's has; of a longer one, its beginning
/// and its hash.
pub(super) fn policy_key(template: &SandboxTemplate) -> Key {
    let template_name = template.name_any();
    let mut name = format!("{template_name}{POLICY_SUFFIX}");
    if name.len() > LONGEST_NAME {
        let end = format!("-{}{POLICY_SUFFIX}", keys::name_hash(&template_name));
        name.truncate(LONGEST_NAME - end.len());
        let begin = name.trim_end_matches(['-', '.']);
        name = format!("{begin}{end}");
    }
    Key::new(&template.namespace().unwrap_or_default(), &name)
}

/// The policy of a template. It is for its own Pods alone if these `are_labelled` so; else also for
/// those of another template with the same hash, because none may be without.
pub(super) fn policy(
    template: &SandboxTemplate,
    router_namespace: &str,
    are_labelled: bool,
) -> NetworkPolicy {
    let (ingress, egress) = match &template.spec.network_policy {
        Some(rules) => (rules.ingress.clone(), rules.egress.clone()),
        None => (
            Some(vec![from_router(router_namespace)]),
            Some(vec![to_internet()]),
        ),
    };
    let name = template.name_any();
    let mut labels = BTreeMap::from([(keys::TEMPLATE_REF_HASH.to_owned(), keys::name_hash(&name))]);
    if are_labelled {
        labels.insert(
            keys::TEMPLATE_NAME_DIGEST.to_owned(),
            keys::name_digest(&name),
        );
    }
    NetworkPolicy {
        metadata: ObjectMeta {
            name: Some(policy_key(template).name),
            namespace: template.namespace(),
            owner_references: Some(vec![owner::reference(template)]),
            ..ObjectMeta::default()
        },
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selector(labels)),
            policy_types: Some(vec!["Ingress".to_owned(), "Egress".to_owned()]),
            // The apiserver keeps no empty lists.
            ingress: ingress.filter(|rules| !rules.is_empty()),
            egress: egress.filter(|rules| !rules.is_empty()),
        }),
    }
}

fn selector(labels: BTreeMap<String, String>) -> LabelSelector {
    LabelSelector {
        match_labels: Some(labels),
        match_expressions: None,
    }
}

fn from_router(namespace: &str) -> NetworkPolicyIngressRule {
    let labels =
        |key: &str, value: &str| selector(BTreeMap::from([(key.to_owned(), value.to_owned())]));
    NetworkPolicyIngressRule {
        from: Some(vec![NetworkPolicyPeer {
            namespace_selector: Some(labels("kubernetes.io/metadata.name", namespace)),
            pod_selector: Some(labels("app", ROUTER_APP)),
            ip_block: None,
        }]),
        ports: None,
    }
}

fn to_internet() -> NetworkPolicyEgressRule {
    let block = |cidr: &str, except: Vec<String>| NetworkPolicyPeer {
        ip_block: Some(IPBlock {
            cidr: cidr.to_owned(),
            except: Some(except),
        }),
        ..NetworkPolicyPeer::default()
    };
    let v4 = NOT_PUBLIC_V4.map(|(net, length)| format!("{net}/{length}"));
    let v6 = NOT_PUBLIC_V6.map(str::to_owned);
    let translated = NOT_PUBLIC_V4.map(|(net, length)| by_nat64(net, length));
    NetworkPolicyEgressRule {
        to: Some(vec![
            block("0.0.0.0/0", v4.into()),
            block("::/0", v6.into_iter().chain(translated).collect()),
        ]),
        ports: None,
    }
}

/// A network of IPv4 as hosts with IPv6 only reach it, by the well-known prefix of NAT64 (RFC 6052).
fn by_nat64(net: Ipv4Addr, length: u8) -> String {
    let prefix = u128::from_be_bytes(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0).octets());
    let net = Ipv6Addr::from_bits(prefix | u128::from(net.to_bits()));
    format!("{net}/{}", 96 + length)
}

/// Gives a Pod of a template what is safe where the template says nothing: no service account
/// token, and under the default policy, which cuts it off from the cluster's DNS, other servers.
pub(crate) fn secure(pod: &mut PodSpec, template: &SandboxTemplateSpec, dns_servers: &[IpAddr]) {
    pod.automount_service_account_token.get_or_insert(false);
    let is_default_policy = is_managed(template) && template.network_policy.is_none();
    if is_default_policy && pod.dns_policy.is_none() && !dns_servers.is_empty() {
        pod.dns_policy = Some("None".to_owned());
        let config = pod.dns_config.get_or_insert_default();
        let nameservers = config.nameservers.get_or_insert_default();
        if nameservers.is_empty() {
            nameservers.extend(dns_servers.iter().map(IpAddr::to_string));
        }
    }
}

/// The patch that makes a policy what it should be. It takes away what others have added, which an
/// apply would leave: a rule too many opens what the policy is there to close.
pub(super) fn correction(found: &NetworkPolicy, wanted: &NetworkPolicy) -> Result<Option<Value>> {
    let old = serde_json::to_value(&found.spec)?;
    let new = serde_json::to_value(&wanted.spec)?;
    let of_this_state = |spec: Value| {
        json!({
            "metadata": {"uid": found.uid(), "resourceVersion": found.resource_version()},
            "spec": spec,
        })
    };
    Ok(patch::diff(&old, &new).map(of_this_state))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(spec: &Value) -> SandboxTemplate {
        let mut all = json!({"podTemplate": {"spec": {"containers": []}}});
        all.as_object_mut()
            .unwrap()
            .extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxTemplate",
            "metadata": {"name": "t", "namespace": "ns", "uid": "u"}, "spec": all,
        }))
        .unwrap()
    }

    #[test]
    fn without_rules_only_the_router_comes_in_and_only_the_internet_is_reached() {
        let spec = serde_json::to_value(policy(&template(&json!({})), "team", true).spec).unwrap();
        assert_eq!(
            spec,
            json!({
                "podSelector": {"matchLabels": {
                    keys::TEMPLATE_REF_HASH: keys::name_hash("t"),
                    keys::TEMPLATE_NAME_DIGEST: keys::name_digest("t"),
                }},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [{
                    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team"}},
                    "podSelector": {"matchLabels": {"app": "sandbox-router"}},
                }]}],
                "egress": [{"to": [
                    {"ipBlock": {"cidr": "0.0.0.0/0", "except": [
                        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32",
                        "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16",
                        "198.18.0.0/15", "240.0.0.0/4",
                    ]}},
                    {"ipBlock": {"cidr": "::/0", "except": [
                        "fc00::/7", "fe80::/10", "64:ff9b:1::/48", "64:ff9b::/104",
                        "64:ff9b::a00:0/104", "64:ff9b::6440:0/106", "64:ff9b::7f00:0/104",
                        "64:ff9b::a83f:8110/128", "64:ff9b::a9fe:0/112", "64:ff9b::ac10:0/108",
                        "64:ff9b::c000:0/120", "64:ff9b::c0a8:0/112", "64:ff9b::c612:0/111",
                        "64:ff9b::f000:0/100",
                    ]}},
                ]}],
            })
        );
    }

    #[test]
    fn a_template_without_rules_in_its_policy_denies_all() {
        let spec = policy(
            &template(&json!({"networkPolicy": {"ingress": []}})),
            "team",
            true,
        )
        .spec
        .unwrap();
        assert!(spec.ingress.is_none() && spec.egress.is_none());
        assert_eq!(spec.policy_types.unwrap().len(), 2);
    }

    #[test]
    fn what_others_have_added_to_a_policy_goes() {
        let wanted = policy(
            &template(&json!({"networkPolicy": {"ingress": [{}]}})),
            "team",
            true,
        );
        let mut found = wanted.clone();
        found.metadata.uid = Some("p".to_owned());
        found.metadata.resource_version = Some("9".to_owned());
        assert_eq!(correction(&found, &wanted).unwrap(), None);
        let spec = found.spec.as_mut().unwrap();
        spec.egress = Some(vec![NetworkPolicyEgressRule::default()]);
        assert_eq!(
            correction(&found, &wanted).unwrap(),
            Some(json!({
                "metadata": {"uid": "p", "resourceVersion": "9"},
                "spec": {"egress": null},
            }))
        );
    }

    #[test]
    fn defaults_are_safe_and_give_way_to_what_is_said() {
        let servers = ["9.9.9.9".parse().unwrap()];
        let secured = |template_spec: &Value, pod: &Value, servers: &[IpAddr]| {
            let mut pod: PodSpec = serde_json::from_value(pod.clone()).unwrap();
            secure(&mut pod, &template(template_spec).spec, servers);
            (pod.automount_service_account_token, pod.dns_policy)
        };
        let none = Some("None".to_owned());
        let plain = json!({"containers": []});
        assert_eq!(secured(&json!({}), &plain, &servers), (Some(false), none));
        assert_eq!(secured(&json!({}), &plain, &[]), (Some(false), None));
        let unmanaged = json!({"networkPolicyManagement": "Unmanaged"});
        assert_eq!(secured(&unmanaged, &plain, &servers), (Some(false), None));
        let said =
            json!({"containers": [], "automountServiceAccountToken": true, "dnsPolicy": "Default"});
        assert_eq!(
            secured(&json!({}), &said, &servers),
            (Some(true), Some("Default".to_owned()))
        );
    }

    #[test]
    fn the_policy_of_a_long_name_has_a_name_that_can_be() {
        let of = |name: &str| {
            let mut template = template(&json!({}));
            template.metadata.name = Some(name.to_owned());
            policy_key(&template).name
        };
        assert_eq!(of("t"), "t-network-policy");
        for length in [238, 239, 246, 253] {
            let (one, other) = (
                of(&"a".repeat(length)),
                of(&format!("{}b", "a".repeat(length - 1))),
            );
            assert!(one.len() <= LONGEST_NAME, "{one}");
            assert!(one.ends_with("-network-policy"), "{one}");
            assert_ne!(one, other);
        }
        let dotted = of(&format!("{}.b", "a".repeat(229)));
        assert!(!dotted.contains(".-"), "{dotted}");
    }

    #[test]
    fn a_templates_own_dns_settings_stay() {
        let servers = ["9.9.9.9".parse().unwrap()];
        let config = |given: &Value| {
            let pod = json!({"containers": [], "dnsConfig": given});
            let mut pod: PodSpec = serde_json::from_value(pod).unwrap();
            secure(&mut pod, &template(&json!({})).spec, &servers);
            assert_eq!(pod.dns_policy.as_deref(), Some("None"));
            serde_json::to_value(pod.dns_config).unwrap()
        };
        let whole = json!({"nameservers": ["10.0.0.10"], "searches": ["example.com"]});
        assert_eq!(config(&whole), whole);
        let searches = json!({"searches": ["example.com"]});
        let merged = json!({"nameservers": ["9.9.9.9"], "searches": ["example.com"]});
        assert_eq!(config(&searches), merged);
    }
}
