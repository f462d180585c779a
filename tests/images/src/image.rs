// SPDX-License-Identifier: Apache-2.0
//! Images: layers and a configuration, bound together by a manifest (OCI image specification 1.1).

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use bytes::Bytes;
use serde::Serialize;

use crate::digest::Digest;
use crate::layer::Layer;
use crate::reference::Reference;

/// Media type of a manifest.
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of a configuration.
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a layer.
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The label that holds the image's short name. It makes configurations differ, and with them the
/// image ids: removing one test image must not remove another that has the same files.
const NAME_LABEL: &str = "io.kiln.test-image";

/// All images are of this moment.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// The machine's architecture as Go, and so every container tool, calls it.
#[must_use]
pub fn architecture() -> &'static str {
    match ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// How an image's programs are run: the `config` part of its configuration.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Config {
    /// `USER[:GROUP]`, as names or numbers; root if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// `PORT/PROTOCOL`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub exposed_ports: BTreeMap<String, Empty>,
    /// Directories for which a container gets volumes of its own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, Empty>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// The program and its first arguments, not replaced by a Pod's `args`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The rest of the command, replaced by a Pod's `args`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// The JSON object `{}`.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Empty {}

/// A finished image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Short name, unique among the images made here.
    pub name: &'static str,
    /// Every full name it goes by.
    pub references: Vec<Reference>,
    /// The manifest, by whose digest the image is pulled.
    pub manifest: Blob,
    /// The configuration, whose digest is the image id.
    pub config: Blob,
    /// The layers, lowest first.
    pub layers: Vec<Layer>,
}

/// Bytes and their digest.
#[derive(Clone, Debug)]
pub struct Blob {
    /// The name.
    pub digest: Digest,
    /// The contents.
    pub bytes: Bytes,
}

impl Image {
    /// Puts a test image together.
    pub(crate) fn new(
        name: &'static str,
        references: Vec<Reference>,
        layers: Vec<Layer>,
        mut config: Config,
    ) -> Result<Self, serde_json::Error> {
        config.labels.insert(NAME_LABEL.to_owned(), name.to_owned());
        Self::of(architecture(), name, references, layers, config)
    }

    /// Puts an image for an architecture together.
    pub(crate) fn of(
        architecture: &'static str,
        name: &'static str,
        references: Vec<Reference>,
        layers: Vec<Layer>,
        config: Config,
    ) -> Result<Self, serde_json::Error> {
        let history = vec![
            History {
                created: CREATED,
                created_by: "kiln-images"
            };
            layers.len()
        ];
        let diff_ids = layers.iter().map(|l| l.diff_id).collect();
        let config = Blob::json(&ImageConfig {
            created: CREATED,
            architecture,
            os: "linux",
            config,
            rootfs: RootFs {
                kind: "layers",
                diff_ids,
            },
            history,
        })?;
        let manifest = Blob::json(&Manifest {
            schema_version: 2,
            media_type: MANIFEST,
            config: Descriptor::new(CONFIG, config.digest, &config.bytes),
            layers: layers
                .iter()
                .map(|l| Descriptor::new(LAYER, l.digest, &l.bytes))
                .collect(),
        })?;
        Ok(Self {
            name,
            references,
            manifest,
            config,
            layers,
        })
    }

    /// Everything the manifest names: the configuration and the layers.
    pub(crate) fn blobs(&self) -> impl Iterator<Item = Blob> {
        let layers = self.layers.iter().map(|l| Blob {
            digest: l.digest,
            bytes: l.bytes.clone(),
        });
        [self.config.clone()].into_iter().chain(layers)
    }
}

impl Blob {
    pub(crate) fn json(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        let bytes = serde_json::to_vec(value)?;
        Ok(Self {
            digest: Digest::of(&bytes),
            bytes: bytes.into(),
        })
    }
}

#[derive(Serialize)]
struct ImageConfig {
    created: &'static str,
    architecture: &'static str,
    os: &'static str,
    config: Config,
    rootfs: RootFs,
    history: Vec<History>,
}

#[derive(Serialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: Vec<Digest>,
}

#[derive(Clone, Serialize)]
struct History {
    created: &'static str,
    created_by: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u8,
    media_type: &'static str,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// How a document names a blob.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    media_type: &'static str,
    digest: Digest,
    size: usize,
}

impl Descriptor {
    pub(crate) fn new(media_type: &'static str, digest: Digest, bytes: &[u8]) -> Self {
        Self {
            media_type,
            digest,
            size: bytes.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::layer::LayerBuilder;

    fn image(name: &'static str) -> Image {
        let mut layer = LayerBuilder::new();
        layer.file("a", 0o644, b"a").unwrap();
        let layers = vec![layer.finish(None).unwrap()];
        let config = Config {
            cmd: vec!["sh".into()],
            user: Some("1002".into()),
            ..Config::default()
        };
        Image::new(
            name,
            vec!["example.com/a:1".parse().unwrap()],
            layers,
            config,
        )
        .unwrap()
    }

    #[test]
    fn the_manifest_names_the_blobs() {
        let image = image("a");
        let manifest: Value = serde_json::from_slice(&image.manifest.bytes).unwrap();
        assert_eq!(manifest["mediaType"], MANIFEST);
        let digests: Vec<_> = image.blobs().map(|b| b.digest.to_string()).collect();
        assert_eq!(
            json!(digests),
            json!([
                manifest["config"]["digest"],
                manifest["layers"][0]["digest"]
            ])
        );
        assert_eq!(manifest["layers"][0]["size"], image.layers[0].bytes.len());
    }

    #[test]
    fn the_configuration_is_what_runtimes_read() {
        let config: Value = serde_json::from_slice(&image("a").config.bytes).unwrap();
        assert_eq!(config["config"]["User"], "1002");
        assert_eq!(config["config"]["Cmd"], json!(["sh"]));
        assert_eq!(config["config"].get("ExposedPorts"), None);
        assert_eq!(config["rootfs"]["type"], "layers");
        assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn images_of_the_same_files_have_ids_of_their_own() {
        assert_eq!(image("a").config.digest, image("a").config.digest);
        assert_ne!(image("a").config.digest, image("b").config.digest);
    }
}
