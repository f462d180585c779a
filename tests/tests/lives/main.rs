// SPDX-License-Identifier: Apache-2.0

//! Lives of shims, seen from where containerd is: every reply, every event, every process. The
//! same cases for runsc by its control socket and by command line.

mod frugal;
mod hangup;
mod life;
mod old;
mod restore;
mod snapshots;

use std::process::ExitCode;

use anyhow::Result;
use kiln_tests::{
    mini::{Config, Mini, Runtime, Shim, bundle::Bundle},
    suite::Cases,
};

/// Adds functions of a module as cases, one per runtime.
macro_rules! for_each_runtime {
    ($cases:ident, $module:ident: $($case:ident),+ $(,)?) => {
        for (name, runtime) in Runtime::ALL {
            $($cases.add(
                format!("{name}::{}", stringify!($case)),
                async move |mini: &Mini| $module::$case(mini, runtime).await,
            );)+
        }
    };
}

fn main() -> ExitCode {
    let mut cases = Cases::<Mini>::new();
    for_each_runtime!(
        cases, life: a_life_has_its_events_in_order, members_live_in_their_sandbox, output_is_complete_when_the_exit_is_known,
        execs_side_by_side_have_their_own_ends, a_container_that_never_ran_is_deleted, input_ends_with_close_io,
        a_shim_that_is_told_to_end_leaves_its_containers, a_delete_ends_a_shim_that_still_serves_and_spares_the_pod_of_a_member,
        a_delete_ends_a_shim_that_was_not_told_that_its_pod_is_gone,
        a_pod_does_without_the_one_of_its_id_in_another_namespace, a_delete_finds_what_an_older_shim_has_left,
        a_delete_does_without_the_nodes_file,
        events_wait_for_containerd,
    );
    for_each_runtime!(
        cases, hangup: a_client_that_leaves_create_leaves_nothing_half_made, a_client_that_leaves_start_leaves_it_started,
        a_client_that_leaves_delete_leaves_it_deleted,
    );
    for_each_runtime!(cases, frugal: one_process_and_one_thread, nothing_grows_with_execs, a_container_of_its_own_has_its_limits);
    for_each_runtime!(cases, restore: a_container_goes_on_from_its_checkpoint, a_pod_goes_on_from_its_checkpoint);
    for_each_runtime!(
        cases, snapshots: a_pod_goes_on_after_its_snapshot, a_stopped_pod_is_told_to_run_until_its_end_is_asked_for,
        a_checkpoint_that_fails_leaves_the_pod_running, what_could_not_come_back_is_not_snapshotted,
        a_pod_comes_back_from_what_the_agent_gives,
    );
    cases.add(
        "runsc::a_pod_takes_few_commands",
        frugal::a_pod_takes_few_commands,
    );
    cases.add(
        "old::containerd_1_7_gets_an_address",
        old::containerd_1_7_gets_an_address,
    );
    cases.add(
        "old::containerd_2_1_gets_json",
        old::containerd_2_1_gets_json,
    );
    cases.add("old::task_v2_answers_too", old::task_v2_answers_too);
    cases.add("old::info_tells_the_runtime", old::info_tells_the_runtime);
    cases.add(
        "old::a_failed_start_says_why_and_leaves_nothing",
        old::a_failed_start_says_why_and_leaves_nothing,
    );
    cases.run(Mini::start)
}

/// A shim on a bundle of a sandbox, with nothing made yet.
async fn sandbox(mini: &Mini, runtime: Runtime, id: &str, script: &str) -> Result<(Bundle, Shim)> {
    let bundle = mini.bundle(id).sandbox().script(script).write()?;
    let config = mini.config(runtime, &Config::default())?;
    let shim = mini.shim(&bundle, &config).await?;
    Ok((bundle, shim))
}

/// Ends the sandbox and its shim, and checks that nothing is left of them.
async fn end(mini: &Mini, shim: &Shim, bundle: Bundle) -> Result<()> {
    shim.end(bundle.id()).await?;
    shim.shutdown().await?;
    gone(mini, bundle).await
}

/// Checks that nothing is left of a sandbox.
async fn gone(mini: &Mini, bundle: Bundle) -> Result<()> {
    let id = bundle.id().to_owned();
    // It is containerd's to remove.
    bundle.remove()?;
    mini.place().expect_gone(&id).await
}
