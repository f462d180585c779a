// SPDX-License-Identifier: Apache-2.0

//! What a cluster that comes up is waited for.

use std::{
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::{
    core::v1::{ConfigMap, Node, ServiceAccount},
    node::v1::RuntimeClass,
};
use kiln_tests::netns::Netns;
use kube::{
    Api, Client,
    api::{GetParams, Patch, PatchParams, Request},
};

use super::layout::NODE;

/// How long each step may take: it takes seconds, and machines are slow.
const LIMIT: Duration = Duration::from_secs(120);

/// Pause between two looks.
const POLL: Duration = Duration::from_millis(50);

/// The class of Pods that our handler runs.
const RUNTIME_CLASS: &str = include_str!("../../../../deploy/base/runtimeclass.yaml");

/// Waits until `probe` holds; fails as soon as `check` does.
pub(super) async fn until(
    what: &str,
    mut probe: impl AsyncFnMut() -> bool,
    check: impl Fn() -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    while !probe().await {
        check()?;
        if start.elapsed() > LIMIT {
            bail!("{what}: not ready after {} s", LIMIT.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Whether the apiserver says that it is ready.
pub(super) async fn is_serving(client: &Client) -> bool {
    match Request::new("").get("readyz", &GetParams::default()) {
        Ok(request) => client.request_text(request).await.is_ok(),
        Err(_) => false,
    }
}

/// Whether something in `netns` takes connections at `address`.
pub(super) fn has_listener(netns: &Netns, address: SocketAddr) -> bool {
    let connected =
        netns.run(|| std::net::TcpStream::connect_timeout(&address, POLL).context("connect"));
    connected.is_ok()
}

/// Whether something takes connections at a UNIX socket.
pub(super) fn listens(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// Makes RuntimeClass `gvisor` as `deploy/` has it.
pub(super) async fn apply_runtime_class(client: &Client) -> Result<()> {
    let class: RuntimeClass =
        serde_saphyr::from_str(RUNTIME_CLASS).context("read runtimeclass.yaml")?;
    let name = class
        .metadata
        .name
        .clone()
        .context("a class without a name")?;
    Api::<RuntimeClass>::all(client.clone())
        .patch(
            &name,
            &PatchParams::apply("kiln-cluster"),
            &Patch::Apply(&class),
        )
        .await
        .with_context(|| format!("make RuntimeClass {name}"))?;
    Ok(())
}

/// Whether the node is Ready.
pub(super) async fn has_node(client: &Client) -> bool {
    let node = node(client).await;
    let conditions = node.and_then(|n| n.status?.conditions).unwrap_or_default();
    conditions
        .iter()
        .any(|c| c.type_ == "Ready" && c.status == "True")
}

/// Whether a Pod that is made now is admitted and scheduled.
pub(super) async fn takes_pods(client: &Client) -> bool {
    let taints = node(client)
        .await
        .map(|n| n.spec.and_then(|s| s.taints).unwrap_or_default());
    let accounts = Api::<ServiceAccount>::default_namespaced(client.clone());
    let maps = Api::<ConfigMap>::default_namespaced(client.clone());
    taints.is_some_and(|t| t.is_empty())
        && accounts.get("default").await.is_ok()
        && maps.get("kube-root-ca.crt").await.is_ok()
}

async fn node(client: &Client) -> Option<Node> {
    Api::<Node>::all(client.clone()).get(NODE).await.ok()
}
