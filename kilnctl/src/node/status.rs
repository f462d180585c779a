// SPDX-License-Identifier: Apache-2.0

//! What this node's agent holds, as it says at its socket.

use std::path::Path;

use anyhow::{Context, Result};
use kiln_agent_api::{Agent, api::ReportResponse};
use serde_json::{Value, json};

use crate::{
    args::NodeFormat,
    output::{say, table, write},
};

/// Prints what the agent at `socket` holds.
///
/// # Errors
/// When nobody answers there, with what to do.
pub(crate) async fn run(socket: &Path, format: NodeFormat) -> Result<()> {
    let report = async { Agent::connect(socket).await?.report().await };
    let report = report.await.with_context(|| {
        format!(
            "the agent cannot be asked at {}. Only root may; does it run on this node, and at \
             the `socket` of its configuration?",
            socket.display()
        )
    })?;
    match format {
        NodeFormat::Table => write(&text(&report)),
        NodeFormat::Json => say(&serde_json::to_string_pretty(&as_json(&report))?),
    }
    Ok(())
}

fn text(report: &ReportResponse) -> String {
    let head = [
        "CLASS", "SHAPE", "WANTED", "READY", "WARMING", "ADOPTED", "MISSED", "BOOT MS",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    for c in &report.classes {
        let class = if c.class.is_empty() {
            "(learned)"
        } else {
            &c.class
        };
        rows.push([
            class.to_owned(),
            c.key.clone(),
            c.wanted.to_string(),
            c.ready.to_string(),
            c.warming.to_string(),
            c.adopted.to_string(),
            c.missed.to_string(),
            c.boot_milliseconds.to_string(),
        ]);
    }
    let mut text = table(&rows);
    text.push_str(&format!(
        "memory held: {} MiB, adoptions that failed: {}\n",
        report.held_bytes >> 20,
        report.failed
    ));
    if !report.problem.is_empty() {
        text.push_str(&format!("no warm sandboxes: {}\n", report.problem));
    }
    text
}

fn as_json(report: &ReportResponse) -> Value {
    let classes = report.classes.iter().map(|c| {
        json!({
            "class": c.class, "shape": c.key, "wanted": c.wanted, "ready": c.ready,
            "warming": c.warming, "adopted": c.adopted, "missed": c.missed,
            "bootMilliseconds": c.boot_milliseconds,
        })
    });
    json!({
        "classes": classes.collect::<Vec<_>>(), "problem": report.problem,
        "heldBytes": report.held_bytes, "failedAdoptions": report.failed,
    })
}
