// SPDX-License-Identifier: Apache-2.0

//! Directories of the host that a shim uses.

use std::path::PathBuf;

use kiln_host::cgroup;

/// Directory of all shims, one directory per sandbox in it. Short, because the path of a UNIX
/// socket ends at 107 bytes.
const RUN_DIR: &str = "/run/kiln";

/// Places on the host that a shim works in; tests have their own.
#[derive(Debug, Clone)]
pub struct HostDirs {
    /// Where cgroup file systems are mounted.
    pub cgroups: PathBuf,
    /// Where shims keep sockets and files of calls in flight.
    pub run: PathBuf,
}

impl Default for HostDirs {
    fn default() -> Self {
        Self {
            cgroups: cgroup::MOUNT.into(),
            run: RUN_DIR.into(),
        }
    }
}
