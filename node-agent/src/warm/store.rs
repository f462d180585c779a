// SPDX-License-Identifier: Apache-2.0

//! The files of warm sandboxes. Each has a bundle, which stays where it is, and one file that
//! stands for it. The directory of that file says what the sandbox is, as the diagram in
//! [`super`] shows. Every step is one rename, so that a sandbox has one owner whoever is killed
//! when. What sandboxes execute is in [`exec_dir`], which is not renamed and may be on another file
//! system.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use kiln_agent_api::Shape;
use kiln_host::fs::{remove_dir_if_there, remove_file_if_there};
use serde::{Deserialize, Serialize};

use kiln_node_install::exec_dir;

/// State of a sandbox, by the directory of its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// It boots.
    Booting,
    /// It can be handed out.
    Ready,
    /// It was handed out, and nobody has taken it yet.
    Handed,
    /// It is to be destroyed.
    Retired,
}

impl Place {
    pub(crate) const ALL: [Self; 4] = [Self::Booting, Self::Ready, Self::Handed, Self::Retired];

    fn name(self) -> &'static str {
        match self {
            Self::Booting => "booting",
            Self::Ready => "ready",
            Self::Handed => "handed",
            Self::Retired => "doomed",
        }
    }
}

/// What is written down of a sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Note {
    pub(crate) shape: Shape,
    /// The sentry.
    pub(crate) pid: u32,
}

/// So long after it was handed out a sandbox whose file is gone is adopted, or will never be.
const ADOPTED: Duration = Duration::from_secs(300);

/// Directory of the bundles. A sandbox that was adopted needs its bundle no more.
const BUNDLES: &str = "bundles";

/// The directories.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the directories below `root`, making those that are missing. Blocks.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let mut private = fs::DirBuilder::new();
        private.mode(0o700).recursive(true);
        private.create(root)?;
        for place in Place::ALL {
            private.create(root.join(place.name()))?;
        }
        private.create(root.join(BUNDLES))?;
        Ok(Self {
            root: root.to_owned(),
        })
    }

    /// The file of sandbox `id` in `place`.
    pub(crate) fn file(&self, place: Place, id: &str) -> PathBuf {
        self.root.join(place.name()).join(id)
    }

    /// The bundle of sandbox `id`.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.root.join(BUNDLES).join(id)
    }

    /// The root file system that all warm sandboxes start with.
    pub(crate) fn rootfs(&self) -> PathBuf {
        exec_dir::of(&self.root).join("rootfs")
    }

    /// The same as an image that sentries read by themselves.
    pub(crate) fn image(&self) -> PathBuf {
        exec_dir::of(&self.root).join("rootfs.erofs")
    }

    /// What prestarted gofers are made from.
    pub(crate) fn gofer_dir(&self) -> PathBuf {
        exec_dir::of(&self.root).join("slots")
    }

    /// Makes file and bundle of a sandbox that is to boot. Blocks.
    pub(crate) fn make(&self, id: &str) -> io::Result<PathBuf> {
        fs::File::create_new(self.file(Place::Booting, id))?;
        let bundle = self.bundle(id);
        fs::DirBuilder::new().mode(0o700).create(&bundle)?;
        Ok(bundle)
    }

    /// Writes down what sandbox `id` is, and that it can be handed out. Blocks.
    pub(crate) fn is_ready(&self, id: &str, note: &Note) -> io::Result<()> {
        fs::write(self.file(Place::Booting, id), serde_json::to_vec(note)?)?;
        self.advance(id, Place::Booting, Place::Ready)
    }

    /// What is written down of sandbox `id` in `place`. Blocks.
    fn note(&self, place: Place, id: &str) -> io::Result<Note> {
        Ok(serde_json::from_slice(&fs::read(self.file(place, id))?)?)
    }

    /// Moves a sandbox on; an error of kind `NotFound` means that somebody else has. Blocks.
    pub(crate) fn advance(&self, id: &str, from: Place, to: Place) -> io::Result<()> {
        fs::rename(self.file(from, id), self.file(to, id))
    }

    /// Moves sandbox `id`, which is ready, to where a shim may take it. Blocks.
    pub(crate) fn hand_out(&self, id: &str) -> io::Result<()> {
        self.advance(id, Place::Ready, Place::Handed)?;
        // What `sweep` goes by: it may have been ready for long, and the shim still has to start it.
        fs::File::open(self.bundle(id))?.set_modified(SystemTime::now())
    }

    /// Every sandbox in `place`, with what is written down of it. Blocks.
    pub(crate) fn list(&self, place: Place) -> io::Result<Vec<(String, Option<Note>)>> {
        let with_note = |id: String| {
            let note = self.note(place, &id).ok();
            (id, note)
        };
        Ok(self.ids(place)?.into_iter().map(with_note).collect())
    }

    /// Every sandbox in `place`. Blocks.
    pub(crate) fn ids(&self, place: Place) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(self.root.join(place.name()))? {
            ids.extend(entry?.file_name().into_string());
        }
        Ok(ids)
    }

    /// Says that no sandbox is left, or which. Blocks.
    pub(crate) fn check_empty(&self) -> io::Result<()> {
        for place in Place::ALL {
            if let Some(id) = self.ids(place)?.first() {
                return Err(io::Error::other(format!("{id} is still there")));
            }
        }
        Ok(())
    }

    /// Removes the bundles of sandboxes that were adopted a while ago. Blocks.
    pub(crate) fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join(BUNDLES))? {
            let entry = entry?;
            let id = entry.file_name();
            let held = |place: &Place| self.root.join(place.name()).join(&id).exists();
            if Place::ALL.iter().any(held) {
                continue;
            }
            // Looked at last: one that was taken just now was handed out before.
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if age > ADOPTED {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// Removes the bundle of sandbox `id`, which is adopted. Blocks.
    pub(crate) fn remove_bundle(&self, id: &str) -> io::Result<()> {
        remove_dir_if_there(&self.bundle(id))
    }

    /// Removes what is left of a retired sandbox that is gone. Blocks.
    pub(crate) fn remove(&self, id: &str) -> io::Result<()> {
        self.remove_bundle(id)?;
        remove_file_if_there(&self.file(Place::Retired, id))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kiln_agent_api::{RuntimeFile, Setup};

    use super::*;

    fn note() -> Note {
        let setup = Setup {
            runtime: RuntimeFile::of(Path::new("/proc/self/exe")).unwrap(),
            root: Path::new("/run/r"),
            flags: &BTreeMap::new(),
        };
        let spec = serde_json::json!({"linux": {"namespaces": [{"type": "network"}]}});
        let shape = Shape::of(&spec, setup).unwrap();
        Note { shape, pid: 1 }
    }

    #[test]
    fn a_bundle_goes_a_while_after_its_sandbox_was_handed_out_however_old_it_is() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let bundle = store.make("a").unwrap();
        let age = || {
            let long_ago = SystemTime::now() - 2 * ADOPTED;
            fs::File::open(&bundle).unwrap().set_modified(long_ago)
        };
        store.is_ready("a", &note()).unwrap();
        age().unwrap();
        store.sweep().unwrap();
        store.hand_out("a").unwrap();
        // A shim has taken it.
        fs::remove_file(store.file(Place::Handed, "a")).unwrap();
        store.sweep().unwrap();
        assert!(bundle.exists());
        age().unwrap();
        store.sweep().unwrap();
        assert!(!bundle.exists());
    }

    #[test]
    fn a_sandbox_is_in_one_place_and_only_one_can_move_it() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("state")).unwrap();
        store.make("a").unwrap();
        assert!(store.make("a").is_err());
        store.advance("a", Place::Booting, Place::Ready).unwrap();
        store.sweep().unwrap();
        assert!(store.bundle("a").exists());
        store.advance("a", Place::Ready, Place::Handed).unwrap();
        let late = store
            .advance("a", Place::Ready, Place::Retired)
            .unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::NotFound);
        assert_eq!(store.list(Place::Handed).unwrap().len(), 1);
        store.advance("a", Place::Handed, Place::Retired).unwrap();
        store.remove("a").unwrap();
        store.remove("a").unwrap();
        for place in Place::ALL {
            assert!(store.list(place).unwrap().is_empty());
        }
        assert!(!store.bundle("a").exists());
    }
}
