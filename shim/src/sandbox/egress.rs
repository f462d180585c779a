// SPDX-License-Identifier: Apache-2.0

//! Packets of a Pod to link-local and metadata addresses: dropped before the Pod has a process,
//! and counted by the node's agent.
//!
//! The shim does it, because it knows the Pod's network namespace before anything runs in it; the
//! agent, which may be late or absent, only learns of it.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use kiln_agent_api::{Agent, AgentError, NodeConfig};
use kiln_host::{
    blocking,
    egress::{Guard, LinkLocal, Mode},
};
use log::{debug, info, warn};
use runsc_wrapper::{ContainerId, check_no_xdp};

use crate::{
    bundle::Network,
    error::{Error, Result},
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
        config: &NodeConfig,
        id: &ContainerId,
    ) -> Result<Self> {
        let policy = &config.policy;
        let Network::Netns(netns) = network else {
            return Ok(Self::default());
        };
        if policy.link_local.mode == Mode::Allow {
            return Ok(Self::default());
        }
        let agent = policy.agent.clone();
        let (netns, rules) = (netns.clone(), policy.link_local.clone());
        let flags = config.runtime.flags.clone();
        match blocking(move || set(&netns, &rules, &flags)).await {
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

/// Sets the rules of a namespace for a sandbox of a runtime with these flags. They are set even
/// where they are not enough.
fn set(netns: &Path, rules: &LinkLocal, flags: &BTreeMap<String, String>) -> Result<Guard> {
    let file = File::open(netns).map_err(Error::io("open", netns))?;
    let failed = |source| Error::Io {
        what: format!("guard {}", netns.display()),
        source,
    };
    let guard = Guard::set(file.as_fd(), rules).map_err(|e| failed(io::Error::other(e)))?;
    check_no_xdp(flags).map_err(|e| failed(io::Error::other(e)))?;
    Ok(guard)
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
    use std::os::fd::AsRawFd;

    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use kiln_agent_api::Policy;

    async fn guard(network: Network, mode: Mode, xdp: &str) -> Result<Egress> {
        let mut config = NodeConfig {
            runtime: runsc_wrapper::Config::default(),
            policy: Policy {
                agent: PathBuf::new(),
                ..Policy::default()
            },
            file: None,
        };
        config.policy.link_local.mode = mode;
        let xdp = ("EXPERIMENTAL-xdp".to_owned(), xdp.to_owned());
        config.runtime.flags.extend([xdp]);
        Egress::guard(&network, &config, &"pod".parse().unwrap()).await
    }

    #[tokio::test]
    async fn what_cannot_be_guarded_is_refused_where_the_node_requires_it() {
        // No network namespace, so that its rules cannot be made.
        let broken = || Network::Netns("/dev/null".into());
        let refused = guard(broken(), Mode::Require, "off").await;
        assert!(matches!(refused, Err(Error::Denied(_))), "{refused:?}");
        for mode in [Mode::Drop, Mode::Allow] {
            let egress = guard(broken(), mode, "off").await.unwrap();
            assert!(egress.count.lock().unwrap().is_none());
        }
    }

    #[tokio::test]
    #[ignore = "needs root"]
    async fn a_sandbox_that_sends_past_the_rules_is_refused_where_the_node_requires_them() {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        let netns = std::thread::spawn(make).join().unwrap();
        let path = PathBuf::from(format!("/proc/self/fd/{}", netns.as_raw_fd()));
        let guard = |mode, xdp| guard(Network::Netns(path.clone()), mode, xdp);
        let refused = guard(Mode::Require, "ns").await.unwrap_err();
        assert!(matches!(refused, Error::Denied(_)), "{refused}");
        assert!(
            refused.to_string().contains("`EXPERIMENTAL-xdp`"),
            "{refused}"
        );
        for (mode, xdp, is_counted) in [
            (Mode::Require, "off", true),
            (Mode::Drop, "off", true),
            (Mode::Drop, "ns", false),
            (Mode::Allow, "ns", false),
        ] {
            let egress = guard(mode, xdp).await.unwrap();
            let count = egress.count.lock().unwrap();
            assert_eq!(count.is_some(), is_counted, "{mode:?}, {xdp}");
        }
    }

    #[tokio::test]
    async fn what_has_no_network_of_its_own_needs_no_rules() {
        for network in [Network::Host, Network::New] {
            guard(network, Mode::Require, "ns").await.unwrap();
        }
    }
}
