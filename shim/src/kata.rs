// SPDX-License-Identifier: Apache-2.0

//! The binary under the name of a handler of Kata's: looks whether the node can run Kata, and
//! becomes Kata's own shim, with the arguments, environment and standard input that it was given.
//!
//! containerd runs the binary for `start`, `delete` and `-info`; everything else goes to the
//! server that Kata's shim starts. Which Kata that is says `kata.toml` beside the name that the
//! binary was called by, else `/etc/kiln/kata.toml`, else where Kata's packages put it.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use serde::Deserialize;

use crate::{Error, Result};

/// What the binary's name begins with where a handler of type `io.containerd.kata-….v2` runs it.
const NAME: &str = "containerd-shim-kata";

/// The configuration's name.
const FILE: &str = "kata.toml";

/// Where that is unless it is beside the binary.
const DIR: &str = "/etc/kiln";

/// Which Kata to become, and what it needs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Kata {
    /// Kata's shim: the first that is there.
    shim: Vec<PathBuf>,
    /// Kata's configuration, of which one has to be there. Which of them Kata reads is its affair.
    config: Vec<PathBuf>,
    /// The device that its hypervisor needs.
    kvm: PathBuf,
}

impl Default for Kata {
    fn default() -> Self {
        let paths = |all: &[&str]| all.iter().map(PathBuf::from).collect();
        Self {
            shim: paths(&[
                "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2",
                "/opt/kata/bin/containerd-shim-kata-v2",
                "/usr/local/bin/containerd-shim-kata-v2",
                "/usr/bin/containerd-shim-kata-v2",
            ]),
            config: paths(&[
                "/etc/kata-containers/runtime-rs/configuration.toml",
                "/etc/kata-containers/configuration.toml",
                "/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml",
                "/opt/kata/share/defaults/kata-containers/configuration.toml",
                "/usr/share/defaults/kata-containers/configuration.toml",
            ]),
            kvm: "/dev/kvm".into(),
        }
    }
}

/// Becomes Kata's shim if the binary was called as one; returns only where it was not, or could
/// not.
pub(crate) fn delegate(arguments: &[OsString]) -> Result<()> {
    let called = env::args_os().next().map(PathBuf::from).unwrap_or_default();
    if !is_katas(&called) {
        return Ok(());
    }
    let kata = Kata::load(&called)?;
    let is_start = arguments.last().is_some_and(|a| a == "start");
    if is_start {
        kata.preflight()?;
    }
    let shim = kata.shim()?;
    let failed = Command::new(shim).args(arguments).exec();
    Err(Error::io("run", shim)(failed))
}

fn is_katas(called: &Path) -> bool {
    let name = called.file_name().and_then(OsStr::to_str);
    name.is_some_and(|n| n.starts_with(NAME))
}

impl Kata {
    fn load(called: &Path) -> Result<Self> {
        let beside = called.parent().filter(|d| d.is_absolute());
        let dirs = beside.into_iter().chain([Path::new(DIR)]);
        let Some(file) = dirs.map(|d| d.join(FILE)).find(|f| f.exists()) else {
            return Ok(Self::default());
        };
        let text = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        toml::from_str(&text)
            .map_err(|e| Error::InvalidArgument(format!("{}: {e}", file.display())))
    }

    /// Kata's shim, which must not be this binary again.
    fn shim(&self) -> Result<&Path> {
        let own = fs::canonicalize("/proc/self/exe").ok();
        let is_program = |path: &&PathBuf| {
            let meta = fs::metadata(path);
            meta.is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
                && fs::canonicalize(path).ok() != own
        };
        let found = self.shim.iter().find(is_program);
        found.map(PathBuf::as_path).ok_or_else(|| {
            Error::InvalidArgument(format!("Kata's shim is not at {}", listed(&self.shim)))
        })
    }

    /// Says in one error all that the node lacks.
    fn preflight(&self) -> Result<()> {
        let mut lacks = Vec::new();
        if let Err(e) = File::options().read(true).write(true).open(&self.kvm) {
            let why = "the node must have virtualization switched on, and be allowed to nest it \
                       where it is a virtual machine itself";
            lacks.push(format!("{}: {e} ({why})", self.kvm.display()));
        }
        if let Err(e) = self.shim() {
            lacks.push(e.to_string());
        }
        if !self.config.iter().any(|c| c.is_file()) {
            lacks.push(format!(
                "Kata's configuration is not at {}",
                listed(&self.config)
            ));
        }
        if lacks.is_empty() {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "this node cannot run Kata: {}",
            lacks.join("; ")
        )))
    }
}

fn listed(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
    names.join(" or ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kata(dir: &Path) -> Kata {
        let program = dir.join("shim");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.join("configuration.toml"), "").unwrap();
        fs::write(dir.join("kvm"), "").unwrap();
        Kata {
            shim: vec![dir.join("none"), program],
            config: vec![dir.join("configuration.toml")],
            kvm: dir.join("kvm"),
        }
    }

    #[test]
    fn only_katas_names_are_katas() {
        for (called, expected) in [
            ("/usr/local/bin/containerd-shim-kata-kiln-v2", true),
            ("containerd-shim-kata-v2", true),
            ("/usr/local/bin/containerd-shim-kiln-v2", false),
            ("/opt/containerd-shim-kata/shim", false),
            ("", false),
        ] {
            assert_eq!(is_katas(Path::new(called)), expected, "{called}");
        }
    }

    #[test]
    fn all_that_is_missing_is_named_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let kata = kata(dir.path());
        kata.preflight().unwrap();
        assert_eq!(kata.shim().unwrap(), dir.path().join("shim"));
        for file in ["shim", "kvm", "configuration.toml"] {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
        let words = kata.preflight().unwrap_err().to_string();
        for name in ["/kvm: ", "/none or ", "/shim", "/configuration.toml"] {
            assert!(words.contains(name), "no {name} in {words}");
        }
    }

    #[test]
    fn what_is_no_program_or_this_one_is_not_katas_shim() {
        let dir = tempfile::tempdir().unwrap();
        let mut kata = kata(dir.path());
        let program = dir.path().join("shim");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
        kata.shim().unwrap_err();
        kata.shim = vec![env::current_exe().unwrap()];
        kata.shim().unwrap_err();
    }

    #[test]
    fn a_file_beside_the_name_says_which_kata() {
        let dir = tempfile::tempdir().unwrap();
        let called = dir.path().join("containerd-shim-kata-kiln-v2");
        fs::write(dir.path().join(FILE), "kvm = '/dev/other'\n").unwrap();
        let expected = Kata {
            kvm: "/dev/other".into(),
            ..Kata::default()
        };
        assert_eq!(Kata::load(&called).unwrap(), expected);
        fs::write(dir.path().join(FILE), "kmv = '/dev/other'\n").unwrap();
        Kata::load(&called).unwrap_err();
    }
}
