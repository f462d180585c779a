// SPDX-License-Identifier: Apache-2.0

//! The agent's configuration: one TOML file, owned by root.
//!
//! ```toml
//! socket = "/run/kiln-agent/agent.sock"
//! state = "/run/kiln-agent"               # must be on the file system of /run/kiln, noexec or not
//! runtime_config = "/etc/kiln/runsc.toml" # the file that the shim reads
//! containerd = "/run/containerd/containerd.sock" # where it listens, if there is no [install]
//! namespace = "k8s.io"                    # containerd's
//! pause = "/opt/kiln/bin/kiln-pause"
//! cgroup = "/kiln-warm"                   # parent of the cgroups of warm sandboxes
//! metrics = "127.0.0.1:9477"              # "" for none
//! runtime_class = "gvisor"                # whose Pods these sandboxes are for
//! # handler = "gvisor"                     # without [install]; else named as the class
//! overhead = 0                            # memory in the RuntimeClass's overhead, bytes
//!
//! [limits]
//! total = 16                # warm sandboxes, those that boot included
//! memory_floor = 536870912  # nothing is booted while fewer bytes are available on the node
//! boots = 1                 # at a time
//! pause_ms = 100            # between two boots
//! learned = 4               # warm sandboxes of shapes that only Pods have asked for; 0 for none
//!
//! [[class]]
//! name = "gvisor"
//! warm = 2
//! memory = 268435456        # bytes that the sandbox says it has; absent for all of the host's
//!
//! [snapshots]               # absent: no snapshots of Pods
//! dir = "/var/lib/kiln/snapshots"
//! kubelet_pods = "/var/lib/kubelet/pods"
//! limit = 68719476736       # bytes of all snapshots
//! free = 2147483648         # bytes that stay free on their file system
//!
//! [install]                 # absent: others have put shim, runsc and handler on the node
//! from = "/"                # where the programs are
//! dir = "/opt/kiln"
//! # runsc = "/usr/local/bin/runsc"         # the node's own, instead of the one in `from`
//! runtime_root = "/run/containerd/runsc"
//! handler = "gvisor"
//! repair = true             # put back what is taken away or changed later
//! [install.containerd]
//! socket = "/run/containerd/containerd.sock"
//! restart = ["systemctl", "restart", "containerd"]
//! # config, drop_in, ctr: where they are, if not where they usually are
//! ```

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use kiln_host::fs::read_regular;
use serde::{Deserialize, Deserializer, de::Error as _};

mod install;
mod snapshots;

pub use install::{Containerd, Install};
pub use snapshots::Snapshots;

/// Largest file that is read, in bytes.
const SIZE_LIMIT: u64 = 256 << 10;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no TOML, has an unknown key, or a key has the wrong type.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: toml::de::Error,
    },
}

/// The agent's configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where shims ask.
    pub socket: PathBuf,
    /// Directory for warm sandboxes, on a file system with the shims' own (`/run/kiln`). That may
    /// be `noexec`: a tmpfs is mounted at `exec` below it then, until the agent is drained.
    pub state: PathBuf,
    /// The runtime's configuration, which shims read too.
    pub runtime_config: PathBuf,
    /// Where containerd listens, unless `install` says so: warm sandboxes have its limits on open
    /// files and on the size of a file.
    pub containerd: PathBuf,
    /// containerd's namespace of the Pods.
    pub namespace: String,
    /// The static program that is a warm sandbox's first process.
    pub pause: PathBuf,
    /// Parent of the cgroups of warm sandboxes, in cgroupfs notation.
    pub cgroup: String,
    /// Where metrics are served.
    #[serde(deserialize_with = "address")]
    pub metrics: Option<SocketAddr>,
    /// Name of the RuntimeClass whose Pods the sandboxes are for.
    pub runtime_class: String,
    /// The handler of that class, where there is no `install`; named as the class.
    pub handler: Option<String>,
    /// Bytes of memory that a kubelet adds to a Pod's limit, by the overhead of its RuntimeClass.
    pub overhead: u64,
    /// What the agent must not exceed.
    pub limits: Limits,
    /// Which warm sandboxes to hold.
    pub class: Vec<Class>,
    /// Where snapshots of Pods are kept, if this node takes any.
    pub snapshots: Option<Snapshots>,
    /// What to put on the node first.
    pub install: Option<Install>,
}

/// What the agent must not exceed.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Warm sandboxes, those that boot included.
    pub total: u32,
    /// Nothing is booted while fewer bytes of memory are available on the node.
    pub memory_floor: u64,
    /// Boots at a time.
    pub boots: u32,
    /// Milliseconds between two boots.
    pub pause_ms: u64,
    /// Warm sandboxes of shapes that only Pods have asked for.
    pub learned: u32,
}

/// Warm sandboxes of one shape.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Its name in reports: that of the RuntimeClass.
    pub name: String,
    /// How many to hold.
    pub warm: u32,
    /// Bytes of memory that the sandbox says it has.
    pub memory: Option<u64>,
    /// Quota and period of the Pods' CPU time in microseconds, for runtimes that derive the number
    /// of CPUs from them (`cpu-num-from-quota`).
    pub cpu: Option<(u64, u64)>,
    /// Kernel parameters of the Pods: those that containerd sets by default
    /// (`enable_unprivileged_ports`, `enable_unprivileged_icmp` of its CRI plugin).
    #[serde(default = "default_sysctl")]
    pub sysctl: BTreeMap<String, String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            socket: kiln_agent_api::SOCKET.into(),
            state: "/run/kiln-agent".into(),
            runtime_config: "/etc/kiln/runsc.toml".into(),
            containerd: "/run/containerd/containerd.sock".into(),
            namespace: "k8s.io".to_owned(),
            pause: "/opt/kiln/bin/kiln-pause".into(),
            cgroup: "/kiln-warm".to_owned(),
            metrics: None,
            runtime_class: "gvisor".to_owned(),
            handler: None,
            overhead: 0,
            limits: Limits::default(),
            class: Vec::new(),
            snapshots: None,
            install: None,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            total: 16,
            memory_floor: 512 << 20,
            boots: 1,
            pause_ms: 100,
            learned: 4,
        }
    }
}

impl Limits {
    /// The time between two boots.
    pub fn pause(&self) -> Duration {
        Duration::from_millis(self.pause_ms)
    }
}

impl Config {
    /// The handler of the class.
    pub fn handler(&self) -> &str {
        let installed = self.install.as_ref().map(|install| &install.handler);
        installed
            .or(self.handler.as_ref())
            .unwrap_or(&self.runtime_class)
    }

    /// Where the node's containerd listens.
    pub fn containerd_socket(&self) -> &Path {
        let install = self.install.as_ref();
        install.map_or(&self.containerd, |it| &it.containerd.socket)
    }

    /// Reads `file`.
    ///
    /// # Errors
    /// [`ConfigError`], with the file's name.
    pub fn load(file: &Path) -> Result<Self, ConfigError> {
        let path = file.to_owned();
        let text = match read_regular(file, SIZE_LIMIT) {
            Ok(text) => text,
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        toml::from_str(&text).map_err(|source| ConfigError::Parse { path, source })
    }
}

/// What containerd's CRI plugin sets in Pods unless it is configured otherwise.
pub fn default_sysctl() -> BTreeMap<String, String> {
    [
        ("net.ipv4.ip_unprivileged_port_start", "0"),
        ("net.ipv4.ping_group_range", "0 2147483647"),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into()
}

fn address<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
    match String::deserialize(from)?.as_str() {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(D::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_differs_and_typos_are_errors() {
        let text =
            "metrics = '127.0.0.1:1'\n[limits]\ntotal = 3\n[[class]]\nname = 'gvisor'\nwarm = 2\n";
        let config: Config = toml::from_str(text).unwrap();
        assert_eq!(config.limits.total, 3);
        assert_eq!(config.limits.boots, 1);
        assert_eq!(config.class[0].sysctl, default_sysctl());
        assert!(config.metrics.is_some());
        assert!(toml::from_str::<Config>("[limits]\ntotl = 3\n").is_err());
        assert!(toml::from_str::<Config>("metrics = 'here'\n").is_err());
    }
}
