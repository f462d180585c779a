// SPDX-License-Identifier: Apache-2.0

//! Reads and writes of the apiserver. Its answers are in the caches before the caller has them.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions},
    core::Request,
};
use serde_json::Value;

use crate::{
    cache::Key,
    context::Context,
    error::{self, Error, Result},
    known::{Answer, Kind, Known},
    queue::Lane,
    request::{FIELD_MANAGER, answer},
    store::Stored,
};

impl Context {
    /// All of an object. A short one is known; a long one is asked of the apiserver, for which the
    /// work has to be in the lane of those.
    ///
    /// # Errors
    /// When it has to be done in another lane; when there is no answer, or no such object any more.
    pub(crate) async fn whole<K: Stored>(&self, known: &Known<K>, lane: Lane) -> Result<Arc<K>> {
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
    pub(crate) async fn find_whole<K: Stored>(
        &self,
        key: &Key,
        lane: Lane,
    ) -> Result<Option<Arc<K>>> {
        match K::cache(&self.store).get(key) {
            Some(known) => Ok(Some(self.whole(&known, lane).await?)),
            None => Ok(None),
        }
    }

    pub(crate) async fn fetch<K: Stored>(&self, key: &Key) -> Result<Option<Arc<K>>> {
        match answer(self.api::<K>(&key.namespace).get(&key.name)).await {
            Ok(object) => Ok(Some(self.keep(object))),
            Err(e) if error::is_not_found(&e) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    pub(crate) async fn create<K: Stored>(&self, object: &K) -> kube::Result<Arc<K>> {
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

    pub(crate) async fn patch<K: Stored>(&self, key: &Key, patch: &Value) -> kube::Result<Arc<K>> {
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
    pub(crate) async fn patch_status<K: Stored>(&self, key: &Key, patch: &Value) -> Result<()> {
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
                let cache = K::cache(&self.store);
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

    /// Has an object that is there say all that `object` says, with its uid; `false` if it has
    /// gone. What others have added stays.
    pub(crate) async fn apply_existing<K: Stored>(&self, object: &K) -> Result<bool> {
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
    pub(crate) async fn delete<K: Stored>(&self, object: &K, params: DeleteParams) -> Result<()> {
        let only = Preconditions {
            uid: object.uid(),
            resource_version: None,
        };
        self.delete_if(object, params.preconditions(only)).await
    }

    /// Deletes an object if it is still as it is known here. If it is not, the watch brings what it
    /// is now.
    pub(crate) async fn delete_unchanged<K: Stored>(&self, object: &K) -> Result<()> {
        let only = Preconditions {
            uid: object.uid(),
            resource_version: object.resource_version(),
        };
        let params = DeleteParams::default().preconditions(only);
        self.delete_if(object, params).await
    }

    async fn delete_if<K: Stored>(&self, object: &K, params: DeleteParams) -> Result<()> {
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

    fn api<K: Stored>(&self, namespace: &str) -> Api<Answer<K>> {
        K::api(self.client.clone(), namespace)
    }

    fn keep<K: Stored>(&self, Answer(object): Answer<K>) -> Arc<K> {
        if object.is_watched() {
            K::cache(&self.store).put(Known::of(object.clone()));
        }
        Arc::new(object)
    }
}

/// Where objects of a kind are that are in the namespace of these metadata.
fn url<K: Kind>(metadata: &ObjectMeta) -> String {
    K::url_path(&(), metadata.namespace.as_deref())
}
