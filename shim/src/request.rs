// SPDX-License-Identifier: Apache-2.0

//! Requests of containerd, decoded.

use std::path::PathBuf;

use containerd_shim_protos::{api::Mount, protobuf::well_known_types::any::Any};

use crate::io::IoSpec;

/// A request to make a container.
#[derive(Debug, Default)]
pub struct CreateRequest {
    /// Its id.
    pub id: String,
    /// Its OCI bundle.
    pub bundle: PathBuf,
    /// What to mount as its root file system.
    pub rootfs: Vec<Mount>,
    /// Its stdio.
    pub io: IoSpec,
    /// A checkpoint that containerd has unpacked, empty for none.
    pub checkpoint: String,
    /// The options of the handler in containerd's configuration.
    pub options: Option<Any>,
}
