// SPDX-License-Identifier: Apache-2.0

//! What people may do by the roles for them, and the example that gives a team access.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kiln_cluster::account::deploy;
use kiln_tests::wait;
use kube::{Api, api::PostParams};

use crate::env::Env;

/// Group of the example.
const TEAM: &str = "team-a";

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "update", "patch", "delete", "deletecollection"];

/// All kinds that users have, as group and resource.
const KINDS: [(&str, &str); 8] = [
    ("agents.x-k8s.io", "sandboxes"),
    ("extensions.agents.x-k8s.io", "sandboxclaims"),
    ("extensions.agents.x-k8s.io", "sandboxtemplates"),
    ("extensions.agents.x-k8s.io", "sandboxwarmpools"),
    (SNAPSHOTS, "podsnapshots"),
    (SNAPSHOTS, "podsnapshotmanualtriggers"),
    (SNAPSHOTS, "podsnapshotpolicies"),
    (SNAPSHOTS, "podsnapshotstorageconfigs"),
];

const SNAPSHOTS: &str = "podsnapshot.gke.io";

/// Verbs beyond reading that a role has for a resource.
fn written(role: &str, resource: &str) -> &'static [&'static str] {
    match (role, resource) {
        ("view", _) => &[],
        (_, "podsnapshotmanualtriggers") => &["create", "delete"],
        (_, "podsnapshots") => &["delete"],
        ("admin", "podsnapshotpolicies") => WRITE,
        (_, "podsnapshotpolicies" | "podsnapshotstorageconfigs") => &[],
        _ => WRITE,
    }
}

/// Whether one of a group may do a thing in a namespace. A resource may have a subresource.
async fn may(env: &Env, group: &str, namespace: &str, what: (&str, &str, &str)) -> Result<bool> {
    let (api_group, resource, verb) = what;
    let (resource, subresource) = match resource.split_once('/') {
        Some((resource, sub)) => (resource, Some(sub.to_owned())),
        None => (resource, None),
    };
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some("somebody".to_owned()),
            groups: Some(vec![group.to_owned()]),
            resource_attributes: Some(ResourceAttributes {
                group: Some(api_group.to_owned()),
                resource: Some(resource.to_owned()),
                subresource,
                verb: Some(verb.to_owned()),
                namespace: Some(namespace.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(env.plane.client());
    let answer = reviews.create(&PostParams::default(), &review).await?;
    Ok(answer.status.context("no answer")?.allowed)
}

/// Applies the roles, and files of the examples to a namespace.
async fn apply(env: &Env, namespace: &str, examples: &[&str]) -> Result<()> {
    let path = |file: &str| deploy().join(file).display().to_string();
    let people = path("base/people.yaml");
    let apply = ["apply", "--server-side", "-f", &people];
    env.plane.kubectl(&apply).await?;
    for example in examples {
        let example = path(&format!("examples/{example}.yaml"));
        let apply = ["apply", "--server-side", "-n", namespace, "-f", &example];
        env.plane.kubectl(&apply).await?;
    }
    Ok(())
}

pub(crate) async fn each_role_may_what_is_written_and_no_more(env: &Env) -> Result<()> {
    let namespace = env.plane.namespace("people").await?;
    apply(env, &namespace, &[]).await?;
    for role in ["view", "edit", "admin"] {
        let name = format!("kiln-sandbox-{role}");
        let label = format!("-lrbac.authorization.k8s.io/aggregate-to-{role}=true");
        let labelled = ["get", "clusterrole", "-oname", &label];
        let labelled = env.plane.kubectl(&labelled).await?;
        ensure!(labelled.contains(&name), "{labelled}");

        let bind = [
            "create",
            "rolebinding",
            role,
            "-n",
            &namespace,
            &format!("--clusterrole={name}"),
            &format!("--group={role}s"),
        ];
        env.plane.kubectl(&bind).await?;
        let group = format!("{role}s");
        let may = async |namespace: &str, what| may(env, &group, namespace, what).await;
        let first = (KINDS[0].0, KINDS[0].1, "get");
        wait::until("the binding", wait::SOON, async || {
            may(&namespace, first).await.ok()?.then_some(())
        })
        .await?;
        for (api_group, resource) in KINDS {
            for verb in [READ, WRITE, &["mark"]].concat() {
                let what = (api_group, resource, verb);
                let expected = READ.contains(&verb) || written(role, resource).contains(&verb);
                ensure!(may(&namespace, what).await? == expected, "{role}: {what:?}");
                ensure!(!may("default", what).await?, "{role}: {what:?} elsewhere");
            }
        }
        let enters = role != "view";
        for (what, expected) in [
            (("", "pods/log", "get"), true),
            (("", "pods/exec", "get"), enters),
            (("", "pods/exec", "create"), enters),
            (("", "pods/portforward", "create"), enters),
            (("", "pods", "create"), false),
            (("", "secrets", "get"), false),
            (("agents.x-k8s.io", "sandboxes/status", "patch"), false),
            (("node.agents.x-k8s.io", "sandboxnodes", "patch"), false),
        ] {
            ensure!(may(&namespace, what).await? == expected, "{role}: {what:?}");
        }
    }
    Ok(())
}

pub(crate) async fn a_team_is_given_access_to_its_namespace(env: &Env) -> Result<()> {
    let namespace = env.plane.namespace(TEAM).await?;
    apply(env, &namespace, &["tenant-quota", "team/access"]).await?;
    let claim = ("extensions.agents.x-k8s.io", "sandboxclaims", "create");
    wait::until("the binding", wait::SOON, async || {
        may(env, TEAM, &namespace, claim).await.ok()?.then_some(())
    })
    .await?;
    ensure!(!may(env, TEAM, &env.plain, claim).await?, "elsewhere");
    ensure!(!may(env, "team-b", &namespace, claim).await?, "others");
    for object in [
        "resourcequota/agent-sandbox",
        "resourcequota/sandboxes",
        "limitrange/sandboxes",
        "networkpolicy/sandboxes",
    ] {
        env.plane
            .kubectl(&["get", object, "-n", &namespace])
            .await?;
    }
    Ok(())
}
