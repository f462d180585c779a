// SPDX-License-Identifier: Apache-2.0

//! The controller on a real etcd and kube-apiserver. A stand-in makes Pods ready, so that what is
//! tested is the controller; each case has a namespace of its own.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod bad;
mod claim;
mod clients;
mod env;
mod faults;
mod flood;
mod large;
mod node;
mod pool;
mod sandbox;
mod snapshot;
mod soak;

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
        sandbox::one_gets_its_pod_its_service_and_its_whole_status,
        sandbox::one_is_suspended_and_resumed_in_the_words_of_either_version,
        sandbox::a_pod_that_takes_its_time_is_waited_for,
        sandbox::a_pod_that_is_deleted_comes_back,
        sandbox::a_strangers_pod_is_left_alone,
        sandbox::a_pod_that_terminates_is_ready_for_nobody,
        sandbox::what_has_finished_runs_no_second_time,
        sandbox::every_sandbox_has_a_scale,
        sandbox::no_name_leads_to_anothers_pod,
        sandbox::a_long_name_and_a_service_do_not_go_together,
        sandbox::one_ends_at_its_time,
        sandbox::one_that_is_retained_keeps_that_it_has_finished,
        sandbox::volume_claims_are_made_and_immutable,
        sandbox::a_pod_waits_for_its_volume_claims,
        sandbox::metadata_of_the_template_reaches_the_pod,
        pool::one_holds_what_its_spec_says,
        pool::one_follows_its_scale,
        pool::what_has_ended_is_replaced,
        pool::one_that_is_never_ready_in_time_is_not_made_without_end,
        pool::a_changed_template_replaces_or_waits,
        pool::another_template_is_followed_and_other_pools_are_left_alone,
        pool::one_says_why_it_is_not_ready,
        pool::a_template_has_its_network_policy,
        pool::one_takes_in_what_a_former_pool_has_left,
        node::nodes_are_asked_for_what_pools_and_claims_need,
        node::room_is_for_what_runs_and_is_shared_between_namespaces,
        node::a_pod_prefers_a_node_that_holds_its_sandbox,
        claim::a_running_sandbox_changes_hands,
        claim::the_words_of_v1alpha1_mean_what_they_meant,
        claim::a_hundred_at_once_get_a_hundred,
        claim::two_race_for_the_last,
        claim::env_and_volumes_follow_the_policy,
        claim::one_ends_as_its_policy_has_it,
        claim::a_finished_one_goes_after_its_time,
        claim::a_pod_that_goes_is_seen_in_the_claim,
        claim::one_waits_for_its_pool_and_its_template,
        claim::times_are_noted_for_clients_that_note_theirs,
        claim::one_names_the_sandbox_that_it_has_from_a_pool,
        claim::a_restored_sandbox_goes_to_nobody_by_itself,
        clients::claims_of_upstreams_are_named_taken_over_and_ended,
        bad::a_pod_that_is_refused_is_explained,
        bad::a_quota_is_explained_and_recovered_from,
        bad::what_a_pod_could_not_be_is_refused_at_once,
        bad::a_forged_member_is_given_to_nobody,
        bad::a_member_that_was_something_else_is_given_to_nobody,
        bad::nobody_is_served_from_another_namespace,
        bad::metadata_of_the_system_is_refused,
        bad::a_claim_replaces_and_names_no_volume,
        bad::a_bound_claim_is_not_judged_anew,
        bad::a_strangers_network_policy_is_not_touched,
        bad::a_claim_has_one_source,
        bad::an_edited_owner_brings_nobody_anothers,
        bad::an_owner_reference_alone_gives_nothing,
        bad::a_claim_without_a_node_is_explained,
        bad::another_schedulers_words_are_passed_on,
        bad::a_container_that_does_not_start_is_explained,
        bad::objects_may_be_large,
    );
    // Those of snapshots make nodes, which pools would count.
    cases!(
        cases.add_alone, Env:
        claim::warm_starts_take_few_writes,
        sandbox::what_becomes_of_one_is_told_where_that_is_wanted,
        node::pools_say_what_nodes_hold_while_there_are_nodes,
        snapshot::a_client_has_a_sandbox_snapshotted_and_restored,
        snapshot::a_suspension_waits_for_its_snapshot,
        snapshot::what_cannot_be_restored_starts_cold_and_says_why,
        snapshot::what_a_pod_ran_counts_and_not_what_its_template_says,
        snapshot::a_trigger_says_why_there_is_no_snapshot,
        flood::one_tenants_flood_does_not_come_before_all_others,
        large::large_objects_are_not_held_and_hold_up_nobody,
        faults::a_controller_that_is_killed_loses_and_doubles_nothing,
        faults::an_apiserver_that_restarts_is_waited_for,
        faults::two_controllers_take_turns,
    );
    let mut cases = cases.limit(soak::time() + CASE * 2);
    cases!(
        cases.add_alone, Env:
        soak::claims_come_and_go_while_controllers_are_killed,
    );
    cases.run(Env::start)
}
