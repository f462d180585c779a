// SPDX-License-Identifier: Apache-2.0

//! What containerd would never send, or a user gets into a spec: each is refused with a code that
//! containerd understands, leaves nothing behind, and harms no Pod that comes after.

mod calls;
mod ids;
mod spec;
mod stdio;
mod wire;

use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{
    api,
    ttrpc::{self, Code},
};
use kiln_tests::{
    leaks::bears,
    mini::{
        Config, Mini, Runtime, Shim,
        bundle::{Bundle, BundleBuilder},
        code, ctx,
    },
    suite::Cases,
};

macro_rules! cases {
    ($cases:ident, $($module:ident: $($case:ident),+ $(,)?;)+) => {
        $($($cases.add(concat!(stringify!($module), "::", stringify!($case)), $module::$case);)+)+
    };
}

fn main() -> ExitCode {
    let mut cases = Cases::<Mini>::new();
    cases!(
        cases,
        ids: ids_that_are_no_names_start_no_shim, ids_that_are_no_names_make_no_container, ids_that_are_no_names_make_no_exec,
            namespaces_that_are_no_names_start_no_shim;
        spec: hooks_are_refused, namespaces_of_others_are_refused, privileges_need_the_node, the_hosts_network_needs_the_node,
            a_node_may_allow_both, a_listener_and_rdt_are_refused, annotations_for_the_runtime_are_dropped, broken_specs_are_refused,
            a_huge_spec_is_refused, a_cgroup_outside_is_refused, a_bundle_must_be_there, a_member_needs_its_own_sandbox,
            a_restore_needs_the_node, a_root_that_is_a_link_is_not_followed;
        stdio: only_fifos_and_log_files_are_taken, an_exec_takes_no_more, a_reader_that_stalls_stalls_nobody_else;
        calls: signals_that_do_not_exist, twice_is_once_too_often, calls_in_the_wrong_order, nobody_knows_the_unknown,
            an_exec_needs_a_program, limits_that_make_no_sense, a_checkpoint_path_is_absolute, a_sandbox_that_goes_first_takes_its_members;
        wire: garbage_is_no_end, a_huge_frame_is_no_end, idle_connections_are_no_end, unknown_methods_are_unimplemented;
    );
    cases.run(Mini::start)
}

/// Checks the code of a call that must fail.
#[track_caller]
fn refused<T>(what: &str, answer: Result<T, ttrpc::Error>, wanted: Code) -> Result<()> {
    let words = answer
        .as_ref()
        .err()
        .map(ttrpc::Error::to_string)
        .unwrap_or_default();
    let got = code(answer)?;
    if got != Some(wanted) {
        bail!(
            "{what}: {got:?}, not {wanted:?}: {words} ({})",
            std::panic::Location::caller()
        );
    }
    Ok(())
}

/// A shim whose first container is what a test will break.
async fn shim(mini: &Mini, bundle: BundleBuilder<'_>) -> Result<(Bundle, Shim)> {
    shim_with(mini, bundle, "").await
}

/// The same with more keys in the `[kiln]` table.
async fn shim_with(mini: &Mini, bundle: BundleBuilder<'_>, kiln: &str) -> Result<(Bundle, Shim)> {
    let bundle = bundle.write()?;
    let config = mini.config(
        Runtime::Runsc,
        &Config {
            kiln: kiln.to_owned(),
            ..Config::default()
        },
    )?;
    let shim = mini.shim(&bundle, &config).await?;
    Ok((bundle, shim))
}

/// A Pod that runs, for calls to be tried on.
async fn running(mini: &Mini, id: &str) -> Result<(Bundle, Shim)> {
    let (bundle, shim) = shim(mini, mini.bundle(id).sandbox()).await?;
    shim.run(&bundle).await?;
    Ok((bundle, shim))
}

/// Ends a Pod that still works, and its shim.
async fn end(mini: &Mini, shim: &Shim, bundle: Bundle) -> Result<()> {
    shim.end(bundle.id()).await?;
    ended(mini, shim, bundle).await
}

/// Ends a shim that has no container, and checks that nothing is left.
async fn ended(mini: &Mini, shim: &Shim, bundle: Bundle) -> Result<()> {
    shim.shutdown().await?;
    let id = bundle.id().to_owned();
    bundle.remove()?;
    mini.place().expect_gone(&id).await
}

/// Checks that a spec is refused with `wanted`, that nothing is left of it, and that the same
/// shim then takes one that is good.
async fn spec_is_refused(
    mini: &Mini,
    what: &str,
    bundle: BundleBuilder<'_>,
    wanted: Code,
) -> Result<()> {
    let (bundle, shim) = shim(mini, bundle).await?;
    refused(
        what,
        shim.task()
            .create(ctx(), &shim.create_request(&bundle))
            .await,
        wanted,
    )?;
    let events = mini.events().of(bundle.id());
    ensure!(events.is_empty(), "{what}: {events:?}");
    ensure!(
        mini.place()
            .processes()
            .iter()
            .filter(|p| bears(&p.argv, bundle.id()))
            .count()
            == 1,
        "{what}: more than the shim runs"
    );
    let good = mini.bundle(bundle.id()).sandbox().spec_text();
    std::fs::write(bundle.dir().join("config.json"), good)?;
    shim.run(&bundle)
        .await
        .with_context(|| format!("after {what}"))?;
    end(mini, &shim, bundle)
        .await
        .with_context(|| format!("after {what}"))
}

/// A request with nothing but an id.
fn state_of(id: &str, exec_id: &str) -> api::StateRequest {
    api::StateRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        ..api::StateRequest::default()
    }
}
