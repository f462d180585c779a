// SPDX-License-Identifier: Apache-2.0

//! A whole cluster with our handler behind RuntimeClass `gvisor`, as `kiln-cluster up` makes it:
//! what users do with kubectl, done to Pods in gVisor. Each case has a namespace of its own.
//!
//! When the cases are through, the cluster is taken down, and nothing of it may be left.

mod burst;
mod clients;
mod env;
mod kilnctl;
mod life;
mod mission;
mod node;
mod reach;
mod sandbox;
mod session;
mod snapshots;
mod volume;

use std::process::ExitCode;

use kiln_tests::{
    cases,
    suite::{CASE, Cases},
};

use env::Env;

fn main() -> ExitCode {
    let mut cases = Cases::new();
    cases!(
        cases.add, Env:
        session::logs_and_exec_work,
        session::a_terminal_is_one,
        session::files_are_copied_both_ways,
        reach::port_forward_reaches_either_runtime,
        reach::a_service_is_reached_by_its_address,
        reach::the_apiserver_takes_a_pods_token,
        volume::two_containers_share_a_pod,
        volume::a_daemon_set_writes_to_the_node,
        life::a_failing_liveness_probe_restarts,
        life::a_job_runs_to_its_end,
        life::a_pod_leaves_nothing,
        life::an_image_of_any_registry_is_pulled,
        mission::the_manifests_word_for_word,
        node::stats_have_cpu_and_memory,
        node::a_second_up_changes_nothing,
        node::others_may_not_use_its_place,
    );
    // They have the controller and the router for themselves, and cost many Pods.
    let mut cases = cases.limit(CASE * 4);
    cases!(
        cases.add_alone, Env:
        clients::upstreams_work_unmodified,
        snapshots::upstreams_client_suspends_and_resumes,
        snapshots::a_suspended_sandbox_keeps_its_memory,
        snapshots::an_adopted_sandbox_keeps_its_memory,
        burst::claims_outlast_controller_and_apiserver,
        sandbox::an_image_that_cannot_be_pulled_is_named,
        kilnctl::a_command_runs_in_a_new_sandbox,
        kilnctl::a_claim_is_used_suspended_and_removed,
    );
    cases.run(Env::start)
}
