// SPDX-License-Identifier: Apache-2.0

//! The root file system of warm sandboxes.

use std::{fs, io, os::unix::fs::PermissionsExt, path::Path};

use super::erofs;

/// Makes the root file system of warm sandboxes, as a directory at `rootfs` and as an image, anew
/// if the program has changed. Blocks.
pub(crate) fn write_rootfs(rootfs: &Path, image: &Path, pause: &Path) -> io::Result<()> {
    const DIRS: [&str; 5] = ["dev", "etc", "proc", "sys", "tmp"];
    let program = fs::read(pause)?;
    fs::create_dir_all(rootfs)?;
    for dir in DIRS {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    replace(&rootfs.join("pause"), &program)?;
    replace(image, &erofs::image(&DIRS, "pause", &program)?)
}

/// Puts another file in the place of one with other content: sandboxes keep what they have.
fn replace(target: &Path, content: &[u8]) -> io::Result<()> {
    if fs::read(target).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let new = target.with_extension("new");
    fs::write(&new, content)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(new, target)
}
