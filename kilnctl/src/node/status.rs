// SPDX-License-Identifier: Apache-2.0

//! What this node's agent holds, as it says at its socket.

use std::path::Path;

use anyhow::{Context, Result};
use kiln_agent_api::{
    Agent,
    api::{ReportResponse, RuntimeReport},
};
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
        "memory held: {} MiB, an adoption takes {} ms, adoptions that failed: {}\n\
         Pods that got none: {}\n\
         packets to link-local addresses: {} dropped, Pods where they are not: {}\n",
        report.held_bytes >> 20,
        report.adoption_milliseconds,
        report.failed,
        report.misses(),
        report.link_local_dropped,
        report.link_local_unguarded,
    ));
    if let Some(runtime) = report.runtime.as_ref() {
        text.push_str(&ways(runtime));
    }
    if !report.handler_problem.is_empty() {
        text.push_str(&format!("Pods cannot start: {}\n", report.handler_problem));
    }
    if !report.problem.is_empty() {
        text.push_str(&format!("no warm sandboxes: {}\n", report.problem));
    }
    text
}

/// The runtime, and how its sandboxes are made.
fn ways(runtime: &RuntimeReport) -> String {
    let known = match runtime.known {
        true => "known",
        false => "not among those that are known",
    };
    let start = match runtime.start.as_str() {
        "ControlSocket" => "over the control socket",
        _ => "by command",
    };
    let no = |has: bool| if has { "" } else { "no " };
    format!(
        "runtime: {} ({known}); sandboxes start {start}, {}image for their root file system, {}gofer made ahead\n",
        runtime.version,
        no(runtime.image),
        no(runtime.gofers),
    )
}

fn as_json(report: &ReportResponse) -> Value {
    let classes = report.classes.iter().map(|c| {
        json!({
            "class": c.class, "shape": c.key, "wanted": c.wanted, "ready": c.ready,
            "warming": c.warming, "adopted": c.adopted, "missed": c.missed,
            "bootMilliseconds": c.boot_milliseconds,
        })
    });
    let runtime = report.runtime.as_ref().map(|r| {
        json!({
            "version": r.version, "known": r.known, "start": r.start, "image": r.image,
            "gofers": r.gofers,
        })
    });
    json!({
        "runtime": runtime,
        "classes": classes.collect::<Vec<_>>(), "problem": report.problem,
        "heldBytes": report.held_bytes, "failedAdoptions": report.failed, "missed": report.missed,
        "adoptionMilliseconds": report.adoption_milliseconds,
        "linkLocalDropped": report.link_local_dropped,
        "linkLocalUnguarded": report.link_local_unguarded,
        "handlerProblem": report.handler_problem,
    })
}

#[cfg(test)]
mod tests {
    use kiln_agent_api::api::ClassReport;

    use super::*;

    #[test]
    fn a_person_is_told_what_the_metrics_say() {
        let class = ClassReport {
            key: "k1".to_owned(),
            ready: 2,
            boot_milliseconds: 180,
            ..ClassReport::default()
        };
        let report = ReportResponse {
            classes: vec![class],
            held_bytes: 26 << 20,
            adoption_milliseconds: 33,
            missed: [("empty".to_owned(), 3)].into(),
            link_local_dropped: 4,
            problem: "no runsc".to_owned(),
            runtime: Some(RuntimeReport {
                version: "release-1".to_owned(),
                start: "ControlSocket".to_owned(),
                image: true,
                ..RuntimeReport::default()
            })
            .into(),
            handler_problem: "no handler".to_owned(),
            ..ReportResponse::default()
        };
        let text = text(&report);
        for words in [
            "(learned)",
            "26 MiB",
            "takes 33 ms",
            "none: 3 (3 empty)",
            "4 dropped",
            "no warm sandboxes: no runsc",
            "release-1 (not among those that are known); sandboxes start over the control socket, \
             image for their root file system, no gofer made ahead",
            "Pods cannot start: no handler",
        ] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let json = as_json(&report);
        assert_eq!(json["classes"][0]["bootMilliseconds"], 180);
        assert_eq!(json["missed"]["empty"], 3);
        assert_eq!(json["runtime"]["start"], "ControlSocket");
    }
}
