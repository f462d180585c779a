// SPDX-License-Identifier: Apache-2.0

//! The runtime as shims on this node see it, looked at again from time to time: a new runsc or
//! another configuration makes other sandboxes.

use std::{collections::BTreeMap, io, path::PathBuf};

use kiln_agent_api::{Ineligible, NodeConfig, NodeConfigError, RuntimeFile, Setup, Shape, shm};
use kiln_host::egress::LinkLocal;
use runsc_wrapper::{Config as RuntimeConfig, config::ConfigError};

use super::{bundle, pool::Wanted};
use kiln_node_install::config::Class;

/// Why no warm sandboxes can be made with the node's runtime.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    /// Its configuration cannot be used.
    #[error(transparent)]
    Config(#[from] NodeConfigError),
    /// The namespace cannot be part of a path.
    #[error(transparent)]
    Namespace(#[from] ConfigError),
    /// Its program cannot be found.
    #[error("runtime {}: {source}", path.display())]
    Program {
        /// The program.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A class cannot be made ahead.
    #[error("class {name}: {source}")]
    Class {
        /// The class.
        name: String,
        /// Why not.
        source: Ineligible,
    },
}

/// The runtime at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Runtime {
    pub(crate) config: RuntimeConfig,
    /// Which packets Pods must not send.
    pub(crate) link_local: LinkLocal,
    file: RuntimeFile,
}

impl Runtime {
    /// Looks at the runtime that the file `config` describes. Blocks.
    pub(crate) fn look(config: &std::path::Path, namespace: &str) -> Result<Self, SetupError> {
        let NodeConfig {
            runtime, policy, ..
        } = NodeConfig::load(Some(config))?;
        let config = runtime.in_namespace(namespace)?;
        let path = config.binary.clone();
        let file = RuntimeFile::of(&path).map_err(|source| SetupError::Program { path, source })?;
        Ok(Self {
            config,
            link_local: policy.link_local,
            file,
        })
    }

    fn setup(&self) -> Setup<'_> {
        Setup {
            runtime: self.file.clone(),
            root: &self.config.root,
            flags: &self.config.flags,
        }
    }

    /// Whether it makes sandboxes of `shape`.
    pub(crate) fn makes(&self, shape: &Shape) -> bool {
        shape.is_made_by(&self.setup())
    }

    /// The shape of a class.
    pub(crate) fn shape(&self, class: &Class) -> Result<Shape, SetupError> {
        let mut spec = bundle::blank();
        shm::hint(&mut spec);
        if let Some(memory) = class.memory {
            spec["linux"]["resources"]["memory"]["limit"] = memory.into();
        }
        if let Some((quota, period)) = class.cpu {
            spec["linux"]["resources"]["cpu"]["quota"] = quota.into();
            spec["linux"]["resources"]["cpu"]["period"] = period.into();
        }
        spec["linux"]["sysctl"] = serde_json::json!(class.sysctl);
        Shape::of(&spec, self.setup()).map_err(|source| SetupError::Class {
            name: class.name.clone(),
            source,
        })
    }

    /// What should be held of all `classes`. Two of one shape add up, under the first's name.
    pub(crate) fn wanted(&self, classes: &[Class]) -> Result<BTreeMap<Shape, Wanted>, SetupError> {
        let mut wanted: BTreeMap<Shape, Wanted> = BTreeMap::new();
        for class in classes {
            let entry = wanted.entry(self.shape(class)?).or_insert_with(|| Wanted {
                class: class.name.clone(),
                count: 0,
            });
            entry.count = entry.count.saturating_add(class.warm);
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shims_refuse_is_no_runtime() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("runsc.toml");
        let read = |text: &str| {
            std::fs::write(&file, text).unwrap();
            Runtime::look(&file, "k8s.io")
        };
        let text = "binary_name = '/proc/self/exe'\n[kiln]\n";
        assert!(read(text).is_ok());
        let refused = read(&format!("{text}parallel_start = 4\n")).unwrap_err();
        assert!(refused.to_string().contains("parallel_start"), "{refused}");
    }
}
