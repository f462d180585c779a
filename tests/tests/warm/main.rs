// SPDX-License-Identifier: Apache-2.0

//! Sandboxes that the node's agent boots ahead: how Pods come to them, that each serves one Pod,
//! and what happens when an agent, a shim or a sandbox dies on the way. That an adopted sandbox
//! is as good as a cold one is the business of the other suites, which run with both.

mod adoption;
mod agent;
mod isolation;
mod paths;
mod releases;
mod upkeep;

use std::process::ExitCode;

use kiln_tests::{
    agent::holding,
    node::{Node, NodeOpts},
    suite::Cases,
};

/// The handler whose Pods adopt.
const HANDLER: &str = "gvisor-warm";

/// How many sandboxes the agent of the suite holds.
const WARM: u32 = 4;

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    macro_rules! alone {
        ($module:ident: $($case:ident),+ $(,)?) => {
            $(cases.add_alone(stringify!($case), $module::$case);)+
        };
    }
    alone!(adoption:
        a_pod_adopts, a_sandbox_rests_until_it_is_adopted, the_network_is_the_pods, a_pod_without_a_name_has_none, the_host_cgroup_is_the_pods, limits_of_the_pod_hold,
        limits_on_files_are_those_of_a_cold_pod,
        the_first_container_takes_the_slots,
        a_shape_is_learned, what_cannot_be_adopted_starts_cold, a_burst_is_served_as_far_as_there_is,
        an_idle_sandbox_takes_no_more_than_its_overhead,
    );
    alone!(agent:
        an_agent_that_is_killed_loses_nothing, pods_start_without_an_agent, an_agent_that_hangs_costs_no_pod,
        an_agent_that_dies_after_its_answer_costs_no_pod,
        a_sandbox_that_dies_is_replaced, a_dead_sandbox_that_is_handed_out_costs_no_pod,
        what_is_handed_out_and_not_taken_is_destroyed, a_shim_that_dies_while_it_adopts_leaves_nothing,
        a_flood_of_requests_is_survived, another_runtime_drains_the_pool,
        a_runtime_that_fails_for_a_while_keeps_the_pool,
        adoptions_that_fail_are_given_up, a_disk_that_is_full_is_survived,
    );
    alone!(paths: paths_need_not_be_clean, what_a_sentry_cannot_place_is_left_to_a_gofer,
        a_working_directory_is_made,
    );
    alone!(upkeep:
        the_gofers_come_back_with_the_agent, nothing_is_booted_below_the_memory_floor,
        sockets_that_are_removed_are_made_anew,
    );
    alone!(releases: an_earlier_release_has_all_that_costs_less,
        a_newer_release_is_tried_with_what_the_newest_has,
        a_release_that_refuses_these_is_driven_by_commands,
    );
    alone!(isolation: no_sandbox_serves_twice, nothing_of_the_agent_is_inside);
    let opts = || NodeOpts {
        agent: Some(holding(WARM, 8)),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}
