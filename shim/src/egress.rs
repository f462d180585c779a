// SPDX-License-Identifier: Apache-2.0

//! Packets of a Pod to link-local and metadata addresses: dropped before the Pod has a process,
//! and counted by the node's agent.
//!
//! The shim does it, because it knows the Pod's network namespace before anything runs in it; the
//! agent, which may be late or absent, only learns of it.

use std::{
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use kiln_agent_api::{Agent, AgentError};
use log::{debug, info, warn};
use runsc_wrapper::{
    ContainerId,
    egress::{Guard, LinkLocal, Mode},
};

use crate::{
    bundle::Network,
    config::Policy,
    error::{Error, Result},
    pod::blocking,
};

/// What of a Pod's packets is dropped, and how much of that the agent knows.
#[derive(Debug, Default)]
pub(crate) struct Egress {
    /// `None` where nothing is dropped.
    count: Mutex<Option<Count>>,
    /// Socket of the agent.
    agent: PathBuf,
}

#[derive(Debug)]
struct Count {
    guard: Guard,
    /// Packets that the agent was told of.
    told: u64,
}

impl Egress {
    /// Guards the namespace of a Pod's `network`, where it has one.
    ///
    /// # Errors
    /// [`Error::Denied`], where the node requires what cannot be done.
    pub(crate) async fn guard(
        network: &Network,
        policy: &Policy,
        id: &ContainerId,
    ) -> Result<Self> {
        let Network::Netns(netns) = network else {
            return Ok(Self::default());
        };
        if policy.link_local.mode == Mode::Allow {
            return Ok(Self::default());
        }
        let agent = policy.agent.clone();
        let (netns, rules) = (netns.clone(), policy.link_local.clone());
        match blocking(move || set(&netns, &rules)).await {
            Ok(guard) => Ok(Self {
                count: Mutex::new(Some(Count { guard, told: 0 })),
                agent,
            }),
            Err(e) if policy.link_local.mode == Mode::Require => Err(Error::Denied(format!(
                "packets to link-local addresses cannot be dropped, which this node requires \
                 (kiln.link_local): {e}"
            ))),
            Err(e) => {
                warn!("{id} may send to link-local addresses: {e}");
                let (id, words) = (id.clone(), e.to_string());
                tokio::spawn(async move { tell(&agent, &id, 0, &words).await });
                Ok(Self::default())
            }
        }
    }

    /// Tells the agent of what was dropped since it was last told.
    pub(crate) async fn tell(&self, id: &ContainerId) {
        let new = self.newly_dropped(id);
        if new > 0 {
            info!("{id}: {new} packets to link-local addresses were dropped");
            tell(&self.agent, id, new, "").await;
        }
    }

    /// What was dropped since this was last asked.
    fn newly_dropped(&self, id: &ContainerId) -> u64 {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Count { guard, told }) = &mut *count else {
            return 0;
        };
        match guard.dropped() {
            Ok(dropped) => dropped - std::mem::replace(told, dropped).min(dropped),
            // Where the namespace had no link, there is no counter.
            Err(e) => {
                debug!("{id}: {e}");
                0
            }
        }
    }
}

fn set(netns: &Path, rules: &LinkLocal) -> Result<Guard> {
    let file = File::open(netns).map_err(Error::io("open", netns))?;
    Guard::set(file.as_fd(), rules).map_err(|e| Error::Io {
        what: format!("guard {}", netns.display()),
        source: std::io::Error::other(e),
    })
}

async fn tell(agent: &Path, id: &ContainerId, dropped: u64, failure: &str) {
    if agent.as_os_str().is_empty() {
        return;
    }
    let told = async {
        let agent = Agent::connect(agent).await?;
        agent.guarded(id.as_str(), dropped, failure).await
    };
    match told.await {
        Ok(()) | Err(AgentError::Absent(_)) => {}
        Err(e) => warn!("{id}: tell the agent of packets that were dropped: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn guard(network: Network, mode: Mode) -> Result<Egress> {
        let mut policy = Policy {
            agent: PathBuf::new(),
            ..Policy::default()
        };
        policy.link_local.mode = mode;
        Egress::guard(&network, &policy, &"pod".parse().unwrap()).await
    }

    #[tokio::test]
    async fn what_cannot_be_guarded_is_refused_where_the_node_requires_it() {
        // No network namespace, so that its rules cannot be made.
        let broken = || Network::Netns("/dev/null".into());
        let refused = guard(broken(), Mode::Require).await;
        assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
        for mode in [Mode::Drop, Mode::Allow] {
            let egress = guard(broken(), mode).await.unwrap();
            assert!(egress.count.lock().unwrap().is_none());
        }
    }

    #[tokio::test]
    async fn what_has_no_network_of_its_own_needs_no_rules() {
        for network in [Network::Host, Network::New] {
            guard(network, Mode::Require).await.unwrap();
        }
    }
}
