// SPDX-License-Identifier: Apache-2.0

//! Files that are put on a node so that all of them can be taken back: by the run that put them
//! there when a later step fails, and by any later run through a record of what there is.

use std::{
    collections::BTreeMap,
    fs::{self, File, Permissions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::Error;
use kiln_host::fs::remove_file_if_there;

/// Ends the name of what somebody else had where a file of ours is now.
const ORIGINAL: &str = ".before-kiln";

/// What is in a file that is to be put somewhere.
pub(super) enum Source<'a> {
    Text(&'a str),
    File(&'a File),
}

impl Source<'_> {
    /// Its SHA-256, in hexadecimal digits.
    pub(super) fn digest(&self) -> io::Result<String> {
        match self {
            Self::Text(text) => Ok(hex(&Sha256::digest(text))),
            Self::File(file) => digest(file),
        }
    }

    fn write(&self, to: &mut File) -> io::Result<()> {
        match self {
            Self::Text(text) => to.write_all(text.as_bytes()),
            Self::File(file) => {
                let mut from: &File = file;
                from.seek(SeekFrom::Start(0))?;
                io::copy(&mut from, to).map(drop)
            }
        }
    }
}

/// SHA-256 of a file, from its start.
pub(super) fn digest(mut file: &File) -> io::Result<String> {
    file.seek(SeekFrom::Start(0))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 64 << 10]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// SHA-256 of what is at `path`, if a file is.
fn digest_at(path: &Path) -> Result<Option<String>, Error> {
    let digest = match File::open(path) {
        Ok(file) => digest(&file),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => Err(e),
    };
    digest.map(Some).map_err(Error::at("read", path))
}

/// What has been put on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Record {
    /// Version of the program that did it.
    pub(super) version: String,
    pub(super) files: BTreeMap<PathBuf, Placed>,
    /// Directories that were made, the outer before the inner.
    dirs: Vec<PathBuf>,
    pub(super) wired: Option<Wired>,
    /// containerd's files have changed since it was started.
    pub(super) restart_is_due: bool,
}

/// A file of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Placed {
    pub(super) sha256: String,
    /// What somebody else had there, under its name of now.
    original: Option<PathBuf>,
}

/// How containerd comes by the handler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wired {
    /// containerd's own file.
    pub(super) config: PathBuf,
    pub(super) drop_in: PathBuf,
}

impl Record {
    pub(super) fn file(dir: &Path) -> PathBuf {
        dir.join("installed.json")
    }

    /// That of the installation in `dir`; an empty one where there is none.
    pub(super) fn load(dir: &Path) -> Result<Self, Error> {
        let path = Self::file(dir);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            read => read,
        };
        text.and_then(|text| Self::parse(&text))
            .map_err(Error::at("read", &path))
    }

    pub(super) fn parse(text: &[u8]) -> io::Result<Self> {
        serde_json::from_slice(text).map_err(io::Error::other)
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    fn save(&self, dir: &Path) -> Result<(), Error> {
        let path = Self::file(dir);
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other);
        let text = text.map_err(Error::at("write", &path))?;
        write(&path, 0o644, &Source::Text(&text))
    }
}

/// Writes a file beside `path`, and then gives it that name.
fn write(path: &Path, mode: u32, source: &Source<'_>) -> Result<(), Error> {
    let new = beside(path, "new");
    let written = (|| {
        // One that a run which was cut off has left.
        remove_file_if_there(&new)?;
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&new)?;
        source.write(&mut file)?;
        // Whatever the mask of this process is.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&new, path)
    })();
    written.map_err(Error::at("write", path))
}

/// A hidden name in the same directory.
fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.kiln-{what}"))
}

fn original_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ORIGINAL);
    name.into()
}

/// Changes under way.
pub(super) struct Changes {
    dir: PathBuf,
    before: Record,
    pub(super) record: Record,
    /// What was changed, in order.
    changed: Vec<PathBuf>,
}

impl Changes {
    /// On what is installed in `dir`.
    pub(super) fn begin(dir: &Path) -> Result<Self, Error> {
        let before = Record::load(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            record: before.clone(),
            before,
            changed: Vec::new(),
        })
    }

    /// Remembers what is in the record on disk, so that what follows can be taken back even if
    /// this run is cut off.
    pub(super) fn save(&mut self) -> Result<(), Error> {
        let dir = self.dir.clone();
        self.make_dir(&dir)?;
        self.record.save(&self.dir)
    }

    /// Makes a directory, and those above that are missing.
    pub(super) fn make_dir(&mut self, dir: &Path) -> Result<(), Error> {
        let missing: Vec<_> = dir.ancestors().take_while(|d| !d.exists()).collect();
        for dir in missing.into_iter().rev() {
            fs::create_dir(dir).map_err(Error::at("make", dir))?;
            self.record.dirs.push(dir.to_owned());
        }
        Ok(())
    }

    /// Takes a file for one that was put there, as it is, where the record does not know it.
    pub(super) fn adopt(&mut self, path: &Path) -> Result<(), Error> {
        let known = self.record.files.contains_key(path);
        if let Some(sha256) = digest_at(path)?.filter(|_| !known) {
            let placed = Placed {
                sha256,
                original: None,
            };
            for record in [&mut self.before, &mut self.record] {
                record.files.insert(path.to_owned(), placed.clone());
            }
        }
        Ok(())
    }

    /// Puts a file at `path` unless it is there already. Returns whether it was not.
    pub(super) fn put(
        &mut self,
        path: &Path,
        mode: u32,
        source: &Source<'_>,
    ) -> Result<bool, Error> {
        let sha256 = source
            .digest()
            .map_err(Error::at("read what becomes", path))?;
        let there = digest_at(path)?;
        let ours = self.record.files.get(path).cloned();
        if there.as_ref() == Some(&sha256) && ours.is_some() {
            return Ok(false);
        }
        let is_ours = ours.is_some();
        let mut original = ours.and_then(|f| f.original);
        if let Some(parent) = path.parent() {
            self.make_dir(parent)?;
        }
        if there.is_some() {
            let kept = match is_ours {
                true => beside(path, "old"),
                false => original.insert(original_of(path)).clone(),
            };
            remove_file_if_there(&kept)
                .and_then(|()| fs::hard_link(path, &kept))
                .map_err(Error::at("keep a copy of", path))?;
        }
        let placed = Placed { sha256, original };
        self.record.files.insert(path.to_owned(), placed);
        self.save()?;
        self.changed.push(path.to_owned());
        write(path, mode, source)?;
        Ok(true)
    }

    /// Takes back one file that was put there once.
    fn restore(&mut self, path: &Path) -> Result<(), Error> {
        let Some(placed) = self.record.files.remove(path) else {
            return Ok(());
        };
        match placed.original {
            Some(original) => fs::rename(original, path),
            None => remove_file_if_there(path),
        }
        .map_err(Error::at("restore", path))
    }

    /// Takes away a file that is no longer wanted.
    pub(super) fn take_away(&mut self, path: &Path) -> Result<(), Error> {
        self.restore(path)?;
        self.save()
    }

    /// Everything has worked: forgets how it was before.
    pub(super) fn commit(mut self) -> Result<(), Error> {
        for path in &self.changed {
            let old = beside(path, "old");
            let before = self.before.files.get(path);
            // What somebody has made of our file since is what it goes back to. In our own directory,
            // it was damage.
            let was_edited = !path.starts_with(&self.dir)
                && before.is_some_and(|b| digest_at(&old).ok().flatten() != Some(b.sha256.clone()));
            if let Some(placed) = self
                .record
                .files
                .get_mut(path)
                .filter(|_| was_edited && old.exists())
            {
                let original = original_of(path);
                fs::rename(&old, &original).map_err(Error::at("keep", &old))?;
                placed.original = Some(original);
            }
            remove_file_if_there(&old).map_err(Error::at("remove", &old))?;
        }
        self.save()
    }

    /// Whether somebody has changed a file since it was put there.
    pub(super) fn was_edited(&self, path: &Path) -> Result<bool, Error> {
        let there = digest_at(path)?;
        let ours = self.record.files.get(path);
        Ok(ours.is_some_and(|f| there.is_some_and(|digest| digest != f.sha256)))
    }

    /// Puts back what a run whose record was lost kept of a file, if `text` says the same in TOML.
    /// Returns whether it did.
    pub(super) fn put_back(&self, path: &Path, text: &str) -> Result<bool, Error> {
        let original = original_of(path);
        let parsed = |text: &str| {
            let mut table = text.parse::<toml::Table>().ok()?;
            // An import that was taken out may leave a list of none.
            let imports = table.get("imports").and_then(toml::Value::as_array);
            if imports.is_some_and(Vec::is_empty) {
                table.remove("imports");
            }
            Some(table)
        };
        let kept = fs::read_to_string(&original).ok();
        let kept = kept.as_deref().and_then(parsed);
        if kept.is_none() || kept != parsed(text) {
            return Ok(false);
        }
        fs::rename(&original, path).map_err(Error::at("restore", path))?;
        Ok(true)
    }

    /// Writes what stays of a file that is ours no more.
    pub(super) fn leave(&mut self, path: &Path, mode: u32, text: &str) -> Result<(), Error> {
        if let Some(original) = self.record.files.remove(path).and_then(|f| f.original) {
            remove_file_if_there(&original).map_err(Error::at("remove", &original))?;
        }
        write(path, mode, &Source::Text(text))?;
        self.save()
    }

    /// Makes everything as it was before. Goes on after a failure, and returns the first.
    pub(super) fn roll_back(mut self) -> Result<(), Error> {
        let mut first = Ok(());
        let mut note = |done: Result<(), Error>| {
            if first.is_ok() {
                first = done;
            }
        };
        for path in std::mem::take(&mut self.changed).iter().rev() {
            match self.before.files.get(path) {
                Some(before) => {
                    let old = beside(path, "old");
                    // Where it was lost before this run, there is nothing to go back to.
                    if old.exists() {
                        note(fs::rename(&old, path).map_err(Error::at("restore", path)));
                    }
                    self.record.files.insert(path.clone(), before.clone());
                }
                None => note(self.restore(path)),
            }
            let new = beside(path, "new");
            note(remove_file_if_there(&new).map_err(Error::at("remove", &new)));
        }
        let made = self.record.dirs.split_off(self.before.dirs.len());
        self.record = self.before.clone();
        if self.record.is_empty() {
            let file = Record::file(&self.dir);
            note(remove_file_if_there(&file).map_err(Error::at("remove", &file)));
        } else {
            note(self.record.save(&self.dir));
        }
        note(remove_dirs(&made));
        first
    }

    /// Takes away everything that is left.
    pub(super) fn finish_removal(mut self) -> Result<(), Error> {
        let paths: Vec<_> = self.record.files.keys().cloned().collect();
        for path in paths {
            self.restore(&path)?;
        }
        let file = Record::file(&self.dir);
        remove_file_if_there(&file).map_err(Error::at("remove", &file))?;
        remove_dirs(&self.record.dirs)
    }
}

/// Removes directories of ours, but for those that others have put something into.
fn remove_dirs(dirs: &[PathBuf]) -> Result<(), Error> {
    for dir in dirs.iter().rev() {
        match fs::remove_dir(dir) {
            Err(e)
                if !matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                ) =>
            {
                return Err(Error::at("remove", dir)(e));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every file below `dir` with what is in it.
    fn listing(dir: &Path) -> BTreeMap<PathBuf, String> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                found.insert(path.clone(), "a directory".to_owned());
                found.extend(listing(&path));
            } else {
                found.insert(path.clone(), fs::read_to_string(&path).unwrap());
            }
        }
        found
    }

    #[test]
    fn what_is_rolled_back_or_removed_leaves_what_was_there() {
        let node = tempfile::tempdir().unwrap();
        let (dir, theirs) = (node.path().join("opt/kiln"), node.path().join("theirs"));
        fs::write(&theirs, "theirs").unwrap();
        let before = listing(node.path());
        let program = dir.join("bin/program");
        let install = |text: &str| {
            let mut changes = Changes::begin(&dir).unwrap();
            for path in [&program, &theirs] {
                changes.put(path, 0o755, &Source::Text(text)).unwrap();
            }
            changes
        };

        install("one").roll_back().unwrap();
        assert_eq!(listing(node.path()), before);

        install("one").commit().unwrap();
        assert_eq!(fs::read_to_string(&program).unwrap(), "one");
        assert_eq!(
            fs::metadata(&program).unwrap().permissions().mode() & 0o777,
            0o755
        );
        let installed = listing(node.path());
        let mut again = Changes::begin(&dir).unwrap();
        assert!(!again.before.is_empty());
        assert!(!again.put(&program, 0o755, &Source::Text("one")).unwrap());

        install("two").roll_back().unwrap();
        assert_eq!(listing(node.path()), installed);

        install("two").commit().unwrap();
        Changes::begin(&dir).unwrap().finish_removal().unwrap();
        assert_eq!(listing(node.path()), before);
    }

    #[test]
    fn what_somebody_made_of_a_file_is_what_it_goes_back_to() {
        let node = tempfile::tempdir().unwrap();
        let (dir, file) = (node.path().join("kiln"), node.path().join("file"));
        for text in ["one", "two"] {
            fs::write(&file, format!("theirs {text}")).unwrap();
            let mut changes = Changes::begin(&dir).unwrap();
            assert_eq!(changes.was_edited(&file).unwrap(), text == "two");
            changes.put(&file, 0o644, &Source::Text(text)).unwrap();
            changes.commit().unwrap();
        }
        Changes::begin(&dir).unwrap().finish_removal().unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "theirs two");
        assert_eq!(listing(node.path()).len(), 1);
    }

    #[test]
    fn a_run_that_was_cut_off_is_taken_back_by_the_next() {
        let node = tempfile::tempdir().unwrap();
        let (dir, theirs) = (node.path().join("kiln"), node.path().join("theirs"));
        fs::write(&theirs, "theirs").unwrap();
        let before = listing(node.path());
        let mut changes = Changes::begin(&dir).unwrap();
        changes.put(&theirs, 0o644, &Source::Text("one")).unwrap();
        drop(changes);
        let mut changes = Changes::begin(&dir).unwrap();
        changes.put(&theirs, 0o644, &Source::Text("two")).unwrap();
        changes.commit().unwrap();
        Changes::begin(&dir).unwrap().finish_removal().unwrap();
        assert_eq!(listing(node.path()), before);
    }

    #[test]
    fn a_source_is_read_from_its_start_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::write(&from, "program").unwrap();
        let file = File::open(&from).unwrap();
        let mut changes = Changes::begin(&dir.path().join("kiln")).unwrap();
        let to = dir.path().join("to");
        assert!(changes.put(&to, 0o755, &Source::File(&file)).unwrap());
        assert_eq!(fs::read_to_string(&to).unwrap(), "program");
        assert!(!changes.put(&to, 0o755, &Source::File(&file)).unwrap());
    }
}
