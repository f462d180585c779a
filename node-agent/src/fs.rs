// SPDX-License-Identifier: Apache-2.0

//! Removes what may be gone already.

use std::{fs, io, path::Path};

/// Removes a file. Blocks.
///
/// # Errors
/// The kernel's, but that there is none.
pub(crate) fn remove_file_if_there(path: &Path) -> io::Result<()> {
    unless_gone(fs::remove_file(path))
}

/// Removes a directory with all that is in it. Blocks.
///
/// # Errors
/// The kernel's, but that there is none.
pub(crate) fn remove_dir_if_there(path: &Path) -> io::Result<()> {
    unless_gone(fs::remove_dir_all(path))
}

fn unless_gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
