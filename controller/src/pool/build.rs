// SPDX-License-Identifier: Apache-2.0

//! Sandboxes of a pool: how they are made, and how one that was made is told from another.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kiln_crds::{
    Sandbox, SandboxSpec, SandboxTemplate, SandboxTemplateSpec, SandboxWarmPool, keys,
};
use kube::{Resource, ResourceExt};

use crate::{
    context::Context,
    error::Result,
    known::{Known, Print},
    marks::template_of,
    options::Options,
    owner, template,
};

/// Letters and digits of names that Kubernetes makes up itself (`apimachinery`'s `util/rand`): no
/// vowels, so that no words come out.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Length of what is added to a pool's name, and the most that a name may have in all.
const SUFFIX: usize = 5;
const LONGEST_NAME: usize = 63;

/// What the Sandboxes of a pool are made from.
pub(crate) struct Source {
    /// All of a Sandbox but its name.
    pub(super) model: Sandbox,
    /// Of the model.
    print: Option<Print>,
    prefix: String,
}

impl Source {
    pub(crate) fn new(
        pool: &SandboxWarmPool,
        template: &SandboxTemplate,
        options: &Options,
    ) -> Result<Self> {
        let mut spec = blueprint(&template.spec);
        template::secure(
            &mut spec.pod_template.spec,
            &template.spec,
            &options.dns_servers,
        );
        let label = |key: &str, value: String| (key.to_owned(), value);
        let labels = BTreeMap::from([
            label(keys::WARM_POOL, keys::name_hash(&pool.name_any())),
            label(
                keys::TEMPLATE_REF_HASH,
                keys::name_hash(&template.name_any()),
            ),
            label(keys::TEMPLATE_HASH, blueprint_hash(&template.spec)?),
            label(keys::LAUNCH_TYPE, keys::WARM.to_owned()),
            label(keys::CREATED_BY, "controller".to_owned()),
        ]);
        let mut prefix = format!("{}-", pool.name_any());
        prefix.truncate(LONGEST_NAME - SUFFIX);
        let model = Sandbox {
            metadata: ObjectMeta {
                namespace: pool.namespace(),
                labels: Some(labels),
                annotations: Some(BTreeMap::from([(
                    keys::TEMPLATE_REF.to_owned(),
                    template.name_any(),
                )])),
                owner_references: Some(vec![owner::reference(pool)]),
                ..ObjectMeta::default()
            },
            spec,
            status: None,
        };
        Ok(Self {
            print: Print::of(&model),
            model,
            prefix,
        })
    }

    /// A new one. It says at once which Pod it will have: that saves a write later.
    pub(super) fn sandbox(&self) -> Sandbox {
        let mut sandbox = self.model.clone();
        let letters =
            (0..SUFFIX).map(|_| char::from(ALPHABET[rand::random_range(0..ALPHABET.len())]));
        let name: String = self.prefix.chars().chain(letters).collect();
        sandbox
            .annotations_mut()
            .insert(keys::POD_NAME.to_owned(), name.clone());
        sandbox.meta_mut().name = Some(name);
        sandbox
    }

    /// Whether a Sandbox is not what would be made now. The hash decides; where another version of
    /// the controller has computed it, what it stands for does.
    pub(crate) fn is_stale(&self, sandbox: &Known<Sandbox>) -> bool {
        if template_of(sandbox) != template_of(&self.model) {
            return true;
        }
        let hash = |s: &Sandbox| s.labels().get(keys::TEMPLATE_HASH).cloned();
        hash(sandbox) != hash(&self.model) && !self.is_alike(sandbox)
    }

    /// Whether a Sandbox makes the Pod, the volumes and the Service that one of the pool makes.
    fn is_alike(&self, sandbox: &Known<Sandbox>) -> bool {
        let prints = sandbox.print().zip(self.print.as_ref());
        prints.is_some_and(|(one, other)| one.spec == other.spec)
    }

    /// Whether a Sandbox was from its beginning what would be made now, whoever has made it: one
    /// whose spec has changed may have a Pod of what it was before.
    pub(super) fn is_same(&self, sandbox: &Known<Sandbox>) -> bool {
        let is_unchanged = sandbox.meta().generation.is_none_or(|g| g == 1);
        is_unchanged
            && template_of(sandbox) == template_of(&self.model)
            && sandbox
                .print()
                .is_some_and(|print| self.print.as_ref() == Some(print))
            && !sandbox.spec.is_suspended()
            && sandbox.spec.shutdown_time.is_none()
            && !sandbox.labels().contains_key(keys::CLAIM_UID)
    }
}

/// Whether a Sandbox that bears a pool's marks is what the pool made. The marks prove nothing, since
/// whoever may create Sandboxes can write them: this process has made it, or has seen that it was
/// what the pool would make by `source`.
pub(crate) fn is_genuine<'a>(
    context: &Context,
    sandbox: &Known<Sandbox>,
    source: impl FnOnce() -> Option<&'a Source>,
) -> bool {
    if context.observed.is_genuine(sandbox) {
        return true;
    }
    let is_same = source().is_some_and(|source| source.is_same(sandbox));
    if is_same {
        context.observed.note_genuine(sandbox);
    }
    is_same
}

/// The part of a template that goes into its Sandboxes.
pub(crate) fn blueprint(template: &SandboxTemplateSpec) -> SandboxSpec {
    SandboxSpec {
        pod_template: template.pod_template.clone(),
        volume_claim_templates: template.volume_claim_templates.clone(),
        service: template.service,
        ..SandboxSpec::default()
    }
}

fn blueprint_hash(template: &SandboxTemplateSpec) -> Result<String> {
    Ok(keys::name_hash(&serde_json::to_string(&blueprint(
        template,
    ))?))
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    fn options() -> Options {
        crate::args::Args::defaults().options().unwrap()
    }

    fn template(image: &str) -> SandboxTemplate {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxTemplate",
            "metadata": {"name": "t", "namespace": "ns", "uid": "u"},
            "spec": {"podTemplate": {"spec": {"containers": [{"name": "c", "image": image}]}}},
        }))
        .unwrap()
    }

    pub(in crate::pool) fn pool(name: &str) -> SandboxWarmPool {
        serde_json::from_value(json!({
            "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxWarmPool",
            "metadata": {"name": name, "namespace": "ns", "uid": "p", "generation": 3},
            "spec": {"replicas": 2, "sandboxTemplateRef": {"name": "t"}},
        }))
        .unwrap()
    }

    #[test]
    fn members_are_marked_as_upstream_marks_them() {
        let source = Source::new(&pool("p"), &template("i"), &options()).unwrap();
        let sandbox = source.sandbox();
        let name = sandbox.name_any();
        assert!(name.starts_with("p-") && name.len() == 7, "{name}");
        assert_eq!(sandbox.annotations()[keys::POD_NAME], name);
        assert_eq!(sandbox.labels()[keys::WARM_POOL], keys::name_hash("p"));
        assert_eq!(
            sandbox.labels()[keys::TEMPLATE_REF_HASH],
            keys::name_hash("t")
        );
        let pod = &sandbox.spec.pod_template;
        assert_eq!(pod.spec.automount_service_account_token, Some(false));
        let long = Source::new(&pool(&"x".repeat(200)), &template("i"), &options()).unwrap();
        assert_eq!(long.sandbox().name_any().len(), LONGEST_NAME);
    }

    #[test]
    fn a_changed_template_makes_members_stale_and_another_hash_of_the_same_does_not() {
        let old = Source::new(&pool("p"), &template("old"), &options()).unwrap();
        let new = Source::new(&pool("p"), &template("new"), &options()).unwrap();
        let mut sandbox = old.sandbox();
        assert!(!old.is_stale(&Known::of(sandbox.clone())));
        assert!(new.is_stale(&Known::of(sandbox.clone())));
        sandbox
            .labels_mut()
            .insert(keys::TEMPLATE_HASH.to_owned(), "else".to_owned());
        assert!(!old.is_stale(&Known::of(sandbox.clone())));
    }

    #[test]
    fn only_what_the_pool_would_make_is_the_same() {
        let source = Source::new(&pool("p"), &template("i"), &options()).unwrap();
        let changed = |change: fn(&mut Sandbox)| {
            let mut sandbox = source.sandbox();
            change(&mut sandbox);
            source.is_same(&Known::of(sandbox))
        };
        assert!(changed(|_| ()));
        assert!(changed(|s| s.metadata.owner_references = None));
        let changes: [fn(&mut Sandbox); 7] = [
            |s| s.metadata.generation = Some(2),
            |s| s.spec.pod_template.spec.host_network = Some(true),
            |s| {
                let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
                s.spec.pod_template.metadata.annotations = Some(annotations);
            },
            |s| s.spec.service = Some(true),
            |s| s.spec.replicas = Some(0),
            |s| {
                s.labels_mut()
                    .insert(keys::CLAIM_UID.to_owned(), "c".to_owned());
            },
            |s| s.metadata.annotations = None,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            assert!(!changed(change), "change {index}");
        }
    }
}
