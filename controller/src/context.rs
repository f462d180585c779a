// SPDX-License-Identifier: Apache-2.0

//! What every reconcile works with: the caches, the queue, and the way to the apiserver.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fmt::Debug,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        core::v1::{
            ContainerStatus, ObjectReference, PersistentVolumeClaim, Pod, PodSpec, Service,
        },
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kiln_crds::{
    NodeClassSpec, PodTemplate, Sandbox, SandboxClaim, SandboxNode, SandboxTemplate,
    SandboxTemplateSpec, SandboxWarmPool, keys,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::{Request, error_boundary::InvalidObject},
    runtime::events::{Event, EventType, Recorder},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::{
    cache::{Cache, Key},
    claim::metadata::Allowed,
    condition::{self, shorten},
    error::{self, Error, Result},
    index::{self, IndexKey},
    known::{Answer, Known, NAME, Print, outline_conditions, outline_names},
    metrics::Metrics,
    node::{self, Arrivals, Pulses},
    queue::{Class, Lane, Limits, Queue, Work},
};

/// Name under which the controller's changes appear in `managedFields`.
const FIELD_MANAGER: &str = "kiln-controller";
/// How long the apiserver may take for an answer: what takes longer fails, and is tried again.
const PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes of an event's note that an apiserver takes.
const NOTE: usize = 1024;

/// What an operator has chosen.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) cluster_domain: String,
    /// Where the sandbox router runs.
    pub(crate) router_namespace: String,
    /// DNS servers of Pods whose template says nothing; none leaves the cluster's DNS.
    pub(crate) dns_servers: Vec<IpAddr>,
    /// Whether cluster-autoscaler may evict Pods that nobody has claimed.
    pub(crate) evict_warm_pods: bool,
    /// Labels and annotations that a claim may put on its Pod.
    pub(crate) claim_metadata: Allowed,
    pub(crate) claim_annotations: ClaimAnnotations,
    pub(crate) claim_events: bool,
    pub(crate) sandbox_events: bool,
    /// Most Sandboxes of a pool that are made at the same time.
    pub(crate) pool_batch: usize,
    /// How long a Sandbox of a pool may take to become ready before it is replaced.
    pub(crate) pool_grace: Duration,
    /// How long it may take until a pool's status says that there are fewer ready.
    pub(crate) pool_status_delay: Duration,
    /// How long a node's word counts.
    pub(crate) node_heartbeat_timeout: Duration,
}

/// Which claims get annotations with the times of their life and their pool's Sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ClaimAnnotations {
    /// Those whose client has noted when it asked.
    Auto,
    /// All, for one more write per claim.
    Always,
    /// None.
    Never,
}

/// See the module.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) options: Options,
    pub(crate) metrics: Metrics,
    pub(crate) queue: Queue,
    recorder: Recorder,
    pub(crate) sandboxes: Cache<Sandbox>,
    pub(crate) claims: Cache<SandboxClaim>,
    pub(crate) pools: Cache<SandboxWarmPool>,
    pub(crate) templates: Cache<SandboxTemplate>,
    pub(crate) pods: Cache<Pod>,
    pub(crate) services: Cache<Service>,
    pub(crate) volume_claims: Cache<PersistentVolumeClaim>,
    pub(crate) policies: Cache<NetworkPolicy>,
    pub(crate) nodes: Cache<SandboxNode>,
    /// When this controller began.
    pub(crate) started: Instant,
    /// Held by the one watch that lists: a list brings many objects at once.
    pub(crate) listing: Semaphore,
    /// Sandboxes, by uid, that a claim is adopting right now.
    reserved: Mutex<HashSet<String>>,
    /// Sandboxes whose adoption or making for a claim, by uid, got no answer: it may have come to
    /// pass.
    unanswered: Mutex<HashMap<String, Key>>,
    /// When a claim, or a Sandbox that is not ready yet, was seen first, by uid.
    seen: Mutex<HashMap<String, Instant>>,
    /// Sandboxes that are what their pool made, by uid, with the generation that was looked at.
    genuine: Mutex<HashMap<String, Option<i64>>>,
    /// How often Sandboxes of a pool were replaced, because they were not ready in time, since it was
    /// full.
    late_rounds: Mutex<HashMap<Key, u32>>,
    /// Since when the status of a pool should be written.
    pending_statuses: Mutex<HashMap<Key, Instant>>,
    arrivals: Mutex<Arrivals>,
    /// What was asked of a node last.
    wishes: Mutex<HashMap<String, Vec<NodeClassSpec>>>,
    /// When nodes reported last.
    pulses: Mutex<Pulses>,
    /// Nodes that reported when they were looked at last.
    live_nodes: Mutex<BTreeSet<String>>,
}

impl Context {
    pub(crate) fn new(client: Client, options: Options, limits: Limits, metrics: Metrics) -> Self {
        let reporter = kube::runtime::events::Reporter {
            controller: FIELD_MANAGER.to_owned(),
            instance: None,
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            options,
            metrics,
            queue: Queue::new(limits),
            sandboxes: Cache::new(index::of_sandbox),
            claims: Cache::new(index::of_claim),
            pools: Cache::new(index::of_pool),
            templates: Cache::new(|_| Vec::new()),
            pods: Cache::new(index::of_owned),
            services: Cache::new(|_| Vec::new()),
            volume_claims: Cache::new(|_| Vec::new()),
            policies: Cache::new(|_| Vec::new()),
            reserved: Mutex::default(),
            unanswered: Mutex::default(),
            seen: Mutex::default(),
            genuine: Mutex::default(),
            late_rounds: Mutex::default(),
            pending_statuses: Mutex::default(),
            nodes: Cache::new(|_| Vec::new()),
            started: Instant::now(),
            listing: Semaphore::new(1),
            arrivals: Mutex::default(),
            wishes: Mutex::default(),
            pulses: Mutex::default(),
            live_nodes: Mutex::default(),
        }
    }

    pub(crate) fn add(&self, class: Class, key: Key) {
        self.queue.add(Work::new(class, key));
    }

    /// Finds what `owner` controls in its own namespace.
    pub(crate) fn owned<K: Kind>(&self, owner: &impl ResourceExt) -> Vec<Arc<Known<K>>> {
        K::cache(self).find(&IndexKey::owned_by(owner))
    }

    /// All of an object. A short one is known; a long one is asked of the apiserver, for which the
    /// work has to be in the lane of those.
    ///
    /// # Errors
    /// When it has to be done in another lane; when there is no answer, or no such object any more.
    pub(crate) async fn whole<K: Kind>(&self, known: &Known<K>, lane: Lane) -> Result<Arc<K>> {
        if let Some(whole) = known.whole() {
            return Ok(Arc::new(whole?));
        }
        if lane == Lane::Light {
            return Err(Error::Heavy);
        }
        let key = Key::of(known);
        self.fetch(&key).await?.ok_or(Error::Gone(key))
    }

    /// All of the object of that name, if there is one.
    pub(crate) async fn find_whole<K: Kind>(
        &self,
        key: &Key,
        lane: Lane,
    ) -> Result<Option<Arc<K>>> {
        match K::cache(self).get(key) {
            Some(known) => Ok(Some(self.whole(&known, lane).await?)),
            None => Ok(None),
        }
    }

    pub(crate) async fn fetch<K: Kind>(&self, key: &Key) -> Result<Option<Arc<K>>> {
        match answer(self.api::<K>(&key.namespace).get(&key.name)).await {
            Ok(object) => Ok(Some(self.keep(object))),
            Err(e) if error::is_not_found(&e) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    pub(crate) async fn create<K: Kind>(&self, object: &K) -> kube::Result<Arc<K>> {
        let _writing = self.metrics.write::<K>("POST", "");
        let params = PostParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PostParams::default()
        };
        let text = serde_json::to_vec(object).map_err(kube::Error::SerdeError)?;
        let request = Request::new(url::<K>(object.meta()));
        let request = request.create(&params, text);
        let request = request.map_err(kube::Error::BuildRequest)?;
        Ok(self.keep(answer(self.client.request(request)).await?))
    }

    pub(crate) async fn patch<K: Kind>(&self, key: &Key, patch: &Value) -> kube::Result<Arc<K>> {
        let _writing = self.metrics.write::<K>("PATCH", "");
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let api = self.api::<K>(&key.namespace);
        let patch = Patch::Merge(patch);
        let new = answer(api.patch(&key.name, &params, &patch)).await?;
        Ok(self.keep(new))
    }

    /// Patches a status. An object that is gone has none. An answer that brings along what others
    /// have changed is left for the watch to bring, which has the change looked at.
    pub(crate) async fn patch_status<K: Kind>(&self, key: &Key, patch: &Value) -> Result<()> {
        let _writing = self.metrics.write::<K>("PATCH", "status");
        let params = PatchParams {
            field_manager: Some(FIELD_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let api = self.api::<K>(&key.namespace);
        let patch = Patch::Merge(patch);
        match answer(api.patch_status(&key.name, &params, &patch)).await {
            Ok(Answer(new)) => {
                let new = Known::of(new);
                let cache = K::cache(self);
                let known = cache.get(key);
                if known.is_some_and(|known| known.is_same_but_status(&new)) {
                    cache.put(new);
                }
                Ok(())
            }
            Err(e) if error::is_not_found(&e) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Has an object that is there say all that `object` says, with its uid; `false` where it has
    /// gone. What others have added stays.
    pub(crate) async fn apply_existing<K: Kind>(&self, object: &K) -> Result<bool> {
        let _writing = self.metrics.write::<K>("PATCH", "");
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let api = self.api::<K>(&object.namespace().unwrap_or_default());
        let name = object.name_any();
        match answer(api.patch(&name, &params, &Patch::Apply(object))).await {
            Ok(new) => {
                self.keep(new);
                Ok(true)
            }
            Err(e) if error::is_conflict(&e) || error::is_not_found(&e) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Deletes this very object, not another of its name. That it is gone is as good.
    pub(crate) async fn delete<K: Kind>(&self, object: &K, params: DeleteParams) -> Result<()> {
        let only = Preconditions {
            uid: object.uid(),
            resource_version: None,
        };
        self.delete_if(object, params.preconditions(only)).await
    }

    /// Deletes an object if it is still as it is known here. If it is not, the watch brings what it
    /// is now.
    pub(crate) async fn delete_unchanged<K: Kind>(&self, object: &K) -> Result<()> {
        let only = Preconditions {
            uid: object.uid(),
            resource_version: object.resource_version(),
        };
        let params = DeleteParams::default().preconditions(only);
        self.delete_if(object, params).await
    }

    async fn delete_if<K: Kind>(&self, object: &K, params: DeleteParams) -> Result<()> {
        let _writing = self.metrics.write::<K>("DELETE", "");
        let request = Request::new(url::<K>(object.meta()));
        let request = request.delete(&object.name_any(), &params);
        let request = request.map_err(kube::Error::BuildRequest)?;
        // The object that may be in the answer is not wanted.
        match answer(self.client.request_text(request)).await {
            Err(e) if error::is_not_found(&e) || error::is_conflict(&e) => Ok(()),
            Err(e) => Err(e.into()),
            Ok(_) => Ok(()),
        }
    }

    /// Tells whoever looks at `object` what has happened, without waiting for it.
    pub(crate) fn tell<K: Kind>(
        self: &Arc<Self>,
        object: &K,
        kind: EventType,
        reason: &str,
        note: String,
    ) {
        let event = Event {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(condition::shorten(note, NOTE)),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        self.publish(event, object.object_ref(&()));
    }

    /// Tells the owner of an object that it cannot be read, and why.
    pub(crate) fn tell_invalid<K: Kind>(self: &Arc<Self>, object: &InvalidObject) {
        let name = object.metadata.name.clone();
        tracing::warn!("{} {:?} is invalid: {}", K::kind(&()), name, object.error);
        let event = Event {
            type_: EventType::Warning,
            reason: "InvalidObject".to_owned(),
            note: Some(condition::shorten(object.error.clone(), NOTE)),
            action: "Read".to_owned(),
            secondary: None,
        };
        let reference = ObjectReference {
            api_version: Some(K::api_version(&()).into_owned()),
            kind: Some(K::kind(&()).into_owned()),
            name,
            namespace: object.metadata.namespace.clone(),
            uid: object.metadata.uid.clone(),
            ..ObjectReference::default()
        };
        self.publish(event, reference);
    }

    fn publish(self: &Arc<Self>, event: Event, reference: ObjectReference) {
        let context = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(e) = answer(context.recorder.publish(&event, &reference)).await {
                tracing::debug!("event {}: {e}", event.reason);
            }
        });
    }

    pub(crate) fn api<K: Kind>(&self, namespace: &str) -> Api<Answer<K>> {
        K::api(self.client.clone(), namespace)
    }

    fn keep<K: Kind>(&self, Answer(object): Answer<K>) -> Arc<K> {
        if object.is_watched() {
            K::cache(self).put(Known::of(object.clone()));
        }
        Arc::new(object)
    }

    /// Takes a Sandbox for one claim, until the result is dropped; `None` when another has it.
    pub(crate) fn reserve(&self, sandbox: &Sandbox) -> Option<Reservation<'_>> {
        let uid = sandbox.uid()?;
        let is_new = self.reservations().insert(uid.clone());
        is_new.then(|| Reservation { context: self, uid })
    }

    pub(crate) fn is_reserved(&self, sandbox: &Sandbox) -> bool {
        sandbox
            .uid()
            .is_some_and(|uid| self.reservations().contains(&uid))
    }

    fn reservations(&self) -> MutexGuard<'_, HashSet<String>> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub(crate) fn unanswered(&self) -> MutexGuard<'_, HashMap<String, Key>> {
        self.unanswered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pending_statuses(&self) -> MutexGuard<'_, HashMap<Key, Instant>> {
        let pending = self.pending_statuses.lock();
        pending.unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub(crate) fn late_rounds(&self) -> MutexGuard<'_, HashMap<Key, u32>> {
        self.late_rounds
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub(crate) fn wishes(&self) -> MutexGuard<'_, HashMap<String, Vec<NodeClassSpec>>> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub(crate) fn pulses(&self) -> MutexGuard<'_, Pulses> {
        self.pulses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub(crate) fn live_nodes(&self) -> MutexGuard<'_, BTreeSet<String>> {
        let live = self.live_nodes.lock();
        live.unwrap_or_else(PoisonError::into_inner)
    }

    /// When an object was seen first.
    pub(crate) fn first_seen<K: ResourceExt>(&self, object: &K) -> Instant {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        *seen
            .entry(object.uid().unwrap_or_default())
            .or_insert_with(Instant::now)
    }

    /// Forgets when an object was seen first, and says so.
    pub(crate) fn forget<K: ResourceExt>(&self, object: &K) -> Option<Instant> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.remove(&object.uid().unwrap_or_default())
    }

    fn genuine(&self) -> MutexGuard<'_, HashMap<String, Option<i64>>> {
        self.genuine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a Sandbox is what its pool made, as long as its spec stays what it is.
    pub(crate) fn note_genuine(&self, sandbox: &Sandbox) {
        let generation = sandbox.meta().generation;
        if let Some(uid) = sandbox.uid() {
            self.genuine().insert(uid, generation);
        }
    }

    /// Whether a Sandbox is known to be what its pool made.
    pub(crate) fn is_genuine(&self, sandbox: &Sandbox) -> bool {
        let known = sandbox
            .uid()
            .and_then(|uid| self.genuine().get(&uid).copied());
        known == Some(sandbox.meta().generation)
    }

    /// Forgets all about a Sandbox.
    pub(crate) fn forget_sandbox(&self, sandbox: &Sandbox) {
        self.forget(sandbox);
        self.genuine().remove(&sandbox.uid().unwrap_or_default());
    }

    /// Forgets all about a claim.
    pub(crate) fn forget_claim(&self, claim: &SandboxClaim) {
        self.forget(claim);
        self.unanswered().remove(&claim.uid().unwrap_or_default());
    }
}

/// Waits for an answer, though not for ever: without one, nobody knows whether the request has come
/// to pass.
async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(answer) => answer,
        Err(late) => Err(kube::Error::Service(late.into())),
    }
}

/// Where objects of a kind are that are in the namespace of these metadata.
fn url<K: Kind>(metadata: &ObjectMeta) -> String {
    K::url_path(&(), metadata.namespace.as_deref())
}

/// A Sandbox that is being adopted.
pub(crate) struct Reservation<'a> {
    context: &'a Context,
    uid: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.context.reservations().remove(&self.uid);
    }
}

/// A kind of object that the controller keeps.
pub(crate) trait Kind:
    Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
    /// Whether more is ever wanted of it than the outline.
    const IS_READ_WHOLE: bool = true;

    fn cache(context: &Context) -> &Cache<Self>;

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

macro_rules! namespaced {
    ($cache:ident) => {
        fn cache(context: &Context) -> &Cache<Self> {
            &context.$cache
        }

        fn api(client: Client, namespace: &str) -> Api<Answer<Self>> {
            Api::namespaced(client, namespace)
        }
    };
}

impl Kind for Sandbox {
    namespaced!(sandboxes);

    fn outline(&mut self) {
        self.spec.pod_template = PodTemplate::default();
        self.spec.volume_claim_templates = None;
        if let Some(status) = &mut self.status {
            outline_conditions(&mut status.conditions);
            outline_names(&mut status.pod_ips);
            status.node_name = status.node_name.take().map(|name| shorten(name, NAME));
            status.selector = None;
            status.service = None;
            status.service_fqdn = None;
        }
    }

    fn print(&self) -> Option<Print> {
        Print::of(self)
    }
}

impl Kind for SandboxClaim {
    namespaced!(claims);

    fn outline(&mut self) {
        let spec = &mut self.spec;
        spec.env = None;
        spec.volume_claim_templates = None;
        spec.additional_pod_metadata = None;
        let pool = spec.warm_pool_ref.as_mut().map(|r| &mut r.name);
        let template = spec.sandbox_template_ref.as_mut().map(|r| &mut r.name);
        for name in [pool, template, spec.warmpool.as_mut()]
            .into_iter()
            .flatten()
        {
            *name = shorten(std::mem::take(name), NAME);
        }
        if let Some(status) = &mut self.status {
            outline_conditions(&mut status.conditions);
            status.sandbox = None;
        }
    }
}

impl Kind for SandboxWarmPool {
    namespaced!(pools);

    fn outline(&mut self) {
        let name = &mut self.spec.sandbox_template_ref.name;
        *name = shorten(std::mem::take(name), NAME);
        self.status = None;
    }
}

impl Kind for SandboxTemplate {
    namespaced!(templates);

    fn outline(&mut self) {
        self.spec = SandboxTemplateSpec {
            pod_template: PodTemplate {
                spec: node::outline(&self.spec.pod_template.spec),
                ..PodTemplate::default()
            },
            ..SandboxTemplateSpec::default()
        };
    }
}

impl Kind for Service {
    namespaced!(services);

    fn is_watched(&self) -> bool {
        is_tracked(self)
    }

    fn outline(&mut self) {
        self.spec = None;
        self.status = None;
    }
}

impl Kind for PersistentVolumeClaim {
    const IS_READ_WHOLE: bool = false;

    namespaced!(volume_claims);

    fn is_watched(&self) -> bool {
        is_tracked(self)
    }

    fn outline(&mut self) {
        self.spec = None;
        self.status = None;
    }
}

impl Kind for NetworkPolicy {
    namespaced!(policies);

    fn outline(&mut self) {
        self.spec = None;
    }
}

impl Kind for SandboxNode {
    const IS_READ_WHOLE: bool = false;

    fn cache(context: &Context) -> &Cache<Self> {
        &context.nodes
    }

    fn api(client: Client, _namespace: &str) -> Api<Answer<Self>> {
        Api::all(client)
    }

    fn is_optional() -> bool {
        true
    }

    // Nodes are few, and their agents' own.
    fn outline(&mut self) {}
}

impl Kind for Pod {
    namespaced!(pods);

    fn is_watched(&self) -> bool {
        is_tracked(self)
    }

    fn trim(&mut self) {
        self.meta_mut().managed_fields = None;
        self.spec = self.spec.take().map(|spec| PodSpec {
            node_name: spec.node_name,
            ..PodSpec::default()
        });
        if let Some(status) = &mut self.status {
            keep_waiting(&mut status.container_statuses);
            keep_waiting(&mut status.init_container_statuses);
        }
    }

    fn outline(&mut self) {
        self.status = None;
    }
}

/// Leaves of `containers` who they are that wait, and for what.
fn keep_waiting(containers: &mut Option<Vec<ContainerStatus>>) {
    let all = containers.take().into_iter().flatten();
    let waiting = all.filter(|c| c.state.as_ref().is_some_and(|s| s.waiting.is_some()));
    let waiting = waiting.map(|container| ContainerStatus {
        name: container.name,
        state: container.state,
        ..ContainerStatus::default()
    });
    *containers = Some(waiting.collect()).filter(|left: &Vec<_>| !left.is_empty());
}

/// Whether an object bears the label that its kind is watched by.
fn is_tracked<K: ResourceExt>(object: &K) -> bool {
    object.labels().contains_key(keys::SANDBOX_NAME_HASH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_apiserver_that_says_nothing_is_not_waited_for() {
        let silence = answer(std::future::pending::<kube::Result<()>>()).await;
        assert!(silence.is_err_and(|e| error::is_unanswered(&e)));
    }
}
