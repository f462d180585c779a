// SPDX-License-Identifier: Apache-2.0

//! containerd's Events service, which shims publish to.

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use containerd_shim_protos::{
    events::task::{TaskExecStarted, TaskExit},
    protobuf::{CodedInputStream, Message, well_known_types::empty::Empty},
    shim::events::ForwardRequest,
    shim_async::{Events as Service, create_events},
    ttrpc::{self, r#async::TtrpcContext},
};

use super::NAMESPACE;
use crate::wait;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its topic without the `/tasks/` that all have: `create`, `start`, `exit`, `delete`, …
    pub topic: String,
    /// The container that it is about.
    pub container: String,
    /// The exec that it is about, of those that are.
    pub exec: Option<String>,
    /// The exit code in an `exit`.
    pub exit: Option<u32>,
}

/// What was published, in order.
#[derive(Debug, Default)]
pub struct Events {
    all: Mutex<Vec<Event>>,
}

impl Events {
    /// The events of container `id` so far.
    pub fn of(&self, id: &str) -> Vec<Event> {
        self.lock()
            .iter()
            .filter(|e| e.container == id)
            .cloned()
            .collect()
    }

    /// The topics of the events of container `id` so far, those of its execs left out.
    pub fn topics(&self, id: &str) -> Vec<String> {
        self.of(id)
            .into_iter()
            .filter(|e| e.exec.is_none())
            .map(|e| e.topic)
            .collect()
    }

    /// Waits for an event of container `id`.
    ///
    /// # Errors
    /// When it does not come; with those that came.
    pub async fn wait_for(&self, id: &str, topic: &str) -> Result<Event> {
        let found = wait::until(&format!("event {topic} of {id}"), wait::SOON, async || {
            self.of(id)
                .into_iter()
                .find(|e| e.topic == topic && e.exec.is_none())
        });
        found
            .await
            .with_context(|| format!("events so far: {:?}", self.of(id)))
    }

    /// Checks that the events of container `id` are exactly `topics`, in that order, when the
    /// last of them has come.
    ///
    /// # Errors
    /// When they are not.
    pub async fn expect(&self, id: &str, topics: &[&str]) -> Result<()> {
        if let Some(last) = topics.last() {
            self.wait_for(id, last).await?;
        }
        ensure!(
            self.topics(id) == topics,
            "events of {id}: {:?}",
            self.of(id)
        );
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Event>> {
        // A list has no invariant that a panic could break.
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Receiver(Arc<Events>);

#[async_trait]
impl Service for Receiver {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let event = read(&request).map_err(|e| {
            let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, format!("{e:#}"));
            ttrpc::Error::RpcStatus(status)
        })?;
        self.0.lock().push(event);
        Ok(Empty::default())
    }
}

/// Refuses what containerd would refuse or nobody could read.
fn read(request: &ForwardRequest) -> Result<Event> {
    let envelope = &request.envelope;
    ensure!(
        envelope.namespace == NAMESPACE,
        "namespace {:?}",
        envelope.namespace
    );
    ensure!(envelope.timestamp.seconds > 0, "no time stamp");
    let topic = envelope
        .topic
        .strip_prefix("/tasks/")
        .with_context(|| format!("topic {:?}", envelope.topic))?;
    let value = &envelope.event.value;
    let container = first_string(value)?;
    let (mut exec, mut exit) = (None, None);
    match topic {
        "exit" => {
            let event = TaskExit::parse_from_bytes(value)?;
            exec = (event.id != container).then_some(event.id);
            exit = Some(event.exit_status);
        }
        // Both have the exec's id in field 2.
        "exec-added" | "exec-started" => {
            exec = Some(TaskExecStarted::parse_from_bytes(value)?.exec_id);
        }
        _ => {}
    }
    Ok(Event {
        topic: topic.to_owned(),
        container,
        exec,
        exit,
    })
}

/// The container's id, which is field 1 of every task event.
fn first_string(message: &[u8]) -> Result<String> {
    let mut input = CodedInputStream::from_bytes(message);
    let tag = input.read_raw_tag_or_eof()?;
    ensure!(tag == Some(0x0a), "an event without container");
    Ok(input.read_string()?)
}

/// A running service.
pub(crate) struct Server {
    /// A mutex only because a server is not `Sync`.
    running: Mutex<ttrpc::asynchronous::Server>,
}

impl Server {
    /// Ends it, with its connections.
    pub(crate) async fn stop(self) -> Result<()> {
        let mut server = self
            .running
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        server.shutdown().await.context("stop serving events")
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Server")
    }
}

/// Serves at `socket`.
pub(crate) async fn serve(events: &Arc<Events>, socket: &Path) -> Result<Server> {
    let service = create_events(Arc::new(Receiver(Arc::clone(events))));
    let server =
        ttrpc::asynchronous::Server::new().bind(&format!("unix://{}", socket.display()))?;
    let mut server = server.register_service(service);
    server.start().await.context("serve events")?;
    Ok(Server {
        running: Mutex::new(server),
    })
}
