// SPDX-License-Identifier: Apache-2.0

//! The runtime as shims on this node see it, looked at again from time to time: a new runsc or
//! another configuration makes other sandboxes.

use std::{collections::BTreeMap, io, path::PathBuf};

use kiln_agent_api::{Ineligible, RuntimeFile, Setup, Shape, shm};
use kiln_host::egress::LinkLocal;
use runsc_wrapper::{Config as RuntimeConfig, config::ConfigError};

use crate::{
    config::Class,
    warm::{Wanted, bundle},
};

/// Why no warm sandboxes can be made with the node's runtime.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    /// Its configuration cannot be used.
    #[error("runtime configuration: {0}")]
    Config(#[from] ConfigError),
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
    file: RuntimeFile,
}

impl Runtime {
    /// Looks at the runtime that the file `config` describes. Blocks.
    pub(crate) fn look(config: &std::path::Path, namespace: &str) -> Result<Self, SetupError> {
        let config = RuntimeConfig::load(config)?.in_namespace(namespace)?;
        let path = config.binary.clone();
        let file = RuntimeFile::of(&path).map_err(|source| SetupError::Program { path, source })?;
        Ok(Self { config, file })
    }

    /// What Pods must not send, by the table `[kiln.link_local]` of its configuration.
    ///
    /// # Errors
    /// What is wrong with it; shims refuse every Pod then.
    pub(crate) fn link_local(&self) -> Result<LinkLocal, toml::de::Error> {
        let table = self.config.kiln.get("link_local");
        let table = table.cloned().map(toml::Value::try_into);
        table.unwrap_or_else(|| Ok(LinkLocal::default()))
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
