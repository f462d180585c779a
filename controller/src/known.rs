// SPDX-License-Identifier: Apache-2.0

//! Objects as they come from the apiserver, and what is kept of them.
//!
//! Who may create objects chooses their size, and decoded they take many times that. So a cache has
//! of each an outline of a few KiB, by which it is found and chosen, and its text where that is
//! short. A longer one is asked of the apiserver again when it is needed, by few at a time (see
//! [`crate::queue::Lane`]). However many are long, the memory that all take is bounded by their number.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Deref,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta, OwnerReference};
use kiln_crds::{Sandbox, keys};
use kube::{Api, Client, Resource, core::error_boundary::InvalidObject};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned, de::Error as _};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use crate::condition::shorten;

/// Longest text of an object that is kept, in bytes.
const TEXT: usize = 16 << 10;
/// Most JSON objects that an object may consist of: each takes up to 2 KiB when it is decoded.
const PARTS: usize = 8 << 10;
/// What is longer, in bytes, may have more.
const SURELY_FEW: usize = 64 << 10;
/// What outlines have of texts of others, in bytes. Names are shorter, so that one that was cut is
/// nobody's.
pub(crate) const NAME: usize = 254;
const MESSAGE: usize = 1024;
/// Most entries of a list in an outline.
pub(crate) const ENTRIES: usize = 8;

/// Labels and annotations by which objects are found and chosen.
const LABELS: [&str; 8] = [
    keys::SANDBOX_NAME_HASH,
    keys::TEMPLATE_REF_HASH,
    keys::TEMPLATE_NAME_DIGEST,
    keys::TEMPLATE_HASH,
    keys::WARM_POOL,
    keys::CLAIM_UID,
    keys::LAUNCH_TYPE,
    keys::CREATED_BY,
];
const ANNOTATIONS: [&str; 2] = [keys::TEMPLATE_REF, keys::CLAIM_NAME];

/// A kind of object that the controller keeps.
pub(crate) trait Kind:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// Whether more is ever wanted of it than the outline.
    const IS_READ_WHOLE: bool = true;

    /// Objects in a namespace; of a kind without, all.
    fn api(client: Client, namespace: &str) -> Api<Answer<Self>>;

    /// Whether a cluster may be without the kind.
    fn is_optional() -> bool {
        false
    }

    /// Whether a watch would bring it; what none brings grows old in a cache.
    fn is_watched(&self) -> bool {
        true
    }

    /// Drops what the controller never reads.
    fn trim(&mut self) {
        self.meta_mut().managed_fields = None;
    }

    /// Leaves what it is found and chosen by, which is little whatever there was; metadata are seen
    /// to.
    fn outline(&mut self);

    /// What is compared of it.
    fn print(&self) -> Option<Print> {
        None
    }
}

/// What a cache has of an object. Whatever is not in its outline has to be asked for with
/// `Context::whole`.
#[derive(Debug, Clone)]
pub(crate) struct Known<K> {
    outline: K,
    /// All of it, where that is short.
    text: Option<Box<str>>,
    /// Tells whether its metadata have changed.
    metadata: u64,
    print: Option<Print>,
}

impl<K: Kind> Known<K> {
    pub(crate) fn of(mut object: K) -> Self {
        object.trim();
        let text = K::IS_READ_WHOLE.then(|| serde_json::to_string(&object).ok());
        let text = text.flatten().filter(|text| text.len() <= TEXT);
        let metadata = hash(object.meta());
        let print = object.print();
        outline_metadata(object.meta_mut());
        object.outline();
        Self {
            outline: object,
            text: text.map(String::into_boxed_str),
            metadata,
            print,
        }
    }

    /// The object, where all of it is known.
    pub(crate) fn whole(&self) -> Option<serde_json::Result<K>> {
        self.text.as_deref().map(serde_json::from_str)
    }

    /// Whether nothing but its status can differ from `other`: all else that changes is in the
    /// metadata, the spec as the generation.
    pub(crate) fn is_same_but_status(&self, other: &Self) -> bool {
        self.metadata == other.metadata
    }
}

impl<K> Known<K> {
    pub(crate) fn outline(&self) -> &K {
        &self.outline
    }

    pub(crate) fn print(&self) -> Option<&Print> {
        self.print.as_ref()
    }
}

impl<K> Deref for Known<K> {
    type Target = K;

    fn deref(&self) -> &K {
        &self.outline
    }
}

/// What a Sandbox makes, as far as a pool compares it, in little space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Print {
    /// Of the Pod's spec, the volumes and the Service.
    pub(crate) spec: [u8; 32],
    /// Of what the Pod's labels and annotations are.
    pub(crate) metadata: [u8; 32],
}

impl Print {
    pub(crate) fn of(sandbox: &Sandbox) -> Option<Self> {
        let spec = &sandbox.spec;
        let template = &spec.pod_template;
        Some(Self {
            spec: digest(&(&template.spec, &spec.volume_claim_templates, spec.service))?,
            metadata: digest(&template.metadata)?,
        })
    }
}

fn digest(of: &impl Serialize) -> Option<[u8; 32]> {
    let text = serde_json::to_vec(of).ok()?;
    Some(Sha256::digest(text).into())
}

/// A hash of all metadata that others change.
fn hash(metadata: &ObjectMeta) -> u64 {
    let ObjectMeta {
        labels,
        annotations,
        finalizers,
        owner_references,
        ..
    } = metadata;
    let mut hasher = DefaultHasher::new();
    (labels, annotations, finalizers, metadata.generation).hash(&mut hasher);
    metadata.uid.hash(&mut hasher);
    metadata.deletion_timestamp.is_some().hash(&mut hasher);
    for owner in owner_references.iter().flatten() {
        (&owner.api_version, &owner.kind, &owner.name, &owner.uid).hash(&mut hasher);
        (owner.controller, owner.block_owner_deletion).hash(&mut hasher);
    }
    hasher.finish()
}

/// Leaves of metadata what objects are found and chosen by.
fn outline_metadata(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    metadata.finalizers = None;
    retain(&mut metadata.labels, &LABELS);
    retain(&mut metadata.annotations, &ANNOTATIONS);
    let owners = metadata.owner_references.take().unwrap_or_default();
    let controller = owners.into_iter().find(|o| o.controller == Some(true));
    metadata.owner_references = controller.map(|owner| {
        vec![OwnerReference {
            api_version: shorten(owner.api_version, NAME),
            kind: shorten(owner.kind, NAME),
            name: shorten(owner.name, NAME),
            uid: shorten(owner.uid, NAME),
            ..owner
        }]
    });
}

fn retain(map: &mut Option<BTreeMap<String, String>>, keys: &[&str]) {
    let kept = map.take().unwrap_or_default().into_iter();
    let kept = kept.filter(|(key, value)| keys.contains(&key.as_str()) && value.len() < NAME);
    *map = Some(kept.collect()).filter(|map: &BTreeMap<_, _>| !map.is_empty());
}

/// Leaves of conditions what an outline has of them.
pub(crate) fn outline_conditions(conditions: &mut Vec<Condition>) {
    conditions.truncate(ENTRIES);
    for condition in conditions {
        for text in [&mut condition.type_, &mut condition.status] {
            *text = shorten(std::mem::take(text), NAME);
        }
        for text in [&mut condition.reason, &mut condition.message] {
            *text = shorten(std::mem::take(text), MESSAGE);
        }
    }
}

/// Leaves of addresses what an outline has of them.
pub(crate) fn outline_names(names: &mut Option<Vec<String>>) {
    if let Some(names) = names {
        names.truncate(ENTRIES);
        for name in names {
            *name = shorten(std::mem::take(name), NAME);
        }
    }
}

/// Decodes an object, unless that would take far more memory than any object needs.
fn decode<K: DeserializeOwned>(text: &str) -> Result<K, String> {
    if text.len() > SURELY_FEW && parts(text) > PARTS {
        return Err(format!(
            "it consists of more than {PARTS} JSON objects, which is more than is read; make it smaller"
        ));
    }
    serde_json::from_str(text).map_err(|e| e.to_string())
}

/// How many objects a JSON text consists of.
fn parts(text: &str) -> usize {
    let (mut count, mut is_text, mut is_escaped) = (0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = is_text,
            b'"' => is_text = !is_text,
            b'{' if !is_text => count += 1,
            _ => {}
        }
    }
    count
}

/// An object in a list or a watch. One that cannot be read must not hide all others: a schema need
/// not be as strict as a type in all things.
#[derive(Debug, Clone)]
pub(crate) struct Watched<K>(pub(crate) Result<Known<K>, InvalidObject>);

impl<'de, K: Kind> Deserialize<'de> for Watched<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Partial {
            #[serde(default)]
            metadata: ObjectMeta,
        }
        let text = <&RawValue>::deserialize(deserializer)?.get();
        match decode::<K>(text) {
            Ok(object) => Ok(Self(Ok(Known::of(object)))),
            Err(error) => {
                let partial: Partial = serde_json::from_str(text).map_err(D::Error::custom)?;
                let mut metadata = partial.metadata;
                outline_metadata(&mut metadata);
                Ok(Self(Err(InvalidObject { error, metadata })))
            }
        }
    }
}

/// The answer to a request.
#[derive(Debug, Clone)]
pub(crate) struct Answer<K>(pub(crate) K);

impl<'de, K: DeserializeOwned> Deserialize<'de> for Answer<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <&RawValue>::deserialize(deserializer)?.get();
        decode(text).map(Self).map_err(D::Error::custom)
    }
}

/// Has a wrapper of an object be of the object's kind.
macro_rules! of_its_kind {
    ($wrapper:ident, $this:ident => $meta:expr, $meta_mut:expr) => {
        impl<K: Resource> Resource for $wrapper<K> {
            type DynamicType = K::DynamicType;
            type Scope = K::Scope;

            fn kind(dynamic: &Self::DynamicType) -> Cow<'_, str> {
                K::kind(dynamic)
            }

            fn group(dynamic: &Self::DynamicType) -> Cow<'_, str> {
                K::group(dynamic)
            }

            fn version(dynamic: &Self::DynamicType) -> Cow<'_, str> {
                K::version(dynamic)
            }

            fn plural(dynamic: &Self::DynamicType) -> Cow<'_, str> {
                K::plural(dynamic)
            }

            fn meta(&$this) -> &ObjectMeta {
                $meta
            }

            fn meta_mut(&mut $this) -> &mut ObjectMeta {
                $meta_mut
            }
        }
    };
}

of_its_kind!(Known, self => self.outline.meta(), self.outline.meta_mut());
of_its_kind!(Answer, self => self.0.meta(), self.0.meta_mut());
of_its_kind!(Watched, self =>
    self.0.as_ref().map_or_else(|invalid| &invalid.metadata, Known::meta),
    self.0.as_mut().map_or_else(|invalid| &mut invalid.metadata, Known::meta_mut)
);

#[cfg(test)]
mod tests {
    use kube::ResourceExt;
    use serde_json::{Value, json};

    use super::*;

    fn sandbox(pod: &Value) -> Value {
        json!({
            "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
            "metadata": {
                "name": "box", "namespace": "ns", "uid": "u", "resourceVersion": "7",
                "labels": {keys::WARM_POOL: "p", "other": "label"},
                "annotations": {keys::TEMPLATE_REF: "t", "other": "annotation"},
                "ownerReferences": [
                    {"apiVersion": "v1", "kind": "A", "name": "a", "uid": "1"},
                    {"apiVersion": "v1", "kind": "B", "name": "b", "uid": "2", "controller": true},
                ],
                "managedFields": [{"manager": "m"}],
            },
            "spec": {"podTemplate": {"spec": pod}, "shutdownPolicy": "Delete"},
        })
    }

    fn known(pod: &Value) -> Known<Sandbox> {
        let text = sandbox(pod).to_string();
        let watched: Watched<Sandbox> = serde_json::from_str(&text).unwrap();
        watched.0.unwrap()
    }

    fn containers(count: usize, image: &str) -> Value {
        let container = |n: usize| json!({"name": n.to_string(), "image": image});
        json!({"containers": (0..count).map(container).collect::<Vec<_>>()})
    }

    #[test]
    fn an_outline_has_what_an_object_is_chosen_by_and_the_text_all_of_it() {
        let known = known(&containers(3, "pause"));
        assert_eq!(known.labels().len(), 1);
        assert_eq!(known.annotations()[keys::TEMPLATE_REF], "t");
        assert_eq!(known.owner_references().len(), 1);
        assert_eq!(known.owner_references()[0].name, "b");
        assert!(known.spec.pod_template.spec.containers.is_empty());
        let whole = known.whole().unwrap().unwrap();
        assert_eq!(whole.labels().len(), 2);
        assert_eq!(whole.owner_references().len(), 2);
        assert_eq!(whole.spec.pod_template.spec.containers.len(), 3);
        assert_eq!(whole.metadata.managed_fields, None);
        assert_eq!(known.print(), Print::of(&whole).as_ref());
    }

    #[test]
    fn of_a_large_object_little_is_kept() {
        for pod in [containers(2, &"x".repeat(1 << 20)), containers(8_000, "x")] {
            let known = known(&pod);
            assert!(known.whole().is_none());
            let left = serde_json::to_string(known.outline()).unwrap();
            assert!(left.len() < 1024, "{left}");
            assert!(known.print().is_some());
        }
    }

    #[test]
    fn prints_differ_where_what_is_made_does() {
        let print = |pod: &Value| *known(pod).print().unwrap();
        let one = print(&containers(1, "a"));
        assert_eq!(one, print(&containers(1, "a")));
        assert_ne!(one, print(&containers(1, "b")));
    }

    #[test]
    fn what_would_take_too_much_memory_is_not_decoded() {
        let text = sandbox(&containers(PARTS + 1, "x")).to_string();
        let watched: Watched<Sandbox> = serde_json::from_str(&text).unwrap();
        let invalid = watched.0.unwrap_err();
        assert_eq!(invalid.metadata.name.as_deref(), Some("box"));
        assert!(invalid.error.contains("make it smaller"), "{invalid}");
        assert!(serde_json::from_str::<Answer<Sandbox>>(&text).is_err());
        // Text is no object, whatever is in it.
        let braces = known(&containers(1, &r#"{"\{"#.repeat(100_000)));
        assert!(braces.print().is_some());
    }

    #[test]
    fn metadata_of_others_are_told_from_a_status() {
        let with = |change: fn(&mut Sandbox)| {
            let text = sandbox(&containers(1, "a")).to_string();
            let mut object: Sandbox = serde_json::from_str(&text).unwrap();
            change(&mut object);
            Known::of(object)
        };
        let one = with(|_| {});
        let status = |s: &mut Sandbox| {
            s.status = Some(kiln_crds::SandboxStatus::default());
            s.metadata.resource_version = Some("8".to_owned());
        };
        assert!(one.is_same_but_status(&with(status)));
        let changes: [fn(&mut Sandbox); 3] = [
            |s| s.metadata.generation = Some(2),
            |s| drop(s.labels_mut().insert("a".to_owned(), "b".to_owned())),
            |s| s.owner_references_mut().clear(),
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert!(!one.is_same_but_status(&with(change)), "{n}");
        }
    }
}
