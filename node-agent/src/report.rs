// SPDX-License-Identifier: Apache-2.0

//! The table of `kiln-node-agent --report`.

use std::path::Path;

use kiln_agent_api::Agent;

/// Prints what the agent that listens at `socket` holds, as a table.
///
/// # Errors
/// When no agent answers there.
#[allow(clippy::print_stdout)] // the answer to whoever asked
pub async fn print(socket: &Path) -> anyhow::Result<()> {
    let report = Agent::connect(socket).await?.report().await?;
    println!(
        "{:<34} {:<12} {:>6} {:>5} {:>7} {:>7} {:>6} {:>7}",
        "KEY", "CLASS", "WANTED", "READY", "WARMING", "ADOPTED", "MISSED", "BOOT MS"
    );
    for c in &report.classes {
        let class = if c.class.is_empty() {
            "(learned)"
        } else {
            &c.class
        };
        println!(
            "{:<34} {class:<12} {:>6} {:>5} {:>7} {:>7} {:>6} {:>7}",
            c.key, c.wanted, c.ready, c.warming, c.adopted, c.missed, c.boot_milliseconds
        );
    }
    println!(
        "memory held: {} MiB; an adoption takes {} ms; adoptions that failed: {}",
        report.held_bytes >> 20,
        report.adoption_milliseconds,
        report.failed
    );
    println!("Pods that got none: {}", report.misses());
    println!(
        "packets to link-local addresses: {} dropped; Pods where they are not: {}",
        report.link_local_dropped, report.link_local_unguarded
    );
    if !report.handler_problem.is_empty() {
        println!("Pods cannot start: {}", report.handler_problem);
    }
    if !report.problem.is_empty() {
        println!("no warm sandboxes: {}", report.problem);
    }
    Ok(())
}
