// SPDX-License-Identifier: Apache-2.0

//! `maskedPaths` and `readonlyPaths` as mounts. runsc drops both lists, because what they hold
//! by default lies below `/proc` and `/sys`, which are the sentry's own. What a Pod adds to them
//! is a promise all the same.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use nix::{errno::Errno, fcntl::OFlag};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    paths::open_inside,
};

/// Mounts that hide `masked` and write-protect `readonly` of the container in `rootfs`, which
/// must be mounted. A path that is not in the image needs none. Blocks.
pub(crate) fn mounts(masked: &[String], readonly: &[String], rootfs: &Path) -> Result<Vec<Value>> {
    let mut mounts = Vec::new();
    if masked.iter().chain(readonly).all(|path| is_virtual(path)) {
        return Ok(mounts);
    }
    let root = File::open(rootfs).map_err(Error::io("open", rootfs))?;
    for path in masked.iter().filter(|path| !is_virtual(path)) {
        let Some((found, _)) = find(&root, path)? else {
            continue;
        };
        let is_dir = found
            .metadata()
            .map_err(Error::io("stat", Path::new(path)))?
            .is_dir();
        mounts.push(if is_dir {
            json!({"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["ro", "size=0k"]})
        } else {
            json!({"destination": path, "type": "bind", "source": "/dev/null", "options": ["bind", "ro"]})
        });
    }
    for path in readonly.iter().filter(|path| !is_virtual(path)) {
        let Some((_, real)) = find(&root, path)? else {
            continue;
        };
        mounts.push(json!({"destination": path, "type": "bind", "source": real, "options": ["rbind", "ro"]}));
    }
    Ok(mounts)
}

/// Whether the sentry makes up what is at `path`, so that it shows nothing of the host.
fn is_virtual(path: &str) -> bool {
    ["/proc", "/sys"]
        .iter()
        .any(|dir| Path::new(path).starts_with(dir))
}

/// Finds `path` inside the root file system, and where it really is on the host.
fn find(root: &File, path: &str) -> Result<Option<(File, PathBuf)>> {
    let found = match open_inside(root, Path::new(path), OFlag::empty()) {
        Ok(found) => found,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
        Err(e) => {
            return Err(Error::io("find in the image", Path::new(path))(
                io::Error::from(e),
            ));
        }
    };
    let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()));
    let real = real.map_err(Error::io("find in the image", Path::new(path)))?;
    Ok(Some((found.into(), real)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_what_the_image_has_is_mounted_over_and_links_stay_inside() {
        let rootfs = tempfile::tempdir().unwrap();
        let inside = rootfs.path().join("etc");
        fs::create_dir(&inside).unwrap();
        fs::write(inside.join("passwd"), "image").unwrap();
        symlink("/etc/passwd", rootfs.path().join("link")).unwrap();
        symlink("../../../../etc", rootfs.path().join("up")).unwrap();
        let list = |paths: &[&str]| paths.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
        let masked = list(&["/proc/kcore", "/link", "/etc", "/not/there"]);
        let mounts = mounts(&masked, &list(&["/up/passwd", "/sys/x"]), rootfs.path()).unwrap();
        let brief: Vec<_> = mounts
            .iter()
            .map(|m| {
                (
                    m["destination"].as_str().unwrap(),
                    m["source"].as_str().unwrap(),
                )
            })
            .collect();
        let real = inside.canonicalize().unwrap().join("passwd");
        assert_eq!(
            brief,
            [
                ("/link", "/dev/null"),
                ("/etc", "tmpfs"),
                ("/up/passwd", real.to_str().unwrap())
            ]
        );
    }
}
