// SPDX-License-Identifier: Apache-2.0

//! Pods by CRI, as a kubelet would run them: the same cases for our shim (by the sentry's control
//! socket, by command line only, and in sandboxes adopted from the node's agent) and for
//! containerd's own with runc, as the control: a case that fails with that expects too much.

mod exec;
mod life;
mod node;
mod resources;
mod streams;
mod volumes;

use std::process::ExitCode;

use kiln_tests::{
    agent::holding,
    node::{Node, NodeOpts},
    suite::Cases,
};

/// The handlers of our shim, and the control.
const HANDLERS: [&str; 4] = ["gvisor", "gvisor-cli", "gvisor-warm", "runc"];

/// Those of Kiln.
const OURS: [&str; 3] = ["gvisor", "gvisor-cli", "gvisor-warm"];

/// Adds functions of a module as cases, one for each of the handlers: `HANDLERS`, unless others are
/// named.
macro_rules! for_each_handler {
    ($cases:ident, $module:ident: $($case:ident),+ $(,)?) => {
        for_each_handler!(HANDLERS; $cases, $module: $($case),+)
    };
    ($handlers:expr; $cases:ident, $module:ident: $($case:ident),+ $(,)?) => {
        for handler in $handlers {
            $($cases.add(
                format!("{handler}::{}", stringify!($case)),
                async move |node: &Node| $module::$case(node, handler).await,
            );)+
        }
    };
}

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    for_each_handler!(
        cases, life: exit_codes, short_lives_have_their_own_exit_code, a_killed_process_counts_its_signal,
        stop_gives_grace, stop_ends_what_ignores_it, containers_come_and_go_in_one_pod, containers_start_together,
        a_container_that_never_ran_is_removed, events_come_in_order, a_pod_knows_its_name_and_address, pods_reach_each_other,
        a_user_is_no_more_than_that,
    );
    for_each_handler!(
        cases, streams: logs_keep_streams_apart, a_long_output_is_complete, the_last_words_are_logged,
        an_attached_client_is_read, a_terminal_of_a_container,
    );
    for_each_handler!(
        cases, exec: an_exec_answers, execs_run_side_by_side, a_missing_program_is_an_error_and_no_more, input_reaches_an_exec_and_ends,
        an_ended_container_takes_no_exec, an_exec_at_a_terminal, an_exec_outlives_its_deadline_not,
    );
    for_each_handler!(
        cases, volumes: containers_share_a_directory, containers_share_memory, memory_is_one_file_system, read_only_is_read_only, an_update_of_a_config_map_is_seen,
        the_image_is_not_written_to,
    );
    for_each_handler!(
        cases, resources: usage_is_reported, a_memory_limit_holds, a_kubelets_limit_holds, a_cpu_limit_holds, limits_can_be_changed, processes_are_listed,
        a_pause_stops_and_a_resume_goes_on,
    );
    // By command line alone nothing reaches into the sandbox's network.
    for_each_handler!(["gvisor", "gvisor-warm", "runc"]; cases, streams: ports_are_forwarded);
    for_each_handler!(OURS; cases, resources: a_limit_of_the_pod_holds);
    for_each_handler!(OURS; cases, node: one_shim_and_no_satellites);
    // ctr is given the configuration of Kiln's shim.
    for_each_handler!(OURS; cases, streams: a_log_file_of_ctr, a_plain_run_of_ctr);
    for_each_handler!(
        OURS; cases, volumes: an_empty_dir_is_one_file_system, an_empty_dir_in_memory_has_its_limit,
    );
    cases.add("gvisor::privileged_is_refused", node::privileged_is_refused);
    cases.add(
        "gvisor::host_network_is_refused",
        node::host_network_is_refused,
    );
    let opts = || NodeOpts {
        kiln: format!("shared_empty_dirs = {:?}\n", volumes::pods()),
        agent: Some(holding(8, 16)),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}
