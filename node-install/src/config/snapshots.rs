// SPDX-License-Identifier: Apache-2.0

use std::path::PathBuf;

use serde::Deserialize;

/// Storage of Pod snapshots. A node without it takes none.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Snapshots {
    /// Directory of the snapshots, which only root may enter. Shims use it by the same path.
    pub dir: PathBuf,
    /// The kubelet's directory of Pods, for the emptyDirs that are kept with a snapshot.
    pub kubelet_pods: PathBuf,
    /// Bytes that all snapshots may take.
    pub limit: u64,
    /// Bytes that stay free on the file system of `dir`.
    pub free: u64,
}

impl Default for Snapshots {
    fn default() -> Self {
        Self {
            dir: "/var/lib/kiln/snapshots".into(),
            kubelet_pods: "/var/lib/kubelet/pods".into(),
            limit: 64 << 30,
            free: 2 << 30,
        }
    }
}
