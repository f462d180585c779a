// SPDX-License-Identifier: Apache-2.0

//! The node's configuration, by the options that containerd has for a handler.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::{CodedInputStream, well_known_types::any::Any};
use kiln_agent_api::NodeConfig;

use crate::error::{Error, Result};

/// Reads the file that `options` of a create request name, else the node's default. Blocks.
///
/// # Errors
/// [`Error::InvalidArgument`] for a file that cannot be used, with the reason.
pub fn from_options(options: Option<&Any>) -> Result<NodeConfig> {
    let named = options.map(config_path).transpose()?.flatten();
    Ok(NodeConfig::load(named.as_deref())?)
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
}
