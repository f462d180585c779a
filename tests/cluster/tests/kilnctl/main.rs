// SPDX-License-Identifier: Apache-2.0

//! `kilnctl` on a real etcd and kube-apiserver, with Kubernetes' own controllers of Deployments
//! and DaemonSets and a stand-in for kubelets. Every case has the whole cluster for itself and
//! leaves it as it was.

mod enable;
mod env;
mod manifests;
mod node;
mod proxy;
mod refused;
mod taken_away;
mod taken_over;

use std::process::ExitCode;

use kiln_tests::suite::Cases;

use env::Env;

macro_rules! cases {
    ($cases:ident: $($module:ident :: $case:ident),+ $(,)?) => {
        $($cases.add_alone(
            concat!(stringify!($module), "::", stringify!($case)),
            async move |env: &Env| {
                let before = env.everything().await?;
                let done = $module::$case(env).await;
                if done.is_err() {
                    env.recover().await;
                    return done;
                }
                env.until_only(&before).await
            },
        );)+
    };
}

fn main() -> ExitCode {
    let mut cases = Cases::new();
    cases!(
        cases:
        enable::what_is_enabled_is_seen_and_a_second_time_changes_nothing,
        enable::nodes_and_pools_are_shown,
        enable::images_and_nodes_are_chosen,
        enable::what_an_older_version_had_is_removed,
        enable::what_does_not_start_is_explained,
        refused::somebody_elses_definitions_are_left_alone_unless_taken_over,
        refused::a_changed_definition_is_not_overruled,
        refused::another_controller_is_in_the_way,
        refused::a_class_of_somebodys_is_left_to_them,
        refused::missing_rights_are_named,
        refused::users_are_told_what_is_missing,
        refused::an_apiserver_that_is_away_is_named,
        taken_over::a_former_owner_leaves_nothing_in_definitions,
        taken_away::what_users_made_stays,
        taken_away::a_node_whose_agent_is_silent_is_named,
        taken_away::a_live_agent_is_asked_whatever_its_clock_says,
        taken_away::purged_is_everything,
        taken_away::somebody_elses_objects_are_not_purged,
        taken_away::somebody_elses_agents_are_in_the_way,
        manifests::all_are_accepted_as_they_are,
        manifests::what_is_applied_comes_back_as_it_is,
        manifests::kustomize_has_the_same_objects,
        manifests::agents_are_held_to_their_node_under_other_names,
        node::preflight_says_what_is_missing,
        node::an_agent_that_is_away_is_named,
        node::it_is_a_plugin_of_kubectl,
        proxy::the_apiserver_is_reached_as_kubectl_reaches_it,
    );
    cases.run(Env::start)
}
