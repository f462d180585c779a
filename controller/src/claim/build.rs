// SPDX-License-Identifier: Apache-2.0

//! The Sandbox of a claim: made for it, or what an adopted one becomes.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::core::v1::{Container, EnvVar as PodEnvVar, Volume},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kiln_crds::{
    EnvVar, InjectionPolicy, Sandbox, SandboxClaim, SandboxTemplate, VolumeClaimTemplate, keys,
};
use kube::ResourceExt;
use serde_json::{Value, json};

use super::metadata;
use crate::{
    error::{Error, Result},
    owner, patch,
    pool::blueprint,
    template,
};

/// A Sandbox made for a claim that found none, or that brings what cannot be put into one that
/// runs already.
pub(super) fn cold(
    claim: &SandboxClaim,
    template: &SandboxTemplate,
    dns_servers: &[IpAddr],
) -> Result<Sandbox> {
    let hash = keys::name_hash(&template.name_any());
    let mut spec = blueprint(&template.spec);
    let claims = volume_claims(
        spec.volume_claim_templates.take().unwrap_or_default(),
        claim
            .spec
            .volume_claim_templates
            .as_deref()
            .unwrap_or_default(),
        template
            .spec
            .volume_claim_templates_policy
            .unwrap_or_default(),
        spec.pod_template
            .spec
            .volumes
            .as_deref()
            .unwrap_or_default(),
    )?;
    spec.volume_claim_templates = (!claims.is_empty()).then_some(claims);
    spec.pod_template.metadata = metadata::merge(&spec.pod_template.metadata, claim)?;
    let policy = template.spec.env_vars_injection_policy.unwrap_or_default();
    let pod = &mut spec.pod_template.spec;
    inject(
        pod.init_containers.as_deref_mut().unwrap_or_default(),
        &mut pod.containers,
        claim.spec.env.as_deref().unwrap_or_default(),
        policy,
    )?;
    template::secure(pod, &template.spec, dns_servers);

    let mut labels = BTreeMap::from([
        (keys::LAUNCH_TYPE.to_owned(), keys::COLD.to_owned()),
        (keys::TEMPLATE_REF_HASH.to_owned(), hash),
    ]);
    metadata::identify(&mut labels, claim);
    let mut annotations = BTreeMap::from([
        (keys::TEMPLATE_REF.to_owned(), template.name_any()),
        (keys::POD_NAME.to_owned(), claim.name_any()),
        (keys::CLAIM_NAME.to_owned(), claim.name_any()),
    ]);
    if let Some(trace) = claim.annotations().get(keys::TRACE_CONTEXT) {
        annotations.insert(keys::TRACE_CONTEXT.to_owned(), trace.clone());
    }
    Ok(Sandbox {
        metadata: ObjectMeta {
            name: Some(claim.name_any()),
            namespace: claim.namespace(),
            labels: Some(labels),
            annotations: Some(annotations),
            owner_references: Some(vec![owner::reference(claim)]),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    })
}

/// The patch that makes a Sandbox of a pool the claim's. It holds only for the state that it was
/// computed from: whoever comes second gets a conflict.
pub(super) fn adoption(
    sandbox: &Sandbox,
    claim: &SandboxClaim,
    template: Option<&SandboxTemplate>,
) -> Result<Value> {
    let mut labels = sandbox.labels().clone();
    for key in [keys::WARM_POOL, keys::TEMPLATE_HASH] {
        labels.remove(key);
    }
    labels.insert(keys::LAUNCH_TYPE.to_owned(), keys::WARM.to_owned());
    metadata::identify(&mut labels, claim);
    let mut annotations = sandbox.annotations().clone();
    annotations.insert(keys::POD_NAME.to_owned(), sandbox.name_any());
    annotations.insert(keys::CLAIM_NAME.to_owned(), claim.name_any());
    if let Some(trace) = claim.annotations().get(keys::TRACE_CONTEXT) {
        annotations.insert(keys::TRACE_CONTEXT.to_owned(), trace.clone());
    }
    let old_pod = &sandbox.spec.pod_template.metadata;
    let source = template.map_or(old_pod, |t| &t.spec.pod_template.metadata);
    let pod = metadata::merge(source, claim)?;
    let view = |labels: &BTreeMap<_, _>, annotations: &BTreeMap<_, _>, pod: &Value| {
        json!({
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": {"podTemplate": {"metadata": pod}},
        })
    };
    let old = view(
        sandbox.labels(),
        sandbox.annotations(),
        &serde_json::to_value(old_pod)?,
    );
    let new = view(&labels, &annotations, &serde_json::to_value(&pod)?);
    let mut patch = patch::diff(&old, &new).unwrap_or_else(|| json!({"metadata": {}}));
    patch["metadata"]["ownerReferences"] = json!([owner::reference(claim)]);
    patch["metadata"]["resourceVersion"] = json!(sandbox.resource_version());
    patch["metadata"]["uid"] = json!(sandbox.uid());
    Ok(patch)
}

/// The volume claim templates of template and claim together, as far as the policy allows. Unless it
/// lets a claim override, that takes the place of none of the `volumes` of the template's Pod.
fn volume_claims(
    mut of_template: Vec<VolumeClaimTemplate>,
    of_claim: &[VolumeClaimTemplate],
    policy: InjectionPolicy,
    volumes: &[Volume],
) -> Result<Vec<VolumeClaimTemplate>> {
    check_names(&of_template).map_err(|why| Error::VolumeClaims(format!("template: {why}")))?;
    if of_claim.is_empty() {
        return Ok(of_template);
    }
    check_names(of_claim).map_err(|why| Error::VolumeClaims(format!("claim: {why}")))?;
    if policy == InjectionPolicy::Disallowed {
        return Err(Error::VolumeClaims(
            "failed to merge volume claim templates: volume claim templates are disallowed by the template".to_owned(),
        ));
    }
    for claim in of_claim {
        let same = of_template
            .iter_mut()
            .find(|t| t.metadata.name == claim.metadata.name);
        if policy == InjectionPolicy::Allowed {
            check_addition(claim, same.is_some(), volumes)?;
        }
        match same {
            Some(same) => *same = claim.clone(),
            None => of_template.push(claim.clone()),
        }
    }
    Ok(of_template)
}

/// Refuses a volume claim that replaces something of the template's, or that names what it is to be
/// made from: a volume, or the data of another claim.
fn check_addition(
    claim: &VolumeClaimTemplate,
    is_templates: bool,
    volumes: &[Volume],
) -> Result<()> {
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    if is_templates || volumes.iter().any(|v| v.name == name) {
        return Err(Error::VolumeClaims(format!(
            "failed to merge volume claim templates: overriding volume claim templates is forbidden by the template: cannot override template volume \"{name}\""
        )));
    }
    let spec = &claim.spec;
    let named = [
        ("volumeName", spec.volume_name.is_some()),
        ("selector", spec.selector.is_some()),
        ("dataSource", spec.data_source.is_some()),
        ("dataSourceRef", spec.data_source_ref.is_some()),
    ];
    match named.into_iter().find(|(_, is_set)| *is_set) {
        Some((field, _)) => Err(Error::VolumeClaims(format!(
            "failed to merge volume claim templates: {field} of volume \"{name}\" is forbidden by the template"
        ))),
        None => Ok(()),
    }
}

fn check_names(templates: &[VolumeClaimTemplate]) -> std::result::Result<(), String> {
    for (index, template) in templates.iter().enumerate() {
        let name = template.metadata.name.as_deref().unwrap_or_default();
        if name.is_empty() {
            return Err(format!(
                "invalid volume claim templates: name at index {index} is empty"
            ));
        }
        if templates[..index]
            .iter()
            .any(|t| t.metadata.name == template.metadata.name)
        {
            return Err(format!(
                "invalid volume claim templates: duplicate name \"{name}\""
            ));
        }
    }
    Ok(())
}

/// Puts a claim's variables into the containers that they are for.
fn inject(
    init: &mut [Container],
    containers: &mut [Container],
    env: &[EnvVar],
    policy: InjectionPolicy,
) -> Result<()> {
    if env.is_empty() {
        return Ok(());
    }
    if policy == InjectionPolicy::Disallowed {
        return Err(Error::EnvVars(
            "environment variable injection is not allowed by the template policy".to_owned(),
        ));
    }
    let first = containers
        .first()
        .map(|c| c.name.clone())
        .unwrap_or_default();
    for variable in env {
        let target = variable.container_name.as_ref().filter(|n| !n.is_empty());
        let target = target.unwrap_or(&first);
        let found = init
            .iter_mut()
            .chain(containers.iter_mut())
            .find(|c| c.name == *target);
        let Some(container) = found else {
            return Err(Error::EnvVars(format!(
                "target container \"{target}\" not found in template for environment variable \"{}\"",
                variable.name
            )));
        };
        inject_one(container, variable, policy)?;
    }
    Ok(())
}

fn inject_one(container: &mut Container, variable: &EnvVar, policy: InjectionPolicy) -> Result<()> {
    let has_sources = container
        .env_from
        .as_ref()
        .is_some_and(|from| !from.is_empty());
    if policy == InjectionPolicy::Allowed && has_sources {
        return Err(Error::EnvVars(format!(
            "container \"{}\" uses EnvFrom sources; Allowed policy cannot safely prevent overriding EnvFrom-provided variables",
            container.name
        )));
    }
    let new = PodEnvVar {
        name: variable.name.clone(),
        value: Some(variable.value.clone()),
        value_from: None,
    };
    let env = container.env.get_or_insert_default();
    match env.iter_mut().find(|e| e.name == variable.name) {
        Some(_) if policy != InjectionPolicy::Overrides => Err(Error::EnvVars(format!(
            "environment variable override is not allowed by the template policy for variable \"{}\"",
            variable.name
        ))),
        Some(old) => {
            *old = new;
            Ok(())
        }
        None => {
            env.push(new);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(spec: &Value) -> SandboxClaim {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
            "metadata": {"name": "c", "namespace": "ns", "uid": "u1"}, "spec": spec,
        }))
        .unwrap()
    }

    fn template(spec: &Value) -> SandboxTemplate {
        let mut all = json!({"podTemplate": {"spec": {
            "initContainers": [{"name": "init"}],
            "containers": [{"name": "main", "env": [{"name": "A", "value": "1"}]}, {"name": "side", "envFrom": [{"prefix": "X"}]}],
        }}});
        all.as_object_mut()
            .unwrap()
            .extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxTemplate",
            "metadata": {"name": "t", "namespace": "ns"}, "spec": all,
        }))
        .unwrap()
    }

    fn env_of(policy: &str, env: &Value) -> String {
        let template = template(&json!({"envVarsInjectionPolicy": policy}));
        match cold(&claim(&json!({ "env": env })), &template, &[]) {
            Err(e) => e.to_string(),
            Ok(sandbox) => {
                let pod = sandbox.spec.pod_template.spec;
                let containers = pod
                    .init_containers
                    .into_iter()
                    .flatten()
                    .chain(pod.containers);
                let all = containers.flat_map(|c| {
                    c.env
                        .into_iter()
                        .flatten()
                        .map(move |e| format!("{}:{}={}", c.name, e.name, e.value.unwrap()))
                });
                all.collect::<Vec<_>>().join(" ")
            }
        }
    }

    #[test]
    fn variables_go_where_the_policy_lets_them() {
        let a = json!([{"name": "A", "value": "2"}]);
        let b = json!([{"name": "B", "value": "2"}, {"name": "C", "value": "3", "containerName": "init"}]);
        let side = json!([{"name": "B", "value": "2", "containerName": "side"}]);
        let lost = json!([{"name": "B", "value": "2", "containerName": "nowhere"}]);
        for (policy, env, expected) in [
            (
                "Disallowed",
                &b,
                "environment variable injection rejected: environment variable injection is not allowed by the template policy",
            ),
            ("Allowed", &b, "init:C=3 main:A=1 main:B=2"),
            (
                "Allowed",
                &a,
                "environment variable injection rejected: environment variable override is not allowed by the template policy for variable \"A\"",
            ),
            ("Overrides", &a, "main:A=2"),
            ("Overrides", &side, "main:A=1 side:B=2"),
        ] {
            assert_eq!(env_of(policy, env), expected);
        }
        assert!(env_of("Allowed", &side).contains("uses EnvFrom sources"));
        assert!(env_of("Overrides", &lost).contains("\"nowhere\" not found"));
    }

    fn volumes_of(policy: &str, of_template: &[&str], of_claim: &[&str]) -> String {
        let list = |names: &[&str]| -> Value {
            names
                .iter()
                .map(|name| json!({"metadata": {"name": name}, "spec": {}}))
                .collect()
        };
        let template = template(&json!({
            "volumeClaimTemplatesPolicy": policy, "volumeClaimTemplates": list(of_template),
        }));
        match cold(
            &claim(&json!({"volumeClaimTemplates": list(of_claim)})),
            &template,
            &[],
        ) {
            Err(e) => e.to_string(),
            Ok(sandbox) => {
                let all = sandbox.spec.volume_claim_templates.unwrap_or_default();
                all.into_iter()
                    .filter_map(|v| v.metadata.name)
                    .collect::<Vec<_>>()
                    .join(" ")
            }
        }
    }

    #[test]
    fn volume_claims_follow_the_policy() {
        for (policy, template, claim, expected) in [
            ("Disallowed", &["a"][..], &[][..], "a"),
            ("Disallowed", &["a"], &["b"], "disallowed by the template"),
            ("Allowed", &["a"], &["b"], "a b"),
            (
                "Allowed",
                &["a"],
                &["a"],
                "cannot override template volume \"a\"",
            ),
            ("Overrides", &["a", "b"], &["b", "c"], "a b c"),
            (
                "Overrides",
                &["a"],
                &["b", "b"],
                "claim: invalid volume claim templates: duplicate name \"b\"",
            ),
            ("Overrides", &["a"], &[""], "name at index 0 is empty"),
        ] {
            let found = volumes_of(policy, template, claim);
            assert!(
                found.ends_with(expected),
                "{policy} {template:?} {claim:?}: {found}"
            );
        }
    }

    #[test]
    fn a_claims_volume_replaces_none_of_the_templates_and_names_nothing() {
        let pod =
            json!({"spec": {"containers": [], "volumes": [{"name": "policy", "emptyDir": {}}]}});
        let with = |policy: &str, name: &str, spec: &Value| {
            let template =
                template(&json!({"podTemplate": pod, "volumeClaimTemplatesPolicy": policy}));
            let volume = json!([{"metadata": {"name": name}, "spec": spec}]);
            let made = cold(
                &claim(&json!({"volumeClaimTemplates": volume})),
                &template,
                &[],
            );
            made.err().map(|e| e.to_string()).unwrap_or_default()
        };
        let why = "cannot override template volume \"policy\"";
        assert!(with("Allowed", "policy", &json!({})).ends_with(why));
        let source = json!({"kind": "VolumeSnapshot", "name": "s"});
        for spec in [
            json!({"volumeName": "pv"}),
            json!({"selector": {"matchLabels": {"a": "b"}}}),
            json!({"dataSource": source}),
            json!({"dataSourceRef": source}),
        ] {
            let field = spec.as_object().and_then(|s| s.keys().next()).unwrap();
            let refused = with("Allowed", "new", &spec);
            assert!(
                refused.contains(&format!("{field} of volume \"new\"")),
                "{refused}"
            );
            assert_eq!(with("Overrides", "policy", &spec), "");
        }
        assert_eq!(
            with("Allowed", "new", &json!({"storageClassName": "fast"})),
            ""
        );
    }

    #[test]
    fn an_adoption_changes_hands_in_one_patch_that_holds_for_one_state() {
        let sandbox: Sandbox = serde_json::from_value(json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {"name": "p-1", "namespace": "ns", "uid": "s1", "resourceVersion": "9",
                "labels": {keys::WARM_POOL: "p", keys::TEMPLATE_HASH: "h", keys::TEMPLATE_REF_HASH: "t", keys::LAUNCH_TYPE: "warm", keys::CREATED_BY: "controller"},
                "annotations": {keys::POD_NAME: "p-1"}},
            "spec": {"podTemplate": {
                "metadata": {"annotations": {keys::SAFE_TO_EVICT: "true"}},
                "spec": {"containers": []}}},
        }))
        .unwrap();
        let claim = claim(&json!({"warmPoolRef": {"name": "p"}}));
        for template in [None, Some(template(&json!({})))] {
            let patch = adoption(&sandbox, &claim, template.as_ref()).unwrap();
            assert_eq!(patch["metadata"]["resourceVersion"], "9");
            assert_eq!(patch["metadata"]["ownerReferences"][0]["uid"], "u1");
            assert_eq!(
                patch["metadata"]["labels"],
                json!({keys::WARM_POOL: null, keys::TEMPLATE_HASH: null, keys::CLAIM_UID: "u1", keys::CREATED_BY: null})
            );
            // What the Pod is to be changes only where the template or the claim says so: each
            // change of the spec is one more status to write.
            let annotations = &patch["spec"]["podTemplate"]["metadata"];
            let wanted = template.map_or(json!(null), |_| json!({"annotations": null}));
            assert_eq!(annotations, &wanted);
        }
    }

    /// Environment of a container: its variables, and whether it has sources of others.
    type Env = (Vec<u8>, bool);

    fn container(index: usize, (names, has_sources): &Env) -> Container {
        let mut names: Vec<u8> = names.iter().map(|n| n % 6).collect();
        names.sort_unstable();
        names.dedup();
        let env: Vec<Value> = names
            .iter()
            .map(|n| json!({"name": format!("V{n}"), "value": "template"}))
            .collect();
        let sources = if *has_sources {
            json!([{"prefix": "X"}])
        } else {
            json!([])
        };
        serde_json::from_value(json!({"name": format!("c{index}"), "env": env, "envFrom": sources}))
            .unwrap()
    }

    fn variables(containers: &[Container]) -> BTreeMap<(String, String), String> {
        let of = |c: &Container| {
            let name = c.name.clone();
            let env = c.env.clone().unwrap_or_default().into_iter();
            env.map(move |e| ((name.clone(), e.name), e.value.unwrap_or_default()))
                .collect::<Vec<_>>()
        };
        containers.iter().flat_map(of).collect()
    }

    #[test]
    fn any_injection_adds_what_the_policy_allows_and_changes_nothing_else() {
        type Wish = (u8, Option<u8>);
        bolero::check!()
            .with_type::<(Vec<Env>, Vec<Env>, Vec<Wish>)>()
            .for_each(|(init, main, wishes)| {
                let init = init.iter().take(2).enumerate();
                let init: Vec<Container> = init.map(|(n, env)| container(n, env)).collect();
                let main = main.iter().take(2).enumerate();
                let main: Vec<Container> = main.map(|(n, env)| container(n + 2, env)).collect();
                let wish = |(n, (name, target)): (usize, &Wish)| EnvVar {
                    name: format!("V{}", name % 6),
                    value: format!("claim{n}"),
                    container_name: target.map(|t| format!("c{}", t % 5)),
                };
                let env: Vec<EnvVar> = wishes.iter().enumerate().map(wish).collect();
                let all: Vec<Container> = init.iter().chain(&main).cloned().collect();
                for policy in [
                    InjectionPolicy::Disallowed,
                    InjectionPolicy::Allowed,
                    InjectionPolicy::Overrides,
                ] {
                    let (mut new_init, mut new_main) = (init.clone(), main.clone());
                    let result = inject(&mut new_init, &mut new_main, &env, policy);
                    assert_eq!(result.is_ok(), expected(&all, &main, &env, policy));
                    if result.is_ok() {
                        let mut wanted = variables(&all);
                        for e in &env {
                            wanted.insert((target(e, &main), e.name.clone()), e.value.clone());
                        }
                        let new: Vec<Container> = new_init.into_iter().chain(new_main).collect();
                        assert_eq!(variables(&new), wanted);
                    }
                }
            });
    }

    fn target(variable: &EnvVar, main: &[Container]) -> String {
        let first = main.first().map(|c| c.name.clone());
        variable
            .container_name
            .clone()
            .or(first)
            .unwrap_or_default()
    }

    /// Whether the policy lets a claim bring `env`, said in another way.
    fn expected(
        all: &[Container],
        main: &[Container],
        env: &[EnvVar],
        policy: InjectionPolicy,
    ) -> bool {
        let mut taken: Vec<(String, String)> = variables(all).into_keys().collect();
        env.iter().all(|variable| {
            let name = target(variable, main);
            let Some(container) = all.iter().find(|c| c.name == name) else {
                return false;
            };
            let is_new = !taken.contains(&(name.clone(), variable.name.clone()));
            taken.push((name, variable.name.clone()));
            let is_plain = container.env_from.as_ref().is_none_or(Vec::is_empty);
            match policy {
                InjectionPolicy::Disallowed => false,
                InjectionPolicy::Allowed => is_new && is_plain,
                InjectionPolicy::Overrides => true,
            }
        })
    }
}
