// SPDX-License-Identifier: Apache-2.0

//! Events about objects, for whoever looks at them. Nobody waits until they are recorded.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    core::error_boundary::InvalidObject,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use crate::{
    condition::shorten,
    known::Kind,
    request::{FIELD_MANAGER, answer},
};

/// Most bytes of an event's note that an apiserver takes.
const NOTE: usize = 1024;

/// Recorder of events.
pub(crate) struct Events(Recorder);

impl Events {
    pub(crate) fn new(client: Client) -> Self {
        let reporter = Reporter {
            controller: FIELD_MANAGER.to_owned(),
            instance: None,
        };
        Self(Recorder::new(client, reporter))
    }

    /// Records that `object` has come along.
    pub(crate) fn inform<K: Kind>(&self, object: &K, reason: &str, note: impl Into<String>) {
        self.record(object, EventType::Normal, reason, note);
    }

    /// Records that `object` has a problem.
    pub(crate) fn warn<K: Kind>(&self, object: &K, reason: &str, note: impl Into<String>) {
        self.record(object, EventType::Warning, reason, note);
    }

    /// Records an event about `object`.
    pub(crate) fn record<K: Kind>(
        &self,
        object: &K,
        kind: EventType,
        reason: &str,
        note: impl Into<String>,
    ) {
        let event = Event {
            type_: kind,
            reason: reason.to_owned(),
            note: Some(shorten(note.into(), NOTE)),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        self.publish(event, object.object_ref(&()));
    }

    /// Records that an object cannot be read, and why.
    pub(crate) fn record_invalid<K: Kind>(&self, object: &InvalidObject) {
        let name = object.metadata.name.clone();
        tracing::warn!("{} {:?} is invalid: {}", K::kind(&()), name, object.error);
        let event = Event {
            type_: EventType::Warning,
            reason: "InvalidObject".to_owned(),
            note: Some(shorten(object.error.clone(), NOTE)),
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

    fn publish(&self, event: Event, reference: ObjectReference) {
        let recorder = self.0.clone();
        tokio::spawn(async move {
            if let Err(e) = answer(recorder.publish(&event, &reference)).await {
                tracing::debug!("event {}: {e}", event.reason);
            }
        });
    }
}
