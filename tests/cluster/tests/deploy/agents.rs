// SPDX-License-Identifier: Apache-2.0

//! What the agent of one node may write.

use anyhow::{Result, bail, ensure};
use kiln_tests::wait;
use serde_json::json;

use crate::env::Env;

/// Who agents are.
const AGENT: &str = "system:serviceaccount:agent-sandbox-system:kiln-node-agent";

/// What a policy of ours says when it refuses.
const POLICY: &str = "ValidatingAdmissionPolicy 'kiln-node-agent'";

/// Patches a node as the agent of `of`, or of no node. Returns why it is refused.
async fn refusal(env: &Env, of: Option<&str>, node: &str, patch: &str) -> Option<String> {
    let who = format!("--as={AGENT}");
    let extra = of.map(|n| format!("--as-user-extra=authentication.kubernetes.io/node-name={n}"));
    let mut args = vec!["patch", "node", node, "--type=merge", "-p", patch, &who];
    args.extend(extra.as_deref());
    let done = env.plane.kubectl(&args).await;
    done.err().map(|e| format!("{e:#}"))
}

/// Makes an event about a node as the agent of `of`, or of no node. Returns why it is refused.
async fn event(env: &Env, of: Option<&str>, about: &str) -> Option<String> {
    let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event",
        "metadata": {"generateName": "told-", "namespace": "default"},
        "eventTime": "2026-01-01T00:00:00.000000Z", "type": "Normal", "reason": "Told",
        "action": "Tell", "reportingController": "test", "reportingInstance": "test",
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": about}});
    let who = format!("--as={AGENT}");
    let extra = of.map(|n| format!("--as-user-extra=authentication.kubernetes.io/node-name={n}"));
    let mut args = vec!["create", "--dry-run=server", "-f", "-", &who];
    args.extend(extra.as_deref());
    let done = env.plane.kubectl_with(&args, &event.to_string()).await;
    done.err().map(|e| format!("{e:#}"))
}

pub(crate) async fn an_agent_writes_of_its_own_node_only(env: &Env) -> Result<()> {
    for name in ["one", "other"] {
        let node = json!({"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"zone": "a"}}});
        env.make(&node).await?;
    }
    let ready = r#"{"metadata": {"labels": {"kiln.dev/gvisor": "ready"}}}"#;
    wait::until("the policy", wait::SOON, async || {
        let refused = refusal(env, Some("one"), "other", ready).await?;
        refused.contains(POLICY).then_some(())
    })
    .await?;
    for patch in [
        ready,
        r#"{"metadata": {"labels": {"kiln.dev/gvisor": null}}}"#,
    ] {
        let refused = refusal(env, Some("one"), "one", patch).await;
        ensure!(refused.is_none(), "{patch}: {refused:?}");
    }
    for (of, patch, words) in [
        (None, ready, "its own node"),
        (Some("other"), ready, "its own node"),
        (
            Some("one"),
            r#"{"metadata": {"labels": {"zone": "b"}}}"#,
            "labels kiln.dev/",
        ),
        (
            Some("one"),
            r#"{"metadata": {"labels": {"zone": null}}}"#,
            "labels kiln.dev/",
        ),
        (
            Some("one"),
            r#"{"metadata": {"labels": {"new": "b"}}}"#,
            "labels kiln.dev/",
        ),
        (
            Some("one"),
            r#"{"metadata": {"annotations": {"a": "b"}}}"#,
            "labels kiln.dev/",
        ),
        (
            Some("one"),
            r#"{"metadata": {"finalizers": ["kiln.test/hold"]}}"#,
            "labels kiln.dev/",
        ),
        (
            Some("one"),
            r#"{"spec": {"unschedulable": true}}"#,
            "labels kiln.dev/",
        ),
    ] {
        let refused = refusal(env, of, "one", patch).await.unwrap_or_default();
        ensure!(
            refused.contains(POLICY) && refused.contains(words),
            "{of:?} {patch}: {refused:?}"
        );
    }
    for (of, about, is_allowed) in [
        (Some("one"), "one", true),
        (Some("one"), "other", false),
        (None, "one", false),
    ] {
        let refused = event(env, of, about).await;
        match (is_allowed, &refused) {
            (true, None) => {}
            (false, Some(why)) if why.contains(POLICY) => {}
            _ => bail!("an event of {of:?} about {about}: {refused:?}"),
        }
    }
    // Who is no agent is none of the policy's.
    let zone = r#"{"metadata": {"labels": {"zone": "b"}}}"#;
    env.plane
        .kubectl(&["patch", "node", "one", "--type=merge", "-p", zone])
        .await?;
    env.plane
        .kubectl(&["delete", "node", "one", "other"])
        .await
        .map(drop)
}

pub(crate) async fn an_agent_reports_snapshots_of_its_own_node_only(env: &Env) -> Result<()> {
    let snapshot = json!({"apiVersion": "podsnapshot.gke.io/v1", "kind": "PodSnapshot",
        "metadata": {"name": "s", "namespace": "default"},
        "spec": {"nodeName": "one", "podSpecDigest": "d",
            "pod": {"name": "p", "uid": "p1"}, "sandbox": {"name": "b", "uid": "b1"}}});
    env.make(&snapshot).await?;
    let who = format!("--as={AGENT}");
    let change = async |of: &str, patch: &str, status: bool| {
        let node = format!("--as-user-extra=authentication.kubernetes.io/node-name={of}");
        let target = [
            "patch",
            "podsnapshot",
            "s",
            "-n",
            "default",
            "--type=merge",
            "-p",
            patch,
        ];
        let mut args = [&target[..], &[&who, &node]].concat();
        args.extend(status.then_some("--subresource=status"));
        env.plane
            .kubectl(&args)
            .await
            .err()
            .map(|e| format!("{e:#}"))
    };
    let taken = r#"{"status": {"sizeBytes": 1}}"#;
    wait::until("the policy", wait::SOON, async || {
        let refused = change("other", taken, true).await?;
        refused.contains(POLICY).then_some(())
    })
    .await?;
    let refused = change("one", taken, true).await;
    ensure!(refused.is_none(), "{refused:?}");
    // Which Pod gets it is not an agent's to say.
    let given = r#"{"spec": {"restore": {"podUID": "mine"}}}"#;
    let refused = change("one", given, false).await.unwrap_or_default();
    ensure!(refused.contains("forbidden"), "{refused}");
    env.plane
        .kubectl(&["delete", "podsnapshot", "s", "-n", "default"])
        .await
        .map(drop)
}
