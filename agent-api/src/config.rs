// SPDX-License-Identifier: Apache-2.0

//! Node configuration: the file from which shim, agent and `kilnctl` read how this node runs Pods.
//!
//! The file is that of gVisor's own shim ([`runsc_wrapper::config`]), with a table of ours in which
//! an unknown key is an error. Annotations of a Pod never change any of it.
//!
//! ```toml
//! [kiln]
//! control_socket = true       # false: drive sandboxes by command line only
//! allow_privileged = false
//! # … all keys of `Policy`
//!
//! [kiln.deadlines]            # seconds
//! create = 100
//! ```

use std::path::{Path, PathBuf};

use kiln_host::egress::LinkLocal;
use runsc_wrapper::{
    Config,
    config::{self, ConfigError, Deadlines},
};
use serde::Deserialize;

/// Files that are read if the handler in containerd's configuration names none.
pub const DEFAULT_FILES: [&str; 2] = ["/etc/kiln/runsc.toml", "/etc/containerd/runsc.toml"];

/// What this node lets Pods do. Everything is off unless the node says otherwise.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Run `privileged` containers. They stay inside the sandbox, but get every capability there.
    pub allow_privileged: bool,
    /// Run `hostNetwork` Pods, on the host's network stack and without gVisor's.
    pub allow_host_network: bool,
    /// Make `kubectl port-forward` reach the sandbox.
    pub port_forward: bool,
    /// Directories below which checkpoint images may be restored.
    pub restore_dirs: Vec<PathBuf>,
    /// The kubelet's directory of Pods, to make each emptyDir of a Pod one file system of its
    /// sandbox; empty to give each container the kubelet's directory.
    pub shared_empty_dirs: PathBuf,
    /// Socket of the node's agent, from which Pods get sandboxes that are booted already; empty
    /// for none.
    pub agent: PathBuf,
    /// Which packets Pods must not send, whatever their network lets through.
    pub link_local: LinkLocal,
    /// By how many microseconds the timers of a sandbox may be late; 0 leaves it to the kernel.
    pub timer_slack_us: u64,
    /// How many sandboxes may start at a time on this node; 0 for twice as many as it has CPUs.
    pub parallel_starts: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            allow_privileged: false,
            allow_host_network: false,
            port_forward: true,
            restore_dirs: Vec::new(),
            shared_empty_dirs: PathBuf::new(),
            agent: crate::SOCKET.into(),
            link_local: LinkLocal::default(),
            timer_slack_us: 0,
            parallel_starts: 0,
        }
    }
}

/// Failure to read a node's configuration.
#[derive(Debug, thiserror::Error)]
#[error("runtime configuration {}: {source}", file.display())]
pub struct NodeConfigError {
    file: PathBuf,
    source: ConfigError,
}

/// The configuration of a node.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NodeConfig {
    /// How the runtime is driven.
    pub runtime: Config,
    /// What Pods may do.
    pub policy: Policy,
    /// The file it came from; `None` for built-in defaults.
    pub file: Option<PathBuf>,
}

impl NodeConfig {
    /// Reads `file`, else the first of [`DEFAULT_FILES`] that exists, else built-in defaults. Blocks.
    ///
    /// # Errors
    /// [`NodeConfigError`] if the file cannot be used, with the reason.
    pub fn load(file: Option<&Path>) -> Result<Self, NodeConfigError> {
        let found = || DEFAULT_FILES.iter().map(Path::new).find(|p| p.exists());
        let Some(file) = file.or_else(found) else {
            return Ok(Self::default());
        };
        let read = config::read(file).and_then(|text| Self::parse(&text));
        let config = read.map_err(|source| NodeConfigError {
            file: file.to_owned(),
            source,
        })?;
        Ok(Self {
            file: Some(file.to_owned()),
            ..config
        })
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// [`ConfigError`] if it is no TOML, has an unknown key in `[kiln]`, or holds a value that cannot
    /// be used.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let File { kiln } = toml::from_str(text)?;
        let runtime = Config {
            control_socket: kiln.control_socket.unwrap_or(true),
            deadlines: kiln.deadlines,
            ..Config::parse(text)?
        };
        Ok(Self {
            runtime,
            policy: kiln.policy.try_into()?,
            file: None,
        })
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    kiln: Table,
}

/// Table `[kiln]`. Its further keys are those of [`Policy`].
#[derive(Default, Deserialize)]
#[serde(default)]
struct Table {
    #[serde(rename = "runtime")]
    _runtime: OnlyRuntime,
    control_socket: Option<bool>,
    deadlines: Deadlines,
    #[serde(flatten)]
    policy: toml::Table,
}

/// The runtime that every node has.
#[derive(Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OnlyRuntime {
    #[default]
    Runsc,
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use kiln_host::egress::Mode;

    use super::*;

    #[test]
    fn any_file_is_read_or_refused() {
        bolero::check!().for_each(|text: &[u8]| {
            let _ = NodeConfig::parse(&String::from_utf8_lossy(text));
        });
    }

    #[test]
    fn pods_may_do_little_by_default() {
        let config = NodeConfig::parse("").unwrap();
        assert_eq!(config, NodeConfig::default());
        let policy = config.policy;
        assert!(!policy.allow_privileged && !policy.allow_host_network);
        assert_eq!(policy.link_local.mode, Mode::Drop);
    }

    #[test]
    fn one_table_is_for_the_runtime_and_for_pods() {
        let config = NodeConfig::parse(
            "[kiln]\nruntime = 'runsc'\ncontrol_socket = false\ntimer_slack_us = 5\n\
             [kiln.deadlines]\ncreate = 7\n[kiln.link_local]\nmode = 'allow'\n",
        )
        .unwrap();
        assert!(!config.runtime.control_socket);
        assert_eq!(config.runtime.deadlines.create, Duration::from_secs(7));
        assert_eq!(config.runtime.deadlines.start, Deadlines::default().start);
        assert_eq!(config.policy.timer_slack_us, 5);
        assert_eq!(config.policy.link_local.mode, Mode::Allow);
    }

    #[test]
    fn typos_and_bad_values_are_refused_by_name() {
        for (text, named) in [
            ("[kiln]\nparallel_start = 4", "parallel_start"),
            ("[kiln]\nallow_priviledged = true", "allow_priviledged"),
            ("[kiln.link_local]\nmod = 'allow'", "mod"),
            ("[kiln.deadlines]\ncraete = 1", "craete"),
            ("[kiln.deadlines]\ncreate = 0", "create"),
            ("[kiln]\nruntime = 'runc'", "runc"),
            ("[runsc_config]\nroot = '/x'", "runsc_config.root"),
        ] {
            let refused = NodeConfig::parse(text).unwrap_err().to_string();
            assert!(refused.contains(named), "{text}: {refused}");
        }
    }

    #[test]
    fn the_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runsc.toml");
        let refused = NodeConfig::load(Some(&path)).unwrap_err().to_string();
        assert!(refused.contains(path.to_str().unwrap()), "{refused}");
        fs::write(&path, "root = '/run/x'").unwrap();
        let config = NodeConfig::load(Some(&path)).unwrap();
        assert_eq!(config.runtime.root, Path::new("/run/x"));
        assert_eq!(config.file, Some(path));
    }
}
