// SPDX-License-Identifier: Apache-2.0

//! The root file system that a snapshotter describes as mounts, put together in the bundle.

use std::{fs, io, path::Path};

use containerd_shim::mount::mount_rootfs;
use containerd_shim_protos::api::Mount;
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};

use crate::error::{Error, Result};

/// Mounts `mounts`, in order, at `target`, which is made if it is missing. Blocks.
///
/// # Errors
/// [`Error::Mount`], and [`Error::InvalidArgument`] for a target that leads elsewhere; then
/// nothing stays mounted.
pub(crate) fn mount(mounts: &[Mount], target: &Path) -> Result<()> {
    if fs::symlink_metadata(target).is_ok_and(|m| m.is_symlink()) {
        let words = format!("{} is a symbolic link", target.display());
        return Err(Error::InvalidArgument(words));
    }
    if mounts.is_empty() {
        return Ok(());
    }
    match fs::create_dir(target) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::io("make", target)(e));
        }
        _ => {}
    }
    let done = mounts.iter().try_for_each(|m| mount_one(m, target));
    if done.is_err() {
        unmount(target)?;
    }
    done
}

fn mount_one(mount: &Mount, target: &Path) -> Result<()> {
    let kind = (!mount.type_.is_empty()).then_some(mount.type_.as_str());
    let source = (!mount.source.is_empty()).then_some(mount.source.as_str());
    // With very long overlay options the crate unshares and changes the working directory of
    // the calling thread, so that it gets one of its own.
    let result = std::thread::scope(|scope| {
        scope
            .spawn(|| mount_rootfs(kind, source, &mount.options, target))
            .join()
    });
    match result {
        Ok(done) => done.map_err(|e| Error::Mount(e.to_string())),
        Err(_) => Err(Error::Mount("the mounting thread panicked".to_owned())),
    }
}

/// Unmounts everything at `target`; nothing mounted there is success. Blocks.
pub(crate) fn unmount(target: &Path) -> Result<()> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(Error::io("unmount", target)(e.into())),
        }
    }
}
