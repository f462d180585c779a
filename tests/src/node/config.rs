// SPDX-License-Identifier: Apache-2.0

//! The files that configure one node: containerd's, one per handler for its runtime, and CNI's.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::{Kata, NodeOpts};
use crate::{agent, tools};

/// The pause image of the node.
pub(crate) const PAUSE: &str = "registry.k8s.io/pause:3.10";

/// Name of the bridge; every node has a network namespace of its own for it.
pub(crate) const BRIDGE: &str = "kilnbr0";

/// Runtime type of our handlers. containerd takes the binary from `runtime_path`.
const KILN: &str = "io.containerd.kiln.v2";

/// Runtime type of containerd's own shim.
const RUNC: &str = "io.containerd.runc.v2";

/// The handler whose Pods adopt what the node's agent holds.
pub const WARM: &str = "gvisor-warm";

/// Keeps a handler from an agent that the machine may have.
const NO_AGENT: &str = "agent = \"\"\n";

/// A RuntimeClass handler of the node.
struct Handler {
    name: &'static str,
    runtime_type: &'static str,
    shim: PathBuf,
    /// Its runtime's configuration file, with what is in it.
    config: Option<(PathBuf, String)>,
}

/// Writes all files below `dir`; returns the path of containerd's.
pub(crate) fn write(dir: &Path, network: &str, opts: &NodeOpts) -> Result<PathBuf> {
    let handlers = handlers(dir, network, opts)?;
    for (path, text) in handlers.iter().filter_map(|h| h.config.as_ref()) {
        put(path, text)?;
    }
    put(&dir.join("cni/10-kiln.conflist"), &cni(dir, network))?;
    let path = dir.join("containerd.toml");
    put(&path, &containerd(dir, &handlers, opts)?)?;
    Ok(path)
}

fn put(path: &Path, text: &str) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
    }
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// The handlers for which the machine has the programs.
fn handlers(dir: &Path, name: &str, opts: &NodeOpts) -> Result<Vec<Handler>> {
    let runsc = match &opts.runsc {
        Some(path) => path.clone(),
        None => tools::runsc()?,
    };
    let ours = |name: &'static str, file: String| -> Result<Handler> {
        let config = Some((dir.join(format!("{name}.toml")), file));
        Ok(Handler {
            name,
            runtime_type: KILN,
            shim: opts.shim.clone().map_or_else(tools::shim, Ok)?,
            config,
        })
    };
    let flags: String = opts
        .runsc_flags
        .iter()
        .fold(String::new(), |mut text, (flag, value)| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{flag} = \"{value}\"");
            text
        });
    let file = |root: &str, kiln: &str| {
        format!(
            "binary_name = \"{}\"\nroot = \"{}\"\n[runsc_config]\nplatform = \"systrap\"\n{flags}\n[kiln]\n{kiln}{}\n",
            runsc.display(),
            dir.join(root).display(),
            opts.kiln,
        )
    };
    let go = "binary_name = \"".to_owned()
        + &format!(
            "{}\"\nroot = \"{}\"\n[runsc_config]\nplatform = \"systrap\"\n",
            runsc.display(),
            dir.join("rg").display()
        );
    let agent = match &opts.agent {
        Some(_) => format!("agent = \"{}\"\n", agent::socket(name).display()),
        None => NO_AGENT.to_owned(),
    };
    let by_command = format!("control_socket = false\n{NO_AGENT}");
    let mut handlers = vec![
        ours("gvisor", file("rs", NO_AGENT))?,
        ours(WARM, file("rw", &agent))?,
        ours("gvisor-cli", file("rc", &by_command))?,
        Handler {
            name: "runsc-go",
            runtime_type: "io.containerd.runsc.v1",
            shim: tools::program("containerd-shim-runsc-v1")?,
            config: Some((dir.join("runsc-go.toml"), go)),
        },
        Handler {
            name: "runc",
            runtime_type: RUNC,
            shim: tools::program("containerd-shim-runc-v2")?,
            config: None,
        },
    ];
    if let Some(kata) = opts.kata {
        let (shim, config) = match kata {
            Kata::Standin => (standin(dir, opts)?, file("rk", NO_AGENT)),
            Kata::Installed => (named_katas(dir, opts)?, String::new()),
        };
        handlers.push(Handler {
            name: "kata",
            runtime_type: "io.containerd.kata-kiln.v2",
            shim,
            config: (!config.is_empty()).then(|| (dir.join("kata.toml"), config)),
        });
    }
    Ok(handlers)
}

/// Our shim under a name of Kata's.
fn named_katas(dir: &Path, opts: &NodeOpts) -> Result<PathBuf> {
    let dir = dir.join("kata");
    fs::create_dir_all(&dir)?;
    let name = dir.join("containerd-shim-kata-kiln-v2");
    let shim = opts.shim.clone().map_or_else(tools::shim, Ok)?;
    symlink(shim, &name).with_context(|| name.display().to_string())?;
    Ok(name)
}

/// The same, with a stand-in for Kata's shim beside it, and what that runs Pods with.
fn standin(dir: &Path, opts: &NodeOpts) -> Result<PathBuf> {
    let name = named_katas(dir, opts)?;
    let dir = dir.join("kata");
    let standin = dir.join("containerd-shim-kata-v2");
    symlink(tools::ours("kiln-kata-standin")?, &standin)?;
    symlink(fs::read_link(&name)?, dir.join("containerd-shim-kiln-v2"))?;
    let file = dir.join("kata.toml");
    let text = format!("shim = [{standin:?}]\nconfig = [{file:?}]\nkvm = \"/dev/null\"\n");
    put(&file, &text)?;
    Ok(name)
}

fn containerd(dir: &Path, handlers: &[Handler], opts: &NodeOpts) -> Result<String> {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut text = format!(
        r#"version = 3
root = "{root}"
state = "{state}"
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
[debug]
  level = "{level}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE}"
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
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
[plugins."io.containerd.shim.v1.manager"]
  socket_dir = "{sockets}"
# What is lost with the machine is of no use after the test.
[plugins."io.containerd.metadata.v1.bolt"]
  no_sync = true
"#,
        root = at("root"),
        state = at("state"),
        socket = at("c.sock"),
        level = opts.log_level,
        certs = dir.join(super::CERTS).display(),
        plugins = tools::cni_plugins()?.display(),
        cni = at("cni"),
        opt = at("opt"),
        sockets = at("s"),
    );
    for handler in handlers {
        let table = format!(
            r#"[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{}"#,
            handler.name
        );
        text += &format!(
            "{table}]\n  runtime_type = \"{}\"\n  runtime_path = \"{}\"\n  pod_annotations = {passed:?}\n  container_annotations = {passed:?}\n",
            handler.runtime_type,
            handler.shim.display(),
            passed = opts.pod_annotations,
        );
        text += &match &handler.config {
            Some((path, _)) => format!(
                "{table}.options]\n  TypeUrl = \"io.containerd.runsc.v1.options\"\n  ConfigPath = \"{}\"\n",
                path.display()
            ),
            None if handler.runtime_type != RUNC => String::new(),
            None => format!(
                "{table}.options]\n  BinaryName = \"{}\"\n",
                tools::program("runc")?.display()
            ),
        };
    }
    Ok(text)
}

fn cni(dir: &Path, network: &str) -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": network,
        "plugins": [
            {
                "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": dir.join("cni-data"),
                    "ranges": [[{"subnet": "10.88.0.0/16"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}
