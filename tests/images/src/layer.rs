// SPDX-License-Identifier: Apache-2.0
//! Layers: a list of files turned into tar+gzip, byte for byte the same on every run.
//!
//! Nothing of the machine gets in: no times, no owners other than those asked for, no order of
//! directory listings.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use tar::{EntryType, Header};

use crate::cache::Cache;
use crate::digest::Digest;

/// What a layer could not be made of.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A path that leaves the image, is absolute, or is empty.
    #[error("{0:?} is not a relative path inside an image")]
    Path(PathBuf),
    /// Two entries of one name.
    #[error("{0:?} is in the layer already")]
    Twice(PathBuf),
    /// A hard link to something that is no file of the same layer.
    #[error("{0:?} is a hard link to a file that is not in the layer")]
    Target(PathBuf),
    /// A device, socket or FIFO in a tree on disk.
    #[error("{0:?} is neither file, directory nor symbolic link")]
    Kind(PathBuf),
    /// A file that could not be read.
    #[error("cannot read {path:?}")]
    Read {
        /// The file, on the host.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The archive could not be written.
    #[error("cannot write the layer")]
    Write(#[source] io::Error),
    /// The cache could not be used.
    #[error("cannot cache the layer")]
    Cache(#[source] io::Error),
}

/// A finished layer.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Digest of the uncompressed tar, by which an image's configuration names the layer.
    pub diff_id: Digest,
    /// Digest of `bytes`, by which a manifest names it.
    pub digest: Digest,
    /// The compressed archive.
    pub bytes: Bytes,
}

/// Permissions and owner of an entry.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner and group, inside the image.
    pub owner: (u32, u32),
}

impl Attributes {
    /// `mode`, owned by root.
    #[must_use]
    pub const fn mode(mode: u32) -> Self {
        Self {
            mode,
            owner: (0, 0),
        }
    }
}

/// A layer in the making. Entries keep the order in which they come.
pub struct LayerBuilder {
    tar: tar::Builder<Vec<u8>>,
    paths: BTreeSet<PathBuf>,
    files: BTreeSet<PathBuf>,
}

impl Default for LayerBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl LayerBuilder {
    /// An empty layer.
    #[must_use]
    pub fn new() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
            paths: BTreeSet::new(),
            files: BTreeSet::new(),
        }
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str, attributes: Attributes) -> Result<(), LayerError> {
        self.add_directory(Path::new(path), attributes)
    }

    /// Adds a file with these contents.
    pub fn file(&mut self, path: &str, mode: u32, contents: &[u8]) -> Result<(), LayerError> {
        self.add_file(Path::new(path), Attributes::mode(mode), contents)
    }

    /// Adds a second name for `target`, a file of this layer.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<(), LayerError> {
        self.add_hard_link(Path::new(path), Path::new(target))
    }

    /// Adds a symbolic link. `target` is not looked at: what it means is for the runtime to say.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<(), LayerError> {
        self.add_symlink(Path::new(path), Path::new(target))
    }

    /// Adds everything below the directory `root` of the host, owned by root, in order of names.
    /// Directories that `lower` names are left as a lower layer has them; what they hold is added.
    pub fn tree(&mut self, root: &Path, lower: &BTreeSet<&Path>) -> Result<(), LayerError> {
        self.add_entries_of(root, Path::new(""), lower, &mut BTreeMap::new())
    }

    /// Whether the layer has an entry of this name.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        self.paths.contains(Path::new(path))
    }

    /// Compresses the layer, or takes the result of an earlier time from the cache.
    pub fn finish(self, cache: Option<&Cache>) -> Result<Layer, LayerError> {
        let tar = self.tar.into_inner().map_err(LayerError::Write)?;
        let diff_id = Digest::of(&tar);
        let cached = cache.and_then(|cache| cache.compressed(diff_id));
        let bytes = match cached {
            Some(bytes) => bytes,
            None => {
                let bytes = compress(&tar).map_err(LayerError::Write)?;
                cache
                    .map_or(Ok(()), |cache| cache.keep(diff_id, &bytes))
                    .map_err(LayerError::Cache)?;
                bytes
            }
        };
        Ok(Layer {
            diff_id,
            digest: Digest::of(&bytes),
            bytes: bytes.into(),
        })
    }

    fn add_directory(&mut self, path: &Path, attributes: Attributes) -> Result<(), LayerError> {
        self.claim(path)?;
        let mut header = header(EntryType::Directory, attributes);
        self.tar
            .append_data(&mut header, path, io::empty())
            .map_err(LayerError::Write)
    }

    fn add_file(
        &mut self,
        path: &Path,
        attributes: Attributes,
        contents: &[u8],
    ) -> Result<(), LayerError> {
        self.claim(path)?;
        self.files.insert(path.to_owned());
        let mut header = header(EntryType::Regular, attributes);
        header.set_size(contents.len() as u64);
        self.tar
            .append_data(&mut header, path, contents)
            .map_err(LayerError::Write)
    }

    fn add_hard_link(&mut self, path: &Path, target: &Path) -> Result<(), LayerError> {
        if !self.files.contains(target) {
            return Err(LayerError::Target(path.to_owned()));
        }
        self.claim(path)?;
        let mut header = header(EntryType::Link, Attributes::mode(0o755));
        self.tar
            .append_link(&mut header, path, target)
            .map_err(LayerError::Write)
    }

    fn add_symlink(&mut self, path: &Path, target: &Path) -> Result<(), LayerError> {
        self.claim(path)?;
        let mut header = header(EntryType::Symlink, Attributes::mode(0o777));
        self.tar
            .append_link(&mut header, path, target)
            .map_err(LayerError::Write)
    }

    /// Adds what the directory `root/path` holds. `names` has the first name in the layer of each
    /// file seen, by device and inode.
    fn add_entries_of(
        &mut self,
        root: &Path,
        path: &Path,
        lower: &BTreeSet<&Path>,
        names: &mut BTreeMap<(u64, u64), PathBuf>,
    ) -> Result<(), LayerError> {
        let directory = root.join(path);
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| LayerError::Read { path, source }
        };
        let entries = fs::read_dir(&directory).map_err(unreadable(&directory))?;
        let names_here: Result<BTreeSet<_>, _> =
            entries.map(|e| e.map(|e| e.file_name())).collect();
        for name in names_here.map_err(unreadable(&directory))? {
            let path = path.join(name);
            let source = root.join(&path);
            let metadata = fs::symlink_metadata(&source).map_err(unreadable(&source))?;
            let attributes = Attributes::mode(metadata.mode() & 0o7777);
            if metadata.is_dir() {
                if !lower.contains(path.as_path()) {
                    self.add_directory(&path, attributes)?;
                }
                self.add_entries_of(root, &path, lower, names)?;
            } else if metadata.is_symlink() {
                let target = fs::read_link(&source).map_err(unreadable(&source))?;
                self.add_symlink(&path, &target)?;
            } else if metadata.is_file() {
                match names.get(&(metadata.dev(), metadata.ino())) {
                    Some(first) => self.add_hard_link(&path, &first.clone())?,
                    None => {
                        let contents = fs::read(&source).map_err(unreadable(&source))?;
                        self.add_file(&path, attributes, &contents)?;
                        names.insert((metadata.dev(), metadata.ino()), path);
                    }
                }
            } else {
                return Err(LayerError::Kind(source));
            }
        }
        Ok(())
    }

    /// Checks a new entry's path and takes it.
    fn claim(&mut self, path: &Path) -> Result<(), LayerError> {
        let inside = path.components().all(|c| matches!(c, Component::Normal(_)));
        // Compared with the parts put together again, `a//b`, `./a` and `a/` are refused too:
        // they would slip through as second names of an entry.
        let plain = path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
        if path.as_os_str().is_empty() || !inside || !plain {
            return Err(LayerError::Path(path.to_owned()));
        }
        if self.paths.insert(path.to_owned()) {
            Ok(())
        } else {
            Err(LayerError::Twice(path.to_owned()))
        }
    }
}

fn header(kind: EntryType, attributes: Attributes) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(attributes.mode);
    header.set_uid(attributes.owner.0.into());
    header.set_gid(attributes.owner.1.into());
    header.set_mtime(0);
    header.set_size(0);
    header
}

/// gzip without a name, a time or a system in its header.
fn compress(tar: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(tar)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use flate2::read::GzDecoder;

    use super::*;

    /// The entries of a layer as `(path, kind, mode, link target, contents)`.
    fn entries(layer: &Layer) -> Vec<(String, EntryType, u32, String, Vec<u8>)> {
        let mut tar = Vec::new();
        GzDecoder::new(&layer.bytes[..])
            .read_to_end(&mut tar)
            .unwrap();
        assert_eq!(Digest::of(&tar), layer.diff_id);
        let mut archive = tar::Archive::new(&tar[..]);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            let header = entry.header();
            assert_eq!(header.mtime().unwrap(), 0);
            let link = entry
                .link_name()
                .unwrap()
                .map(|l| l.display().to_string())
                .unwrap_or_default();
            (
                entry.path().unwrap().display().to_string(),
                header.entry_type(),
                header.mode().unwrap(),
                link,
                contents,
            )
        });
        entries.collect()
    }

    fn small() -> LayerBuilder {
        let mut layer = LayerBuilder::new();
        layer.directory("tmp", Attributes::mode(0o1777)).unwrap();
        layer
            .directory(
                "home",
                Attributes {
                    mode: 0o700,
                    owner: (1000, 1000),
                },
            )
            .unwrap();
        layer.file("su", 0o4755, b"code").unwrap();
        layer.hard_link("sudo", "su").unwrap();
        layer.symlink("link", "/etc/../passwd").unwrap();
        layer
    }

    #[test]
    fn a_layer_holds_what_was_put_in() {
        let layer = small().finish(None).unwrap();
        let expected = [
            ("tmp", EntryType::Directory, 0o1777, "", &b""[..]),
            ("home", EntryType::Directory, 0o700, "", b""),
            ("su", EntryType::Regular, 0o4755, "", b"code"),
            ("sudo", EntryType::Link, 0o755, "su", b""),
            ("link", EntryType::Symlink, 0o777, "/etc/../passwd", b""),
        ];
        let expected =
            expected.map(|(p, k, m, l, c)| (p.to_owned(), k, m, l.to_owned(), c.to_vec()));
        assert_eq!(entries(&layer), expected);
        assert_eq!(layer.digest, Digest::of(&layer.bytes));
    }

    #[test]
    fn the_same_entries_give_the_same_bytes() {
        assert_eq!(
            small().finish(None).unwrap().digest,
            small().finish(None).unwrap().digest
        );
    }

    #[test]
    fn paths_that_leave_the_image_are_refused() {
        let long = "x/".repeat(2000) + "..";
        for path in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../a",
            "a/../b",
            "a/..",
            ".",
            "./a",
            "a/./b",
            "a//b",
            "a/",
            &long,
        ] {
            let mut layer = small();
            assert!(
                matches!(layer.file(path, 0o644, b""), Err(LayerError::Path(_))),
                "{path}"
            );
            assert!(
                matches!(
                    layer.directory(path, Attributes::mode(0o755)),
                    Err(LayerError::Path(_))
                ),
                "{path}"
            );
            assert!(
                matches!(layer.symlink(path, "x"), Err(LayerError::Path(_))),
                "{path}"
            );
            assert!(
                matches!(layer.hard_link(path, "su"), Err(LayerError::Path(_))),
                "{path}"
            );
            assert!(
                matches!(layer.hard_link("new", path), Err(LayerError::Target(_))),
                "{path}"
            );
        }
    }

    #[test]
    fn a_name_is_taken_once() {
        assert!(matches!(
            small().file("su", 0o644, b""),
            Err(LayerError::Twice(_))
        ));
        assert!(matches!(
            small().hard_link("x", "tmp"),
            Err(LayerError::Target(_))
        ));
    }

    #[test]
    fn long_paths_and_targets_survive() {
        let path = vec!["a-rather-long-name"; 20].join("/");
        let mut layer = LayerBuilder::new();
        layer.file(&path, 0o644, b"x").unwrap();
        layer.symlink("link", &path).unwrap();
        let entries = entries(&layer.finish(None).unwrap());
        assert_eq!(entries[0].0, path);
        assert_eq!(entries[1].3, path);
    }

    #[test]
    fn a_tree_is_taken_in_order_without_following_links() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("usr/lib")).unwrap();
        fs::create_dir(at("tmp")).unwrap();
        fs::write(at("usr/lib/z"), "z").unwrap();
        fs::set_permissions(at("usr/lib/z"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::hard_link(at("usr/lib/z"), at("usr/lib/zz")).unwrap();
        symlink("/etc", at("usr/lib/a")).unwrap();
        let mut layer = LayerBuilder::new();
        layer
            .tree(
                root.path(),
                &BTreeSet::from([Path::new("tmp"), Path::new("usr")]),
            )
            .unwrap();
        let found: Vec<_> = entries(&layer.finish(None).unwrap())
            .into_iter()
            .map(|(path, kind, mode, link, _)| (path, kind, mode, link))
            .collect();
        let expected = [
            ("usr/lib", EntryType::Directory, 0o755, ""),
            ("usr/lib/a", EntryType::Symlink, 0o777, "/etc"),
            ("usr/lib/z", EntryType::Regular, 0o4711, ""),
            ("usr/lib/zz", EntryType::Link, 0o755, "usr/lib/z"),
        ];
        let expected: Vec<_> = expected
            .map(|(p, k, m, l)| (p.to_owned(), k, m, l.to_owned()))
            .into();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_socket_in_a_tree_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(root.path().join("s")).unwrap();
        assert!(matches!(
            LayerBuilder::new().tree(root.path(), &BTreeSet::new()),
            Err(LayerError::Kind(_))
        ));
    }

    #[test]
    fn a_cached_layer_is_used_and_a_spoilt_one_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let fresh = small().finish(Some(&cache)).unwrap();
        let file = fs::read_dir(directory.path())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .path();
        // Another compression of the same tar is as good.
        let mut other = GzEncoder::new(Vec::new(), Compression::none());
        let mut tar = Vec::new();
        GzDecoder::new(&fresh.bytes[..])
            .read_to_end(&mut tar)
            .unwrap();
        other.write_all(&tar).unwrap();
        let other = other.finish().unwrap();
        fs::write(&file, &other).unwrap();
        assert_eq!(small().finish(Some(&cache)).unwrap().bytes, other);
        fs::write(&file, b"spoilt").unwrap();
        assert_eq!(small().finish(Some(&cache)).unwrap().digest, fresh.digest);
        assert_eq!(fs::read(&file).unwrap(), fresh.bytes);
    }
}
