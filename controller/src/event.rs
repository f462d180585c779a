// SPDX-License-Identifier: Apache-2.0

//! Events about objects. They are the least urgent work, so one is published at a time.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    core::error_boundary::InvalidObject,
    runtime::events::{Event, EventType, Recorder, Reporter},
};

use tokio::sync::mpsc;

use crate::{
    condition::shorten,
    known::Kind,
    request::{FIELD_MANAGER, answer},
};

/// Most bytes of an event's note that an apiserver takes.
const NOTE: usize = 1024;
/// Most events that wait to be published, the limit of client-go
/// (`tools/record/event.go`, `maxQueuedEvents`). More are dropped.
const MAX_WAITING: usize = 1000;

/// Queue of events that are published one after the other.
pub(crate) struct Events(mpsc::Sender<(Event, ObjectReference)>);

impl Events {
    /// Starts the task that publishes; it ends when the result is dropped.
    pub(crate) fn new(client: Client) -> Self {
        let reporter = Reporter {
            controller: FIELD_MANAGER.to_owned(),
            instance: None,
        };
        let recorder = Recorder::new(client, reporter);
        let (sender, mut waiting) = mpsc::channel::<(Event, ObjectReference)>(MAX_WAITING);
        tokio::spawn(async move {
            while let Some((event, reference)) = waiting.recv().await {
                if let Err(e) = answer(recorder.publish(&event, &reference)).await {
                    tracing::debug!("event {}: {e}", event.reason);
                }
            }
        });
        Self(sender)
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
        if let Err(e) = self.0.try_send((event, reference)) {
            tracing::debug!("an event is dropped: {e}");
        }
    }
}
