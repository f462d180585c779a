// SPDX-License-Identifier: Apache-2.0

//! Volumes of Pods in gVisor, and a DaemonSet beside them.

use std::fs;

use anyhow::{Result, ensure};
use kiln_tests::wait;

use crate::env::Env;

/// Two containers, an init container and a hook, with an emptyDir and a ConfigMap between them.
const TWO: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: blue}
---
apiVersion: v1
kind: Pod
metadata: {name: two}
spec:
  runtimeClassName: gvisor
  terminationGracePeriodSeconds: 1
  initContainers:
  - name: first
    image: busybox:1
    command: [sh, -c, "echo 1 > /shared/init"]
    volumeMounts: [{name: shared, mountPath: /shared}]
  containers:
  - name: writer
    image: busybox:1
    command: [sh, -c, "echo 2 > /shared/writer; exec sleep 1000000"]
    lifecycle: {postStart: {exec: {command: [sh, -c, "echo 3 > /shared/hook"]}}}
    volumeMounts: [{name: shared, mountPath: /shared}]
  - name: reader
    image: busybox:1
    command: [sleep, "1000000"]
    readinessProbe: {exec: {command: [cat, /shared/writer, /shared/hook]}, periodSeconds: 1}
    volumeMounts:
    - {name: shared, mountPath: /shared}
    - {name: settings, mountPath: /settings}
  volumes:
  - {name: shared, emptyDir: {}}
  - {name: settings, configMap: {name: settings}}
"#;

pub(crate) async fn two_containers_share_a_pod(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    ns.apply(TWO).await?;
    ns.ready("two").await?;
    let reader = |command| ["exec", "two", "-c", "reader", "--", "sh", "-c", command];
    let shared = ns
        .kubectl(reader("cd /shared && cat init writer hook"))
        .await?;
    ensure!(shared == "1\n2\n3\n", "{shared:?}");
    let colour = ns.kubectl(reader("cat /settings/colour")).await?;
    ensure!(colour == "blue", "{colour:?}");
    Ok(())
}

/// A privileged agent of the node, as node software is installed; it is not in gVisor.
pub(crate) async fn a_daemon_set_writes_to_the_node(env: &Env) -> Result<()> {
    let ns = env.namespace().await?;
    let dir = env.private.cluster().dir().join("agent");
    ns.apply(&format!(
        r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: agent}}
spec:
  selector: {{matchLabels: {{app: agent}}}}
  template:
    metadata: {{labels: {{app: agent}}}}
    spec:
      hostPID: true
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      containers:
      - name: agent
        image: busybox:1
        command: [sh, -c, "uname -n > /node/name && exec sleep 1000000"]
        securityContext: {{privileged: true}}
        volumeMounts: [{{name: node, mountPath: /node, mountPropagation: HostToContainer}}]
      volumes: [{{name: node, hostPath: {{path: {}, type: DirectoryOrCreate}}}}]
"#,
        dir.display()
    ))
    .await?;
    ns.kubectl(["rollout", "status", "ds/agent", "--timeout=50s"])
        .await?;
    wait::until_true("the file of the agent", wait::SOON, || {
        fs::metadata(dir.join("name")).is_ok_and(|m| m.len() > 0)
    })
    .await
}
