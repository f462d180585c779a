// SPDX-License-Identifier: Apache-2.0

//! What dashboards and alerts ask for is what controller, agents and router count.

use std::{collections::BTreeMap, fs};

use kiln_cluster::account::deploy;
use serde_json::Value;

/// Sources of metrics, and what their names begin with.
const SOURCES: [(&str, &str); 4] = [
    (include_str!("../../../controller/src/metrics.rs"), ""),
    (
        include_str!("../../../node-agent/src/warm/metrics.rs"),
        "kiln_node_",
    ),
    (
        include_str!("../../../node-agent/src/snapshots/metrics.rs"),
        "kiln_snapshot_",
    ),
    (
        include_str!("../../../router/src/metrics.rs"),
        "sandbox_router_",
    ),
];

/// What a name of ours begins with.
const OURS: [&str; 3] = ["agent_sandbox", "kiln_", "sandbox_router_"];

/// Series that are there, by what the sources register.
fn series() -> BTreeMap<String, &'static str> {
    let mut all = BTreeMap::new();
    for (source, prefix) in SOURCES {
        let statements: Vec<&str> = source.split(';').collect();
        for (i, statement) in statements.iter().enumerate() {
            let Some((_, call)) = statement.split_once(".register") else {
                continue;
            };
            let Some(name) = call.split('"').nth(1) else {
                continue;
            };
            // The metric is named in the call, or was cloned right before it.
            let field = |text: &'static str| {
                let mut owners = ["self.", "metrics."].into_iter();
                let named = owners.find_map(|owner| text.split(owner).nth(1))?;
                named.split('.').next()
            };
            let (before, call) = (i.checked_sub(1).map(|i| statements[i]), *statement);
            let field = field(call).or_else(|| field(before?));
            let unit = match () {
                () if !call.contains("register_with_unit") => "",
                () if call.contains("Unit::Bytes") => "_bytes",
                () => "_seconds",
            };
            let name = format!("{prefix}{name}{unit}");
            match field.map(|f| kind(source, f)) {
                Some("Counter") => drop(all.insert(format!("{name}_total"), "Counter")),
                Some("Gauge") => drop(all.insert(name, "Gauge")),
                Some("Histogram") => {
                    for part in ["bucket", "sum", "count"] {
                        all.insert(format!("{name}_{part}"), "Histogram");
                    }
                }
                // Information about the build.
                _ => drop(all.insert(format!("{name}_info"), "Info")),
            }
        }
    }
    all
}

/// What sort of metric a field is, by its declaration.
fn kind(source: &str, field: &str) -> &'static str {
    let kinds = ["Counter", "Gauge", "Histogram"];
    let mut declared = source.lines().filter_map(|line| {
        let line = line.trim().trim_start_matches("pub(crate) ");
        let declared = line.strip_prefix(field)?.strip_prefix(": ")?;
        // Labels have fields of such names too.
        kinds.into_iter().find(|k| declared.contains(k))
    });
    declared
        .next()
        .unwrap_or_else(|| panic!("{field} is no metric"))
}

/// Names of ours in an expression.
fn names(expression: &str) -> Vec<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = expression.split(|c| !is_part(c));
    words
        .filter(|w| OURS.iter().any(|o| w.starts_with(o)))
        .collect()
}

fn check(what: &str, expression: &str) {
    let series = series();
    let names = names(expression);
    assert!(!names.is_empty(), "{what}: {expression}");
    for name in names {
        assert!(
            series.contains_key(name),
            "{what}: no {name} in {:#?}",
            series.keys()
        );
    }
}

#[test]
fn sources_are_read() {
    let series = series();
    for (name, kind) in [
        ("agent_sandbox_claim_creation_total", "Counter"),
        ("agent_sandbox_build_info", "Info"),
        ("kiln_controller_queue_depth", "Gauge"),
        ("kiln_node_warm_boot_failures_total", "Counter"),
        ("kiln_node_warm_adoption_seconds_bucket", "Histogram"),
        ("kiln_node_warm_held_bytes", "Gauge"),
        ("sandbox_router_requests_total", "Counter"),
        ("sandbox_router_inflight_requests", "Gauge"),
        (
            "sandbox_router_request_duration_seconds_bucket",
            "Histogram",
        ),
    ] {
        assert_eq!(series.get(name), Some(&kind), "{name}");
    }
}

#[test]
fn every_panel_shows_what_is_counted() {
    let text = fs::read_to_string(deploy().join("grafana/kiln.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(!panels.is_empty());
    for panel in panels {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{panel}");
        for target in targets {
            check(
                &panel["title"].to_string(),
                target["expr"].as_str().unwrap(),
            );
        }
    }
}

#[test]
fn every_alert_is_about_what_is_counted_and_is_explained() {
    let text = fs::read_to_string(deploy().join("prometheus/alerts.yaml")).unwrap();
    let rules: Value = serde_saphyr::from_str(&text).unwrap();
    let docs = deploy().join("../docs/operations.md");
    let docs = fs::read_to_string(docs).unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap();
    assert!(!rules.is_empty());
    for rule in rules {
        let name = rule["alert"].as_str().unwrap();
        check(name, rule["expr"].as_str().unwrap());
        assert!(docs.contains(name), "{name} is not in docs/operations.md");
    }
}
