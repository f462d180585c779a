// SPDX-License-Identifier: Apache-2.0

//! Node configuration: the runtime's (`runsc_wrapper::Config`) and, in the `[kiln]` table of the
//! same file, what this node lets Pods do. Annotations of a Pod never change any of it.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::{CodedInputStream, well_known_types::any::Any};
use kiln_host::egress::LinkLocal;
use runsc_wrapper::Config;
use serde::Deserialize;

use crate::error::{Error, Result};

/// Files that are read when the handler in containerd's configuration names none.
const DEFAULT_FILES: [&str; 2] = ["/etc/kiln/runsc.toml", "/etc/containerd/runsc.toml"];

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
    /// What Pods must not send, whatever their network lets through.
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
            agent: kiln_agent_api::SOCKET.into(),
            link_local: LinkLocal::default(),
            timer_slack_us: 0,
            parallel_starts: 0,
        }
    }
}

/// The configuration of one Pod's shim.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// How the runtime is driven.
    pub runtime: Config,
    /// What Pods may do.
    pub policy: Policy,
    /// The file it came from.
    pub file: Option<PathBuf>,
}

impl NodeConfig {
    /// Reads the file that `options` of a create request name, else the first default that
    /// exists, else built-in defaults.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a file that cannot be used, with the reason.
    pub fn from_options(options: Option<&Any>) -> Result<Self> {
        let named = options.map(config_path).transpose()?.flatten();
        Self::load(named.as_deref())
    }

    /// Reads `file`, else the first default that exists, else built-in defaults.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a file that cannot be used, with the reason.
    pub fn load(file: Option<&Path>) -> Result<Self> {
        let found = || DEFAULT_FILES.iter().map(Path::new).find(|p| p.exists());
        let Some(file) = file.or_else(found) else {
            return Ok(Self {
                runtime: Config::default(),
                policy: Policy::default(),
                file: None,
            });
        };
        let invalid = |e: &dyn std::fmt::Display| {
            Error::InvalidArgument(format!("runtime configuration {}: {e}", file.display()))
        };
        let runtime = Config::load(file).map_err(|e| invalid(&e))?;
        let policy = runtime.kiln.clone().try_into().map_err(|e| invalid(&e))?;
        Ok(Self {
            runtime,
            policy,
            file: Some(file.to_owned()),
        })
    }
}

/// `config_path` of a `runtimeoptions.v1.Options` (containerd
/// `api/types/runtimeoptions/v1/api.proto`: field 2), the message in which containerd passes a
/// handler's options to any shim but runc's.
pub(crate) fn config_path(options: &Any) -> Result<Option<PathBuf>> {
    const CONFIG_PATH: u32 = 2;
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if !name.ends_with("runtimeoptions.v1.Options") {
        // `ctr run` sends runc's options when it is given none.
        return Ok(None);
    }
    let read = || -> containerd_shim_protos::protobuf::Result<Option<String>> {
        let mut path = None;
        let mut input = CodedInputStream::from_bytes(&options.value);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            let (field, wire) = (tag >> 3, tag & 7);
            match (field, wire) {
                (CONFIG_PATH, 2) => path = Some(input.read_string()?),
                (_, 2) => drop(input.read_bytes()?),
                (_, 0) => drop(input.read_raw_varint64()?),
                (_, 1) => drop(input.read_fixed64()?),
                (_, 5) => drop(input.read_fixed32()?),
                _ => break,
            }
        }
        Ok(path)
    };
    let path = read().map_err(|e| Error::InvalidArgument(format!("runtime options: {e}")))?;
    Ok(path.filter(|p| !p.is_empty()).map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use kiln_host::egress::Mode;

    use super::*;

    fn options(value: &[u8]) -> Any {
        Any {
            type_url: "types.containerd.io/runtimeoptions.v1.Options".to_owned(),
            value: value.to_owned(),
            ..Any::default()
        }
    }

    #[test]
    fn the_config_path_is_found_among_other_fields() {
        let value = b"\x0a\x01x\x12\x0c/etc/r.toml!\x1a\x01y";
        assert_eq!(
            config_path(&options(value)).unwrap(),
            Some("/etc/r.toml!".into())
        );
        assert_eq!(config_path(&options(b"")).unwrap(), None);
        assert!(config_path(&options(b"\x12\x7fshort")).is_err());
        let other = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            ..Any::default()
        };
        assert_eq!(config_path(&other).unwrap(), None);
    }

    #[test]
    fn pods_may_do_little_by_default_and_typos_are_errors() {
        let policy: Policy = toml::from_str("").unwrap();
        assert_eq!(policy, Policy::default());
        assert!(!policy.allow_privileged && !policy.allow_host_network);
        assert_eq!(policy.link_local.mode, Mode::Drop);
        assert!(toml::from_str::<Policy>("allow_priviledged = true").is_err());
        assert!(toml::from_str::<Policy>("[link_local]\nmod = 'allow'").is_err());
    }
}
