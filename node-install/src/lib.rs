// SPDX-License-Identifier: Apache-2.0

//! Puts what Pods of the class need on a node, and takes it away again.
//!
//! What is put there: the shim, the pause program and runsc in `bin/` of one directory, by digest
//! and each by one rename; the runtime's configuration; one file that containerd reads as well. A
//! configuration that is there already is the node's, and is used with the runsc that it names.
//! containerd's own program says beforehand whether its configuration would differ in more than
//! the handler; it is started anew only where something changed, and then a container is run
//! through it. When a step fails, everything is put back as it was. A record of what is there,
//! written before each change, lets a later run take back what one that was cut off has left.
//!
//! Pods live on through all of it: an earlier runsc stays for as long as a sandbox of it runs,
//! and nothing is taken away while Pods need it.

mod check;
pub mod config;
mod containerd;
mod cri;
pub mod exec_dir;
mod files;
mod host;
mod remove;
mod smoke;
mod wire;
mod wiring;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use kiln_agent_api::NodeConfig;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use runsc_wrapper::Config as RuntimeConfig;
use serde::{Deserialize, Serialize};

pub use self::{
    check::{Check, Health},
    containerd::listener,
    host::run_on_node,
};
use self::{
    containerd::{ANSWER, Containerd},
    files::{Changes, Record, Source},
    wiring::Handler,
};
pub use self::{
    containerd::{config_argument, output, version as containerd_version},
    host::{Outcome, enter},
    remove::uninstall,
    wiring::{CRI, RUNTIME_TYPE},
};
use crate::config::{Config, Install};

/// The programs, as they are called in an image and on a node.
pub const SHIM: &str = "containerd-shim-kiln-v2";
const PAUSE: &str = "kiln-pause";
const RUNSC: &str = "runsc";

/// The file that containerd reads as well.
const DROP_IN: &str = "kiln.toml";

/// What the runtime's configuration says where the node has none.
const RUNTIME: &str = include_str!("../../deploy/runsc.toml");

/// Why something was not installed or taken away.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node lacks something.
    #[error("{what}; {advice}")]
    Lacks {
        /// What was found.
        what: String,
        /// What to do.
        advice: String,
    },
    /// A file could not be used.
    #[error("{doing} {}: {source}", path.display())]
    File {
        /// What was to be done with it.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A configuration says something that cannot be.
    #[error("{0}")]
    Config(String),
    /// A program of the node failed.
    #[error("{line}: {why}")]
    Program {
        /// How it was called.
        line: String,
        /// What became of it, with its words.
        why: String,
    },
    /// Sandboxes do not run.
    #[error("a sandbox for trial does not run: {0}")]
    Smoke(String),
    /// It failed, and was put back.
    #[error("{0}. Everything was put back as it was")]
    PutBack(Box<Error>),
    /// It failed, and could not be put back.
    #[error("{why}. It could not be put back as it was: {then}")]
    LeftOver {
        /// Why it was to be put back.
        why: Box<Error>,
        /// Why it was not.
        then: Box<Error>,
    },
}

impl Error {
    fn at(doing: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::File {
            doing,
            path: path.to_owned(),
            source,
        }
    }
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Whether files have changed.
    pub changed: bool,
    /// Whether containerd was started anew.
    pub restarted: bool,
    /// Pods because of which nothing was taken away.
    pub in_use: usize,
    /// For people.
    pub words: String,
}

/// What is to be put on a node, opened before the node is entered.
#[derive(Debug)]
pub struct Payload {
    shim: Option<File>,
    pause: Option<File>,
    runsc: Option<File>,
}

impl Payload {
    /// The programs in a directory, as far as they are there.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        let open = |name: &str| File::open(dir.join(name)).ok();
        Self {
            shim: open(SHIM),
            pause: open(PAUSE),
            runsc: open(RUNSC),
        }
    }
}

/// Installs on the node on which, and in whose namespaces, this process runs. Blocks also between
/// its awaits: for a process that does nothing else.
///
/// # Errors
/// What the node lacks; then nothing was changed, or all of it was put back.
pub async fn install(config: &Config, from: &Payload) -> Result<Done, Error> {
    let install = installation(config)?;
    let containerd = Containerd::find(&install.containerd).await?;
    let _lock = lock(install)?;
    let mut run = Run {
        config,
        install,
        containerd: &containerd,
        changes: Changes::begin(&install.dir)?,
        changed: false,
        restarts: None,
    };
    let why = match run.all(from).await {
        Ok(version) => {
            let (changed, restarted) = (run.changed, run.restarts.is_some());
            run.changes.commit()?;
            return Ok(Done {
                changed,
                restarted,
                words: format!("sandboxes run, by {version}"),
                in_use: 0,
            });
        }
        Err(why) => Box::new(why),
    };
    let rolled_back = run.changes.roll_back();
    let restarted = match run.restarts {
        // One that was not started anew goes by the files of before still.
        Some(before) if listener(&containerd.socket).ok() != Some(before) => {
            containerd.restart().await
        }
        _ => Ok(()),
    };
    Err(match rolled_back.and(restarted) {
        Ok(()) => Error::PutBack(why),
        Err(then) => Error::LeftOver {
            why,
            then: Box::new(then),
        },
    })
}

/// Held while a node is changed: two runs at once would take back each other's work. It is on the
/// directory of containerd's socket, which is there on every node, so that nothing is left of it.
fn lock(install: &Install) -> Result<Flock<File>, Error> {
    let dir = install.containerd.socket.parent();
    let dir = dir.unwrap_or(Path::new("/"));
    let file = File::open(dir).map_err(Error::at("open", dir))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| match e {
        Errno::EWOULDBLOCK => Error::Lacks {
            what: "another installation on this node is under way".to_owned(),
            advice: "try again when it has ended".to_owned(),
        },
        e => Error::at("lock", dir)(e.into()),
    })
}

/// What is to be put on the node.
///
/// # Errors
/// [`Error::Config`], where the configuration has no `[install]`.
pub fn installation(config: &Config) -> Result<&Install, Error> {
    let absent = || Error::Config("there is no [install] in the configuration".to_owned());
    config.install.as_ref().ok_or_else(absent)
}

/// Whether something is installed, as the record says.
///
/// # Errors
/// When the record cannot be read.
pub fn is_installed(config: &Config) -> Result<bool, Error> {
    Ok(!Record::load(&installation(config)?.dir)?.is_empty())
}

/// An installation under way.
struct Run<'a> {
    config: &'a Config,
    install: &'a Install,
    containerd: &'a Containerd,
    changes: Changes,
    changed: bool,
    /// containerd's pid before it was told to start anew, if it was.
    restarts: Option<u32>,
}

impl Run<'_> {
    /// All of it. Returns the runtime's version.
    async fn all(&mut self, from: &Payload) -> Result<String, Error> {
        let shim = self.program(SHIM, from.shim.as_ref())?;
        let pause = self.program(PAUSE, from.pause.as_ref())?;
        let runtime = self.runtime(from.runsc.as_ref())?;
        let version = self.runtime_version(&runtime).await?;
        self.wire(&shim).await?;
        env!("CARGO_PKG_VERSION").clone_into(&mut self.changes.record.version);
        if self.changes.record.restart_is_due {
            self.changes.save()?;
            self.restarts = Some(listener(&self.containerd.socket)?);
            self.containerd.restart().await?;
            self.expect_handler(&shim).await?;
            self.changes.record.restart_is_due = false;
        }
        let trial = smoke::Trial {
            containerd: self.containerd,
            shim: &shim,
            runtime_config: &self.config.runtime_config,
            dir: &self.install.dir,
        };
        trial.run(&pause).await?;
        self.remove_old_runtimes(&runtime)?;
        Ok(version)
    }

    /// Fails where the containerd that was started anew does not have the handler: whoever starts it
    /// may have written its file anew.
    async fn expect_handler(&self, shim: &Path) -> Result<(), Error> {
        let handler = Handler {
            name: &self.install.handler,
            shim,
            config: &self.config.runtime_config,
        };
        match self.containerd.problem_of(&handler).await {
            Ok(Some(what)) => Err(Error::Lacks {
                what: format!("{what}, though it was started anew with it"),
                advice: format!(
                    "look who writes {}; where that is k3s, see docs/install-k3s-kind.md",
                    self.containerd.config.display()
                ),
            }),
            Ok(None) => Ok(()),
            Err(e) => {
                tracing::warn!("whether containerd has the handler is not known: {e}");
                Ok(())
            }
        }
    }

    fn put(&mut self, path: &Path, mode: u32, source: &Source<'_>) -> Result<(), Error> {
        self.changed |= self.changes.put(path, mode, source)?;
        Ok(())
    }

    fn program(&mut self, name: &str, from: Option<&File>) -> Result<PathBuf, Error> {
        let from = from.ok_or_else(|| Error::Lacks {
            what: format!("there is no {name} in {}", self.install.from.display()),
            advice: "name the directory with the programs: `from` in [install]".to_owned(),
        })?;
        let path = self.install.program(name);
        self.put(&path, 0o755, &Source::File(from))?;
        Ok(path)
    }

    /// The runtime and its configuration. Returns the runtime's program.
    fn runtime(&mut self, from: Option<&File>) -> Result<PathBuf, Error> {
        let config = &self.config.runtime_config;
        let ours = self.own_runsc(from)?;
        self.adopt_config(config)?;
        let is_ours = self.changes.record.files.contains_key(config);
        let mut base = None;
        if config.exists() && (!is_ours || self.changes.was_edited(config)?) {
            let program = self.load_runtime()?.binary;
            let is_lost = self.is_own_runsc(&program) && !program.exists();
            let is_named = self.install.runsc.is_none() && ours.as_ref() == Some(&program);
            if !is_lost && !is_named {
                return Ok(program);
            }
            base = Some(fs::read_to_string(config).map_err(Error::at("read", config))?);
        }
        let program = match (&self.install.runsc, ours, from) {
            (Some(path), ..) => path.clone(),
            (None, Some(path), Some(from)) => {
                self.put(&path, 0o755, &Source::File(from))?;
                path
            }
            _ => {
                return Err(Error::Lacks {
                    what: format!(
                        "there is no runsc: none in {}, and no {}",
                        self.install.from.display(),
                        config.display()
                    ),
                    advice: "put one there, or name the node's: `runsc` in [install]".to_owned(),
                });
            }
        };
        let text = self.runtime_config(base.as_deref(), &program)?;
        if base.is_none_or(|base| base != text) {
            self.put(config, 0o644, &Source::Text(&text))?;
        }
        Ok(self.load_runtime()?.binary)
    }

    /// Takes a configuration for ours that is as it was put there, where the record was lost.
    fn adopt_config(&mut self, path: &Path) -> Result<(), Error> {
        let Ok(text) = fs::read_to_string(path) else {
            return Ok(());
        };
        let config = NodeConfig::parse(&text).ok();
        let program = config
            .map(|config| config.runtime.binary)
            .filter(|p| self.is_own_runsc(p));
        match program {
            Some(program) if self.runtime_config(None, &program)? == text => {
                self.changes.adopt(path)
            }
            _ => Ok(()),
        }
    }

    /// Where the runsc that is installed with this program is to be, if one is: by its digest, for
    /// sandboxes that run go on with theirs.
    fn own_runsc(&self, from: Option<&File>) -> Result<Option<PathBuf>, Error> {
        let digest = from.map(|from| Source::File(from).digest()).transpose();
        let digest = digest.map_err(Error::at("read", Path::new(RUNSC)))?;
        Ok(digest.map(|it| self.install.program(&format!("{RUNSC}-{}", &it[..12]))))
    }

    fn is_own_runsc(&self, path: &Path) -> bool {
        let start = self.install.program(&format!("{RUNSC}-"));
        path.to_string_lossy()
            .starts_with(&*start.to_string_lossy())
    }

    fn load_runtime(&self) -> Result<RuntimeConfig, Error> {
        let config = NodeConfig::load(Some(&self.config.runtime_config));
        let config = config.map_err(|e| Error::Config(e.to_string()))?;
        Ok(config.runtime)
    }

    /// What `deploy/` has, with what is this node's; or the node's own `base`, which names a runsc of
    /// ours that is gone.
    fn runtime_config(&self, base: Option<&str>, program: &Path) -> Result<String, Error> {
        let text = base.unwrap_or(RUNTIME).parse::<toml_edit::DocumentMut>();
        let mut text = text.map_err(|e| Error::Config(format!("runtime configuration: {e}")))?;
        let path = |path: &Path| toml_edit::value(path.display().to_string());
        text["binary_name"] = path(program);
        if base.is_some() {
            return Ok(text.to_string());
        }
        text["root"] = path(&self.install.runtime_root);
        text["kiln"]["agent"] = path(&self.config.socket);
        Ok(text.to_string())
    }

    async fn runtime_version(&self, program: &Path) -> Result<String, Error> {
        let words = self
            .containerd
            .ask(program, &["--version".as_ref()], ANSWER)
            .await;
        let words = words.map_err(|e| Error::Lacks {
            what: e.to_string(),
            advice: format!(
                "install runsc of 2024 or newer there, or name another in {}",
                self.config.runtime_config.display()
            ),
        })?;
        Ok(words.lines().next().unwrap_or_default().to_owned())
    }
}
