// SPDX-License-Identifier: Apache-2.0
//! The images that `deploy/` names: static programs, a layer each, and nothing else.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cargo_metadata::Metadata;
use tempfile::NamedTempFile;

use crate::image::{Config, Image};
use crate::layer::{LayerBuilder, LayerError};
use crate::program::is_static;
use crate::reference::{NotAReference, Reference};
use crate::{
    Cache, archive,
    sbom::{self, Found},
};

/// The user of programs that need no rights on their node.
const NOBODY: &str = "65532:65532";

/// What is in an image.
struct Recipe {
    image: &'static str,
    /// The first is what is run.
    programs: &'static [&'static str],
    user: Option<&'static str>,
}

/// All images.
const RECIPES: [Recipe; 3] = [
    Recipe {
        image: "kiln-node-agent",
        // What it installs is with it.
        programs: &[
            "kiln-node-agent",
            "containerd-shim-kiln-v2",
            "kiln-pause",
            "runsc",
        ],
        user: None,
    },
    Recipe {
        image: "kiln-controller",
        programs: &["kiln-controller"],
        user: Some(NOBODY),
    },
    Recipe {
        image: "kiln-router",
        programs: &["kiln-router"],
        user: Some(NOBODY),
    },
];

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// Images hold no loader and no C library.
    #[error("{0:?} is not a statically linked 64-bit ELF program for amd64 or arm64")]
    NotStatic(PathBuf),
    /// Some of an image's programs are there, and this is not.
    #[error("{image} for {architecture}: there is no {program}")]
    Lacks {
        /// The image.
        image: &'static str,
        /// The architecture.
        architecture: &'static str,
        /// The program.
        program: &'static str,
    },
    /// The tag is none.
    #[error(transparent)]
    Tag(#[from] NotAReference),
    /// A layer cannot be made.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A document cannot be written.
    #[error("cannot write the image")]
    Document(#[from] serde_json::Error),
    /// A file cannot be used.
    #[error("{path:?}")]
    File {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
}

/// The architecture that a program is for, as container tools call it (ELF-64 object file format:
/// e_machine).
fn architecture_of(program: &[u8]) -> Option<&'static str> {
    match u16::from_le_bytes([*program.get(18)?, *program.get(19)?]) {
        62 => Some("amd64"),
        183 => Some("arm64"),
        _ => None,
    }
}

/// The programs of a recipe that are in `dirs`. The first of a name counts.
fn find(recipe: &Recipe, dirs: &[PathBuf]) -> Result<Found, ReleaseError> {
    let mut found = Found::new();
    for dir in dirs {
        for name in recipe.programs {
            let path = dir.join(name);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(ReleaseError::File { path, source }),
            };
            match architecture_of(&bytes).filter(|_| is_static(&bytes)) {
                Some(architecture) => {
                    let programs = found.entry(architecture).or_default();
                    programs.entry(name).or_insert(bytes);
                }
                None => return Err(ReleaseError::NotStatic(path)),
            }
        }
    }
    Ok(found)
}

/// Makes the image of one recipe for one architecture.
fn image(
    recipe: &Recipe,
    architecture: &'static str,
    programs: &BTreeMap<&'static str, Vec<u8>>,
    references: &[Reference],
    cache: Option<&Cache>,
) -> Result<Image, ReleaseError> {
    let mut layers = Vec::new();
    for name in recipe.programs {
        let bytes = programs.get(name).ok_or(ReleaseError::Lacks {
            image: recipe.image,
            architecture,
            program: name,
        })?;
        let mut layer = LayerBuilder::new();
        layer.file(name, 0o755, bytes)?;
        layers.push(layer.finish(cache)?);
    }
    let labels = [
        ("org.opencontainers.image.title", recipe.image),
        (
            "org.opencontainers.image.version",
            references.first().map_or("", |r| r.tag.as_str()),
        ),
        ("org.opencontainers.image.licenses", "Apache-2.0"),
    ];
    let config = Config {
        user: recipe.user.map(str::to_owned),
        entrypoint: recipe
            .programs
            .first()
            .map(|p| format!("/{p}"))
            .into_iter()
            .collect(),
        labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        ..Config::default()
    };
    let references = references.to_vec();
    Ok(Image::of(
        architecture,
        recipe.image,
        references,
        layers,
        config,
    )?)
}

/// Writes `OUT/IMAGE.tar` for every image of whose programs one is in `dirs`, under the name
/// `REGISTRY/IMAGE:TAG`, and beside it `OUT/IMAGE.cdx.json`, a bill of what is in it, if it is given
/// what cargo knows of the workspace; gives the paths of both.
///
/// # Errors
/// A program is missing or cannot be in an image, or a file cannot be written.
pub fn release(
    dirs: &[PathBuf],
    registry: &str,
    tag: &str,
    cache: Option<&Cache>,
    workspace: Option<&Metadata>,
    out: &Path,
) -> Result<Vec<PathBuf>, ReleaseError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| ReleaseError::File { path, source }
    };
    fs::create_dir_all(out).map_err(at(out))?;
    let mut paths = Vec::new();
    for recipe in &RECIPES {
        let found = find(recipe, dirs)?;
        let has_own = |programs: &BTreeMap<_, _>| {
            recipe
                .programs
                .first()
                .is_some_and(|p| programs.contains_key(p))
        };
        let references: Vec<Reference> =
            vec![format!("{registry}/{}:{tag}", recipe.image).parse()?];
        let mut images = Vec::new();
        for (architecture, programs) in found.iter().filter(|(_, p)| has_own(p)) {
            images.push((
                *architecture,
                image(recipe, architecture, programs, &references, cache)?,
            ));
        }
        if images.is_empty() {
            continue;
        }
        let path = out.join(format!("{}.tar", recipe.image));
        let written = (|| {
            let mut file = NamedTempFile::new_in(out)?;
            archive::write_all(&images, &mut io::BufWriter::new(&mut file))?;
            file.as_file()
                .set_permissions(Permissions::from_mode(0o644))?;
            file.persist(&path).map_err(|e| e.error).map(drop)
        })();
        written.map_err(at(&path))?;
        paths.push(path);
        let Some(workspace) = workspace else {
            continue;
        };
        let path = out.join(format!("{}.cdx.json", recipe.image));
        let bill = sbom::bill(recipe.image, tag, &found, workspace);
        fs::write(&path, serde_json::to_vec_pretty(&bill)?).map_err(at(&path))?;
        paths.push(path);
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use serde_json::{Value, json};

    use super::*;

    fn make(dirs: &[PathBuf], workspace: Option<&Metadata>, out: &Path) -> Made {
        release(dirs, "docker.io/library", "v1", None, workspace, out)
    }

    type Made = Result<Vec<PathBuf>, ReleaseError>;

    /// The head of a static program for a machine.
    fn program(machine: u16) -> Vec<u8> {
        let mut head = b"\x7fELF\x02\x01".to_vec();
        head.resize(64, 0);
        head[18..20].copy_from_slice(&machine.to_le_bytes());
        head
    }

    fn put(dir: &Path, names: &[&str], machine: u16) {
        for name in names {
            let bytes = [&program(machine), name.as_bytes()].concat();
            fs::write(dir.join(name), bytes).unwrap();
        }
    }

    fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut archive = tar::Archive::new(fs::File::open(path).unwrap());
        let read = |entry: io::Result<tar::Entry<'_, fs::File>>| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path().unwrap().display().to_string(), bytes)
        };
        archive.entries().unwrap().map(read).collect()
    }

    #[test]
    fn an_image_has_every_architecture_a_layer_a_program_and_is_the_same_again() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let names = RECIPES[0].programs;
        put(dirs[0].path(), names, 62);
        put(dirs[0].path(), &["kiln-controller"], 62);
        put(dirs[1].path(), names, 183);
        let dirs = dirs.each_ref().map(|d| d.path().to_owned());
        let workspace = sbom::workspace().unwrap();
        let make = |out: &Path| make(&dirs, Some(&workspace), out).unwrap();
        let out = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let paths = make(out[0].path());
        let written: Vec<_> = paths
            .iter()
            .map(|p| p.file_name().unwrap().to_owned())
            .collect();
        let all = [
            "kiln-node-agent.tar",
            "kiln-node-agent.cdx.json",
            "kiln-controller.tar",
            "kiln-controller.cdx.json",
        ];
        assert_eq!(written, all);
        for (one, other) in paths.iter().zip(make(out[1].path())) {
            assert_eq!(fs::read(one).unwrap(), fs::read(other).unwrap());
        }

        let bill: Value = serde_json::from_slice(&fs::read(&paths[1]).unwrap()).unwrap();
        let programs = bill["components"].as_array().unwrap();
        assert_eq!(programs.len(), 2 * names.len());
        let shim = programs
            .iter()
            .find(|p| p["name"] == "containerd-shim-kiln-v2")
            .unwrap();
        let bytes = fs::read(dirs[0].join("containerd-shim-kiln-v2")).unwrap();
        let digest = crate::digest::Digest::of(&bytes).hex();
        assert_eq!(shim["hashes"][0]["content"], digest);
        let crates = shim["components"].as_array().unwrap();
        let has = |name: &str| crates.iter().any(|c| c["name"] == name);
        assert!(has("containerd-shim-protos") && has("runsc-wrapper"));
        // Linked by the controller only, and by tests only.
        assert!(!has("kube-runtime") && !has("bolero"));
        let runsc = programs.iter().find(|p| p["name"] == "runsc").unwrap();
        assert_eq!(runsc["components"], json!([]));

        let files = files(&paths[0]);
        let json = |name: &str| -> Value { serde_json::from_slice(&files[name]).unwrap() };
        let blob = |of: &Value| {
            let digest = of["digest"].as_str().unwrap();
            json(&format!(
                "blobs/sha256/{}",
                digest.strip_prefix("sha256:").unwrap()
            ))
        };
        let outer = &json("index.json")["manifests"][0];
        let name = &outer["annotations"]["io.containerd.image.name"];
        assert_eq!(name, "docker.io/library/kiln-node-agent:v1");
        let inner = blob(outer);
        let platforms: Vec<_> = inner["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["platform"]["architecture"].as_str().unwrap())
            .collect();
        assert_eq!(platforms, ["amd64", "arm64"]);
        let manifest = blob(&inner["manifests"][1]);
        assert_eq!(manifest["layers"].as_array().unwrap().len(), names.len());
        let config = blob(&manifest["config"]);
        assert_eq!(config["architecture"], "arm64");
        assert_eq!(config["config"]["Entrypoint"][0], "/kiln-node-agent");
        assert_eq!(config["config"].get("User"), None);
    }

    #[test]
    fn a_program_that_is_missing_or_dynamic_is_named() {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let dirs = [dir.path().to_owned()];
        let make = || make(&dirs, None, out.path());
        assert!(make().unwrap().is_empty());
        put(dir.path(), &["kiln-node-agent", "kiln-pause"], 62);
        let words = make().unwrap_err().to_string();
        assert_eq!(
            words,
            "kiln-node-agent for amd64: there is no containerd-shim-kiln-v2"
        );
        fs::copy("/bin/sh", dir.path().join("kiln-node-agent")).unwrap();
        assert!(matches!(make(), Err(ReleaseError::NotStatic(_))));
    }
}
