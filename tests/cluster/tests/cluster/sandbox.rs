// SPDX-License-Identifier: Apache-2.0

//! Sandboxes on a real kubelet.

use anyhow::Result;
use kiln_cluster::system::System;

use crate::env::{Env, NOTHING_WARM};

const UNPULLABLE: &str = "apiVersion: agents.x-k8s.io/v1beta1
kind: Sandbox
metadata: {name: lost}
spec:
  podTemplate:
    spec:
      runtimeClassName: gvisor
      containers: [{name: main, image: \"busybox:not-there\"}]
";

/// Who has made the Sandbox reads which image it is, and need not look for the Pod.
pub(crate) async fn an_image_that_cannot_be_pulled_is_named(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, NOTHING_WARM).await?;
    let ns = env.namespace().await?;
    ns.apply(UNPULLABLE).await?;
    let ready = ".status.conditions[?(@.type==\"Ready\")].message";
    ns.until_field("sandbox/lost", ready, |said| {
        said.contains("container main is waiting: ") && said.contains("busybox:not-there")
    })
    .await?;
    ns.kubectl(["delete", "--wait", "sandbox/lost"]).await?;
    let gone = ["wait", "--for=delete", "--timeout=50s", "pod/lost"];
    ns.kubectl(gone).await?;
    system.end().await
}
