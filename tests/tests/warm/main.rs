// SPDX-License-Identifier: Apache-2.0

//! Pods that start in sandboxes which the node's agent has booted ahead: each says how it came to
//! its sandbox, and it must be as in a cold one.

mod adoption;

use std::process::ExitCode;

use kiln_tests::{
    node::{Node, NodeOpts},
    suite::Cases,
};

/// What the agent of the suite holds.
const AGENT: &str = "[limits]\ntotal = 12\npause_ms = 10\n[[class]]\nname = \"gvisor\"\nwarm = 3\n";

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    cases.add_alone("a_pod_adopts", adoption::a_pod_adopts);
    let opts = || NodeOpts {
        agent: Some(AGENT.to_owned()),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}
