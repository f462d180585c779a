// SPDX-License-Identifier: Apache-2.0

//! `ctr` and `crictl` on a node.

use std::{ffi::OsStr, path::PathBuf};

use crate::{node::Node, process::Cmd, tools};

impl Node {
    /// A run of `ctr`. In namespace `k8s.io` are the containers of CRI.
    pub fn ctr<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        self.tool("ctr")
            .args(["--address".as_ref(), self.socket().as_os_str()])
            .args(args)
    }

    /// A run of `crictl`.
    pub fn crictl<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        let endpoint = format!("unix://{}", self.socket().display());
        // Without a file of its own it would read the machine's.
        let config = ["--config", "/dev/null", "--timeout", "60s"];
        self.tool("crictl")
            .args(config)
            .args([
                "--runtime-endpoint",
                &endpoint,
                "--image-endpoint",
                &endpoint,
            ])
            .args(args)
    }

    /// A missing program shows when it is run, with its name.
    fn tool(&self, name: &str) -> Cmd {
        self.command(&tools::program(name).unwrap_or_else(|_| PathBuf::from(name)))
    }
}
