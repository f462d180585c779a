// SPDX-License-Identifier: Apache-2.0

//! Conditions of a `SandboxNode`.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kiln_crds::{SandboxNodeStatus, keys};

use crate::{
    installer::State,
    warm::{self, Guarding},
};
use kiln_node_install::Health;

/// Makes condition `Ready`: whether the node boots sandboxes ahead.
pub(super) fn ready(health: &warm::Health, last: Option<&SandboxNodeStatus>) -> Condition {
    let (status, reason) = match health {
        warm::Health::Untried => ("Unknown", "NotTriedYet"),
        warm::Health::Works(_) => ("True", "SandboxesCanBeAdopted"),
        warm::Health::Broken(_) => ("False", "NoWarmSandboxes"),
    };
    let message = health.problem().unwrap_or_default();
    condition("Ready", status, reason, message, last)
}

/// Makes condition `Installed`: whether what Pods of the class need is on the node, if the agent
/// installs it.
pub(super) fn installed(
    state: &State,
    health: &Health,
    last: Option<&SandboxNodeStatus>,
) -> Option<Condition> {
    let (status, reason, message) = match (state, health) {
        (State::Installed(_), Health::Bad(why)) => ("False", "Damaged", why.as_str()),
        (State::Installed(message), _) => ("True", "Installed", message.as_str()),
        (State::InstallFailed { why, is_installed }, _) => match (is_installed, health) {
            (true, Health::Bad(_)) => ("False", "RepairFailed", why.as_str()),
            (true, _) => ("False", "UpgradeFailed", why.as_str()),
            (false, _) => ("False", "InstallFailed", why.as_str()),
        },
        (state, _) => state_of_change(state)?,
    };
    Some(condition(keys::INSTALLED, status, reason, message, last))
}

/// Returns status, reason and message of a state in which it does not count what is on the node.
fn state_of_change(state: &State) -> Option<(&'static str, &'static str, &str)> {
    Some(match state {
        State::Unmanaged | State::Installed(_) | State::InstallFailed { .. } => return None,
        State::Installing => ("Unknown", "Installing", ""),
        State::Removing => ("False", "Removing", ""),
        State::InUse(message) => ("False", keys::IN_USE, message.as_str()),
        State::Removed(message) => ("False", keys::REMOVED, message.as_str()),
        State::RemoveFailed(why) => ("False", keys::REMOVE_FAILED, why.as_str()),
    })
}

/// Makes condition `HandlerServed`: whether Pods of the class can start.
pub(super) fn served(health: &Health, last: Option<&SandboxNodeStatus>) -> Condition {
    let (status, reason, message) = match health {
        Health::Unknown(why) => ("Unknown", "NotSeen", why.as_str()),
        Health::Good => ("True", "PodsCanStart", ""),
        Health::Bad(why) => ("False", "PodsCannotStart", why.as_str()),
    };
    condition(keys::HANDLER_SERVED, status, reason, message, last)
}

/// Makes condition `LinkLocalDropped`: whether packets of Pods to link-local and metadata addresses
/// are dropped.
pub(super) fn guarded(guarding: &Guarding, last: Option<&SandboxNodeStatus>) -> Condition {
    let (status, reason, message) = match guarding {
        Guarding::Unknown => ("Unknown", "NotTriedYet", ""),
        Guarding::Works => ("True", "PacketsAreDropped", ""),
        Guarding::Off => ("False", "AllowedByConfiguration", ""),
        Guarding::Fails(why) => ("False", "CannotDropPackets", why.as_str()),
    };
    condition("LinkLocalDropped", status, reason, message, last)
}

/// Makes a condition. Its time is that of the last change of its status.
fn condition(
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
    last: Option<&SandboxNodeStatus>,
) -> Condition {
    let before = last.and_then(|l| l.conditions.iter().find(|c| c.type_ == kind));
    let since = before
        .filter(|c| c.status == status)
        .map(|c| c.last_transition_time.clone());
    Condition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.chars().take(1024).collect(),
        last_transition_time: since.unwrap_or_else(|| Time(Timestamp::now())),
        observed_generation: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_that_was_not_tried_is_no_broken_one() {
        let untried = ready(&warm::Health::Untried, None);
        assert_eq!(
            (&*untried.status, &*untried.reason),
            ("Unknown", "NotTriedYet")
        );
        let broken = ready(&warm::Health::Broken("why".to_owned()), None);
        assert_eq!((&*broken.status, &*broken.message), ("False", "why"));
    }
}
