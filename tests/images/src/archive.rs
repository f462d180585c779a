// SPDX-License-Identifier: Apache-2.0
//! Images as files: an OCI image layout in a tar, one for each image, for `ctr images import`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tar::{EntryType, Header};
use tempfile::NamedTempFile;

use crate::image::{Blob, Descriptor, Image, MANIFEST, architecture};

/// Media type of the list of manifests.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// The annotation from which containerd takes an image's full name (core/images/annotations.go).
const FULL_NAME: &str = "io.containerd.image.name";

/// The annotation for the tag (OCI image specification, annotations.md).
const TAG: &str = "org.opencontainers.image.ref.name";

/// Writes `DIRECTORY/NAME.tar` for each image and gives the paths.
pub fn export(images: &[Image], directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::create_dir_all(directory)?;
    let export_one = |image: &Image| {
        let path = directory.join(format!("{}.tar", image.name));
        let mut file = NamedTempFile::new_in(directory)?;
        write(image, &mut io::BufWriter::new(&mut file))?;
        file.as_file()
            .set_permissions(Permissions::from_mode(0o644))?;
        file.persist(&path)?;
        Ok(path)
    };
    images.iter().map(export_one).collect()
}

/// Writes one image as an archive.
pub fn write(image: &Image, out: &mut impl Write) -> io::Result<()> {
    let index = serde_json::to_vec(&Index::of(image))?;
    let blobs = [image.manifest.clone()].into_iter().chain(image.blobs());
    write_layout(&index, blobs, out)
}

/// Writes images of the same names, one for each of these architectures, as one archive.
pub fn write_all(images: &[(&'static str, Image)], out: &mut impl Write) -> io::Result<()> {
    let manifests = images.iter().map(|(architecture, image)| Entry {
        platform: Some(Platform {
            architecture,
            os: "linux",
        }),
        ..Entry::new(MANIFEST, &image.manifest)
    });
    let inner = Blob::json(&Index::new(manifests.collect()))?;
    let names = images.iter().flat_map(|(_, image)| &image.references);
    let names: BTreeSet<String> = names.map(ToString::to_string).collect();
    let entries = names.into_iter().map(|name| Entry {
        annotations: BTreeMap::from([(FULL_NAME, name)]),
        ..Entry::new(INDEX, &inner)
    });
    let index = serde_json::to_vec(&Index::new(entries.collect()))?;
    let blobs = images
        .iter()
        .flat_map(|(_, image)| [image.manifest.clone()].into_iter().chain(image.blobs()));
    write_layout(&index, [inner.clone()].into_iter().chain(blobs), out)
}

/// Writes an OCI image layout whose index this is; each blob once.
fn write_layout(
    index: &[u8],
    blobs: impl Iterator<Item = Blob>,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    let mut add = |path: &str, bytes: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, path, bytes)
    };
    add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    add("index.json", index)?;
    let mut written = BTreeSet::new();
    for Blob { digest, bytes } in blobs {
        if written.insert(digest) {
            add(&format!("blobs/sha256/{}", digest.hex()), &bytes)?;
        }
    }
    tar.into_inner()?.flush()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u8,
    media_type: &'static str,
    manifests: Vec<Entry>,
}

/// The manifest under one of its names.
#[derive(Serialize)]
struct Entry {
    #[serde(flatten)]
    manifest: Descriptor,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<&'static str, String>,
}

impl Entry {
    fn new(media_type: &'static str, blob: &Blob) -> Self {
        Self {
            manifest: Descriptor::new(media_type, blob.digest, &blob.bytes),
            platform: None,
            annotations: BTreeMap::new(),
        }
    }
}

#[derive(Serialize)]
struct Platform {
    architecture: &'static str,
    os: &'static str,
}

impl Index {
    fn of(image: &Image) -> Self {
        let entry = |reference: &crate::Reference| Entry {
            platform: Some(Platform {
                architecture: architecture(),
                os: "linux",
            }),
            annotations: BTreeMap::from([
                (FULL_NAME, reference.to_string()),
                (TAG, reference.tag.clone()),
            ]),
            ..Entry::new(MANIFEST, &image.manifest)
        };
        Self::new(image.references.iter().map(entry).collect())
    }

    fn new(manifests: Vec<Entry>) -> Self {
        Self {
            schema_version: 2,
            media_type: INDEX,
            manifests,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use serde_json::Value;

    use super::*;
    use crate::digest::Digest;
    use crate::image::Config;
    use crate::layer::LayerBuilder;

    #[test]
    fn an_archive_holds_every_blob_once_under_its_digest_and_every_name() {
        let layer = LayerBuilder::new().finish(None).unwrap();
        let references = vec![
            "example.com/a:1".parse().unwrap(),
            "example.com/b/c:2".parse().unwrap(),
        ];
        let image = Image::new(
            "a",
            references,
            vec![layer.clone(), layer],
            Config::default(),
        )
        .unwrap();
        let directory = tempfile::tempdir().unwrap();
        let paths = export(std::slice::from_ref(&image), directory.path()).unwrap();
        assert_eq!(paths, [directory.path().join("a.tar")]);

        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(fs::File::open(&paths[0]).unwrap())
            .entries()
            .unwrap()
        {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            assert!(
                files
                    .insert(entry.path().unwrap().display().to_string(), bytes)
                    .is_none()
            );
        }
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let names: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| m["annotations"][FULL_NAME].as_str().unwrap())
            .collect();
        assert_eq!(names, ["example.com/a:1", "example.com/b/c:2"]);
        assert_eq!(
            index["manifests"][0]["digest"],
            image.manifest.digest.to_string()
        );
        let blobs: Vec<_> = files
            .iter()
            .filter_map(|(path, bytes)| Some((path.strip_prefix("blobs/sha256/")?, bytes)))
            .collect();
        assert_eq!(blobs.len(), 3);
        assert!(
            blobs
                .iter()
                .all(|(name, bytes)| *name == Digest::of(bytes).hex())
        );
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }
}
