// SPDX-License-Identifier: Apache-2.0

//! The cluster: requests, what its refusals mean for people, and what one may do there.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context, Error, Result, anyhow, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use http::{Request, header::DATE};
use jiff::{Timestamp, fmt::rfc2822};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::{
    Api, Client, Config, Resource,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    client::Body,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::{
    args::Connection,
    manifests::{Kind, MANAGED_BY, MANAGER, Manifest},
    owner::taken_over,
    proxy,
};

/// How long the apiserver may take to let us in, and to answer.
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(60);

/// How often, and after which pause, an apiserver that is not ready to tell is asked again.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(500);

/// What it answers then: too many requests, and not done in time.
const BUSY: [u16; 2] = [429, 504];

/// Requests that are under way at a time.
pub(crate) const AT_ONCE: usize = 8;

/// Objects in one answer to a list.
const PAGE: u32 = 500;

/// The apiserver's clock, read once: it may differ by minutes from the one of this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    read: Timestamp,
    at: Instant,
}

impl Clock {
    /// What it shows now.
    pub(crate) fn now(&self) -> Timestamp {
        // Years do not pass before this program ends.
        self.read
            .saturating_add(self.at.elapsed())
            .unwrap_or(self.read)
    }
}

/// A connection.
pub(crate) struct Cluster {
    client: Client,
    server: String,
    namespace: String,
}

/// What one may have to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Right {
    pub(crate) verb: &'static str,
    group: &'static str,
    plural: &'static str,
    pub(crate) namespace: Option<String>,
}

impl Right {
    /// To do `verb` to objects of `kind`, in all namespaces where none is named.
    pub(crate) fn new(verb: &'static str, kind: &Kind, namespace: Option<&str>) -> Self {
        Self {
            verb,
            group: kind.group,
            plural: kind.plural,
            namespace: namespace.map(str::to_owned),
        }
    }

    fn words(&self) -> String {
        let group = match self.group {
            "" => String::new(),
            group => format!(".{group}"),
        };
        let place = match &self.namespace {
            Some(namespace) => format!(" in namespace {namespace}"),
            None => String::new(),
        };
        format!("{} {}{group}{place}", self.verb, self.plural)
    }
}

/// Asks again while the apiserver is not ready to tell: it says so of kinds that it has just
/// learned of, and when it has more to do than it can.
///
/// # Errors
/// Those of `ask`.
pub(crate) async fn patiently<T>(ask: impl AsyncFn() -> kube::Result<T>) -> kube::Result<T> {
    for _ in 0..TRIES {
        match ask().await {
            Err(kube::Error::Api(status)) if BUSY.contains(&status.code) => sleep(PAUSE).await,
            answer => return answer,
        }
    }
    ask().await
}

impl Cluster {
    /// Connects, and asks whether anybody is there.
    ///
    /// # Errors
    /// When there is no configuration, or nobody answers; with what to do.
    pub(crate) async fn connect(connection: &Connection) -> Result<Self> {
        Self::connect_within(connection, Some(ANSWER)).await
    }

    /// Connects for requests on which nothing may come for long, as of a command that is silent.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub(crate) async fn connect_for_streams(connection: &Connection) -> Result<Self> {
        Self::connect_within(connection, None).await
    }

    async fn connect_within(connection: &Connection, answer: Option<Duration>) -> Result<Self> {
        let mut config = configuration(connection).await?;
        config.connect_timeout = Some(CONNECT);
        config.read_timeout = answer;
        // Who waits for a cluster that is away wants to hear of it.
        config.default_retry = false;
        let cluster = Self {
            server: config.cluster_url.to_string(),
            namespace: config.default_namespace.clone(),
            client: Client::try_from(config).context("set up the connection")?,
        };
        let answer = cluster.client.apiserver_version().await;
        answer.map_err(|e| cluster.explain(e))?;
        Ok(cluster)
    }

    /// Lists all objects of a kind of ours; none if the apiserver does not know it.
    pub(crate) async fn all<K>(&self) -> Result<Vec<K>>
    where
        K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
    {
        let api = Api::all(self.client());
        match patiently(async || api.list(&ListParams::default()).await).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(Vec::new()),
            found => Ok(found.map_err(|e| self.explain(e))?.items),
        }
    }

    /// The namespace of the context.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Reads the apiserver's clock, to the second. Without one, as where a proxy drops it, this
    /// machine's.
    pub(crate) async fn clock(&self) -> Result<Clock> {
        let request = Request::get("/version").body(Body::empty());
        let request = request.context("ask for the time")?;
        let answer = self.client.send(request).await;
        let answer = answer.map_err(|e| self.explain(e))?;
        let date = answer.headers().get(DATE).and_then(|d| d.to_str().ok());
        let read = date.and_then(|d| Some(rfc2822::parse(d).ok()?.timestamp()));
        Ok(Clock {
            read: read.unwrap_or_else(Timestamp::now),
            at: Instant::now(),
        })
    }

    /// Objects of a kind, in all namespaces where none is named.
    pub(crate) fn api(&self, kind: &Kind, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = kind.resource();
        match namespace {
            Some(namespace) => Api::namespaced_with(self.client(), namespace, &resource),
            None => Api::all_with(self.client(), &resource),
        }
    }

    /// An object, if it is there.
    pub(crate) async fn find(&self, of: &Manifest) -> Result<Option<DynamicObject>> {
        let api = self.api(of.kind, of.namespace.as_deref());
        api.get_opt(&of.name).await.map_err(|e| self.explain(e))
    }

    /// Applies an object, and returns it as it is now.
    pub(crate) async fn apply(&self, manifest: &Manifest, force: bool) -> Result<DynamicObject> {
        let api = self.api(manifest.kind, manifest.namespace.as_deref());
        let params = PatchParams {
            force,
            ..PatchParams::apply(MANAGER)
        };
        let applied = api
            .patch(&manifest.name, &params, &Patch::Apply(&manifest.object))
            .await;
        applied
            .map_err(|e| self.explain(e))
            .with_context(|| format!("apply {}", manifest.title()))
    }

    /// Makes an object ours with all that others have written of it, as [`taken_over`] says.
    pub(crate) async fn take_over(&self, manifest: &Manifest) -> Result<()> {
        let api = self.api(manifest.kind, manifest.namespace.as_deref());
        let take = async || {
            let Some(found) = api.get_metadata_opt(&manifest.name).await? else {
                return Ok(());
            };
            let Some(fields) = taken_over(&found.metadata) else {
                return Ok(());
            };
            let patch = json!({"metadata": {
                "resourceVersion": found.metadata.resource_version, "managedFields": fields,
            }});
            let params = PatchParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PatchParams::default()
            };
            let name = &manifest.name;
            api.patch_metadata(name, &params, &Patch::Merge(&patch))
                .await
                .map(drop)
        };
        for _ in 0..TRIES {
            match take().await {
                // Somebody has written it since, most likely its status.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                taken => {
                    let taken = taken.map_err(|e| self.explain(e));
                    return taken.with_context(|| format!("take over {}", manifest.title()));
                }
            }
        }
        bail!("{} is written by others all the time", manifest.title())
    }

    /// All objects of a kind with such labels; none where the kind is not known.
    pub(crate) async fn list(&self, kind: &Kind, labels: &str) -> Result<Vec<DynamicObject>> {
        let api = self.api(kind, None);
        let mut params = ListParams::default().labels(labels).limit(PAGE);
        let mut all = Vec::new();
        loop {
            let page = match patiently(async || api.list(&params).await).await {
                Err(kube::Error::Api(status)) if status.code == 404 => return Ok(all),
                page => page.map_err(|e| self.explain(e))?,
            };
            all.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(all),
            }
        }
    }

    /// All objects of a kind that [`enable`](crate::enable) has made.
    pub(crate) async fn list_ours(&self, kind: &Kind) -> Result<Vec<DynamicObject>> {
        self.list(kind, &format!("{MANAGED_BY}={MANAGER}")).await
    }

    /// Has an object deleted after all that it owns. One that is gone is success.
    pub(crate) async fn delete(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<()> {
        let api = self.api(kind, namespace);
        let foreground = DeleteParams::foreground();
        match patiently(async || api.delete(name, &foreground).await).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(e) => Err(self.explain(e)),
            Ok(_) => Ok(()),
        }
    }

    /// Fails when one may not do all of this, with what is missing.
    pub(crate) async fn require(&self, rights: BTreeSet<Right>) -> Result<()> {
        let missing: Vec<Option<String>> = stream::iter(rights)
            .map(|right| async move {
                let may = self.may(&right).await?;
                Ok::<_, Error>((!may).then(|| right.words()))
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let missing: Vec<String> = missing.into_iter().flatten().collect();
        if missing.is_empty() {
            return Ok(());
        }
        bail!(
            "nothing was changed, because you may not:\n  {}\nAsk for these rights, or have \
             somebody with the ClusterRole cluster-admin do it.",
            missing.join("\n  ")
        )
    }

    async fn may(&self, right: &Right) -> Result<bool> {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    verb: Some(right.verb.to_owned()),
                    group: Some(right.group.to_owned()),
                    resource: Some(right.plural.to_owned()),
                    namespace: right.namespace.clone(),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let api: Api<SelfSubjectAccessReview> = Api::all(self.client());
        let answer = api.create(&PostParams::default(), &review).await;
        let answer = answer.map_err(|e| self.explain(e))?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }

    /// What an error means, and what to do about it.
    pub(crate) fn explain(&self, error: kube::Error) -> Error {
        let kube::Error::Api(status) = error else {
            return anyhow!(error).context(format!(
                "the apiserver at {} does not answer. Is the cluster up, and is it the one that \
                 $KUBECONFIG, --kubeconfig and --context name?",
                self.server
            ));
        };
        match status.code {
            401 => anyhow!(
                "the apiserver at {} does not know you: renew the credentials in your kubeconfig",
                self.server
            ),
            403 => anyhow!(
                "{}. Ask for this right, or have somebody do it who has it.",
                status.message
            ),
            409 => anyhow!(
                "{}. Somebody else has changed the object; --take-over overrules them.",
                status.message
            ),
            _ => anyhow!(status),
        }
    }
}

async fn configuration(connection: &Connection) -> Result<Config> {
    let options = KubeConfigOptions {
        context: connection.context.clone(),
        ..KubeConfigOptions::default()
    };
    let hint = "find out which cluster: name a kubeconfig by $KUBECONFIG or --kubeconfig";
    let kubeconfig = match &connection.kubeconfig {
        Some(file) => Some(Kubeconfig::read_from(file).context(hint)?),
        None => Kubeconfig::read().ok(),
    };
    let context = connection.context.as_deref();
    let named = kubeconfig.as_ref().and_then(|k| proxy::named(k, context));
    let mut config = match (&connection.kubeconfig, kubeconfig) {
        (Some(file), Some(kubeconfig)) => {
            let config = Config::from_custom_kubeconfig(kubeconfig, &options).await;
            config.with_context(|| format!("use {}", file.display()))?
        }
        _ if context.is_some() => Config::from_kubeconfig(&options).await.context(hint)?,
        _ => Config::infer().await.context(hint)?,
    };
    // The library compares $NO_PROXY with the proxy, not with the server.
    let env = |name: &str| std::env::var(name).ok();
    config.proxy_url = proxy::proxy(&config.cluster_url, named.as_deref(), &env)?;
    Ok(config)
}
