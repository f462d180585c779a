// SPDX-License-Identifier: Apache-2.0

//! The label of a node on which Pods of the class can run.

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tracing::warn;

use super::{RETRY, Reporter};
use crate::installer::State;
use kiln_node_install::Health;

/// How often the node's label is written if nothing has changed.
const LABEL_INTERVAL: Duration = Duration::from_secs(60);

/// Start of the label of nodes on which Pods of a class can run; the class follows.
const READY_LABEL: &str = "kiln.dev/";

impl Reporter {
    /// Has the node's label say whether Pods of the class can run there. It is written again from
    /// time to time, because without it no Pod comes: a node may lose its labels, or be made anew.
    pub(super) async fn label(&self) {
        let key = format!("{READY_LABEL}{}", self.manager.config.runtime_class);
        let nodes: Api<Node> = Api::all(self.client.clone());
        let (mut state, mut health) = (self.installer.state(), self.installer.health());
        loop {
            let value = label_of(&state.borrow_and_update(), &health.borrow_and_update());
            let mut pause = LABEL_INTERVAL;
            if let Some(value) = value {
                let patch = Patch::Merge(json!({"metadata": {"labels": {(key.as_str()): value}}}));
                let params = PatchParams::default();
                if let Err(e) = nodes.patch_metadata(&self.node, &params, &patch).await {
                    warn!("label node {}: {e}", self.node);
                    pause = RETRY;
                }
            }
            // The senders live as long as `self`.
            tokio::select! {
                _ = state.changed() => {}
                _ = health.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Decides the value of the node's label, null for none, if the agent decides it.
fn label_of(state: &State, health: &Health) -> Option<Value> {
    match state {
        State::Unmanaged => None,
        State::Installing | State::Installed(_) | State::InstallFailed { .. }
            if matches!(health, Health::Bad(_)) =>
        {
            Some(Value::Null)
        }
        State::Installed(_) => Some(json!("ready")),
        State::InstallFailed {
            is_installed: true, ..
        } if *health == Health::Good => Some(json!("ready")),
        // Each of the last ones: the first may be over before the last label is written.
        State::InstallFailed {
            is_installed: false,
            ..
        }
        | State::Removing
        | State::InUse(_)
        | State::Removed(_)
        | State::RemoveFailed(_) => Some(Value::Null),
        // It is as it was, or nobody's to say.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::conditions::installed;

    /// The label, and the reason of condition `Installed`.
    fn said(state: &State, health: &Health) -> (Option<Value>, Option<String>) {
        let condition = installed(state, health, None);
        (label_of(state, health), condition.map(|c| c.reason))
    }

    #[test]
    fn a_node_on_which_pods_cannot_start_loses_its_label() {
        let failed = |is_installed| State::InstallFailed {
            why: "why".to_owned(),
            is_installed,
        };
        let unknown = Health::Unknown("no containerd".to_owned());
        let bad = Health::Bad("the shim is gone".to_owned());
        let installed = State::Installed("sandboxes run".to_owned());
        let (ready, none) = (Some(json!("ready")), Some(Value::Null));
        for (state, health, label, reason) in [
            (&installed, &unknown, &ready, "Installed"),
            (&installed, &Health::Good, &ready, "Installed"),
            (&installed, &bad, &none, "Damaged"),
            // It is as it was until it is known how it is.
            (&State::Installing, &unknown, &None, "Installing"),
            (&State::Installing, &bad, &none, "Installing"),
            (&failed(true), &unknown, &None, "UpgradeFailed"),
            (&failed(true), &Health::Good, &ready, "UpgradeFailed"),
            (&failed(true), &bad, &none, "RepairFailed"),
            (&failed(false), &Health::Good, &none, "InstallFailed"),
            (&State::Removing, &Health::Good, &none, "Removing"),
        ] {
            let found = said(state, health);
            let wanted = (label.clone(), Some(reason.to_owned()));
            assert_eq!(found, wanted, "{state:?} {health:?}");
        }
        assert_eq!(said(&State::Unmanaged, &bad), (None, None));
    }
}
