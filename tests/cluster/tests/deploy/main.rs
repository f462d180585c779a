// SPDX-License-Identifier: Apache-2.0

//! What is in `deploy/` beside the definitions, on a real etcd and kube-apiserver: the admission
//! policies, the chart, what our own Pods may, and classes other than gVisor's.

mod admission;
mod agents;
mod chart;
mod classes;
mod env;
mod people;
mod pods;
mod rights;

use std::process::ExitCode;

use kiln_tests::{cases, suite::Cases};

use env::Env;

fn main() -> ExitCode {
    let mut cases = Cases::new();
    cases!(
        cases.add, Env:
        admission::the_expressions_have_no_type_errors,
        admission::every_rule_for_all_sandboxes_refuses_and_allows,
        admission::every_rule_of_restricted_namespaces_refuses_and_allows,
        admission::classes_that_are_no_sandboxes_are_left_alone,
        admission::a_class_can_allow_its_pods_more,
        admission::sandboxes_have_a_class_in_restricted_namespaces,
        admission::marks_of_sandboxes_are_the_controllers,
        admission::what_a_snapshot_is_of_is_the_controllers,
        admission::an_ephemeral_container_is_looked_at_too,
        admission::the_examples_pass,
        agents::an_agent_writes_of_its_own_node_only,
        agents::an_agent_reports_snapshots_of_its_own_node_only,
        chart::as_it_comes_it_is_the_base,
        chart::its_values_reach_the_objects,
        chart::values_of_a_wrong_type_are_refused,
        chart::the_apiserver_accepts_it,
        people::each_role_may_what_is_written_and_no_more,
        people::a_team_is_given_access_to_its_namespace,
        pods::controller_and_router_are_nobody,
        pods::no_sandbox_reaches_our_pods,
        pods::the_agent_is_given_these_directories_of_its_node,
        rights::every_account_may_what_is_written_and_no_more,
        rights::a_token_is_good_for_its_own_node,
        rights::the_controller_makes_pods_of_sandboxes_only,
        rights::the_router_has_no_token,
        classes::a_pool_of_kata_holds_warm_pods,
        classes::agents_know_the_overhead_of_the_class,
    );
    cases.run(Env::start)
}
