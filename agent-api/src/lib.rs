// SPDX-License-Identifier: Apache-2.0

//! The contract between the shim and the agent of its node.
//!
//! The agent boots sandboxes before there are Pods for them. A shim that makes a Pod's sandbox
//! computes the [`Shape`] that it needs, asks the agent for one, and makes it its own by renaming
//! the file away that stands for the sandbox ([`Warm::file`](api::Warm)): from then on the agent
//! has nothing to do with it. Two can never own one, whichever of them dies when.
//!
//! Everything here is an optimisation. No answer, an answer too late, or "none" mean that the Pod
//! starts cold.

/// Messages and stubs, made from the files in `proto`.
pub mod api {
    #![allow(missing_docs, unreachable_pub, unused_imports, unused_mut)]
    #![allow(non_upper_case_globals)]
    #![allow(
        clippy::all,
        clippy::needless_pass_by_value,
        clippy::semicolon_if_nothing_returned,
        clippy::uninlined_format_args
    )]

    mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
    mod shim {
        include!(concat!(env!("OUT_DIR"), "/shim.rs"));
    }
    mod shim_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/shim_ttrpc.rs"));
    }
    pub use agent::*;
    pub use agent_ttrpc::*;
    pub use shim::*;
    pub use shim_ttrpc::*;
}
mod client;
pub mod config;
pub mod gofer;
mod pod_sockets;
mod shape;
pub mod shm;

use std::collections::BTreeMap;

pub use client::{Agent, AgentError};
pub use config::{NodeConfig, NodeConfigError, Policy};
pub use gofer::gofer_socket;
pub use pod_sockets::{SHIMS, find_socket, publish_socket};
pub use shape::{Ineligible, RuntimeFile, Setup, Shape};

impl api::ReportResponse {
    /// How many Pods got none, and for which reasons, for people.
    #[must_use]
    pub fn misses(&self) -> String {
        let reasons: BTreeMap<_, _> = self.missed.iter().filter(|(_, n)| **n > 0).collect();
        let total: u64 = reasons.values().copied().sum();
        let reasons: Vec<_> = reasons
            .iter()
            .map(|(reason, n)| format!("{n} {reason}"))
            .collect();
        match reasons.as_slice() {
            [] => total.to_string(),
            _ => format!("{total} ({})", reasons.join(", ")),
        }
    }
}

/// Where the agent listens unless a node's configuration names another socket.
pub const SOCKET: &str = "/run/kiln-agent/agent.sock";

/// The OCI process that, run in the root container of a warm sandbox, gives it the host name
/// `name`.
pub fn naming_process(name: &str) -> serde_json::Value {
    let caps = ["CAP_SYS_ADMIN"];
    serde_json::json!({
        "args": ["/pause", "hostname", name],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
    })
}

/// Largest shape that is read, in bytes of JSON.
pub const MAX_SHAPE: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::*;

    #[test]
    fn misses_are_told_with_their_reasons() {
        let mut report = api::ReportResponse::new();
        report.missed = [("broken", 0)].map(|(r, n)| (r.to_owned(), n)).into();
        assert_eq!(report.misses(), "0");
        let missed = [("unknown", 2), ("empty", 10), ("broken", 0)];
        report.missed = missed.map(|(r, n)| (r.to_owned(), n)).into();
        assert_eq!(report.misses(), "12 (10 empty, 2 unknown)");
    }

    #[test]
    fn any_message_is_read_or_refused() {
        bolero::check!().for_each(|bytes: &[u8]| {
            if let Ok(request) = api::AcquireRequest::parse_from_bytes(bytes) {
                // A shape that is none is an error as well.
                let _ = Shape::from_json(&request.shape);
            }
            let _ = (
                api::AcquireResponse::parse_from_bytes(bytes),
                api::AdoptedRequest::parse_from_bytes(bytes),
                api::ReleaseRequest::parse_from_bytes(bytes),
                api::GuardedRequest::parse_from_bytes(bytes),
                api::ReportResponse::parse_from_bytes(bytes),
            );
        });
    }
}
