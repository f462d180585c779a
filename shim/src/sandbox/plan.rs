// SPDX-License-Identifier: Apache-2.0

//! How a sandbox will be booted: decided from the spec of its first container and the node's
//! configuration, before anything is made for it.

use std::path::{Path, PathBuf};

use kiln_agent_api::{NodeConfig, Policy};
use kiln_host::cgroup::{Cgroup, Limits};
use runsc_wrapper::ContainerId;

use crate::{
    bundle::{Network, Spec},
    error::Result,
    sandbox::record::RuntimeRecord,
};

/// A sandbox that is to be booted.
#[derive(Debug)]
pub(crate) struct BootPlan {
    /// The Pod's id.
    pub(crate) id: ContainerId,
    pub(crate) from: Source,
    /// The first container, as containerd describes it.
    pub(crate) spec: Spec,
    pub(crate) network: Network,
    pub(crate) cgroup: Cgroup,
    /// The limits that CRI named for the Pod.
    pub(crate) pod_limits: Limits,
    /// The runtime, and what Pods may do.
    pub(crate) config: NodeConfig,
    /// containerd's namespace.
    pub(crate) namespace: String,
}

/// Where a sandbox comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The runtime boots it.
    Cold,
    /// The node's agent at this socket has it, or the runtime boots it.
    Warm(PathBuf),
}

/// How the first container is to be made, beside its spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum First {
    /// Without stdio and from its own command, as the pause container of a Pod.
    Plain,
    /// With stdio, or from a checkpoint: nothing for a sandbox that is booted already.
    Special,
}

impl BootPlan {
    /// Decides how the sandbox `id` of containerd's `namespace` is booted, on a host with the
    /// cgroups at `cgroups`.
    ///
    /// # Errors
    /// When the spec asks for what the node does not allow.
    pub(crate) fn new(
        id: ContainerId,
        spec: Spec,
        first: First,
        mut config: NodeConfig,
        namespace: &str,
        cgroups: &Path,
    ) -> Result<Self> {
        spec.check(&config.policy, None)?;
        let network = spec.network();
        if network == Network::Host {
            let flags = &mut config.runtime.flags;
            flags.insert("network".to_owned(), "host".to_owned());
        }
        let fallback = format!("/{namespace}/{id}");
        let cgroup = Cgroup::new(cgroups, spec.cgroups_path().unwrap_or(&fallback))?;
        Ok(Self {
            id,
            from: source(&spec, first, &config.policy),
            network,
            cgroup,
            pod_limits: spec.pod_limits(),
            spec,
            config,
            namespace: namespace.to_owned(),
        })
    }

    /// How a `delete` finds the runtime again.
    pub(crate) fn runtime_record(&self) -> RuntimeRecord {
        RuntimeRecord::from(&self.config)
    }
}

fn source(spec: &Spec, first: First, policy: &Policy) -> Source {
    let is_pause = first == First::Plain && spec.is_pod() && !spec.terminal();
    if is_pause && !policy.agent.as_os_str().is_empty() {
        Source::Warm(policy.agent.clone())
    } else {
        Source::Cold
    }
}

#[cfg(test)]
mod tests {
    use runsc_wrapper::Config;
    use serde_json::{Value, json};

    use super::*;

    const AGENT: &str = "/run/agent.sock";

    fn plan(first: First, agent: &str, change: impl FnOnce(&mut Value)) -> Result<BootPlan> {
        let mut spec = json!({
            "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
            "process": {"args": ["/pause"]},
            "linux": {"namespaces": [{"type": "network", "path": "/run/netns/a"}]},
        });
        change(&mut spec);
        let config = NodeConfig {
            runtime: Config::default(),
            policy: Policy {
                agent: agent.into(),
                allow_host_network: true,
                ..Policy::default()
            },
            file: None,
        };
        let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let (id, cgroups) = ("pod".parse().unwrap(), Path::new("/nowhere"));
        BootPlan::new(id, spec, first, config, "k8s.io", cgroups)
    }

    #[test]
    fn only_a_pods_pause_container_is_for_a_warm_sandbox() {
        let terminal = |spec: &mut Value| spec["process"]["terminal"] = true.into();
        let standalone = |spec: &mut Value| spec["annotations"] = json!({});
        let warm = Source::Warm(AGENT.into());
        for (first, agent, change, expected) in [
            (First::Plain, AGENT, None, warm),
            (First::Plain, "", None, Source::Cold),
            (First::Special, AGENT, None, Source::Cold),
            (
                First::Plain,
                AGENT,
                Some(terminal as fn(&mut Value)),
                Source::Cold,
            ),
            (First::Plain, AGENT, Some(standalone), Source::Cold),
        ] {
            let plan = plan(first, agent, change.unwrap_or(|_| {})).unwrap();
            assert_eq!(plan.from, expected, "{plan:?}");
        }
    }

    #[test]
    fn the_network_of_the_host_is_a_flag_of_the_runtime() {
        let host = plan(First::Plain, "", |s| s["linux"]["namespaces"] = json!([])).unwrap();
        assert_eq!(host.network, Network::Host);
        assert_eq!(host.config.runtime.flags["network"], "host");
        let own = plan(First::Plain, "", |_| {}).unwrap();
        assert_eq!(own.network, Network::Netns("/run/netns/a".into()));
        assert!(!own.config.runtime.flags.contains_key("network"));
    }

    #[test]
    fn a_sandbox_has_the_cgroup_of_its_spec_or_of_its_id() {
        let own = plan(First::Plain, "", |_| {}).unwrap();
        assert_eq!(own.cgroup.spec_path(), "/k8s.io/pod");
        let named = |path: &'static str| {
            plan(First::Plain, "", move |s| {
                s["linux"]["cgroupsPath"] = path.into();
            })
        };
        assert_eq!(named("/pods/a").unwrap().cgroup.spec_path(), "/pods/a");
        assert!(named("/../x").is_err());
    }

    #[test]
    fn a_spec_that_the_node_refuses_has_no_plan() {
        let hooked = |s: &mut Value| s["hooks"] = json!({"prestart": [{"path": "/bin/sh"}]});
        assert!(plan(First::Plain, AGENT, hooked).is_err());
    }
}
