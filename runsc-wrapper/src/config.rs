// SPDX-License-Identifier: Apache-2.0

//! How a node drives its runtime: one TOML file, owned by root, read once.
//!
//! The file is the one that gVisor's own shim reads (`pkg/shim/v1/runsc/options.go`):
//!
//! ```toml
//! binary_name = "/opt/kiln/bin/runsc"  # name or path; default `runsc`
//! root = "/run/containerd/runsc"       # state of the runtime; the namespace is joined to it
//!
//! [runsc_config]                       # any flag of runsc
//! platform = "systrap"
//! overlay2 = "root:memory,size=1g"
//! debug = true
//! debug-log = "/run/kiln-agent/debug/%ID%/"   # %ID% is the container's id
//! ```
//!
//! Table `[kiln]` of the file belongs to whoever uses this library, who also sets
//! [`Config::control_socket`] and [`Config::deadlines`].

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use kiln_host::fs::read_regular;
use serde::Deserialize;

use crate::ContainerId;

/// Largest configuration file, in bytes.
const SIZE_LIMIT: u64 = 256 << 10;

/// Where runsc keeps its state when the file does not say: the place of gVisor's own shim.
const RUNSC_ROOT: &str = "/run/containerd/runsc";

/// Flags that are ours to set on every command: what the file says of them is ignored.
const OURS: &[&str] = &["log", "log-format"];

/// Flags for what is done without them, whatever the file says: where systemd runs the host, whoever
/// uses this library has it make cgroups, and the runtime gets paths of them.
const NEEDLESS: &[&str] = &["systemd-cgroup"];

/// Flags that a file must not turn on, because they let the workload choose its own sandbox.
const FORBIDDEN: &[&str] = &["allow-flag-override", "allow-rootfs-tar-annotation"];

/// Flags whose value is a path in which `%ID%` stands for the container's id.
const PATH_FLAGS: &[&str] = &[
    "panic-log",
    "debug-log",
    "coverage-report",
    "profile-block",
    "profile-cpu",
    "profile-heap",
    "profile-mutex",
    "trace",
];

/// Flags of runsc that are set unless the file sets them. They are the defaults of runsc
/// itself, written down so that a newer runsc cannot change them:
/// no raw sockets, and no UNIX sockets of the host.
const HARDENED: &[(&str, &str)] = &[("net-raw", "false"), ("host-uds", "none")];

/// Top-level keys that mean nothing here: keys of gVisor's shim, and the table of Kiln.
const IGNORED: &[&str] = &[
    "shim_cgroup",
    "grouping",
    "enable_hibernate_server",
    "log_path",
    "log_level",
    "io_uid",
    "io_gid",
    "kiln",
];

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is no TOML, or a key has the wrong type.
    #[error("parse configuration: {0}")]
    Parse(#[from] toml::de::Error),
    /// A key has a value that cannot be used.
    #[error("{key}: {problem}")]
    Value {
        /// The key, with its table.
        key: String,
        /// What is wrong.
        problem: String,
    },
}

/// How long each kind of operation may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Seconds")]
pub struct Deadlines {
    /// Making a container. Many at a time on a small node can take half a minute each.
    pub create: Duration,
    /// Starting its process.
    pub start: Duration,
    /// Starting a further process; not how long it may run.
    pub exec: Duration,
    /// Removing a container.
    pub delete: Duration,
    /// Saving a sandbox, or starting from a saved one.
    pub checkpoint: Duration,
    /// Everything else by command line: signals, state, processes, statistics, pause, resume.
    pub query: Duration,
    /// One call over a control socket, except those that wait for an exit.
    pub control: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            create: Duration::from_secs(100),
            start: Duration::from_secs(100),
            exec: Duration::from_secs(60),
            delete: Duration::from_secs(60),
            checkpoint: Duration::from_secs(300),
            query: Duration::from_secs(30),
            control: Duration::from_secs(10),
        }
    }
}

/// How a node drives its runtime.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The program.
    pub binary: PathBuf,
    /// Directory in which it keeps its state.
    pub root: PathBuf,
    /// Its global flags, without dashes.
    pub flags: BTreeMap<String, String>,
    /// Whether sandboxes may be talked to by their control socket.
    pub control_socket: bool,
    /// How long operations may take.
    pub deadlines: Deadlines,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            binary: find_program(Path::new("runsc")),
            root: RUNSC_ROOT.into(),
            flags: hardened(),
            control_socket: true,
            deadlines: Deadlines::default(),
        }
    }
}

/// Reads a file, which must be a regular one of at most 256 KiB. Blocks.
///
/// # Errors
/// [`ConfigError::Read`].
pub fn read(path: &Path) -> Result<String, ConfigError> {
    read_regular(path, SIZE_LIMIT).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })
}

impl Config {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// When it is no TOML, or holds a value that cannot be used.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let file: File = toml::from_str(text)?;
        for key in file
            .other
            .keys()
            .filter(|key| !IGNORED.contains(&key.as_str()))
        {
            log::warn!("configuration: unknown key {key}");
        }
        let name = file.binary_name.filter(|name| !name.is_empty());
        let root = file.root.filter(|root| !root.is_empty());
        let config = Self {
            binary: find_program(Path::new(name.as_deref().unwrap_or("runsc"))),
            root: root.as_deref().unwrap_or(RUNSC_ROOT).into(),
            flags: flags(file.runsc_config)?,
            ..Self::default()
        };
        if !config.root.is_absolute() {
            return Err(bad("root", "must be an absolute path"));
        }
        Ok(config)
    }

    /// Joins a containerd namespace to the root, as all of containerd's shims do.
    ///
    /// # Errors
    /// When the name cannot be part of a path.
    pub fn in_namespace(mut self, namespace: &str) -> Result<Self, ConfigError> {
        let name: ContainerId = namespace
            .parse()
            .map_err(|e| bad("namespace", &format!("{e}")))?;
        self.root.push(name.as_str());
        Ok(self)
    }

    /// Whether a boolean flag is on, as Go's `strconv.ParseBool` reads it.
    pub fn is_on(&self, flag: &str) -> bool {
        self.flags.get(flag).is_some_and(|value| is_true(value))
    }

    /// The flags as arguments for a command on container `id`, in a fixed order.
    pub(crate) fn flag_args(&self, id: &str) -> Vec<String> {
        let value = |flag: &str, value: &str| {
            if PATH_FLAGS.contains(&flag) {
                with_id(value, id)
            } else {
                value.to_owned()
            }
        };
        self.flags
            .iter()
            .map(|(flag, v)| format!("--{flag}={}", value(flag, v)))
            .collect()
    }

    /// Makes the directories of the files that the flags name for container `id`.
    ///
    /// # Errors
    /// The first directory that cannot be made.
    pub(crate) fn create_log_dirs(&self, id: &str) -> io::Result<()> {
        for flag in PATH_FLAGS {
            let Some(path) = self.flags.get(*flag).filter(|path| !path.is_empty()) else {
                continue;
            };
            let path = with_id(path, id);
            // A trailing slash means a directory, which runsc fills.
            let dir = match path.strip_suffix('/') {
                Some(dir) => Path::new(dir),
                None => Path::new(&path).parent().unwrap_or(Path::new("/")),
            };
            fs::create_dir_all(dir)?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct File {
    binary_name: Option<String>,
    root: Option<String>,
    #[serde(default)]
    runsc_config: BTreeMap<String, toml::Value>,
    #[serde(flatten)]
    other: toml::Table,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seconds {
    create: Option<u64>,
    start: Option<u64>,
    exec: Option<u64>,
    delete: Option<u64>,
    checkpoint: Option<u64>,
    query: Option<u64>,
    control: Option<u64>,
}

impl TryFrom<Seconds> for Deadlines {
    type Error = String;

    fn try_from(seconds: Seconds) -> Result<Self, String> {
        let or = |key: &str, seconds: Option<u64>, default| match seconds {
            None => Ok(default),
            Some(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds)),
            Some(_) => Err(format!("{key} must be 1 to 86400 seconds")),
        };
        let default = Self::default();
        Ok(Self {
            create: or("create", seconds.create, default.create)?,
            start: or("start", seconds.start, default.start)?,
            exec: or("exec", seconds.exec, default.exec)?,
            delete: or("delete", seconds.delete, default.delete)?,
            checkpoint: or("checkpoint", seconds.checkpoint, default.checkpoint)?,
            query: or("query", seconds.query, default.query)?,
            control: or("control", seconds.control, default.control)?,
        })
    }
}

fn hardened() -> BTreeMap<String, String> {
    HARDENED
        .iter()
        .map(|(flag, value)| ((*flag).to_owned(), (*value).to_owned()))
        .collect()
}

fn flags(file: BTreeMap<String, toml::Value>) -> Result<BTreeMap<String, String>, ConfigError> {
    let mut flags = hardened();
    for (flag, value) in file {
        let key = format!("runsc_config.{flag}");
        let value = match value {
            toml::Value::String(value) => value,
            toml::Value::Boolean(value) => value.to_string(),
            toml::Value::Integer(value) => value.to_string(),
            other => return Err(bad(&key, &format!("{} is no flag value", other.type_str()))),
        };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        if !flag.as_bytes().first().is_some_and(u8::is_ascii_alphabetic) || !flag.bytes().all(plain)
        {
            return Err(bad(&key, "is no flag name"));
        }
        if value.contains('\0') {
            return Err(bad(&key, "holds a zero byte"));
        }
        if OURS.contains(&flag.as_str()) {
            log::warn!("configuration: {key} is ignored");
            continue;
        }
        if NEEDLESS.contains(&flag.as_str()) {
            continue;
        }
        if flag == "root" || flag.ends_with("-fd") {
            return Err(bad(&key, "is not for this table"));
        }
        if flag.starts_with("TESTONLY") {
            return Err(bad(&key, "takes the sandbox's walls down"));
        }
        if FORBIDDEN.contains(&flag.as_str()) && !is_false(&value) {
            return Err(bad(&key, "would let the workload choose its sandbox"));
        }
        flags.insert(flag, value);
    }
    Ok(flags)
}

pub(crate) fn is_true(value: &str) -> bool {
    matches!(value, "1" | "t" | "T" | "true" | "TRUE" | "True")
}

fn is_false(value: &str) -> bool {
    matches!(value, "0" | "f" | "F" | "false" | "FALSE" | "False")
}

fn with_id(path: &str, id: &str) -> String {
    path.replace("%ID%", id)
}

/// Looks a bare name up where a command would: commands run with another `PATH` than ours.
fn find_program(name: &Path) -> PathBuf {
    if name.components().count() > 1 {
        return name.to_owned();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path)
        .chain(["/usr/local/bin", "/usr/local/sbin"].map(PathBuf::from));
    let found = dirs
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|p| p.is_file());
    found.unwrap_or_else(|| name.to_owned())
}

fn bad(key: &str, problem: &str) -> ConfigError {
    ConfigError::Value {
        key: key.to_owned(),
        problem: problem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_file_is_read_or_refused() {
        bolero::check!().for_each(|text: &[u8]| {
            let _ = Config::parse(&String::from_utf8_lossy(text));
        });
    }

    #[test]
    fn an_empty_file_is_hardened_runsc() {
        let config = Config::parse("").unwrap();
        assert_eq!(config, Config::default());
        assert!(config.control_socket);
        assert_eq!(
            config.flag_args("x"),
            ["--host-uds=none", "--net-raw=false"]
        );
    }

    #[test]
    fn gvisors_own_file_is_accepted_as_it_is() {
        let config = Config::parse(
            r#"
            binary_name = "/opt/bin/runsc"
            root = "/run/x"
            log_path = "/var/log/%ID%/"
            log_level = "debug"
            shim_cgroup = "/shims"
            io_uid = 5
            io_gid = 6
            grouping = true
            enable_hibernate_server = false
            [runsc_config]
            platform = "kvm"
            debug = true
            num-network-channels = 4
            log = "/tmp/ignored"
            systemd-cgroup = "true"
            allow-flag-override = "false"
            debug-log = "/var/log/%ID%/gvisor.%COMMAND%.log"
            "#,
        )
        .unwrap();
        assert_eq!(config.binary, Path::new("/opt/bin/runsc"));
        assert_eq!(config.root, Path::new("/run/x"));
        assert_eq!(
            config.flag_args("c1"),
            [
                "--allow-flag-override=false",
                "--debug=true",
                "--debug-log=/var/log/c1/gvisor.%COMMAND%.log",
                "--host-uds=none",
                "--net-raw=false",
                "--num-network-channels=4",
                "--platform=kvm",
            ]
        );
        assert!(config.is_on("debug"));
        assert!(!config.is_on("net-raw"));
    }

    #[test]
    fn the_file_overrides_hardened_flags() {
        let config = Config::parse("[runsc_config]\nnet-raw = true\n").unwrap();
        assert!(config.is_on("net-raw"));
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        for (text, key) in [
            (
                "[runsc_config]\nallow-flag-override = true",
                "runsc_config.allow-flag-override",
            ),
            (
                "[runsc_config]\nallow-flag-override = 'yes'",
                "runsc_config.allow-flag-override",
            ),
            (
                "[runsc_config]\nallow-rootfs-tar-annotation = 1",
                "runsc_config.allow-rootfs-tar-annotation",
            ),
            (
                "[runsc_config]\nTESTONLY-unsafe-nonroot = true",
                "runsc_config.TESTONLY-unsafe-nonroot",
            ),
            ("[runsc_config]\nroot = '/x'", "runsc_config.root"),
            ("[runsc_config]\nlog-fd = 3", "runsc_config.log-fd"),
            ("[runsc_config]\n'-x' = true", "runsc_config.-x"),
            ("[runsc_config]\n'a=b' = true", "runsc_config.a=b"),
            ("[runsc_config]\nx = [1]", "runsc_config.x"),
            ("[runsc_config]\nx = \"a\\u0000\"", "runsc_config.x"),
            ("root = 'relative'", "root"),
        ] {
            match Config::parse(text).unwrap_err() {
                ConfigError::Value { key: named, .. } => assert_eq!(named, key),
                other => panic!("{text}: {other}"),
            }
        }
        for text in ["root = 1", "x"] {
            assert!(
                matches!(Config::parse(text), Err(ConfigError::Parse(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn namespaces_cannot_leave_the_root() {
        let config = Config::parse("root = '/run/x'").unwrap();
        assert_eq!(
            config.clone().in_namespace("k8s.io").unwrap().root,
            Path::new("/run/x/k8s.io")
        );
        for namespace in ["", "..", "a/b", "/etc"] {
            assert!(
                config.clone().in_namespace(namespace).is_err(),
                "{namespace:?}"
            );
        }
    }

    #[test]
    fn directories_of_logs_are_made() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().display();
        let config = Config::parse(&format!(
            "[runsc_config]\ndebug-log = '{base}/a/%ID%/'\npanic-log = '{base}/b/%ID%/panic.log'\n"
        ))
        .unwrap();
        config.create_log_dirs("c1").unwrap();
        assert!(dir.path().join("a/c1").is_dir());
        assert!(dir.path().join("b/c1").is_dir());
        assert!(!dir.path().join("b/c1/panic.log").exists());
    }

    #[test]
    fn bare_names_are_looked_up() {
        assert!(find_program(Path::new("sh")).is_absolute());
        assert_eq!(
            find_program(Path::new("no-such-program")),
            Path::new("no-such-program")
        );
        assert_eq!(find_program(Path::new("./bin/x")), Path::new("./bin/x"));
    }
}
