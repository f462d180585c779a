// SPDX-License-Identifier: Apache-2.0

//! Waiting for a condition of a claim or Sandbox, with the reason on standard error.

use std::{fmt::Debug, time::Duration};

use anyhow::{Result, bail};
use futures_util::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kiln_crds::{Sandbox, SandboxClaim};
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt as _,
        watcher::{Error, watch_object},
    },
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use super::{
    Space,
    find::{condition, words},
};
use crate::output::tell;

/// An object with conditions.
pub(crate) trait Conditions:
    Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
    /// Its conditions.
    fn conditions(&self) -> &[Condition];
}

impl Conditions for Sandbox {
    fn conditions(&self) -> &[Condition] {
        self.status.as_ref().map_or(&[], |s| &s.conditions)
    }
}

impl Conditions for SandboxClaim {
    fn conditions(&self) -> &[Condition] {
        self.status.as_ref().map_or(&[], |s| &s.conditions)
    }
}

/// Waits until condition `kind` of an object is True, and returns the object.
///
/// # Errors
/// When the object is deleted, may not be watched, or is not so within `limit`; with the reason.
pub(crate) async fn until<K: Conditions>(
    space: &Space,
    api: Api<K>,
    name: &str,
    kind: &str,
    limit: Duration,
) -> Result<K> {
    let title = format!("{} {name:?}", K::kind(&()));
    let end = Instant::now() + limit;
    let mut changes = std::pin::pin!(watch_object(api, name).default_backoff());
    let mut last = "the controller has not seen it yet".to_owned();
    loop {
        let Ok(change) = timeout_at(end, changes.next()).await else {
            bail!("{title} is not {kind} after {}s: {last}", limit.as_secs());
        };
        let now = match change {
            Some(Ok(Some(object))) => match found(&object, kind) {
                Some(c) if c.status == "True" => return Ok(object),
                Some(c) => words(c),
                None => continue,
            },
            Some(Ok(None)) => bail!("{title} is gone"),
            Some(Err(Error::InitialListFailed(e))) if is_final(&e) => return Err(space.explain(e)),
            Some(Err(e)) => e.to_string(),
            None => bail!("the watch of {title} has ended"),
        };
        if now != last {
            tell(&format!("waiting for {title}: {now}"));
            last = now;
        }
    }
}

/// The condition, unless it is about an older spec.
fn found<'a, K: Conditions>(object: &'a K, kind: &str) -> Option<&'a Condition> {
    let generation = object.meta().generation.unwrap_or(0);
    condition(object.conditions(), kind)
        .filter(|c| c.observed_generation.is_none_or(|seen| seen >= generation))
}

/// Whether it makes no sense to ask again.
fn is_final(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_of_an_older_spec_does_not_count() {
        let sandbox = |seen: u64| -> Sandbox {
            serde_json::from_value(json!({
                "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
                "metadata": {"name": "s", "generation": 2},
                "spec": {"podTemplate": {"spec": {"containers": []}}},
                "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "r",
                    "message": "", "observedGeneration": seen,
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
            }))
            .unwrap()
        };
        assert!(found(&sandbox(1), "Ready").is_none());
        assert!(found(&sandbox(2), "Ready").is_some());
        assert!(found(&sandbox(2), "Suspended").is_none());
    }
}
