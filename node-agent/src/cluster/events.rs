// SPDX-License-Identifier: Apache-2.0

//! Events of a node.

use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::{
    Api, Resource, ResourceExt,
    runtime::events::{self, Event, EventType, Recorder},
};
use tracing::warn;

use super::{MANAGER, Reporter};
use crate::installer::State;
use kiln_node_install::Health;

/// Longest text of an event, in characters; 1024 bytes are allowed.
const MAX_NOTE: usize = 256;

impl Reporter {
    /// Publishes what happens to the node as events of it.
    pub(super) async fn publish_events(&self) {
        let reporter = events::Reporter {
            controller: MANAGER.to_owned(),
            instance: Some(self.node.clone()),
        };
        let recorder = Recorder::new(self.client.clone(), reporter);
        let (mut state, mut health) = (self.installer.state(), self.installer.health());
        let mut last = (state.borrow().clone(), health.borrow().clone());
        loop {
            // The senders live as long as `self`.
            tokio::select! {
                _ = state.changed() => {}
                _ = health.changed() => {}
            }
            let now = (
                state.borrow_and_update().clone(),
                health.borrow_and_update().clone(),
            );
            let of_health = (now.1 != last.1).then(|| event_of_health(&last.1, &now.1));
            let of_state = (now.0 != last.0).then(|| event_of_state(&now.0));
            last = now;
            for event in [of_health, of_state].into_iter().flatten().flatten() {
                if let Err(e) = recorder.publish(&event, &self.reference().await).await {
                    warn!("event {} of node {}: {e}", event.reason, self.node);
                }
            }
        }
    }

    /// The node, as events name it.
    async fn reference(&self) -> ObjectReference {
        let nodes = Api::<Node>::all(self.client.clone());
        let node = nodes.get_opt(&self.node).await;
        let node = node.ok().flatten().unwrap_or_default();
        ObjectReference {
            api_version: Some(Node::api_version(&()).into_owned()),
            kind: Some(Node::kind(&()).into_owned()),
            name: Some(self.node.clone()),
            uid: node.uid(),
            ..ObjectReference::default()
        }
    }
}

/// Makes the event of a change from `before` to `now`.
fn event_of_health(before: &Health, now: &Health) -> Option<Event> {
    match (before, now) {
        (_, Health::Bad(why)) => Some(event(EventType::Warning, "SandboxesCannotStart", why)),
        (Health::Bad(_), Health::Good) => {
            let message = "Pods of the class can start again";
            Some(event(EventType::Normal, "SandboxesCanStart", message))
        }
        _ => None,
    }
}

/// Makes the event of a state that has just begun.
fn event_of_state(state: &State) -> Option<Event> {
    match state {
        State::Installed(message) => Some(event(EventType::Normal, "SandboxesInstalled", message)),
        State::InstallFailed { why, .. } => {
            Some(event(EventType::Warning, "SandboxesNotInstalled", why))
        }
        State::RemoveFailed(why) => Some(event(EventType::Warning, "SandboxesNotRemoved", why)),
        _ => None,
    }
}

fn event(type_: EventType, reason: &str, note: &str) -> Event {
    Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note.chars().take(MAX_NOTE).collect()),
        action: "Install".to_owned(),
        secondary: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changes_for_pods_is_an_event() {
        let bad = Health::Bad("é".repeat(2000));
        let event = event_of_health(&Health::Good, &bad).unwrap();
        assert!(event.note.unwrap().len() <= 1024);
        assert_eq!(event.reason, "SandboxesCannotStart");
        let again = event_of_health(&bad, &Health::Good).unwrap();
        assert_eq!(again.reason, "SandboxesCanStart");
        let unknown = Health::Unknown(String::new());
        assert!(event_of_health(&unknown, &Health::Good).is_none());
        assert!(event_of_state(&State::Installing).is_none());
    }
}
