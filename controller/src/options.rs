// SPDX-License-Identifier: Apache-2.0

//! Options of the controller.

use std::{net::IpAddr, time::Duration};

/// Choices of an operator.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) cluster_domain: String,
    /// Where the sandbox router runs.
    pub(crate) router_namespace: String,
    /// DNS servers of Pods whose template says nothing; none leaves the cluster's DNS.
    pub(crate) dns_servers: Vec<IpAddr>,
    /// Whether cluster-autoscaler may evict Pods that nobody has claimed.
    pub(crate) evict_warm_pods: bool,
    /// Labels and annotations that a claim may put on its Pod.
    pub(crate) claim_metadata: Allowed,
    pub(crate) claim_annotations: ClaimAnnotations,
    pub(crate) claim_events: bool,
    pub(crate) sandbox_events: bool,
    /// Most Sandboxes of a pool that are made at the same time.
    pub(crate) pool_batch: usize,
    /// How long a Sandbox of a pool may take to become ready before it is replaced.
    pub(crate) pool_grace: Duration,
    /// How long it may take until a pool's status says that there are fewer ready.
    pub(crate) pool_status_delay: Duration,
    /// How long a node's heartbeat counts.
    pub(crate) node_heartbeat_timeout: Duration,
}

/// Which claims get annotations with the times of their life and their pool's Sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ClaimAnnotations {
    /// Those whose client has noted when it asked.
    Auto,
    /// All, for one more write per claim.
    Always,
    /// None.
    Never,
}

/// Domains of the labels and annotations that a claim may bring, in lower case.
#[derive(Debug, Clone)]
pub(crate) struct Allowed {
    /// Of labels.
    pub(crate) labels: Vec<String>,
    /// Of annotations; `None` for all but the system's, as upstream has it.
    pub(crate) annotations: Option<Vec<String>>,
}
