// SPDX-License-Identifier: Apache-2.0

//! Task events for containerd, delivered in the order in which they happened.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use containerd_shim::event::Event;
use containerd_shim_protos::{
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    ttrpc::context,
};
use log::warn;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};

use crate::error::{Error, Result};

/// Events that may wait for a containerd that is restarting: some 100 bytes each.
const QUEUE: usize = 4096;
/// How long one event is retried. containerd asks for the state of every task when it is back,
/// so that what is older than a restart is worth nothing to it.
const GIVE_UP: Duration = Duration::from_secs(120);
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Deadline of one delivery.
const DELIVERY: Duration = Duration::from_secs(5);

/// Where task events go. Publishing never waits.
pub trait EventSink: Send + Sync {
    /// Queues `event`, a message of `containerd.events`, behind those published before.
    fn publish(&self, topic: String, event: Any);
}

/// Publishes a typed event under its own topic.
pub(crate) fn publish<E: Event + Message>(sink: &dyn EventSink, event: &E) {
    match pack("containerd.events", event) {
        Ok(any) => sink.publish(event.topic(), any),
        Err(e) => warn!("event {}: {e}", event.topic()),
    }
}

/// Packs a message of a protobuf `package` under its bare name, as containerd's `typeurl` does.
/// The name could be had by reflection, for which a shim would build the descriptors of whole
/// protocols in memory.
pub(crate) fn pack<M: Message>(package: &str, message: &M) -> Result<Any> {
    let value = message.write_to_bytes().map_err(|e| Error::Io {
        what: format!("encode {}", M::NAME),
        source: e.into(),
    })?;
    Ok(Any {
        type_url: format!("{package}.{}", M::NAME),
        value,
        ..Any::default()
    })
}

/// Milliseconds-true protobuf form of `t`.
pub(crate) fn timestamp(t: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(Timestamp::from(t))
}

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Sends events to containerd's ttrpc endpoint from one queue.
pub struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl Publisher {
    /// Starts the queue; `address` is what containerd gave as `TTRPC_ADDRESS`. It is dialled
    /// when there is something to send.
    pub fn new(address: String, namespace: String) -> Arc<Self> {
        let (queue, items) = mpsc::channel(QUEUE);
        tokio::spawn(deliver_all(address, items));
        Arc::new(Self { namespace, queue })
    }

    /// Returns when everything published so far is delivered, or after `limit`.
    pub async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        if timeout(limit, async {
            if self.queue.send(Item::Flush(done)).await.is_ok() {
                // An error means that the queue has ended: nothing is left to wait for.
                flushed.await.ok();
            }
        })
        .await
        .is_err()
        {
            warn!("events not delivered within {} ms", limit.as_millis());
        }
    }
}

impl EventSink for Publisher {
    fn publish(&self, topic: String, event: Any) {
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic,
            event: MessageField::some(event),
            ..Envelope::default()
        };
        if let Err(e) = self.queue.try_send(Item::Event(Box::new(envelope))) {
            warn!("event lost, containerd does not take events: {e}");
        }
    }
}

async fn deliver_all(address: String, mut items: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = items.recv().await {
        match item {
            Item::Event(envelope) => deliver(&address, &mut client, *envelope).await,
            // Nobody waits any more: nothing to tell.
            Item::Flush(done) => done.send(()).unwrap_or_default(),
        }
    }
}

/// Delivers the head of the queue; later events wait behind it, so that order holds.
async fn deliver(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let give_up = Instant::now() + GIVE_UP;
    let topic = envelope.topic.clone();
    let request = ForwardRequest {
        envelope: MessageField::some(envelope),
        ..ForwardRequest::default()
    };
    let mut pause = RETRY_MIN;
    loop {
        let error = match forward(address, client, &request).await {
            Ok(()) => return,
            Err(e) => e,
        };
        *client = None;
        if Instant::now() + pause > give_up {
            return warn!("event {topic} lost: {error}");
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> containerd_shim_protos::ttrpc::Result<()> {
    let events = match client {
        Some(events) => events,
        None => {
            let url = if address.contains("://") {
                address.to_owned()
            } else {
                format!("unix://{address}")
            };
            client.insert(EventsClient::new(Client::connect(&url).await?))
        }
    };
    let deadline = i64::try_from(DELIVERY.as_nanos()).unwrap_or(i64::MAX);
    events
        .forward(context::with_timeout(deadline), request)
        .await
        .map(drop)
}
