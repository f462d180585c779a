// SPDX-License-Identifier: Apache-2.0

//! A sentry as the host sees it: how little of the host a program would have that broke out of
//! gVisor's kernel into the process that runs it.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, Result};

/// Namespaces that a sentry must not share with the host (namespaces(7)).
pub(crate) const OWN_NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "user"];

/// `Seccomp` of proc_pid_status(5) for a filter.
const FILTER: &str = "2";

/// CAP_SYS_ADMIN's bit (linux/capability.h).
const SYS_ADMIN: u64 = 1 << 21;

/// What a process may do to the host.
#[derive(Debug)]
pub(crate) struct Posture {
    status: BTreeMap<String, String>,
    /// Effective capabilities.
    pub(crate) capabilities: u64,
    /// Namespaces of [`OWN_NAMESPACES`] that it has for itself.
    pub(crate) own_namespaces: Vec<&'static str>,
    /// The names in its root directory.
    pub(crate) root: Vec<String>,
}

impl Posture {
    /// Reads that of the process `pid`.
    ///
    /// # Errors
    /// When it is gone.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        let status =
            fs::read_to_string(dir.join("status")).context("read the status of a process")?;
        let status: BTreeMap<_, _> = status.lines().filter_map(field).collect();
        let capabilities = status
            .get("CapEff")
            .context("a process without capabilities")?;
        let capabilities = u64::from_str_radix(capabilities, 16).context("parse capabilities")?;
        let namespace = |of: &str, name: &str| fs::read_link(format!("/proc/{of}/ns/{name}"));
        let is_own =
            |name: &&str| namespace(&pid.to_string(), name).ok() != namespace("self", name).ok();
        let own_namespaces = OWN_NAMESPACES.into_iter().filter(is_own).collect();
        let root =
            fs::read_dir(dir.join("root")).context("list the root directory of a process")?;
        let mut root: Vec<_> = root
            .flatten()
            .map(|e| format!("/{}", e.file_name().to_string_lossy()))
            .collect();
        root.sort();
        Ok(Self {
            status,
            capabilities,
            own_namespaces,
            root,
        })
    }

    /// Whether the kernel filters its system calls.
    pub(crate) fn is_filtered(&self) -> bool {
        self.is("Seccomp", FILTER)
    }

    /// Whether it cannot get privileges that it does not have.
    pub(crate) fn gets_no_privileges(&self) -> bool {
        self.is("NoNewPrivs", "1")
    }

    /// Whether it may not administer the host.
    pub(crate) fn is_no_admin(&self) -> bool {
        self.capabilities & SYS_ADMIN == 0
    }

    fn is(&self, name: &str, value: &str) -> bool {
        self.status.get(name).is_some_and(|v| v == value)
    }
}

/// A line of `/proc/PID/status`.
fn field(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once(':')?;
    Some((name.to_owned(), value.trim().to_owned()))
}
