// SPDX-License-Identifier: Apache-2.0

//! `kilnctl list`: the claims and Sandboxes of a namespace, one a line.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kiln_crds::{Sandbox, SandboxClaim};
use kube::{ResourceExt, api::ListParams};
use serde_json::json;

use super::{
    Space,
    find::{condition, pod, sandbox_of, words},
    ready::Conditions as _,
};
use crate::{
    args::users::{List, ListFormat},
    output::{say, table, tell, write},
};

/// Columns of the wide table; the last two are of that only.
const HEAD: [&str; 9] = [
    "SANDBOX",
    "CLAIM",
    "READY",
    "SUSPENDED",
    "AGE",
    "POD",
    "NODE",
    "IP",
    "REASON",
];

/// Shown if there is nothing to show.
const NONE: &str = "-";

/// Prints the claims and Sandboxes of a namespace.
///
/// # Errors
/// When they cannot be listed.
pub(crate) async fn run(space: &Space, args: &List) -> Result<()> {
    let all = ListParams::default();
    let claims = space.claims().list(&all).await;
    let claims = claims.map_err(|e| space.explain(e))?.items;
    let sandboxes = space.sandboxes().list(&all).await;
    let sandboxes = sandboxes.map_err(|e| space.explain(e))?.items;
    if args.output == ListFormat::Json {
        let claims = claims.iter().map(serde_json::to_value);
        let sandboxes = sandboxes.iter().map(serde_json::to_value);
        let items = claims.chain(sandboxes).collect::<Result<Vec<_>, _>>()?;
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        say(&serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    if claims.is_empty() && sandboxes.is_empty() {
        tell(&format!(
            "No claims or sandboxes in namespace {:?}.",
            space.name
        ));
        return Ok(());
    }
    let now = space.cluster.clock().await?.now();
    let rows = rows(&claims, &sandboxes, now);
    write(&match args.output {
        ListFormat::Wide => table(&rows),
        _ => table(&rows.iter().map(narrow).collect::<Vec<_>>()),
    });
    Ok(())
}

fn narrow([a, b, c, d, e, f, g, ..]: &[String; 9]) -> [String; 7] {
    [a, b, c, d, e, f, g].map(String::clone)
}

/// A line for each claim, and for each Sandbox that no claim has.
fn rows(claims: &[SandboxClaim], sandboxes: &[Sandbox], now: Timestamp) -> Vec<[String; 9]> {
    let by_name: BTreeMap<String, &Sandbox> = sandboxes.iter().map(|s| (s.name_any(), s)).collect();
    let claimed: BTreeSet<&str> = claims.iter().filter_map(sandbox_of).collect();
    let mut rows = vec![HEAD.map(str::to_owned)];
    for claim in claims {
        let sandbox = sandbox_of(claim).and_then(|name| by_name.get(name));
        rows.push(row(Some(claim), sandbox.copied(), now));
    }
    let free = by_name
        .iter()
        .filter(|(name, _)| !claimed.contains(name.as_str()));
    rows.extend(free.map(|(_, sandbox)| row(None, Some(sandbox), now)));
    rows
}

fn row(claim: Option<&SandboxClaim>, sandbox: Option<&Sandbox>, now: Timestamp) -> [String; 9] {
    let none = || NONE.to_owned();
    let conditions = match (claim, sandbox) {
        (Some(claim), _) => claim.conditions(),
        (None, Some(sandbox)) => sandbox.conditions(),
        (None, None) => &[],
    };
    let ready = condition(conditions, "Ready");
    let is_ready = ready.is_some_and(|c| c.status == "True");
    let made = claim.map_or_else(
        || sandbox.and_then(|s| s.metadata.creation_timestamp.clone()),
        |claim| claim.metadata.creation_timestamp.clone(),
    );
    let suspended = sandbox.is_some_and(|s| s.spec.is_suspended());
    let status = sandbox.and_then(|s| s.status.as_ref());
    let addresses = status.and_then(|s| s.pod_ips.clone()).unwrap_or_default();
    [
        sandbox.map_or_else(none, ResourceExt::name_any),
        claim.map_or_else(none, ResourceExt::name_any),
        ready.map_or_else(|| "Unknown".to_owned(), |c| c.status.clone()),
        if suspended { "True" } else { "False" }.to_owned(),
        made.map_or_else(none, |Time(made)| age(now.as_second() - made.as_second())),
        sandbox.filter(|_| !suspended).map_or_else(none, pod),
        status
            .and_then(|s| s.node_name.clone())
            .unwrap_or_else(none),
        addresses.first().cloned().unwrap_or_else(none),
        ready.filter(|_| !is_ready).map_or_else(none, one_line),
    ]
}

fn one_line(condition: &Condition) -> String {
    words(condition).replace('\n', " ")
}

/// An age in seconds as kubectl prints it (apimachinery, `HumanDuration`).
fn age(seconds: i64) -> String {
    let two = |large: i64, a: &str, small: i64, b: &str| match small {
        0 => format!("{large}{a}"),
        _ => format!("{large}{a}{small}{b}"),
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        ..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, "d", hours % 24, "h"),
        _ => format!("{days}d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_kubectls() {
        for (seconds, text) in [
            (-5, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (3600, "60m"),
            (3 * 3600 + 60, "3h1m"),
            (30 * 3600, "30h"),
            (50 * 3600, "2d2h"),
            (9 * 86400, "9d"),
        ] {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn a_claim_and_its_sandbox_are_one_line() {
        let claim = |name: &str, sandbox: &str| -> SandboxClaim {
            serde_json::from_value(json!({
                "apiVersion": "extensions.agents.x-k8s.io/v1beta1", "kind": "SandboxClaim",
                "metadata": {"name": name, "creationTimestamp": "1970-01-01T00:00:00Z"},
                "spec": {}, "status": {"sandbox": {"name": sandbox}, "conditions": [{
                    "type": "Ready", "status": "False", "reason": "Waiting", "message": "a\nb",
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}]},
            }))
            .unwrap()
        };
        let sandbox = |name: &str| -> Sandbox {
            serde_json::from_value(json!({
                "apiVersion": "agents.x-k8s.io/v1beta1", "kind": "Sandbox",
                "metadata": {"name": name},
                "spec": {"podTemplate": {"spec": {"containers": []}}, "operatingMode": "Suspended"},
                "status": {"nodeName": "n", "podIPs": ["10.0.0.1"]},
            }))
            .unwrap()
        };
        let claims = [claim("c", "pool-1"), claim("early", "gone")];
        let now = Timestamp::from_second(60).unwrap();
        let rows = rows(&claims, &[sandbox("own"), sandbox("pool-1")], now);
        let lines: Vec<String> = rows.iter().skip(1).map(|row| row.join("|")).collect();
        assert_eq!(
            lines,
            [
                "pool-1|c|False|True|60s|-|n|10.0.0.1|Waiting: a b",
                "-|early|False|False|60s|-|-|-|Waiting: a b",
                "own|-|Unknown|True|-|-|n|10.0.0.1|-",
            ]
        );
    }
}
