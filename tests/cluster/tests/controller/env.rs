// SPDX-License-Identifier: Apache-2.0

//! What the cases share, and the words that they are written in.

use std::fmt::Debug;

use anyhow::{Context, Result, bail};
use k8s_openapi::{
    NamespaceResourceScope, api::core::v1::Event, apimachinery::pkg::apis::meta::v1::Condition,
};
use kiln_cluster::{control_plane::ControlPlane, controller::Controller, standin::Standin};
use kiln_crds::{Sandbox, SandboxClaim, SandboxTemplate, SandboxWarmPool};
use kiln_tests::{suite::Fixture, wait};
use kube::{
    Api, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::sync::Mutex;

/// Flags of the controller: nodes that cases speak for report once and stay.
pub(crate) const FLAGS: [&str; 1] = ["--node-heartbeat-timeout=5m"];

pub(crate) struct Env {
    pub(crate) plane: ControlPlane,
    pub(crate) controller: Mutex<Option<Controller>>,
    standin: Standin,
}

pub(crate) trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + 'static
{
}

impl<K> Kind for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + Debug
        + Serialize
        + DeserializeOwned
        + Send
        + 'static
{
}

impl Env {
    pub(crate) async fn start() -> Result<Self> {
        let plane = ControlPlane::start().await?;
        let standin = Standin::start(plane.client());
        let controller = Controller::start(&plane, &FLAGS).await?;
        Ok(Self {
            plane,
            controller: Mutex::new(Some(controller)),
            standin,
        })
    }

    pub(crate) async fn namespace(&self) -> Result<Namespace<'_>> {
        Ok(Namespace {
            env: self,
            name: self.plane.namespace("case").await?,
        })
    }
}

impl Fixture for Env {
    async fn finish(self) -> Result<()> {
        drop(self.standin);
        drop(self.controller);
        self.plane.stop()
    }

    fn log(&self) -> String {
        let controller = self.controller.try_lock();
        let log = controller
            .ok()
            .and_then(|c| c.as_ref().map(Controller::log))
            .unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(60)..].join("\n");
        format!("--- end of the controller's log\n{tail}")
    }
}

/// A namespace of one case.
pub(crate) struct Namespace<'a> {
    pub(crate) env: &'a Env,
    pub(crate) name: String,
}

impl Namespace<'_> {
    pub(crate) fn api<K: Kind>(&self) -> Api<K> {
        Api::namespaced(self.env.plane.client(), &self.name)
    }

    /// Makes an object of `name` with these fields.
    pub(crate) async fn make<K: Kind>(&self, name: &str, fields: Value) -> Result<K> {
        Ok(self.try_make(name, fields).await?)
    }

    pub(crate) async fn try_make<K: Kind>(&self, name: &str, mut fields: Value) -> kube::Result<K> {
        fields["apiVersion"] = json!(K::api_version(&()));
        fields["kind"] = json!(K::kind(&()));
        fields["metadata"]["name"] = json!(name);
        let object: K = serde_json::from_value(fields).map_err(kube::Error::SerdeError)?;
        self.api().create(&PostParams::default(), &object).await
    }

    pub(crate) async fn get<K: Kind>(&self, name: &str) -> Result<K> {
        Ok(self.api().get(name).await?)
    }

    pub(crate) async fn list<K: Kind>(&self) -> Result<Vec<K>> {
        Ok(self.api().list(&ListParams::default()).await?.items)
    }

    pub(crate) async fn patch<K: Kind>(&self, name: &str, patch: Value) -> Result<K> {
        let params = PatchParams::default();
        Ok(self
            .api()
            .patch(name, &params, &Patch::Merge(patch))
            .await?)
    }

    pub(crate) async fn delete<K: Kind>(&self, name: &str) -> Result<()> {
        self.api::<K>()
            .delete(name, &DeleteParams::default())
            .await?;
        Ok(())
    }

    /// Waits until an object is as `probe` wants it, and returns what `probe` finds.
    pub(crate) async fn until<K: Kind, T>(
        &self,
        name: &str,
        what: &str,
        probe: impl Fn(&K) -> Option<T>,
    ) -> Result<T> {
        let api = self.api::<K>();
        let mut last = String::new();
        let found = wait::until(what, wait::SOON, async || {
            let object = api.get_opt(name).await.ok()??;
            last = serde_json::to_string_pretty(&object).unwrap_or_default();
            probe(&object)
        });
        found
            .await
            .with_context(|| format!("{} {name}: {last}", K::kind(&())))
    }

    pub(crate) async fn until_gone<K: Kind>(&self, name: &str) -> Result<()> {
        let api = self.api::<K>();
        let what = format!("{} {name} to be gone", K::kind(&()));
        wait::until(&what, wait::SOON, async || {
            api.get_opt(name).await.ok()?.is_none().then_some(())
        })
        .await
    }

    /// Waits until an object has a condition, which begins with `status reason` or
    /// `status reason: message`.
    pub(crate) async fn until_condition<K: Conditions>(
        &self,
        name: &str,
        kind: &str,
        begins: &str,
    ) -> Result<K> {
        let what = format!("{kind} {begins}");
        self.until(name, &what, |object: &K| {
            let line = line(object.conditions(), kind)?;
            line.starts_with(begins).then(|| object.clone())
        })
        .await
    }

    pub(crate) async fn template(&self, name: &str, fields: Value) -> Result<SandboxTemplate> {
        let mut spec =
            json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}});
        merge(&mut spec, &fields);
        self.make(name, json!({ "spec": spec })).await
    }

    pub(crate) async fn sandbox(&self, name: &str, fields: Value) -> Result<Sandbox> {
        let mut spec =
            json!({"podTemplate": {"spec": {"containers": [{"name": "main", "image": "pause"}]}}});
        merge(&mut spec, &fields);
        self.make(name, json!({ "spec": spec })).await
    }

    /// A pool, when it is full.
    pub(crate) async fn pool(
        &self,
        name: &str,
        template: &str,
        replicas: i32,
    ) -> Result<SandboxWarmPool> {
        let spec = json!({"replicas": replicas, "sandboxTemplateRef": {"name": template}});
        self.make::<SandboxWarmPool>(name, json!({ "spec": spec }))
            .await?;
        self.until_ready(name, replicas).await
    }

    /// Waits until a pool holds `replicas` Sandboxes, all of them ready, and says so. (Alone, what
    /// it says may be from before.)
    pub(crate) async fn until_ready(&self, pool: &str, replicas: i32) -> Result<SandboxWarmPool> {
        let what = format!("{replicas} ready in {pool}");
        let mut last = String::new();
        wait::until(&what, wait::SOON, async || {
            let all = self.list::<Sandbox>().await.ok()?;
            let of_pool = all.iter().filter(|s| {
                s.metadata.deletion_timestamp.is_none()
                    && controller_of(*s).is_some_and(|(_, _, name)| name == pool)
            });
            let ready = of_pool.filter(|s| {
                line(s.conditions(), "Ready").is_some_and(|line| line.starts_with("True"))
            });
            let ready = i32::try_from(ready.count()).ok()?;
            last = all
                .iter()
                .map(|s| format!("{} {:?}\n", s.name_any(), line(s.conditions(), "Ready")))
                .collect();
            (ready == replicas).then_some(())
        })
        .await
        .with_context(|| last)?;
        self.until(pool, &what, |pool: &SandboxWarmPool| {
            let status = pool.status.as_ref()?;
            let is = (status.replicas, status.ready_replicas) == (replicas, replicas)
                && status.observed_generation == pool.metadata.generation;
            is.then(|| pool.clone())
        })
        .await
    }

    pub(crate) async fn claim(&self, name: &str, pool: &str) -> Result<SandboxClaim> {
        self.claim_with(name, json!({"warmPoolRef": {"name": pool}}))
            .await
    }

    pub(crate) async fn claim_with(&self, name: &str, spec: Value) -> Result<SandboxClaim> {
        self.make(name, json!({ "spec": spec })).await
    }

    /// The Sandbox of a claim that is ready.
    pub(crate) async fn claimed(&self, name: &str) -> Result<Sandbox> {
        let claim: SandboxClaim = self.until_condition(name, "Ready", "True").await?;
        let status = claim.status.context("a claim without a status")?;
        let sandbox = status
            .sandbox
            .and_then(|s| s.name)
            .context("a claim without a Sandbox")?;
        self.get(&sandbox).await
    }

    /// The Sandboxes of claims, waited for one after the other: the apiserver would be busy with
    /// being asked else.
    pub(crate) async fn all_claimed(&self, names: &[String]) -> Result<Vec<Sandbox>> {
        let mut all = Vec::new();
        for name in names {
            all.push(self.claimed(name).await?);
        }
        Ok(all)
    }

    /// Waits for a warning about an object.
    pub(crate) async fn until_warned(&self, object: &str, text: &str) -> Result<()> {
        self.until_told("", object, text).await
    }

    /// Waits for a warning about an object of `kind`, empty for any.
    pub(crate) async fn until_told(&self, kind: &str, object: &str, text: &str) -> Result<()> {
        let what = format!("a warning about {kind} {object}: {text}");
        let api = self.api::<Event>();
        wait::until(&what, wait::SOON, async || {
            let events = api.list(&ListParams::default()).await.ok()?;
            events.items.into_iter().find_map(|e| {
                let is_kind = |found: &str| kind.is_empty() || found == kind;
                let about = e.involved_object.name.as_deref() == Some(object)
                    && e.involved_object.kind.as_deref().is_some_and(is_kind);
                let says = e.message.as_deref().is_some_and(|m| m.contains(text));
                (about && says && e.type_.as_deref() == Some("Warning")).then_some(())
            })
        })
        .await
    }
}

/// Objects with conditions.
pub(crate) trait Conditions: Kind {
    fn conditions(&self) -> &[Condition];
}

macro_rules! conditions {
    ($($kind:ty),+) => {
        $(impl Conditions for $kind {
            fn conditions(&self) -> &[Condition] {
                self.status.as_ref().map_or(&[], |s| &s.conditions)
            }
        })+
    };
}

conditions!(Sandbox, SandboxClaim, SandboxWarmPool);

/// `status reason: message` of a condition.
pub(crate) fn line(conditions: &[Condition], kind: &str) -> Option<String> {
    let condition = conditions.iter().find(|c| c.type_ == kind)?;
    Some(format!(
        "{} {}: {}",
        condition.status, condition.reason, condition.message
    ))
}

/// The object that controls another: API version, kind and name.
pub(crate) fn controller_of<K: ResourceExt>(object: &K) -> Option<(String, String, String)> {
    let owners = object.owner_references();
    let owner = owners.iter().find(|o| o.controller == Some(true))?;
    Some((
        owner.api_version.clone(),
        owner.kind.clone(),
        owner.name.clone(),
    ))
}

/// Fails when two are not equal, with both.
pub(crate) fn same<T: PartialEq + Debug>(what: &str, found: &T, wanted: &T) -> Result<()> {
    if found != wanted {
        bail!("{what}: found {found:?}, wanted {wanted:?}");
    }
    Ok(())
}

pub(crate) fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}
