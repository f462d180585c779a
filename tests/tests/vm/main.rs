// SPDX-License-Identifier: Apache-2.0

//! A node as Debian makes one, in a virtual machine: systemd, cgroup v2 with systemd's driver, a `/run`
//! that nothing is executed from, the packaged containerd 1.7 or ours, and a kernel of its own. Cases
//! do what an operator does by README, in this order, on one machine.

mod guest;
mod machine;
mod node;
mod only_here;
mod operator;

use std::{process::ExitCode, time::Duration};

use kiln_tests::{cases, suite::Cases};

use crate::node::Node;

/// Longest that a case may take where the machine is emulated.
const CASE: Duration = Duration::from_secs(1500);

fn main() -> ExitCode {
    let mut all = Cases::<Node>::new().at_a_time(1).limit(CASE);
    cases!(all.add_alone, Node:
        operator::preflight_names_what_is_missing,
        operator::a_node_is_enabled,
        only_here::a_cold_pod_works,
        only_here::systemd_keeps_what_limits_a_pod,
        only_here::a_pod_that_exhausts_its_memory_is_oom_killed,
        only_here::an_adopted_pod_is_in_its_slice,
        only_here::a_flag_for_systemd_is_honoured,
        operator::pods_and_warm_sandboxes_survive_restarts,
        operator::a_reboot_brings_all_back,
        operator::an_upgrade_keeps_pods,
        operator::a_node_is_disabled,
    );
    all.run(Node::start)
}
