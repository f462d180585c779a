// SPDX-License-Identifier: Apache-2.0
//! Compressed layers kept from one run to the next, by the digest of what they hold: making the
//! archive of a large tree is quick, compressing it is not.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use tempfile::NamedTempFile;

use crate::digest::Digest;

/// A directory of compressed layers. Processes may share it.
#[derive(Debug)]
pub struct Cache(PathBuf);

impl Cache {
    /// Uses `directory`, which is made if it is not there.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        Ok(Self(directory.to_owned()))
    }

    /// The compressed form of the tar `diff_id`. A file that holds anything else is as good as none.
    pub(crate) fn compressed(&self, diff_id: Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.path(diff_id)).ok()?;
        let mut tar = Vec::new();
        GzDecoder::new(&bytes[..]).read_to_end(&mut tar).ok()?;
        (Digest::of(&tar) == diff_id).then_some(bytes)
    }

    /// Keeps `bytes`, the compressed form of `diff_id`.
    pub(crate) fn keep(&self, diff_id: Digest, bytes: &[u8]) -> io::Result<()> {
        let mut file = NamedTempFile::new_in(&self.0)?;
        file.write_all(bytes)?;
        let _: File = file.persist(self.path(diff_id))?;
        Ok(())
    }

    fn path(&self, diff_id: Digest) -> PathBuf {
        self.0.join(format!("{}.tar.gz", diff_id.hex()))
    }
}
