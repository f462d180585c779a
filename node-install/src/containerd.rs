// SPDX-License-Identifier: Apache-2.0

//! The containerd that runs on the node: found by its socket, asked by its own program.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{ffi::OsStringExt, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use kiln_host::reap::pidfd_open;
use nix::sys::socket::{
    getsockopt,
    sockopt::{PeerCredentials, PeerPidfd},
};
use tokio::{process::Command, time::timeout};

use super::{Error, wiring::Handler};
use crate::config;
use crate::cri::{Cri, CriError};

/// The oldest containerd: the file formats that this knows.
const OLDEST: (u32, u32) = (1, 7);

/// How long a program may take to say something of itself.
pub(super) const ANSWER: Duration = Duration::from_secs(30);

/// How long containerd may take to serve again after it was told to start anew.
const RESTART: Duration = Duration::from_secs(90);

/// Its configuration where it was told of none.
const CONFIG: &str = "/etc/containerd/config.toml";

/// A containerd that runs.
#[derive(Debug, Clone)]
pub(super) struct Containerd {
    pub(super) socket: PathBuf,
    pub(super) program: PathBuf,
    pub(super) config: PathBuf,
    /// Where it looks for programs.
    search: OsString,
    pub(super) version: (u32, u32),
    restart: Vec<String>,
    ctr: PathBuf,
}

/// What can be seen of a containerd that runs.
pub(super) struct Process {
    pub(super) program: PathBuf,
    /// Its own file.
    pub(super) config: PathBuf,
    /// Where it looks for programs.
    pub(super) search: OsString,
}

impl Process {
    /// Of the one with this pid. Blocks.
    pub(super) fn of(pid: u32) -> Result<Self, Error> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let read = |name: &str| fs::read(dir.join(name)).map_err(Error::at("read", &dir));
        let program = fs::read_link(dir.join("exe")).map_err(Error::at("look at", &dir))?;
        let search = read("environ")?
            .split(|b| *b == 0)
            .find_map(|v| v.strip_prefix(b"PATH="))
            .map(|path| OsString::from_vec(path.to_owned()))
            .unwrap_or_else(|| {
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()
            });
        let told = config_argument(&read("cmdline")?).map(|path| {
            let from = fs::read_link(dir.join("cwd")).unwrap_or_default();
            from.join(path)
        });
        Ok(Self {
            program: called(without_deleted(program), &read("cmdline")?),
            config: told.unwrap_or_else(|| CONFIG.into()),
            search,
        })
    }
}

/// The process that listens at a socket.
///
/// # Errors
/// When none does.
pub fn listener(socket: &Path) -> Result<u32, Error> {
    pid_of_peer(&connect(socket)?, socket)
}

/// The same process by a pidfd.
///
/// # Errors
/// When none listens.
pub(super) fn listening_process(socket: &Path) -> Result<OwnedFd, Error> {
    let stream = connect(socket)?;
    getsockopt(&stream, PeerPidfd).or_else(|_| {
        // Before kernel 6.5, or where it is in no pid namespace of this process.
        pidfd_open(pid_of_peer(&stream, socket)?).map_err(|e| absent(socket, &e))
    })
}

fn connect(socket: &Path) -> Result<UnixStream, Error> {
    UnixStream::connect(socket).map_err(|e| absent(socket, &e))
}

fn pid_of_peer(stream: &UnixStream, socket: &Path) -> Result<u32, Error> {
    let peer = getsockopt(stream, PeerCredentials).map_err(|e| absent(socket, &e.into()))?;
    u32::try_from(peer.pid())
        .ok()
        .filter(|pid| *pid > 0)
        .ok_or_else(|| Error::Lacks {
            what: format!("who listens at {} cannot be seen", socket.display()),
            advice: "run this where the node's processes can be seen (hostPID)".to_owned(),
        })
}

fn absent(socket: &Path, e: &io::Error) -> Error {
    Error::Lacks {
        what: format!("no containerd listens at {}: {e}", socket.display()),
        advice: "start it, or name its socket: `socket` in [install.containerd]".to_owned(),
    }
}

/// Runs a program that has nothing to read to its end, and returns what it left. It is killed when
/// that takes longer than `limit`.
///
/// # Errors
/// When it cannot be run; of kind [`TimedOut`](io::ErrorKind::TimedOut) when it was killed.
pub async fn output(command: &mut Command, limit: Duration) -> io::Result<Output> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    timeout(limit, child.wait_with_output()).await?
}

/// The value of `--config` in a `/proc/PID/cmdline`.
#[must_use]
pub fn config_argument(arguments: &[u8]) -> Option<PathBuf> {
    let mut words = arguments.split(|b| *b == 0).map(String::from_utf8_lossy);
    while let Some(word) = words.next() {
        if matches!(&*word, "--config" | "-config" | "-c") {
            return words.next().map(|w| PathBuf::from(w.as_ref()));
        }
        if let Some(path) = word.strip_prefix("--config=") {
            return Some(path.into());
        }
    }
    None
}

/// The version in what `containerd --version` says: the major and the minor number.
#[must_use]
pub fn version(words: &str) -> Option<(u32, u32)> {
    let name = words.split_whitespace().nth(2)?.trim_start_matches('v');
    let mut numbers = name
        .split(['.', '-', '+', '~'])
        .map_while(|n| n.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// Finds `ctr`: beside containerd, or in one of the directories of `search`, as some packages have it.
fn find_ctr(containerd: &Path, search: &OsStr) -> PathBuf {
    let beside = containerd.with_file_name("ctr");
    if beside.exists() {
        return beside;
    }
    let found = std::env::split_paths(search).map(|dir| dir.join("ctr"));
    found.into_iter().find(|ctr| ctr.exists()).unwrap_or(beside)
}

impl Containerd {
    /// The one that listens where `config` says.
    pub(super) async fn find(config: &config::Containerd) -> Result<Self, Error> {
        let process = Process::of(listener(&config.socket)?)?;
        let program = process.program;
        let mut found = Self {
            socket: config.socket.clone(),
            ctr: config
                .ctr
                .clone()
                .unwrap_or_else(|| find_ctr(&program, &process.search)),
            config: config.config.clone().unwrap_or(process.config),
            program,
            search: process.search,
            version: (0, 0),
            restart: config.restart.clone(),
        };
        found.version = found.ask_version().await?;
        Ok(found)
    }

    /// One that does not run, with its own file at `config`.
    #[cfg(test)]
    pub(super) async fn of(program: PathBuf, config: PathBuf) -> Self {
        let mut this = Self {
            socket: "/nowhere".into(),
            ctr: "/nowhere".into(),
            config,
            program,
            search: OsString::new(),
            version: (0, 0),
            restart: Vec::new(),
        };
        this.version = this.ask_version().await.unwrap();
        this
    }

    async fn ask_version(&self) -> Result<(u32, u32), Error> {
        let words = self
            .ask(&self.program, &["--version".as_ref()], ANSWER)
            .await?;
        version(&words)
            .filter(|v| *v >= OLDEST)
            .ok_or_else(|| Error::Lacks {
                what: format!("{} is {}", self.program.display(), words.trim()),
                advice: "use containerd 1.7 or newer".to_owned(),
            })
    }

    /// Runs a program as containerd would, and returns what it prints.
    pub(super) async fn ask(
        &self,
        program: &Path,
        args: &[&std::ffi::OsStr],
        limit: Duration,
    ) -> Result<String, Error> {
        let failed = |why: String| Error::Program {
            line: line(program, args),
            why,
        };
        let mut command = Command::new(program);
        let done = output(command.args(args).env("PATH", &self.search), limit).await;
        let done = done.map_err(|e| match e.kind() {
            io::ErrorKind::TimedOut => failed(format!("not done after {} s", limit.as_secs())),
            _ => failed(e.to_string()),
        })?;
        if !done.status.success() {
            let words = String::from_utf8_lossy(&done.stderr);
            return Err(failed(format!("{}: {}", done.status, words.trim())));
        }
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// All of what containerd would go by with `config` as its own file.
    pub(super) async fn dump(&self, config: &Path) -> Result<toml::Table, Error> {
        let args = [
            "--config".as_ref(),
            config.as_os_str(),
            "config".as_ref(),
            "dump".as_ref(),
        ];
        let text = self.ask(&self.program, &args, ANSWER).await?;
        toml::from_str(&text)
            .map_err(|e| Error::Config(format!("what `containerd config dump` says: {e}")))
    }

    /// What `ctr` prints, run on this containerd.
    pub(super) async fn ctr(
        &self,
        args: &[&std::ffi::OsStr],
        limit: Duration,
    ) -> Result<String, Error> {
        let args = [&["--address".as_ref(), self.socket.as_os_str()], args].concat();
        self.ask(&self.ctr, &args, limit).await
    }

    /// What is wrong with a handler of the one that runs.
    pub(super) async fn problem_of(
        &self,
        handler: &Handler<'_>,
    ) -> Result<Option<String>, CriError> {
        let runtimes = Cri::new(&self.socket)?.runtimes().await?;
        Ok(handler.problem(runtimes.get(handler.name)))
    }

    /// Starts containerd anew, and waits until it serves Pods again. Containers run on.
    pub(super) async fn restart(&self) -> Result<(), Error> {
        let before = listener(&self.socket)?;
        let Some((program, args)) = self.restart.split_first() else {
            return Err(Error::Config(
                "`restart` in [install.containerd] is empty".to_owned(),
            ));
        };
        let args: Vec<_> = args.iter().map(std::ffi::OsStr::new).collect();
        self.ask(Path::new(program), &args, RESTART).await?;
        let start = Instant::now();
        loop {
            let why = match listener(&self.socket) {
                Ok(pid) if pid != before => match self.cri().await {
                    Ok(()) => return Ok(()),
                    Err(e) => e,
                },
                Ok(_) => Error::Lacks {
                    what: "containerd was not started anew".to_owned(),
                    advice: "set `restart` in [install.containerd] to what does it here".to_owned(),
                },
                Err(e) => e,
            };
            if start.elapsed() > RESTART {
                return Err(why);
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Whether containerd's part for Kubernetes has started.
    async fn cri(&self) -> Result<(), Error> {
        let plugins = self
            .ctr(&["plugins".as_ref(), "ls".as_ref()], ANSWER)
            .await?;
        let cri = plugins.lines().find(|l| {
            let mut words = l.split_whitespace();
            words.next() == Some("io.containerd.grpc.v1") && words.next() == Some("cri")
        });
        match cri.map(|l| l.split_whitespace().any(|w| w == "ok")) {
            Some(true) => Ok(()),
            found => Err(Error::Lacks {
                what: match found {
                    Some(_) => "containerd's CRI plugin does not start",
                    None => "containerd has no CRI plugin",
                }
                .to_owned(),
                advice: "look at containerd's log, and at disabled_plugins of its configuration"
                    .to_owned(),
            }),
        }
    }
}

/// A program that was replaced since it was started is named so by the kernel.
fn without_deleted(program: PathBuf) -> PathBuf {
    let name = program.to_string_lossy();
    match name.strip_suffix(" (deleted)") {
        Some(name) => name.into(),
        None => program,
    }
}

/// A program that is several in one, as k3s is, goes by the name that it is called by.
fn called(program: PathBuf, arguments: &[u8]) -> PathBuf {
    let word = arguments.split(|b| *b == 0).next().unwrap_or_default();
    let word = PathBuf::from(OsString::from_vec(word.to_owned()));
    match word.file_name() {
        Some(name) if Some(name) != program.file_name() => {
            let named = program.with_file_name(name);
            if named.exists() { named } else { program }
        }
        _ => program,
    }
}

fn line(program: &Path, args: &[&std::ffi::OsStr]) -> String {
    let words = [program.as_os_str()]
        .into_iter()
        .chain(args.iter().copied());
    let words: Vec<_> = words.map(|w| w.to_string_lossy()).collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctr_is_beside_containerd_or_where_containerd_looks_for_programs() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["own", "bin"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let search = std::env::join_paths([at("none"), at("bin")]).unwrap();
        let found = || find_ctr(&at("own/containerd"), &search);
        assert_eq!(found(), at("own/ctr"));
        std::fs::write(at("bin/ctr"), "").unwrap();
        assert_eq!(found(), at("bin/ctr"));
        std::fs::write(at("own/ctr"), "").unwrap();
        assert_eq!(found(), at("own/ctr"));
    }

    #[test]
    fn a_containerds_configuration_is_in_its_arguments() {
        let found = |words: &str| config_argument(words.replace(' ', "\0").as_bytes());
        assert_eq!(found("containerd"), None);
        assert_eq!(found("containerd --config /a b"), Some("/a".into()));
        assert_eq!(found("containerd -l debug -c /a"), Some("/a".into()));
        assert_eq!(found("containerd --config=/a"), Some("/a".into()));
    }

    #[test]
    fn one_of_many_in_a_program_is_found_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let [k3s, name] = ["k3s", "containerd"].map(|name| dir.path().join(name));
        fs::write(&k3s, "").unwrap();
        let of = |arguments: &[u8]| called(k3s.clone(), arguments);
        assert_eq!(of(b"containerd\0-c\0/x"), k3s);
        std::os::unix::fs::symlink("k3s", &name).unwrap();
        assert_eq!(of(b"containerd\0-c\0/x"), name);
        assert_eq!(of(b""), k3s);
    }

    #[test]
    fn versions_of_all_who_build_it_are_read() {
        let of = |name: &str| {
            version(&format!(
                "containerd github.com/containerd/containerd {name} abc"
            ))
        };
        assert_eq!(of("v2.4.2"), Some((2, 4)));
        assert_eq!(of("1.7.28"), Some((1, 7)));
        assert_eq!(of("1.6.20~ds1"), Some((1, 6)));
        assert_eq!(of("v2.1.0-rc.1+k3s"), Some((2, 1)));
        assert_eq!(version("what?"), None);
    }

    #[test]
    fn a_program_that_was_replaced_is_the_one_in_its_place() {
        assert_eq!(
            without_deleted("/bin/c (deleted)".into()),
            Path::new("/bin/c")
        );
        assert_eq!(without_deleted("/bin/c".into()), Path::new("/bin/c"));
    }
}
