// SPDX-License-Identifier: Apache-2.0

//! Whether Pods of the class can start: what was installed is still there as it was put there, and
//! the containerd that runs has the handler. All of that is others' to change at any time.
//!
//! Files are looked at below the root of containerd's process, where this one is in a container.

use std::{
    collections::HashMap,
    env,
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use kiln_agent_api::NodeConfig;
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::Mode,
};

use super::{
    Error, Install, SHIM,
    containerd::{Process, listener},
    files::{Record, digest},
    wiring::{Handler, Main},
};
use crate::{
    config::Config,
    cri::{Cri, CriError, Runtime},
};

/// Largest text that is read, in bytes.
const TEXT_LIMIT: u64 = 4 << 20;

/// Whether Pods of the class can start on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It cannot be seen, for this reason: containerd does not run, or has just been started.
    Unknown(String),
    /// They can.
    Good,
    /// They cannot, or not after containerd's next start, for this reason.
    Bad(String),
}

/// Looks again and again, and reads only what has changed since.
pub struct Check {
    config: Config,
    cri: Option<Cri>,
    digests: Digests,
}

/// A file's digest, for as long as it is the same file.
type Digests = HashMap<PathBuf, (Stamp, String)>;

/// What changes when a file does.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp([i64; 5], [u64; 3]);

impl Stamp {
    fn of(meta: &Metadata) -> Self {
        let times = [
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        ];
        let [mtime, mtime_ns, ctime, ctime_ns] = times;
        let mode = i64::from(meta.mode());
        Self(
            [mtime, mtime_ns, ctime, ctime_ns, mode],
            [meta.dev(), meta.ino(), meta.size()],
        )
    }
}

impl Check {
    /// Of a node with this configuration.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            cri: None,
            digests: Digests::new(),
        }
    }

    /// Looks once.
    pub async fn look(&mut self) -> Health {
        let (config, digests) = (self.config.clone(), std::mem::take(&mut self.digests));
        let looked = tokio::task::spawn_blocking(move || {
            let mut digests = digests;
            let found = Place::look(&config, &mut digests);
            (found, digests)
        });
        let place = match looked.await {
            Ok((found, digests)) => {
                self.digests = digests;
                found
            }
            Err(e) => return Health::Unknown(e.to_string()),
        };
        match place {
            Ok(place) => match self.handler(place).await {
                Ok(None) => Health::Good,
                Ok(Some(why)) => Health::Bad(why),
                Err(e) => Health::Unknown(e.to_string()),
            },
            Err(Trouble::Bad(why)) => Health::Bad(why),
            Err(Trouble::Unknown(e)) => Health::Unknown(e.to_string()),
        }
    }

    /// What is wrong with the handler of the containerd that runs, and with the shim that it names.
    async fn handler(&mut self, place: Place) -> Result<Option<String>, CriError> {
        let cri = match &self.cri {
            Some(cri) => cri,
            None => self.cri.insert(Cri::new(self.config.containerd_socket())?),
        };
        let runtimes = cri.runtimes().await?;
        let name = self.config.handler();
        let found = runtimes.get(name);
        if let Some(install) = &self.config.install {
            let handler = Handler {
                name,
                shim: &install.program(SHIM),
                config: &self.config.runtime_config,
            };
            return Ok(handler.problem(found));
        }
        let Some(found) = found.cloned() else {
            return Ok(Some(format!("containerd has no handler {name}")));
        };
        let looked = tokio::task::spawn_blocking(move || place.shim_problem(&found));
        let problem = looked.await.ok().flatten();
        Ok(problem.map(|why| format!("handler {name} of containerd: {why}")))
    }
}

/// Why a look ends.
enum Trouble {
    Bad(String),
    Unknown(Error),
}

impl From<Error> for Trouble {
    fn from(e: Error) -> Self {
        Self::Unknown(e)
    }
}

/// The file system of the containerd that runs.
struct Place {
    root: File,
    process: Process,
}

impl Place {
    /// Fails where something is gone, or another than it was. Blocks.
    fn look(config: &Config, digests: &mut Digests) -> Result<Self, Trouble> {
        let pid = listener(config.containerd_socket())?;
        let path = PathBuf::from(format!("/proc/{pid}/root"));
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = open(&path, flags, Mode::empty()).map_err(io::Error::from);
        let place = Self {
            root: root.map_err(Error::at("open", &path))?.into(),
            process: Process::of(pid)?,
        };
        if let Some(install) = &config.install {
            place.expect_installed(config, install, digests)?;
        }
        place.expect_runtime(&config.runtime_config)?;
        Ok(place)
    }

    /// Opens a file of the node.
    fn open(&self, path: &Path, flags: OFlag) -> io::Result<File> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(openat2(&self.root, path, how).map(File::from)?)
    }

    /// Opens one that has to be there.
    fn need(&self, path: &Path) -> Result<File, Trouble> {
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK;
        self.open(path, flags).map_err(|e| lost(path, e))
    }

    fn text(&self, path: &Path) -> Result<String, Trouble> {
        let mut text = String::new();
        let read = self.need(path)?.take(TEXT_LIMIT).read_to_string(&mut text);
        read.map_err(Error::at("read", path))?;
        Ok(text)
    }

    /// Fails unless every file is as it was put there, but for those that are the user's as well,
    /// and containerd reads what it is to read.
    fn expect_installed(
        &self,
        config: &Config,
        install: &Install,
        digests: &mut Digests,
    ) -> Result<(), Trouble> {
        let path = Record::file(&install.dir);
        let record = Record::parse(self.text(&path)?.as_bytes());
        let record = record.map_err(Error::at("read", &path))?;
        let Some(wired) = &record.wired else {
            return Err(Trouble::Bad(format!(
                "{} does not say how containerd comes by the handler",
                path.display()
            )));
        };
        let is_ours = |path: &Path| {
            let is_there = path.starts_with(&install.dir) || path == wired.drop_in;
            is_there && path != config.runtime_config
        };
        for (path, placed) in &record.files {
            if is_ours(path) && self.digest(path, digests)? != placed.sha256 {
                return Err(Trouble::Bad(format!(
                    "{} is not what was put there",
                    path.display()
                )));
            }
        }
        let own = install.containerd.config.as_ref();
        let own = own.unwrap_or(&self.process.config);
        let main = Main::parse(own, &self.text(own)?).map_err(|e| Trouble::Bad(e.to_string()))?;
        match main.imports_file(&wired.drop_in) {
            true => Ok(()),
            false => Err(Trouble::Bad(format!(
                "{} does not import {}",
                own.display(),
                wired.drop_in.display()
            ))),
        }
    }

    fn digest(&self, path: &Path, digests: &mut Digests) -> Result<String, Trouble> {
        let file = self.need(path)?;
        let stamp = Stamp::of(&file.metadata().map_err(Error::at("look at", path))?);
        match digests.get(path) {
            Some((before, digest)) if *before == stamp => Ok(digest.clone()),
            _ => {
                let digest = digest(&file).map_err(Error::at("read", path))?;
                digests.insert(path.to_owned(), (stamp, digest.clone()));
                Ok(digest)
            }
        }
    }

    /// Fails unless the runtime can be run.
    fn expect_runtime(&self, config: &Path) -> Result<(), Trouble> {
        let read = NodeConfig::parse(&self.text(config)?);
        let NodeConfig { runtime, .. } =
            read.map_err(|e| Trouble::Bad(format!("{}: {e}", config.display())))?;
        // Where it is none, it was looked for in this process's PATH, which is not the node's.
        match runtime.binary.is_absolute() {
            true => self.expect_program(&runtime.binary),
            false => Ok(()),
        }
    }

    fn expect_program(&self, path: &Path) -> Result<(), Trouble> {
        let meta = self.open(path, OFlag::O_PATH).and_then(|f| f.metadata());
        let meta = meta.map_err(|e| lost(path, e))?;
        match meta.is_file() && meta.permissions().mode() & 0o111 != 0 {
            true => Ok(()),
            false => Err(Trouble::Bad(format!("{} is no program", path.display()))),
        }
    }

    /// What is wrong with the shim that containerd takes for a handler.
    fn shim_problem(&self, handler: &Runtime) -> Option<String> {
        let named = &handler.runtime_path;
        if !named.as_os_str().is_empty() {
            return match self.expect_program(named) {
                Err(Trouble::Bad(why)) => Some(why),
                _ => None,
            };
        }
        let name = shim_name(&handler.runtime_type)?;
        let beside = self.process.program.with_file_name(&name);
        let places = env::split_paths(&self.process.search).map(|dir| dir.join(&name));
        let is_there = places
            .chain([beside])
            .any(|p| self.expect_program(&p).is_ok());
        (!is_there).then(|| format!("there is no {name} where containerd looks for programs"))
    }
}

fn lost(path: &Path, e: io::Error) -> Trouble {
    match e.kind() {
        io::ErrorKind::NotFound => Trouble::Bad(format!("{} is gone", path.display())),
        _ => Trouble::Unknown(Error::at("open", path)(e)),
    }
}

/// The program that containerd runs for a type such as `io.containerd.kiln.v2`.
fn shim_name(runtime_type: &str) -> Option<String> {
    let mut parts = runtime_type.rsplit('.');
    let (version, name) = (parts.next()?, parts.next()?);
    Some(format!("containerd-shim-{name}-{version}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The file system of this process.
    fn place() -> Place {
        Place {
            root: File::open("/").unwrap(),
            process: Process::of(std::process::id()).unwrap(),
        }
    }

    fn words<T>(done: Result<T, Trouble>) -> String {
        match done {
            Ok(_) => String::new(),
            Err(Trouble::Bad(why)) => why,
            Err(Trouble::Unknown(e)) => panic!("{e}"),
        }
    }

    #[test]
    fn a_program_is_there_or_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("text");
        fs::write(&text, "").unwrap();
        let place = place();
        assert_eq!(words(place.expect_program(Path::new("/bin/sh"))), "");
        assert!(words(place.expect_program(&text)).ends_with("text is no program"));
        let gone = dir.path().join("gone");
        assert!(words(place.expect_program(&gone)).ends_with("gone is gone"));
        let shim = |runtime_type: &str, path: &Path| {
            place.shim_problem(&Runtime {
                runtime_type: runtime_type.to_owned(),
                runtime_path: path.to_owned(),
                ..Runtime::default()
            })
        };
        assert_eq!(shim("", Path::new("/bin/sh")), None);
        assert!(shim("", &gone).unwrap().contains("is gone"));
        let lacking = shim("io.containerd.nobodys.v9", Path::new("")).unwrap();
        assert!(lacking.contains("containerd-shim-nobodys-v9"), "{lacking}");
    }

    #[test]
    fn a_file_is_read_again_when_it_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "one").unwrap();
        let (place, mut digests) = (place(), Digests::new());
        let mut digest = || place.digest(&file, &mut digests).ok().unwrap();
        let one = digest();
        assert_eq!(digest(), one);
        let other = dir.path().join("other");
        fs::write(&other, "two").unwrap();
        fs::rename(&other, &file).unwrap();
        assert_ne!(digest(), one);
    }
}
