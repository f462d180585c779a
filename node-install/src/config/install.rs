// SPDX-License-Identifier: Apache-2.0

//! What is to be put on a node, and where.

use std::path::PathBuf;

use serde::Deserialize;

/// The table `[install]` of the agent's configuration. All paths but `from` are the node's.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Install {
    /// Directory with the programs, such as that of an image: `containerd-shim-kiln-v2`,
    /// `kiln-pause` and, unless the node has one, `runsc`.
    pub from: PathBuf,
    /// Directory of all that is installed, programs in `bin` below. Programs must be allowed to
    /// run there.
    pub dir: PathBuf,
    /// The node's own runsc, to be used instead of the one in `from`.
    pub runsc: Option<PathBuf>,
    /// Where runsc keeps its state.
    pub runtime_root: PathBuf,
    /// The handler: `handler` of the RuntimeClass.
    pub handler: String,
    /// Whether an agent puts back what was taken away or changed since. Without, it only says so.
    pub repair: bool,
    /// The node's containerd.
    pub containerd: Containerd,
}

/// The table `[install.containerd]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Containerd {
    /// Where it listens; the same path on the node and where the agent runs.
    pub socket: PathBuf,
    /// Its own file; the one that it was started with.
    pub config: Option<PathBuf>,
    /// The file that is added; `kiln.toml` where containerd's own file imports all files of a
    /// directory, else in `conf.d` beside that. With containerd 1.7: beside its own file.
    pub drop_in: Option<PathBuf>,
    /// What starts it anew on the node.
    pub restart: Vec<String>,
    /// `ctr`; without it the one beside containerd, or in the `PATH` of containerd.
    pub ctr: Option<PathBuf>,
}

impl Default for Install {
    fn default() -> Self {
        Self {
            from: "/".into(),
            dir: "/opt/kiln".into(),
            runsc: None,
            runtime_root: "/run/containerd/runsc".into(),
            handler: "gvisor".to_owned(),
            repair: true,
            containerd: Containerd::default(),
        }
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            socket: "/run/containerd/containerd.sock".into(),
            config: None,
            drop_in: None,
            restart: ["systemctl", "restart", "containerd"]
                .map(str::to_owned)
                .into(),
            ctr: None,
        }
    }
}

impl Install {
    /// Where a program is once it is installed.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join("bin").join(name)
    }
}
