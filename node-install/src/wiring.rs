// SPDX-License-Identifier: Apache-2.0

//! What containerd's files must say for it to know the handler.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kiln_crds::keys::RESTORE;
use toml::{Table, Value};
use toml_edit::{Array, DocumentMut};

use super::Error;
use crate::cri::Runtime;

/// What runs the Pods, as containerd names it.
pub const RUNTIME_TYPE: &str = "io.containerd.kiln.v2";

/// containerd's plugin for CRI, from version 2 on and before.
pub const CRI: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];

/// What a handler's options are called by gVisor's shim, and so by ours.
const OPTIONS: &str = "io.containerd.runsc.v1.options";

/// Head of the file that is ours alone.
pub(super) const HEAD: &str =
    "# Written by Kiln, and taken away with it: see `kilnctl node disable`.\n";

/// A handler of Pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Handler<'a> {
    pub(super) name: &'a str,
    pub(super) shim: &'a Path,
    /// The runtime's configuration.
    pub(super) config: &'a Path,
}

/// How a file must be written that containerd reads as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Format {
    /// `version` in the file.
    version: u32,
    /// The name of CRI's plugin in this version.
    cri: &'static str,
    /// A plugin's section in this file replaces that of the file that imports it.
    replaces: bool,
}

impl Format {
    /// For a containerd of this major version, whose own file has this `version`.
    fn of(major: u32, own: Option<i64>) -> Self {
        let (version, cri) = match (major, own) {
            // containerd 2.0 and 2.1 translate what their files say from version 2 only where no
            // file is newer.
            (..2, _) | (_, Some(2)) => (2, CRI[1]),
            _ => (3, CRI[0]),
        };
        Self {
            version,
            cri,
            replaces: major < 2,
        }
    }
}

impl Handler<'_> {
    /// The table of this handler.
    fn table(&self) -> Table {
        let path = |path: &Path| Value::String(path.display().to_string());
        let options = Table::from_iter([
            ("TypeUrl".to_owned(), Value::String(OPTIONS.to_owned())),
            ("ConfigPath".to_owned(), path(self.config)),
        ]);
        Table::from_iter([
            (
                "runtime_type".to_owned(),
                Value::String(RUNTIME_TYPE.to_owned()),
            ),
            ("runtime_path".to_owned(), path(self.shim)),
            (
                "pod_annotations".to_owned(),
                Value::Array(vec![Value::String(RESTORE.to_owned())]),
            ),
            ("options".to_owned(), Value::Table(options)),
        ])
    }

    /// What is wrong with what containerd has under the name of this one.
    pub(super) fn problem(&self, found: Option<&Runtime>) -> Option<String> {
        let name = self.name;
        match found {
            None => Some(format!("containerd has no handler {name}")),
            Some(found) => self
                .difference(found)
                .map(|why| format!("handler {name} of containerd: {why}")),
        }
    }

    /// How one that containerd has differs from this one.
    fn difference(&self, found: &Runtime) -> Option<String> {
        let Runtime {
            runtime_type,
            runtime_path,
            ..
        } = found;
        if runtime_type != RUNTIME_TYPE || runtime_path != self.shim {
            let (path, shim) = (runtime_path.display(), self.shim.display());
            return Some(format!(
                "its Pods run by {runtime_type} {path}, and not by {shim}"
            ));
        }
        let config = found.config();
        (config != self.config).then(|| {
            let (config, ours) = (config.display(), self.config.display());
            format!("its runtime's configuration is {config}, and not {ours}")
        })
    }

    /// The drop-in for a containerd whose whole configuration without it is `base`.
    pub(super) fn drop_in(&self, format: Format, base: &Table) -> Result<String, Error> {
        let Format { version, cri, .. } = format;
        let mut section = match format.replaces {
            true => plugin(base, cri).cloned().unwrap_or_default(),
            false => Table::new(),
        };
        let mut at = &mut section;
        for key in ["containerd", "runtimes"] {
            let inner = at.entry(key).or_insert_with(|| Value::Table(Table::new()));
            at = inner
                .as_table_mut()
                .ok_or_else(|| Error::Config(format!("{cri}: {key} is no table")))?;
        }
        at.insert(self.name.to_owned(), Value::Table(self.table()));
        let plugins = Table::from_iter([(cri.to_owned(), Value::Table(section))]);
        let file = Table::from_iter([
            ("version".to_owned(), Value::Integer(version.into())),
            ("plugins".to_owned(), Value::Table(plugins)),
        ]);
        let text = toml::to_string(&file).map_err(|e| Error::Config(e.to_string()))?;
        Ok(format!("{HEAD}{text}"))
    }

    /// Fails unless `after` is `before` with this handler, and nothing else.
    pub(super) fn expect_alone(&self, before: &Table, after: &Table) -> Result<(), Error> {
        let (mut before, mut after) = (before.clone(), after.clone());
        let refuse = |what: &str, advice: &str| {
            Err(Error::Lacks {
                what: what.to_owned(),
                advice: advice.to_owned(),
            })
        };
        let look = "look at what `containerd config dump` says, and at the files that \
                    containerd's configuration imports";
        take_handler(&mut before, self.name);
        match take_handler(&mut after, self.name) {
            None => {
                let what = format!("containerd does not see the handler {}", self.name);
                return refuse(&what, look);
            }
            Some(found) if !is_in(&self.table(), &found) => {
                let what = format!(
                    "another file changes what ours says of the handler {}",
                    self.name
                );
                return refuse(&what, look);
            }
            Some(_) => {}
        }
        for table in [&mut before, &mut after] {
            table.remove("imports");
        }
        match difference(&before, &after) {
            Some(key) => refuse(
                &format!("with our file, containerd would change {key} too"),
                "write containerd's own file and all that it imports in one version, as \
                 `containerd config dump` prints it, or put the handler into its own file by hand",
            ),
            None => Ok(()),
        }
    }
}

/// Describes Kiln's handler in a drop-in that an installation with another shim than `shim` has
/// written; none in any other file.
pub(super) fn other_handler(text: &str, shim: &Path) -> Option<String> {
    let file: Table = text.strip_prefix(HEAD).map(toml::from_str)?.ok()?;
    let runtimes = |cri: &&str| {
        let containerd = plugin(&file, cri)?.get("containerd")?;
        containerd.get("runtimes")?.as_table()
    };
    let handlers = CRI.iter().filter_map(runtimes).flatten();
    let ours = handlers.filter_map(|(name, handler)| {
        let is_ours = handler.get("runtime_type")?.as_str() == Some(RUNTIME_TYPE);
        let path = handler.get("runtime_path")?.as_str()?;
        is_ours.then_some((name, path))
    });
    let ours: Vec<_> = ours.collect();
    let is_same = ours.iter().any(|(_, path)| Path::new(path) == shim);
    let (name, path) = ours.first().filter(|_| !is_same)?;
    Some(format!("handler {name} by {path}"))
}

/// The section of a plugin.
fn plugin<'a>(config: &'a Table, name: &str) -> Option<&'a Table> {
    config.get("plugins")?.get(name)?.as_table()
}

/// Takes a handler out of a configuration of either format.
fn take_handler(config: &mut Table, name: &str) -> Option<Value> {
    let plugins = config.get_mut("plugins")?.as_table_mut()?;
    let cri = CRI.iter().find(|cri| plugins.contains_key(**cri))?;
    let mut at = plugins.get_mut(*cri)?;
    for key in ["containerd", "runtimes"] {
        at = at.get_mut(key)?;
    }
    at.as_table_mut()?.remove(name)
}

/// Whether all of `part` is in `whole`.
fn is_in(part: &Table, whole: &Value) -> bool {
    part.iter().all(|(key, value)| match whole.get(key) {
        Some(found @ Value::Table(_)) => value.as_table().is_some_and(|t| is_in(t, found)),
        Some(found) => found == value,
        None => false,
    })
}

/// The first key, with those above it, that differs.
fn difference(a: &Table, b: &Table) -> Option<String> {
    let keys = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
    for key in keys {
        match (a.get(key), b.get(key)) {
            (Some(Value::Table(a)), Some(Value::Table(b))) => {
                if let Some(inner) = difference(a, b) {
                    return Some(format!("{key}.{inner}"));
                }
            }
            (a, b) if a == b => {}
            _ => return Some(key.clone()),
        }
    }
    None
}

/// containerd's own file, as its user wrote it.
#[derive(Clone)]
pub(super) struct Main {
    path: PathBuf,
    document: DocumentMut,
}

impl Main {
    /// Of a file at `path` that says `text`.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let document = text.parse::<DocumentMut>();
        Ok(Self {
            path: path.to_owned(),
            document: document.map_err(|e| Error::Config(format!("{}: {e}", path.display())))?,
        })
    }

    /// One that says nothing but its version.
    pub(super) fn new(path: &Path, major: u32) -> Result<Self, Error> {
        let Format { version, .. } = Format::of(major, None);
        Self::parse(path, &format!("version = {version}\n"))
    }

    /// Its `version`; none is the same as 1.
    fn version(&self) -> Option<i64> {
        self.document.get("version")?.as_integer()
    }

    /// Whether it is in the first version, which knows plugins by other names.
    pub(super) fn is_of_version_1(&self) -> bool {
        self.version().is_none_or(|version| version < 2)
    }

    /// Whether its first lines say that a program writes it each time that it starts containerd, as
    /// those of k3s and rke2 do. Config management has other words, and its nodes are repaired.
    pub(super) fn is_generated(&self) -> bool {
        let text = self.text();
        let head = text.lines().take_while(|line| line.starts_with('#'));
        head.map(str::to_lowercase)
            .any(|line| line.contains("file generated by") && line.contains("do not edit"))
    }

    /// How a file must be written that a containerd of this major version reads beside this one.
    pub(super) fn format(&self, major: u32) -> Format {
        Format::of(major, self.version())
    }

    fn imports(&self) -> impl Iterator<Item = &str> {
        let imports = self.document.get("imports").and_then(|i| i.as_array());
        imports.into_iter().flatten().filter_map(|i| i.as_str())
    }

    /// Where a file that containerd is to read as well had best be: where it reads all files, else
    /// in a directory beside its own.
    pub(super) fn place_for(&self, name: &str) -> PathBuf {
        let beside = self.path.with_file_name("conf.d");
        let all = self.imports().find_map(|i| i.strip_suffix("/*.toml"));
        let dir = all.map_or(beside, |dir| self.absolute(dir));
        dir.join(name)
    }

    /// containerd takes what is not absolute from where its own file is.
    fn absolute(&self, import: &str) -> PathBuf {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        dir.join(import)
    }

    fn is_imported_by(&self, import: &str, file: &Path) -> bool {
        let import = self.absolute(import);
        let (Some(pattern), Some(name)) = (import.file_name(), file.file_name()) else {
            return false;
        };
        let (pattern, name) = (pattern.to_string_lossy(), name.to_string_lossy());
        import.parent() == file.parent()
            && match pattern.split_once('*') {
                Some((start, end)) => {
                    name.len() >= start.len() + end.len()
                        && name.starts_with(start)
                        && name.ends_with(end)
                }
                None => pattern == name,
            }
    }

    /// The files that containerd reads as well, as far as they are there.
    pub(super) fn imported(&self) -> Vec<PathBuf> {
        let of_import = |import| {
            let dir = self.absolute(import).parent().map(fs::read_dir);
            let entries = dir.and_then(Result::ok).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.path())
                .filter(move |file| self.is_imported_by(import, file))
        };
        self.imports().flat_map(of_import).collect()
    }

    /// Whether containerd reads `file` as well.
    pub(super) fn imports_file(&self, file: &Path) -> bool {
        self.imports().any(|i| self.is_imported_by(i, file))
    }

    /// Has containerd read `file` as well.
    pub(super) fn import(&mut self, file: &Path) -> Result<(), Error> {
        let imports = self
            .document
            .entry("imports")
            .or_insert(toml_edit::value(Array::new()));
        let Some(imports) = imports.as_array_mut() else {
            let what = "imports is no list of files";
            return Err(Error::Config(format!("{}: {what}", self.path.display())));
        };
        imports.push(file.display().to_string());
        Ok(())
    }

    /// Whether `file` is named among the imports.
    pub(super) fn names(&self, file: &Path) -> bool {
        let named = file.display().to_string();
        self.imports().any(|import| import == named)
    }

    /// Has containerd read `file` no more, if it is named.
    pub(super) fn forget(&mut self, file: &Path) {
        let named = file.display().to_string();
        if let Some(imports) = self
            .document
            .get_mut("imports")
            .and_then(|i| i.as_array_mut())
        {
            imports.retain(|i| i.as_str() != Some(&named));
        }
    }

    pub(super) fn text(&self) -> String {
        self.document.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handler() -> Handler<'static> {
        Handler {
            name: "gvisor",
            shim: Path::new("/opt/kiln/bin/shim"),
            config: Path::new("/etc/kiln/runsc.toml"),
        }
    }

    fn main(text: &str) -> Main {
        Main::parse(Path::new("/etc/containerd/config.toml"), text).unwrap()
    }

    const BASE: &str = "version = 2\nimports = ['/a']\n\
        [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'pause'\n\
        [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'runc'\n";

    #[test]
    fn an_old_containerd_gets_its_whole_section_and_a_new_one_the_handler() {
        let base: Table = toml::from_str(BASE).unwrap();
        let drop_in = |format| -> Table {
            toml::from_str(&handler().drop_in(format, &base).unwrap()).unwrap()
        };
        let old = drop_in(Format::of(1, Some(2)));
        // As that one merges: section by section.
        let mut merged = base.clone();
        merged["plugins"] = old["plugins"].clone();
        handler().expect_alone(&base, &merged).unwrap();
        for (own, version, cri) in [
            (None, 3, CRI[0]),
            (Some(1), 3, CRI[0]),
            (Some(2), 2, CRI[1]),
            (Some(3), 3, CRI[0]),
        ] {
            let new = drop_in(Format::of(2, own));
            assert_eq!(new["version"].as_integer(), Some(version), "{own:?}");
            let section = plugin(&new, cri).unwrap();
            assert_eq!(section.len(), 1);
            let found = &section["containerd"]["runtimes"]["gvisor"];
            let passed = found["pod_annotations"].as_array().unwrap();
            assert_eq!(passed.as_slice(), [Value::String(RESTORE.to_owned())]);
            assert_eq!(
                found["options"]["ConfigPath"].as_str(),
                Some("/etc/kiln/runsc.toml")
            );
        }
    }

    #[test]
    fn the_drop_in_of_another_installation_is_told_from_ours_and_the_users() {
        let base: Table = toml::from_str(BASE).unwrap();
        for format in [Format::of(1, Some(2)), Format::of(2, Some(3))] {
            let text = handler().drop_in(format, &base).unwrap();
            let other = |text: &str, shim: &str| other_handler(text, Path::new(shim));
            assert_eq!(other(&text, "/opt/kiln/bin/shim"), None);
            assert_eq!(
                other(&text, "/kiln/bin/shim").as_deref(),
                Some("handler gvisor by /opt/kiln/bin/shim")
            );
            assert_eq!(other(text.strip_prefix(HEAD).unwrap(), "/x"), None);
        }
    }

    #[test]
    fn anything_else_that_changes_is_refused() {
        let base: Table = toml::from_str(BASE).unwrap();
        let with = |text: &str| -> String {
            let after: Table = toml::from_str(text).unwrap();
            handler()
                .expect_alone(&base, &after)
                .unwrap_err()
                .to_string()
        };
        assert!(with(BASE).contains("does not see the handler gvisor"));
        let ours = handler().drop_in(Format::of(1, Some(2)), &base).unwrap();
        let other = ours.replace("\"pause\"", "\"other\"");
        assert!(with(&other).contains("sandbox_image"), "{other}");
        let theirs = ours.replace("/opt/kiln/bin/shim", "/bin/theirs");
        assert!(with(&theirs).contains("another file"));
    }

    #[test]
    fn a_file_is_imported_by_name_or_by_pattern() {
        let file = Path::new("/etc/containerd/conf.d/kiln.toml");
        for imports in [
            "imports = ['/etc/containerd/conf.d/*.toml']",
            "imports = ['conf.d/*.toml']",
            "imports = ['/x', '/etc/containerd/conf.d/kiln.toml']",
        ] {
            assert!(main(imports).imports_file(file), "{imports}");
            assert_eq!(main(imports).place_for("kiln.toml"), file);
        }
        for imports in [
            "",
            "imports = ['/etc/*.toml', '/etc/containerd/conf.d/a*.toml']",
        ] {
            assert!(!main(imports).imports_file(file), "{imports}");
        }
        let elsewhere = main("imports = ['/srv/c/*.toml']").place_for("kiln.toml");
        assert_eq!(elsewhere, Path::new("/srv/c/kiln.toml"));
    }

    #[test]
    fn files_that_are_imported_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("conf.d")).unwrap();
        for name in ["conf.d/a.toml", "conf.d/b.txt", "c.toml", "d.toml"] {
            fs::write(at(name), "").unwrap();
        }
        let absolute = at("c.toml").display().to_string();
        let text =
            format!("imports = ['conf.d/*.toml', '{absolute}', '/nowhere/*.toml', 'e.toml']");
        let main = Main::parse(&at("config.toml"), &text).unwrap();
        assert_eq!(main.imported(), [at("conf.d/a.toml"), at("c.toml")]);
    }

    #[test]
    fn what_is_added_to_a_users_file_can_be_taken_out_again() {
        let file = Path::new("/etc/containerd/conf.d/kiln.toml");
        for text in [
            "# Mine.\nversion = 2\nimports = [\"/a\"] # those\n\n[grpc]\n  uid = 0\n",
            "version = 3\nimports = []\n",
        ] {
            let mut edited = main(text);
            edited.import(file).unwrap();
            let edited = edited.text();
            assert!(main(&edited).imports_file(file), "{edited}");
            assert!(
                text.lines()
                    .filter(|l| !l.starts_with("imports"))
                    .all(|l| edited.contains(l))
            );
            let mut back = main(&edited);
            back.forget(file);
            assert_eq!(back.text(), text);
        }
        let mut none = main("version = 3\n[grpc]\nuid = 0\n");
        none.import(file).unwrap();
        let text = none.text();
        assert!(
            toml::from_str::<Table>(&text)
                .unwrap()
                .contains_key("imports"),
            "{text}"
        );
        assert!(main("imports = 'x'").import(file).is_err());
        assert!(Main::parse(file, "version = [").is_err());
    }
}
