// SPDX-License-Identifier: Apache-2.0

//! Where things of a cluster are, and what they are called.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
};

use kiln_tests::agent;

/// The node.
pub(super) const NODE: &str = "kiln-node";
/// Addresses of Pods. All clusters have the same: they are in network namespaces of their own.
pub(super) const PODS: &str = "10.211.0.0/24";
/// Addresses of services.
pub(super) const SERVICES: &str = "10.212.0.0/24";
/// The service `kubernetes`.
pub(super) const FIRST_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 212, 0, 1);

/// Paths and names.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) dir: PathBuf,
    pub(super) cgroup: String,
}

impl Layout {
    pub(super) fn new(dir: &Path, cgroup: &str) -> Self {
        Self {
            dir: dir.to_owned(),
            cgroup: cgroup.to_owned(),
        }
    }

    /// Directories that are there before anything is started.
    pub(super) fn dirs(&self) -> [PathBuf; 7] {
        ["bin", "etc", "log", "cni", "opt", "s", "volume-plugins"].map(|name| self.at(name))
    }

    /// A file or directory.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(super) fn pki(&self) -> PathBuf {
        self.at("pki")
    }

    pub(super) fn etc(&self, name: &str) -> PathBuf {
        self.at("etc").join(name)
    }

    pub(super) fn log(&self, program: &str) -> PathBuf {
        self.at("log").join(format!("{program}.log"))
    }

    pub(super) fn netns(&self) -> PathBuf {
        self.at("netns")
    }

    pub(super) fn state(&self) -> PathBuf {
        self.at("state.json")
    }

    /// Where containerd looks for programs first.
    pub(super) fn bin(&self) -> PathBuf {
        self.at("bin")
    }

    /// Not in the cluster's own directory, whose lock it would share with who changes the node.
    pub(super) fn containerd_socket(&self) -> PathBuf {
        self.at("containerd-state/c.sock")
    }

    /// The socket of the node's agent, where one is started: that of an agent in the place that
    /// the cgroup belongs to.
    pub(super) fn agent_socket(&self) -> PathBuf {
        agent::socket(self.cgroup.split('/').next().unwrap_or_default())
    }

    /// Where containerd keeps the bundles of containers, by their ids.
    pub(super) fn bundles(&self) -> PathBuf {
        self.at("containerd-state/io.containerd.runtime.v2.task/k8s.io")
    }

    /// The name of the Pod network: nothing else on the machine has it, as the CNI library keeps
    /// results by it, outside of the directory.
    pub(super) fn pod_network(&self) -> String {
        format!("{}-pods", self.cgroup.replace('/', "-"))
    }
}
