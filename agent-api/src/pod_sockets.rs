// SPDX-License-Identifier: Apache-2.0

//! Links by which the agent finds the shim of a Pod.
//!
//! A shim leaves a symbolic link `pod-UID` in the directory of its sandbox, which leads to the
//! socket that it serves. It goes with that directory.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// Directory of all shims, with one directory for each sandbox.
pub const SHIMS: &str = "/run/kiln";

/// Leaves a link to `socket` in `dir`, the directory of the sandbox of the Pod `pod_uid`. Blocks.
///
/// # Errors
/// The kernel's, and `InvalidInput` if the UID could not be the name of a file.
pub fn publish_socket(dir: &Path, pod_uid: &str, socket: &Path) -> io::Result<()> {
    symlink(socket, dir.join(link_name(pod_uid)?))
}

/// Finds the socket of the shim of the Pod `pod_uid` below `shims`, usually [`SHIMS`]. A Pod whose
/// sandbox was made anew has that of the newest. Blocks.
///
/// # Errors
/// The kernel's, `InvalidInput` as above, and `NotFound` if no shim has left a link.
pub fn find_socket(shims: &Path, pod_uid: &str) -> io::Result<PathBuf> {
    let name = link_name(pod_uid)?;
    let mut newest = None;
    for dir in fs::read_dir(shims)? {
        let link = dir?.path().join(&name);
        let Ok(made) = fs::symlink_metadata(&link).and_then(|m| m.modified()) else {
            continue;
        };
        newest = newest.max(Some((made, link)));
    }
    match newest {
        Some((_, link)) => fs::read_link(link),
        None => Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("no shim serves Pod {pod_uid}"),
        )),
    }
}

fn link_name(pod_uid: &str) -> io::Result<String> {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
    if pod_uid.is_empty() || pod_uid.len() > 128 || !pod_uid.bytes().all(is_plain) {
        let message = format!("{pod_uid:?} is no UID of a Pod");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    Ok(format!("pod-{pod_uid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods)] // there is no runtime whose thread could be blocked
    fn the_newest_shim_of_a_pod_is_found() {
        let run = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let dir = run.path().join(name);
            fs::create_dir(&dir).unwrap();
            dir
        };
        let (first, second) = (dir("a@1"), dir("b@2"));
        publish_socket(&first, "uid-1", Path::new("/s/first")).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        publish_socket(&second, "uid-1", Path::new("/s/second")).unwrap();
        let found = find_socket(run.path(), "uid-1").unwrap();
        assert_eq!(found, Path::new("/s/second"));
        let none = find_socket(run.path(), "uid-2").unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_uid_leads_nowhere_else() {
        for uid in ["", "../x", "a/b", "a\0", &"x".repeat(200)] {
            let refused = find_socket(Path::new("/"), uid).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{uid:?}");
        }
    }
}
