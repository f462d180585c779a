// SPDX-License-Identifier: Apache-2.0

//! What service accounts may do: by asking the apiserver for every verb of every resource, and
//! comparing the answers with the table in docs/security.md.

use std::{collections::BTreeSet, fs};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::{
    api::{
        authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
        authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
        core::v1::{Node, Pod, ServiceAccount},
    },
    apimachinery::pkg::apis::meta::v1::APIResourceList,
};
use kiln_cluster::account::deploy;
use kiln_crds::SandboxNode;
use kiln_tests::wait;
use kube::{
    Api, Client, Config,
    api::{Patch, PatchParams, PostParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};

use crate::env::Env;

/// Where our accounts are.
const SYSTEM: &str = "agent-sandbox-system";

/// Everything that can be asked of an apiserver (Kubernetes, "Authorization overview"), also what
/// only admission and authorization look for.
const VERBS: [&str; 14] = [
    "get",
    "list",
    "watch",
    "create",
    "update",
    "patch",
    "delete",
    "deletecollection",
    "impersonate",
    "bind",
    "escalate",
    "approve",
    "mark",
    "*",
];

/// Questions at a time.
const AT_ONCE: usize = 64;

/// One thing that may be done: API group, resource, verb, and whether in every namespace.
type Right = (String, String, String, bool);

/// The rights of an account by the table.
fn written(account: &str) -> Result<BTreeSet<Right>> {
    let text = fs::read_to_string(deploy().join("../docs/security.md"))?;
    let head = format!("| `{account}` |");
    let mut rights = BTreeSet::new();
    let mut rows = 0;
    for row in text.lines().filter(|line| line.starts_with(&head)) {
        rows += 1;
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let words = |n: usize| cells.get(n).copied().unwrap_or_default().split_whitespace();
        for group in words(2) {
            let group = if group == "core" { "" } else { group };
            for (resource, verb) in words(3).flat_map(|r| words(4).map(move |v| (r, v))) {
                let everywhere = cells.get(5) == Some(&"all");
                let right = [group, resource, verb].map(str::to_owned);
                let [group, resource, verb] = right;
                rights.insert((group, resource, verb, everywhere));
            }
        }
    }
    ensure!(rows > 0, "{account} is not in the table");
    Ok(rights)
}

/// Groups and resources that the apiserver serves, with what stands for all.
async fn resources(client: &Client) -> Result<BTreeSet<(String, String)>> {
    let mut all = BTreeSet::from([("*".to_owned(), "*".to_owned())]);
    let mut lists = vec![client.list_core_api_resources("v1").await?];
    for group in client.list_api_groups().await?.groups {
        for version in group.versions {
            lists.push(
                client
                    .list_api_group_resources(&version.group_version)
                    .await?,
            );
        }
    }
    for APIResourceList {
        group_version,
        resources,
    } in lists
    {
        let group = group_version.split_once('/').map_or("", |(group, _)| group);
        all.extend(resources.into_iter().map(|r| (group.to_owned(), r.name)));
    }
    // Asked for where owners are set (OwnerReferencesPermissionEnforcement), and served by nobody.
    let kinds = all.iter().filter(|(_, name)| !name.contains('/'));
    let finalizers: Vec<_> = kinds
        .map(|(group, name)| (group.clone(), format!("{name}/finalizers")))
        .collect();
    all.extend(finalizers);
    Ok(all)
}

/// Whether an account may do a thing in a namespace, or in all.
async fn may(client: &Client, account: &str, right: &Right, namespace: &str) -> Result<bool> {
    let (group, resource, verb, _) = right;
    let (resource, subresource) = match resource.split_once('/') {
        Some((resource, sub)) => (resource.to_owned(), Some(sub.to_owned())),
        None => (resource.clone(), None),
    };
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{SYSTEM}:{account}")),
            groups: Some(vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{SYSTEM}"),
                "system:authenticated".to_owned(),
            ]),
            resource_attributes: Some(ResourceAttributes {
                group: Some(group.clone()),
                resource: Some(resource),
                subresource,
                verb: Some(verb.clone()),
                namespace: Some(namespace.to_owned()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = reviews.create(&PostParams::default(), &review).await?;
    Ok(answer.status.context("no answer")?.allowed)
}

/// What an account may do, in all namespaces or in its own.
async fn rights(client: &Client, account: &str) -> Result<BTreeSet<Right>> {
    let resources = resources(client).await?;
    ensure!(resources.len() > 100, "{} resources", resources.len());
    let questions = resources.iter().flat_map(|(group, resource)| {
        VERBS.map(|verb| (group.clone(), resource.clone(), verb.to_owned()))
    });
    let answers = stream::iter(questions).map(async |(group, resource, verb)| {
        let mut right = (group, resource, verb, true);
        // What it may everywhere it may there, too.
        if !may(client, account, &right, SYSTEM).await? {
            return anyhow::Ok(None);
        }
        right.3 = may(client, account, &right, "").await?;
        Ok(Some(right))
    });
    let found: Vec<_> = answers.buffer_unordered(AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

pub(crate) async fn every_account_may_what_is_written_and_no_more(env: &Env) -> Result<()> {
    let client = env.plane.client();
    // What everybody may do is the cluster's to say.
    let everybody = rights(&client, "nobody-that-is-there").await?;
    ensure!(!everybody.is_empty(), "nobody may even ask who they are");
    for account in ["agent-sandbox-controller", "kiln-node-agent", "default"] {
        let may: BTreeSet<_> = rights(&client, account).await?;
        let own: BTreeSet<_> = may.difference(&everybody).cloned().collect();
        let written = written(account)?;
        let more: Vec<_> = own.difference(&written).collect();
        let less: Vec<_> = written.difference(&own).collect();
        ensure!(
            more.is_empty() && less.is_empty(),
            "{account} may do what is not written: {more:?}, and may not what is: {less:?}"
        );
    }
    Ok(())
}

/// A client with a token of the agent's: that of a Pod, or of nobody's.
async fn agent(env: &Env, pod: Option<&Pod>) -> Result<Client> {
    let bound = pod.map(|pod| BoundObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
    });
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            bound_object_ref: bound,
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(env.plane.client(), SYSTEM);
    let params = PostParams::default();
    let made = accounts.create_token_request("kiln-node-agent", &params, &request);
    let token = made.await?.status.context("no token")?.token;
    let mut config = Kubeconfig::read_from(env.plane.kubeconfig())?;
    let auth = config
        .auth_infos
        .first_mut()
        .and_then(|a| a.auth_info.as_mut());
    *auth.context("no user")? = serde_json::from_value(json!({"token": token}))?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Writes a node's object as an agent does, and its status.
async fn write(client: &Client, node: &str, ready: i32) -> [kube::Result<SandboxNode>; 2] {
    let nodes: Api<SandboxNode> = Api::all(client.clone());
    let params = PatchParams::apply("kiln-node-agent").force();
    let object = |more: Value| {
        let mut object = json!({"apiVersion": "node.agents.x-k8s.io/v1alpha1",
            "kind": "SandboxNode", "metadata": {"name": node}});
        crate::env::merge(&mut object, &more);
        object
    };
    let spec = object(json!({"spec": {}}));
    let status = object(json!({"status": {"total": {"ready": ready}}}));
    [
        nodes.patch(node, &params, &Patch::Apply(&spec)).await,
        nodes
            .patch_status(node, &params, &Patch::Apply(&status))
            .await,
    ]
}

/// Fails unless the policy has refused it.
fn is_refused(answer: &kube::Result<SandboxNode>) -> Result<()> {
    let policy = "ValidatingAdmissionPolicy 'kiln-node-agent'";
    match answer {
        Err(kube::Error::Api(status)) if status.message.contains(policy) => Ok(()),
        other => anyhow::bail!("not refused by the policy: {other:?}"),
    }
}

/// By the node that its token names. A token that names none is good for nothing here.
pub(crate) async fn a_token_is_good_for_its_own_node(env: &Env) -> Result<()> {
    let admin = env.plane.client();
    let params = PostParams::default();
    let mut pods = Vec::new();
    for node in ["agents-own", "agents-other"] {
        let object: Node = serde_json::from_value(json!({"metadata": {"name": node}}))?;
        Api::<Node>::all(admin.clone())
            .create(&params, &object)
            .await?;
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": format!("kiln-node-agent-{node}")},
            "spec": {"nodeName": node, "serviceAccountName": "kiln-node-agent",
                "containers": [{"name": "agent", "image": "agent"}]},
        }))?;
        let api: Api<Pod> = Api::namespaced(admin.clone(), SYSTEM);
        pods.push(api.create(&params, &pod).await?);
    }
    let (own, other) = (
        agent(env, Some(&pods[0])).await?,
        agent(env, Some(&pods[1])).await?,
    );
    let nobody = agent(env, None).await?;
    for answer in write(&other, "agents-other", 5).await {
        answer.context("its own node")?;
    }
    // Policies come to an apiserver's admission a moment after they are made.
    wait::until("the policy", wait::SOON, async || {
        let [answer, _] = write(&own, "agents-other", 9).await;
        is_refused(&answer).ok()
    })
    .await?;
    for client in [&own, &nobody] {
        for answer in write(client, "agents-other", 9).await {
            is_refused(&answer)?;
        }
    }
    is_refused(&write(&nobody, "agents-own", 9).await[0])?;
    for answer in write(&own, "agents-own", 5).await {
        answer.context("its own node")?;
    }
    let nodes: Api<SandboxNode> = Api::all(admin.clone());
    let status = nodes
        .get("agents-other")
        .await?
        .status
        .context("no status")?;
    ensure!(
        status.total.is_some_and(|t| t.ready == 5),
        "another's is changed"
    );
    // Who else may write is not the policy's business.
    for answer in write(&admin, "agents-other", 7).await {
        answer.context("an administrator")?;
    }
    Ok(())
}

/// With a token that may write Pods everywhere.
pub(crate) async fn the_controller_makes_pods_of_sandboxes_only(env: &Env) -> Result<()> {
    let account = env.plane.account().await?.display().to_string();
    let kubeconfig = ["--kubeconfig", &account];
    let own = |namespace: &str, name: &str, kind: &str| {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "ownerReferences": [{
                "apiVersion": "agents.x-k8s.io/v1beta1", "kind": kind, "name": "s", "controller": true,
                "uid": "00000000-0000-0000-0000-000000000001",
            }]},
            "spec": {"containers": [{"name": "c", "image": "i"}],
                "runtimeClassName": "gvisor"},
        })
    };
    let create = async |pod: &Value| {
        let args = [&kubeconfig[..], &["create", "--dry-run=server", "-f", "-"]].concat();
        env.plane.kubectl_with(&args, &pod.to_string()).await
    };
    let refused = |answer: Result<String>, words: &str| -> Result<()> {
        let error = answer
            .err()
            .with_context(|| format!("allowed, not: {words}"))?;
        ensure!(format!("{error:#}").contains(words), "{error:#}");
        Ok(())
    };
    let mut bare = own("default", "bare", "Sandbox");
    bare["metadata"]["ownerReferences"] = json!([]);
    wait::until("the policy", wait::SOON, async || create(&bare).await.err()).await?;
    let of_sandboxes = "Pods of Sandboxes only";
    refused(create(&bare).await, of_sandboxes)?;
    refused(
        create(&own("default", "p", "SandboxClaim")).await,
        of_sandboxes,
    )?;
    for (field, value) in [
        ("controller", json!(false)),
        ("apiVersion", json!("example.com/v1")),
    ] {
        let mut pod = own("default", "p", "Sandbox");
        pod["metadata"]["ownerReferences"][0][field] = value;
        refused(create(&pod).await, of_sandboxes)?;
    }
    let words = "no Pods in this namespace";
    for namespace in ["kube-system", "kube-public", "kube-node-lease"] {
        refused(create(&own(namespace, "p", "Sandbox")).await, words)?;
    }
    let mut powerful = own(SYSTEM, "p", "Sandbox");
    powerful["spec"]["serviceAccountName"] = json!("kiln-node-agent");
    refused(create(&powerful).await, "no Pods with a service account")?;
    for namespace in ["default", SYSTEM] {
        create(&own(namespace, "p", "Sandbox")).await?;
    }
    // Of a Pod of somebody's it may change what a Sandbox says of its own, and that is no image.
    bare["metadata"]["name"] = json!("strangers");
    env.make(&bare).await?;
    let change = async |args: &[&str]| {
        let last = ["pod", "strangers", "-n", "default", "--dry-run=server"];
        env.plane
            .kubectl(&[&kubeconfig[..], args, &last[..]].concat())
            .await
    };
    let image = r#"--patch={"spec": {"containers": [{"name": "c", "image": "evil"}]}}"#;
    refused(change(&["patch", image]).await, "what a Pod runs")?;
    change(&["patch", r#"--patch={"metadata": {"labels": {"a": "b"}}}"#]).await?;
    refused(change(&["delete"]).await, of_sandboxes)?;
    let status = r#"--patch={"status": {"phase": "Failed"}}"#;
    let status = change(&["patch", "--subresource=status", status]).await;
    refused(status, of_sandboxes)?;
    env.plane
        .kubectl(&["delete", "pod", "strangers", "-n", "default"])
        .await?;
    Ok(())
}

pub(crate) async fn the_router_has_no_token(_: &Env) -> Result<()> {
    let text = fs::read_to_string(deploy().join("base/router.yaml"))?;
    let all: Vec<Value> = serde_saphyr::from_multiple(&text)?;
    let routers: Vec<_> = all.iter().filter(|o| o["kind"] == "Deployment").collect();
    ensure!(routers.len() == 1, "{} Deployments", routers.len());
    let pod = &routers[0]["spec"]["template"]["spec"];
    ensure!(pod["automountServiceAccountToken"] == json!(false), "{pod}");
    ensure!(
        pod["volumes"]
            .to_string()
            .find("serviceAccountToken")
            .is_none(),
        "{pod}"
    );
    Ok(())
}
