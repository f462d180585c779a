// SPDX-License-Identifier: Apache-2.0

//! Networks: port-forward, services, the apiserver.

use anyhow::{Context, Result, ensure};

use crate::env::{Env, Namespace, get, pod, web};

pub(crate) async fn port_forward_reaches_either_runtime(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.apply(&pod("boxed", "gvisor", &web("from-gvisor"), ""))
        .await?;
    // Without a class, containerd's default runs it.
    let plain = pod("plain", "x", &web("from-runc"), "").replace("  runtimeClassName: x\n", "");
    ns.apply(&plain).await?;
    expect_forwarded(&ns, "boxed", "from-gvisor").await?;
    expect_forwarded(&ns, "plain", "from-runc").await
}

async fn expect_forwarded(ns: &Namespace<'_>, pod: &str, text: &str) -> Result<()> {
    ns.ready(pod).await?;
    let forward = ns.background(["port-forward", &format!("pod/{pod}"), ":8080"])?;
    let said = forward.expect("Forwarding from 127.0.0.1:").await?;
    let address = said
        .split_whitespace()
        .find(|w| w.starts_with("127.0.0.1:"))
        .context("no address")?;
    // Twice: the first connection must not be the only one.
    for _ in 0..2 {
        let answer = get(None, address).await.with_context(|| forward.text())?;
        ensure!(answer == text, "{pod}: {answer:?}");
    }
    Ok(())
}

pub(crate) async fn a_service_is_reached_by_its_address(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.apply(&pod("web", "gvisor", &web("behind-a-service"), ""))
        .await?;
    ns.pod("client", "gvisor", "sleep 1000000", "").await?;
    ns.ready("web").await?;
    ns.kubectl(["expose", "pod/web", "--port=80", "--target-port=8080"])
        .await?;
    let service = ns.field("service/web", ".spec.clusterIP").await?;
    let pod = ns.field("pod/web", ".status.podIP").await?;
    for address in [format!("{service}:80"), format!("{pod}:8080")] {
        let ask = format!(
            "i=0; while [ $i -lt 30 ]; do timeout 5 wget -qO- http://{address}/ && exit; \
             i=$((i + 1)); sleep 1; done"
        );
        let answer = ns.shell("client", &ask).await?;
        ensure!(answer == "behind-a-service", "Pod to {address}: {answer:?}");
        let answer = get(Some(&env.private.cluster().netns()?), &address).await?;
        ensure!(
            answer == "behind-a-service",
            "node to {address}: {answer:?}"
        );
    }
    Ok(())
}

/// Its words are those of RBAC: who it is was believed.
pub(crate) async fn the_apiserver_takes_a_pods_token(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.pod("idle", "gvisor", "sleep 1000000", "").await?;
    let reached = ns
        .shell(
            "idle",
            "nc -w 5 $KUBERNETES_SERVICE_HOST 443 -e true; echo $?",
        )
        .await?;
    ensure!(reached == "0", "{reached}");
    let dir = "/var/run/secrets/kubernetes.io/serviceaccount";
    let token = ns.shell("idle", &format!("cat {dir}/token")).await?;
    let namespace = ns.shell("idle", &format!("cat {dir}/namespace")).await?;
    let token = format!("--token={token}");
    // The administrator's certificate must not go along.
    let server = ns
        .kubectl(["config", "view", "-ojsonpath={.clusters[0].cluster.server}"])
        .await?;
    let ca = env.private.cluster().dir().join("pki/ca.crt");
    let args = [
        "--kubeconfig=/dev/null",
        &format!("--server={server}"),
        &format!("--certificate-authority={}", ca.display()),
        &token,
        "get",
        "pods",
    ];
    let refused = ns.kubectl_with(args, "").await?.errors();
    let user = format!("system:serviceaccount:{namespace}:default\" cannot list");
    ensure!(refused.contains(&user), "{refused}");
    Ok(())
}
