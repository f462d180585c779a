// SPDX-License-Identifier: Apache-2.0

//! The files that configure a node: containerd's with the handler as `deploy/` has it, the
//! runtime's, CNI's, kubelet's and kube-proxy's.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kiln_images::hosts;
use kiln_tests::tools;
use serde_json::{Value, json};

use super::{
    Parts,
    layout::{Layout, NODE, PODS},
    programs::REGISTRY,
};

/// What a user puts where containerd reads drop-ins.
const HANDLER: &str = include_str!("../../../../deploy/containerd.toml");

/// What a user installs as `/etc/kiln/runsc.toml`.
const RUNTIME: &str = include_str!("../../../../deploy/runsc.toml");

/// Writes all files, and installs the shim and its runtime where containerd looks for programs.
pub(super) fn write(layout: &Layout, parts: &Parts) -> Result<()> {
    if parts.handler {
        let shim = layout.bin().join("containerd-shim-kiln-v2");
        fs::copy(&parts.shim, shim).with_context(|| format!("copy {}", parts.shim.display()))?;
        symlink(&parts.runsc, layout.bin().join("runsc")).context("link runsc")?;
        put(&layout.etc("kiln.toml"), &handler(layout)?)?;
        put(&layout.etc("runsc.toml"), &runtime(layout)?)?;
    }
    let files = [
        (
            layout.etc("containerd.toml"),
            containerd(layout, parts.handler)?,
        ),
        (layout.at("cni/10-kiln.conflist"), cni(layout).to_string()),
        (layout.etc("kubelet.json"), kubelet(layout).to_string()),
        (layout.etc("kube-proxy.json"), proxy(layout).to_string()),
        // The host's would send Pods to name servers that they cannot reach.
        (layout.etc("resolv.conf"), String::new()),
    ];
    for (path, text) in files {
        put(&path, &text)?;
    }
    hosts::write(&layout.at("certs.d"), REGISTRY).context("write hosts.toml")?;
    Ok(())
}

fn put(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// containerd's own file, with handler `runc` as the default.
fn containerd(layout: &Layout, has_handler: bool) -> Result<String> {
    let imports = match has_handler {
        true => format!("imports = [\"{}\"]\n", layout.etc("kiln.toml").display()),
        false => String::new(),
    };
    let at = |name: &str| layout.at(name).display().to_string();
    Ok(format!(
        r#"version = 3
root = "{root}"
state = "{state}"
{imports}[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.10"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "{certs}"
[plugins."io.containerd.cri.v1.runtime"]
  enable_selinux = false
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  cdi_spec_dirs = []
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["{plugins}"]
    conf_dir = "{cni}"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      runtime_path = "{runc_shim}"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        BinaryName = "{runc}"
        Root = "{runc_root}"
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = "{sockets}"
# What is lost with the machine is of no use afterwards.
[plugins."io.containerd.metadata.v1.bolt"]
  no_sync = true
"#,
        root = at("containerd"),
        state = at("containerd-state"),
        socket = layout.containerd_socket().display(),
        certs = at("certs.d"),
        plugins = tools::cni_plugins()?.display(),
        cni = at("cni"),
        runc_shim = tools::program("containerd-shim-runc-v2")?.display(),
        runc = tools::program("runc")?.display(),
        runc_root = at("runc"),
        opt = at("opt"),
        sockets = at("s"),
    ))
}

/// The drop-in, with the path of this node.
fn handler(layout: &Layout) -> Result<String> {
    let config = format!("ConfigPath = \"{}\"", layout.etc("runsc.toml").display());
    replace_line(HANDLER, "ConfigPath = ", &config)
}

/// The runtime's file, with the paths of this node.
fn runtime(layout: &Layout) -> Result<String> {
    let mut text = RUNTIME.to_owned();
    for (key, path) in [
        ("binary_name", layout.bin().join("runsc")),
        ("root", layout.at("runsc")),
        ("agent", layout.agent_socket()),
    ] {
        let line = format!("{key} = \"{}\"", path.display());
        text = replace_line(&text, &format!("{key} = "), &line)?;
    }
    // A small machine has many Pods at a time here, which do nothing most of theirs.
    replace_line(&text, "timer_slack_us = ", "timer_slack_us = 20000")
}

/// Replaces the only line that begins with `start`.
///
/// # Errors
/// When there is none, or more than one.
pub fn replace_line(text: &str, start: &str, line: &str) -> Result<String> {
    let count = text.lines().filter(|l| l.starts_with(start)).count();
    ensure!(count == 1, "{count} lines begin with {start:?}");
    let lines = text
        .lines()
        .map(|l| if l.starts_with(start) { line } else { l });
    Ok(lines.flat_map(|l| [l, "\n"]).collect())
}

fn cni(layout: &Layout) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": layout.pod_network(),
        "plugins": [
            {
                "type": "bridge", "bridge": "kilnbr0",
                "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": layout.at("cni-data"),
                    "ranges": [[{"subnet": PODS}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
}

fn kubelet(layout: &Layout) -> Value {
    let pki = |name: &str| -> PathBuf { layout.pki().join(name) };
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": pki("kubelet.crt"),
        "tlsPrivateKeyFile": pki("kubelet.key"),
        "containerRuntimeEndpoint": format!("unix://{}", layout.containerd_socket().display()),
        "cgroupDriver": "cgroupfs",
        // Two kubelets must not share one: each takes the other's Pods for orphans and kills them.
        "cgroupRoot": format!("/{}", layout.cgroup),
        "failCgroupV1": false,
        "failSwapOn": false,
        "resolvConf": layout.etc("resolv.conf"),
        "podLogsDir": layout.at("log/pods"),
        "volumePluginDir": layout.at("volume-plugins"),
        "serializeImagePulls": false,
        // A disk that is nearly full is no reason to evict Pods of a test.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {
            "memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%",
        },
    })
}

fn proxy(layout: &Layout) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": layout.pki().join("proxy.conf")},
        "hostnameOverride": NODE,
        "mode": "iptables",
        "clusterCIDR": PODS,
        // Without it, answers between Pods of the bridge go past the rules where the kernel does
        // not have br_netfilter.
        "iptables": {"masqueradeAll": true},
        // Limits of the whole machine, which cannot be set from a namespace: left alone.
        "conntrack": {
            "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_deploy_get_the_paths_of_the_node() {
        let layout = Layout::new(Path::new("/x"), "c");
        let text = handler(&layout).unwrap();
        assert!(text.contains("\nConfigPath = \"/x/etc/runsc.toml\"\n"));
        let text = runtime(&layout).unwrap();
        assert!(text.contains("\nbinary_name = \"/x/bin/runsc\"\n"));
        assert!(text.contains("\nroot = \"/x/runsc\"\n"));
        assert!(text.contains("\nagent = \"/run/c-agent/a.sock\"\n"));
        assert!(text.contains("platform = \"systrap\""));
    }

    #[test]
    fn a_line_that_is_missing_or_double_is_an_error() {
        assert_eq!(
            replace_line("a = 1\nb = 2\n", "b", "c").unwrap(),
            "a = 1\nc\n"
        );
        replace_line("a\n", "b", "c").unwrap_err();
        replace_line("b\nb\n", "b", "c").unwrap_err();
    }
}
