// SPDX-License-Identifier: Apache-2.0

//! The directory of snapshots. All functions block.
//!
//! ```text
//! KEY          of the checksums, made once
//! UID.new/     a snapshot that is being taken
//! UID/         one that can be restored
//!   image/     what runsc writes
//!   volumes/   the Pod's emptyDirs, by name
//!   record     see `Record`
//! ```
//!
//! `UID` is that of the PodSnapshot. Everything is root's alone: an image has the memory of a Pod, and
//! a sentry reads it before it has confined itself.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use kiln_host::fs::{remove_dir_if_there, write_atomically};
use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::tree;
use kiln_node_install::config;

/// Largest record that is read, in bytes.
const RECORD_LIMIT: u64 = 1 << 20;

/// Directory of a Pod's emptyDirs, below the kubelet's directory of the Pod.
const EMPTY_DIRS: &str = "volumes/kubernetes.io~empty-dir";

const KEY: &str = "key";
const RECORD: &str = "record";
const IMAGE: &str = "image";
const VOLUMES: &str = "volumes";

/// Facts of a snapshot that the agent itself has noted: runsc checks little of what it reads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    version: u32,
    /// UID of the Pod that it was taken of.
    pub(super) pod_uid: String,
    /// UID of the Sandbox.
    pub(super) sandbox_uid: String,
    /// Whether that Pod was stopped.
    pub(super) is_stopped: bool,
    /// Whether the Pod's sandbox was one of the agent's.
    pub(super) adopted: bool,
    /// Names of its containers.
    pub(super) containers: Vec<String>,
    /// The runtime and its flags, as the shim says.
    pub(super) runtime: String,
    /// Digest of the features of the node's CPUs: a process that has seen them may rely on them.
    pub(super) cpu: String,
    /// Checksum and size in bytes of each file of the image, and of each emptyDir.
    checksums: BTreeMap<String, Checksum>,
    /// UIDs of the Pods that it was given to.
    served: BTreeSet<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Checksum {
    bytes: u64,
    blake3: String,
}

/// Facts of an image as the shim that wrote it says.
#[derive(Debug, Clone, Default)]
pub(super) struct Taken {
    pub(super) pod_uid: String,
    pub(super) sandbox_uid: String,
    pub(super) is_stopped: bool,
    pub(super) adopted: bool,
    pub(super) containers: Vec<String>,
    pub(super) runtime: String,
}

impl Record {
    const VERSION: u32 = 1;

    /// Bytes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.checksums.values().map(|c| c.bytes).sum()
    }
}

/// Why a snapshot that is there cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    /// Its files are gone, or were never here.
    #[error("this node does not have its files")]
    Lost,
    /// This Pod was given the snapshot before: the restore must have failed.
    #[error("the Pod was restored from it before, and has ended")]
    Served,
    /// A file is not what was written.
    #[error("{0} is not what was written")]
    Damaged(String),
    /// A file of the snapshot cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// The directory of snapshots.
#[derive(Debug, Clone)]
pub(super) struct Store {
    config: config::Snapshots,
    key: [u8; blake3::KEY_LEN],
}

impl Store {
    /// Opens the directory, and makes it if it is not there.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn open(config: config::Snapshots) -> io::Result<Self> {
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700).create(&config.dir)?;
        fs::set_permissions(&config.dir, fs::Permissions::from_mode(0o700))?;
        let path = config.dir.join(KEY);
        let key = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let key: [u8; blake3::KEY_LEN] = rand::random();
                write_atomically(&path, &key)?;
                key
            }
            read => read?
                .try_into()
                .map_err(|_| io::Error::other(format!("{} is no key", path.display())))?,
        };
        Ok(Self { config, key })
    }

    /// Lists the UIDs of snapshots that are there, and of those that were being taken.
    pub(super) fn list(&self) -> io::Result<(BTreeSet<String>, BTreeSet<String>)> {
        let (mut whole, mut begun) = (BTreeSet::new(), BTreeSet::new());
        for entry in fs::read_dir(&self.config.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.file_type()?.is_dir() {
                continue;
            }
            match name.strip_suffix(".new") {
                Some(uid) => begun.insert(uid.to_owned()),
                None => whole.insert(name),
            };
        }
        Ok((whole, begun))
    }

    /// How many snapshots there are, and the bytes that they have.
    pub(super) fn usage(&self) -> io::Result<(usize, u64)> {
        let (whole, _) = self.list()?;
        let records = whole.iter().filter_map(|uid| self.look(uid).ok());
        Ok((whole.len(), records.map(|record| record.bytes()).sum()))
    }

    /// How many bytes another snapshot may have.
    pub(super) fn room(&self) -> io::Result<u64> {
        let system = statvfs(&self.config.dir)?;
        let free = system
            .blocks_available()
            .saturating_mul(system.fragment_size());
        let limit = self.config.limit.saturating_sub(self.usage()?.1);
        Ok(free.saturating_sub(self.config.free).min(limit))
    }

    /// Makes the directories of the snapshot `uid`, and returns that of its image.
    pub(super) fn begin(&self, uid: &str) -> io::Result<PathBuf> {
        let dir = self.new_dir(uid);
        remove_dir_if_there(&dir)?;
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        for dir in [&dir, &dir.join(IMAGE), &dir.join(VOLUMES)] {
            private.create(dir)?;
        }
        Ok(dir.join(IMAGE))
    }

    /// Copies the emptyDirs of the Pod that is paused, and writes the record.
    ///
    /// # Errors
    /// The kernel's, and `FileTooLarge` if all has more than `room` bytes.
    pub(super) fn seal(&self, uid: &str, taken: Taken, room: u64) -> io::Result<Record> {
        let dir = self.new_dir(uid);
        let mut checksums = BTreeMap::new();
        let mut used = 0_u64;
        for entry in fs::read_dir(dir.join(IMAGE))? {
            let path = entry?.path();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            let checksum = self.file_checksum(&path)?;
            used = used.saturating_add(checksum.bytes);
            checksums.insert(format!("{IMAGE}/{}", file_name(&path)), checksum);
        }
        if checksums.is_empty() {
            return Err(io::Error::other("the runtime has written no image"));
        }
        for volume in self.empty_dirs(&taken.pod_uid)? {
            let copy = dir.join(VOLUMES).join(file_name(&volume));
            fs::DirBuilder::new().mode(0o700).create(&copy)?;
            let bytes = tree::copy(&volume, &copy, room.saturating_sub(used))?;
            used = used.saturating_add(bytes);
            let checksum = self.tree_checksum(&copy, bytes)?;
            checksums.insert(format!("{VOLUMES}/{}", file_name(&volume)), checksum);
        }
        if used > room {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let record = Record {
            version: Record::VERSION,
            pod_uid: taken.pod_uid,
            sandbox_uid: taken.sandbox_uid,
            is_stopped: taken.is_stopped,
            adopted: taken.adopted,
            containers: taken.containers,
            runtime: taken.runtime,
            cpu: cpu_features(),
            checksums,
            served: BTreeSet::new(),
        };
        write_record(&dir, &record)?;
        Ok(record)
    }

    /// The record of a snapshot that is being taken, if it got so far.
    pub(super) fn sealed(&self, uid: &str) -> Option<Record> {
        self.record(&self.new_dir(uid)).ok()
    }

    /// Makes a snapshot that is sealed one that can be restored.
    pub(super) fn keep(&self, uid: &str) -> io::Result<()> {
        fs::rename(self.new_dir(uid), self.dir(uid))
    }

    /// Removes all of the snapshot `uid`.
    pub(super) fn remove(&self, uid: &str) -> io::Result<()> {
        remove_dir_if_there(&self.new_dir(uid))?;
        remove_dir_if_there(&self.dir(uid))
    }

    /// Whether the snapshot `uid` is there.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.dir(uid).join(RECORD).exists()
    }

    /// The record of the snapshot `uid`.
    ///
    /// # Errors
    /// [`Unusable::Lost`], and [`Unusable::Io`].
    pub(super) fn look(&self, uid: &str) -> Result<Record, Unusable> {
        self.record(&self.dir(uid)).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => Unusable::Lost,
            _ => Unusable::Io(e),
        })
    }

    /// Gives the snapshot `uid` to the Pod `pod_uid`, once: checks every file, puts the emptyDirs
    /// into those of the Pod, and returns the directory of the image.
    pub(super) fn serve(&self, uid: &str, pod_uid: &str) -> Result<PathBuf, Unusable> {
        let dir = self.dir(uid);
        let mut record = self.look(uid)?;
        if !record.served.insert(pod_uid.to_owned()) {
            return Err(Unusable::Served);
        }
        // Before the Pod has it: whatever happens then, it gets none another time.
        write_record(&dir, &record)?;
        for (name, expected) in &record.checksums {
            let path = dir.join(name);
            let found = match name.starts_with(VOLUMES) {
                true => self.tree_checksum(&path, expected.bytes),
                false => self.file_checksum(&path),
            };
            if found.ok().as_ref() != Some(expected) {
                return Err(Unusable::Damaged(name.clone()));
            }
        }
        for name in record.checksums.keys() {
            if let Some(volume) = name.strip_prefix(VOLUMES) {
                let to = self.pod_dirs(pod_uid).join(volume.trim_start_matches('/'));
                // A volume that the Pod no longer has is not missed.
                if to.is_dir() {
                    tree::copy(&dir.join(name), &to, u64::MAX)?;
                }
            }
        }
        Ok(dir.join(IMAGE))
    }

    fn dir(&self, uid: &str) -> PathBuf {
        self.config.dir.join(uid)
    }

    fn new_dir(&self, uid: &str) -> PathBuf {
        self.config.dir.join(format!("{uid}.new"))
    }

    fn pod_dirs(&self, pod_uid: &str) -> PathBuf {
        self.config.kubelet_pods.join(pod_uid).join(EMPTY_DIRS)
    }

    fn empty_dirs(&self, pod_uid: &str) -> io::Result<Vec<PathBuf>> {
        match fs::read_dir(self.pod_dirs(pod_uid)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            entries => entries?.map(|entry| Ok(entry?.path())).collect(),
        }
    }

    fn record(&self, dir: &Path) -> io::Result<Record> {
        let text = kiln_host::fs::read_regular(&dir.join(RECORD), RECORD_LIMIT)?;
        let record: Record = serde_json::from_str(&text)?;
        if record.version == Record::VERSION {
            Ok(record)
        } else {
            Err(io::Error::other("a record of another version"))
        }
    }

    fn file_checksum(&self, path: &Path) -> io::Result<Checksum> {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update_reader(File::open(path)?)?;
        Ok(Checksum {
            bytes: hasher.count(),
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }

    fn tree_checksum(&self, dir: &Path, bytes: u64) -> io::Result<Checksum> {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        tree::hash(dir, &mut hasher)?;
        Ok(Checksum {
            bytes,
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }
}

fn write_record(dir: &Path, record: &Record) -> io::Result<()> {
    write_atomically(&dir.join(RECORD), &serde_json::to_vec(record)?)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A digest of what the CPUs of this node can do, as `/proc/cpuinfo` says.
pub(super) fn cpu_features() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let features = text
        .lines()
        .find(|line| line.starts_with("flags") || line.starts_with("Features"));
    blake3::hash(features.unwrap_or_default().as_bytes())
        .to_hex()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        store: Store,
        dir: tempfile::TempDir,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let config = config::Snapshots {
            dir: dir.path().join("store"),
            kubelet_pods: dir.path().join("pods"),
            limit: 1 << 20,
            free: 0,
        };
        let store = Store::open(config).unwrap();
        Fixture { store, dir }
    }

    impl Fixture {
        fn volume(&self, pod: &str) -> PathBuf {
            let dir = self.dir.path().join("pods").join(pod).join(EMPTY_DIRS);
            let dir = dir.join("work");
            fs::create_dir_all(&dir).unwrap();
            dir
        }

        fn take(&self, room: u64) -> io::Result<Record> {
            fs::write(self.volume("old").join("file"), "kept").unwrap();
            let image = self.store.begin("snap")?;
            fs::write(image.join("pages.img"), "memory")?;
            let taken = Taken {
                pod_uid: "old".to_owned(),
                ..Taken::default()
            };
            self.store.seal("snap", taken, room)
        }
    }

    #[test]
    fn a_snapshot_is_given_to_a_pod_once_with_its_empty_dirs() {
        let f = fixture();
        assert_eq!(f.take(100).unwrap().bytes(), 10);
        assert!(!f.store.has("snap"));
        f.store.keep("snap").unwrap();
        for pod in ["new", "newer"] {
            let volume = f.volume(pod);
            let image = f.store.serve("snap", pod).unwrap();
            assert_eq!(fs::read(image.join("pages.img")).unwrap(), b"memory");
            assert_eq!(fs::read(volume.join("file")).unwrap(), b"kept");
            let again = f.store.serve("snap", pod).unwrap_err();
            assert!(matches!(again, Unusable::Served));
        }
        // Another agent knows that too.
        let store = Store::open(f.store.config.clone()).unwrap();
        assert!(matches!(store.serve("snap", "new"), Err(Unusable::Served)));
        store.remove("snap").unwrap();
        assert!(matches!(store.serve("snap", "n"), Err(Unusable::Lost)));
    }

    #[test]
    fn what_is_not_as_it_was_written_is_not_restored() {
        for name in ["image/pages.img", "volumes/work/file"] {
            let f = fixture();
            f.take(100).unwrap();
            f.store.keep("snap").unwrap();
            let path = f.store.dir("snap").join(name);
            let mut bytes = fs::read(&path).unwrap();
            bytes[0] ^= 1;
            fs::write(&path, bytes).unwrap();
            let refused = f.store.serve("snap", "new").unwrap_err().to_string();
            assert!(refused.contains("is not what was written"), "{refused}");
        }
    }

    #[test]
    fn what_has_no_room_is_not_kept() {
        let f = fixture();
        let room = f.store.room().unwrap();
        assert_eq!(room, 1 << 20);
        assert!(f.take(9).is_err());
        f.take(10).unwrap();
        f.store.keep("snap").unwrap();
        assert_eq!(f.store.room().unwrap(), room - 10);
    }

    #[test]
    fn only_root_may_look_into_the_store() {
        let f = fixture();
        f.take(100).unwrap();
        f.store.keep("snap").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&f.store.config.dir), 0o700);
        let dir = f.store.dir("snap");
        assert_eq!(mode(&dir), 0o700);
        for name in ["image/pages.img", "record", "../key"] {
            assert_eq!(mode(&dir.join(name)), 0o600, "{name}");
        }
    }
}
