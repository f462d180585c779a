// SPDX-License-Identifier: Apache-2.0

//! containerd's files: tried out beside the real ones first.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use tempfile::NamedTempFile;
use toml::Table;

use super::{
    DROP_IN, Error, Run,
    containerd::Containerd,
    files::{Source, Wired},
    wiring::{self, Handler, Main},
};

/// containerd's own file as it is.
#[derive(Clone)]
pub(super) struct Own {
    pub(super) mode: u32,
    main: Main,
}

impl Own {
    /// Reads it; where there is none, it is one that says nothing.
    pub(super) fn read(path: &Path, major: u32) -> Result<Self, Error> {
        let main = match fs::read_to_string(path) {
            Ok(text) => Main::parse(path, &text)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Main::new(path, major)?,
            Err(e) => return Err(Error::at("read", path)(e)),
        };
        let mode = fs::metadata(path).map_or(0o644, |m| m.permissions().mode() & 0o7777);
        Ok(Self { mode, main })
    }

    /// Whether it imports `drop_in` by its name.
    pub(super) fn names(&self, drop_in: &Path) -> bool {
        self.main.names(drop_in)
    }

    /// What it says without `drop_in`.
    pub(super) fn without(mut self, drop_in: &Path) -> String {
        self.main.forget(drop_in);
        self.main.text()
    }
}

/// The file itself, where `path` is a link to it: the link stays.
pub(super) fn target(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// A file beside `path` for as long as the value lives. containerd takes what its own file imports
/// from where that is.
fn beside(path: &Path, text: &str) -> Result<NamedTempFile, Error> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let made = tempfile::Builder::new().prefix(".kiln-").tempfile_in(dir);
    let mut file = made.map_err(Error::at("make a file in", dir))?;
    file.write_all(text.as_bytes())
        .map_err(Error::at("write", file.path()))?;
    Ok(file)
}

/// All of what containerd would go by, if its own file at `path` said `text`.
pub(super) async fn dump_of(
    containerd: &Containerd,
    path: &Path,
    text: &str,
) -> Result<Table, Error> {
    let own = beside(path, text)?;
    let dump = containerd.dump(own.path()).await;
    dump.map_err(|e| renamed(e, own.path(), path))
}

/// Has a program's words about the file at `trial`, which is gone by now, name `path` instead.
fn renamed(error: Error, trial: &Path, path: &Path) -> Error {
    let [trial, path] = [trial, path].map(|p| p.display().to_string());
    match error {
        Error::Program { line, why } => Error::Program {
            line: line.replace(&trial, &path),
            why: why.replace(&trial, &path),
        },
        other => other,
    }
}

impl Run<'_> {
    /// Has containerd's files name the handler, whose shim is this.
    pub(super) async fn wire(&mut self, shim: &Path) -> Result<(), Error> {
        let (major, _) = self.containerd.version;
        let path = &self.containerd.config;
        let mut own = Own::read(path, major)?;
        let drop_in = self.drop_in(&own.main, major);
        self.expect_no_other_installation(&own.main, &drop_in, shim)?;
        if !own.main.imports_file(&drop_in) && own.main.is_generated() {
            return Err(Error::Lacks {
                what: format!(
                    "{} says of itself that it is generated, and does not import {}: what is \
                     written into it is lost when it is generated again",
                    path.display(),
                    drop_in.display()
                ),
                advice: "have what generates it write `imports` of all files in a directory, or \
                         the handler itself, and then use a configuration without [install] \
                         (docs/install-k3s-kind.md)"
                    .to_owned(),
            });
        }
        if let Some(dir) = path.parent() {
            self.changes.make_dir(dir)?;
        }
        let handler = Handler {
            name: &self.install.handler,
            shim,
            config: &self.config.runtime_config,
        };
        let without = own.clone().without(&drop_in);
        let before = dump_of(self.containerd, path, &without).await?;
        let wanted = handler.drop_in(own.main.format(major), &before)?;
        let after = self.try_out(&without, &drop_in, &wanted).await?;
        handler.expect_alone(&before, &after)?;

        // Another installation's was refused: this is ours, and its record was lost.
        let there = fs::read_to_string(&drop_in);
        if there.is_ok_and(|text| text.starts_with(wiring::HEAD)) {
            self.changes.adopt(&drop_in)?;
        }
        let record = &mut self.changes.record;
        record.wired = Some(Wired {
            config: path.clone(),
            drop_in: drop_in.clone(),
        });
        // Until it is known that nothing changes: this run may be cut off.
        let was_due = std::mem::replace(&mut record.restart_is_due, true);
        let mut changed = self.changes.put(&drop_in, 0o644, &Source::Text(&wanted))?;
        if !own.main.imports_file(&drop_in) {
            own.main.import(&drop_in)?;
            let text = own.main.text();
            let target = target(path);
            changed |= self.changes.put(&target, own.mode, &Source::Text(&text))?;
        }
        // What is in the drop-in is the handler alone, from containerd 2 on: where the one that runs
        // has that, because somebody has taken a file away since, it need not be started anew.
        let is_due = was_due || changed;
        let has_it = async || matches!(self.containerd.problem_of(&handler).await, Ok(None));
        let is_due = is_due && (major < 2 || !has_it().await);
        self.changes.record.restart_is_due = is_due;
        self.changed |= changed;
        handler.expect_alone(&before, &self.containerd.dump(path).await?)
    }

    /// Where the file that containerd reads as well is, or goes.
    fn drop_in(&self, main: &Main, major: u32) -> PathBuf {
        let named = self.install.containerd.drop_in.clone();
        let wired = self.changes.record.wired.as_ref();
        let wired = wired.filter(|w| w.config == self.containerd.config);
        named
            .or_else(|| wired.map(|w| w.drop_in.clone()))
            .unwrap_or_else(|| match major {
                2.. => main.place_for(DROP_IN),
                // It has a whole section in it, and must be the last that is read.
                _ => self.containerd.config.with_file_name(DROP_IN),
            })
    }

    /// Fails when another installation of Kiln, one with another shim, has its file at `drop_in` or
    /// where `main` imports it. To take that for the user's would take its handler away and leave
    /// the file at the end; and each would put the own file back as it was before itself.
    fn expect_no_other_installation(
        &self,
        main: &Main,
        drop_in: &Path,
        shim: &Path,
    ) -> Result<(), Error> {
        for file in main.imported().into_iter().chain([drop_in.to_owned()]) {
            // What cannot be read is told by containerd, or by who writes it.
            let text = fs::read(&file).unwrap_or_default();
            let other = wiring::other_handler(&String::from_utf8_lossy(&text), shim);
            if let Some(other) = other {
                return Err(Error::Lacks {
                    what: format!(
                        "{} is of another installation of Kiln: {other}",
                        file.display()
                    ),
                    advice: "take that away first, by `kilnctl node disable` with its \
                             configuration"
                        .to_owned(),
                });
            }
        }
        Ok(())
    }

    /// Asks containerd what it would make of the files, before they are where it reads them: of its
    /// own, which says `without`, and the drop-in, which is to say `wanted`.
    async fn try_out(&self, without: &str, drop_in: &Path, wanted: &str) -> Result<Table, Error> {
        let path = &self.containerd.config;
        let trial = beside(path, wanted)?;
        let mut main = Main::parse(path, without)?;
        let is_first = main.is_of_version_1();
        main.import(trial.path())?;
        let dump = dump_of(self.containerd, path, &main.text()).await;
        dump.map_err(|e| match renamed(e, trial.path(), drop_in) {
            // containerd 1.7 takes names of plugins for those of the newest file that it has read.
            Error::Program { why, .. } if is_first && self.containerd.version.0 < 2 => {
                Error::Lacks {
                    what: format!(
                        "{} is in version 1 of containerd's format, which bears no file of ours \
                         beside it: {why}",
                        path.display()
                    ),
                    advice: "write it in version 2, as `containerd config dump` prints it"
                        .to_owned(),
                }
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests;
