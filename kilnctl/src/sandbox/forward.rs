// SPDX-License-Identifier: Apache-2.0

//! `kilnctl port-forward`.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Context as _, Result};
use futures_util::{FutureExt as _, future::select_all};
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

use super::{Space, find::find};
use crate::{
    args::users::PortForward,
    output::{say, tell},
};

/// Has ports of this machine's loopback lead to ports of a sandbox, until it is interrupted.
///
/// # Errors
/// When there is no such sandbox, it has no Pod, or a port is taken.
pub(crate) async fn run(space: &Space, args: &PortForward) -> Result<()> {
    let pod: Arc<str> = find(space, &args.name).await?.target(None)?.pod.into();
    let mut servers = Vec::new();
    for &(local, remote) in &args.ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, local)).await;
        let listener = listener.with_context(|| format!("listen on port {local}"))?;
        say(&format!(
            "Forwarding from {} -> {remote}",
            listener.local_addr()?
        ));
        servers.push(serve(listener, space.pods(), Arc::clone(&pod), remote).boxed());
    }
    select_all(servers).await.0
}

async fn serve(listener: TcpListener, pods: Api<Pod>, pod: Arc<str>, port: u16) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await.context("accept a connection")?;
        let (pods, pod) = (pods.clone(), Arc::clone(&pod));
        tokio::spawn(async move {
            if let Err(e) = forward(stream, &pods, &pod, port).await {
                tell(&format!("port {port}: {e:#}"));
            }
        });
    }
}

async fn forward(mut stream: TcpStream, pods: &Api<Pod>, pod: &str, port: u16) -> Result<()> {
    let mut forwarder = pods.portforward(pod, &[port]).await?;
    let mut remote = forwarder.take_stream(port).context("no stream")?;
    copy_bidirectional(&mut stream, &mut remote).await?;
    drop(remote);
    forwarder.join().await.context("the sandbox")
}
