// SPDX-License-Identifier: Apache-2.0

//! Record of a container for a `delete` after the death of its shim, kept in the bundle.
//!
//! It is written before the runtime makes the container, and says how to find and delete it there
//! even when the node's configuration has changed or cannot be read any more.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use kiln_agent_api::NodeConfig;
use kiln_host::fs::write_atomically;
use runsc_wrapper::ContainerId;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    io::read_capped,
    sandbox::Origin,
};

/// Record of one container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    version: u32,
    /// The sandbox that the container belongs to.
    pub(crate) sandbox: String,
    /// The file of the node's configuration.
    config: Option<PathBuf>,
    /// The id of an adopted sandbox in the runtime, else empty.
    #[serde(default)]
    pub(crate) adopted: String,
    /// `cgroupsPath` of the container, empty when it has no cgroup of its own.
    pub(crate) cgroup: String,
    /// How the runtime was driven. `None` in records of 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    runtime: Option<RuntimeRecord>,
}

/// Runtime of a container, as the node's configuration had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RuntimeRecord {
    /// The file that it came from: `config` of a [`Record`].
    #[serde(skip)]
    file: Option<PathBuf>,
    /// Its program.
    pub(crate) binary: PathBuf,
    /// Its state, without containerd's namespace.
    pub(crate) root: PathBuf,
    /// Its global flags.
    pub(crate) flags: BTreeMap<String, String>,
    /// Socket of the node's agent, empty for none.
    pub(crate) agent: PathBuf,
}

impl From<&NodeConfig> for RuntimeRecord {
    fn from(config: &NodeConfig) -> Self {
        Self {
            file: config.file.clone(),
            binary: config.runtime.binary.clone(),
            root: config.runtime.root.clone(),
            flags: config.runtime.flags.clone(),
            agent: config.policy.agent.clone(),
        }
    }
}

impl Record {
    const FILE: &str = "kiln.json";
    const VERSION: u32 = 1;
    /// Largest record, in bytes: a file of the node's configuration has at most 256 KiB.
    const MAX: u64 = 1 << 20;

    /// Record of a container with the cgroup `cgroup`, in the sandbox `sandbox`.
    pub(crate) fn new(
        sandbox: &ContainerId,
        origin: &Origin,
        runtime: &RuntimeRecord,
        cgroup: String,
    ) -> Self {
        Self {
            version: Self::VERSION,
            sandbox: sandbox.to_string(),
            config: runtime.file.clone(),
            adopted: match origin {
                Origin::Booted => String::new(),
                Origin::Adopted(id) => id.to_string(),
            },
            cgroup,
            runtime: Some(runtime.clone()),
        }
    }

    /// The id that the runtime knows the sandbox by.
    pub(crate) fn runtime_id(&self) -> &str {
        if self.adopted.is_empty() {
            &self.sandbox
        } else {
            &self.adopted
        }
    }

    /// The node's configuration, with the runtime as it was when the container was made. Blocks.
    ///
    /// # Errors
    /// When the record does not name the runtime, and today's file cannot be used.
    pub(crate) fn node_config(&self) -> Result<NodeConfig> {
        let today = NodeConfig::load(self.config.as_deref());
        let Some(runtime) = self.runtime.clone() else {
            return Ok(today?);
        };
        // Of a file that cannot be used, only deadlines are missed.
        let mut config = today.unwrap_or_default();
        config.runtime.binary = runtime.binary;
        config.runtime.root = runtime.root;
        config.runtime.flags = runtime.flags;
        config.policy.agent = runtime.agent;
        Ok(config)
    }

    /// Writes the record into `bundle`, in one step. Blocks.
    pub(crate) fn save(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(Self::FILE);
        let text = serde_json::to_vec(self).map_err(|e| Error::io("encode", &path)(e.into()))?;
        write_atomically(&path, &text).map_err(Error::io("write", &path))
    }

    /// Removes the record of `bundle`. One that is not there is success. Blocks.
    pub(crate) fn remove(bundle: &Path) -> Result<()> {
        let path = bundle.join(Self::FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    /// Reads the record of `bundle`. Blocks.
    pub(crate) fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join(Self::FILE);
        let text = read_capped(&path, Self::MAX)?;
        let record: Self =
            serde_json::from_slice(&text).map_err(|e| Error::io("decode", &path)(e.into()))?;
        if record.version != Self::VERSION {
            let other = io::Error::other(format!(
                "version {} is not {}",
                record.version,
                Self::VERSION
            ));
            return Err(Error::io("decode", &path)(other));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A node whose configuration is in `file`.
    fn runtime_of(file: &Path) -> RuntimeRecord {
        fs::write(file, "binary_name = '/opt/runsc'\nroot = '/run/then'\n").unwrap();
        RuntimeRecord::from(&NodeConfig::load(Some(file)).unwrap())
    }

    #[test]
    fn a_record_is_read_back_and_another_version_is_not() {
        let bundle = tempfile::tempdir().unwrap();
        let runtime = runtime_of(&bundle.path().join("runsc.toml"));
        let origin = Origin::Adopted("warm1".parse().unwrap());
        Record::new(
            &"pod1".parse().unwrap(),
            &origin,
            &runtime,
            "/pods/pod1".into(),
        )
        .save(bundle.path())
        .unwrap();
        let record = Record::load(bundle.path()).unwrap();
        assert_eq!(
            (record.sandbox.as_str(), record.cgroup.as_str()),
            ("pod1", "/pods/pod1")
        );
        assert_eq!(record.runtime_id(), "warm1");
        fs::write(
            bundle.path().join("kiln.json"),
            r#"{"version":2,"sandbox":"a","config":null,"cgroup":""}"#,
        )
        .unwrap();
        assert!(Record::load(bundle.path()).is_err());
    }

    #[test]
    fn the_runtime_of_then_is_known_whatever_the_file_says_now() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runsc.toml");
        let runtime = runtime_of(&file);
        let id = "pod1".parse().unwrap();
        let record = Record::new(&id, &Origin::Booted, &runtime, String::new());
        for now in ["root = '/run/now'\n", "root = ", "[kiln]\nno_key = 1\n"] {
            fs::write(&file, now).unwrap();
            let config = record.node_config().unwrap();
            assert_eq!(config.runtime.binary, Path::new("/opt/runsc"), "{now}");
            assert_eq!(config.runtime.root, Path::new("/run/then"), "{now}");
        }
    }

    #[test]
    fn a_record_of_an_older_shim_means_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runsc.toml");
        fs::write(&file, "root = '/run/now'\n").unwrap();
        let text = format!(r#"{{"version":1,"sandbox":"a","config":{file:?},"cgroup":""}}"#);
        fs::write(dir.path().join("kiln.json"), text).unwrap();
        let record = Record::load(dir.path()).unwrap();
        assert_eq!(record.runtime_id(), "a");
        let config = record.node_config().unwrap();
        assert_eq!(config.runtime.root, Path::new("/run/now"));
        fs::write(&file, "root = ").unwrap();
        assert!(record.node_config().is_err());
    }
}
