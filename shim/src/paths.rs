// SPDX-License-Identifier: Apache-2.0

//! Paths inside a container, as an OCI spec has them.
//!
//! A gofer cleans the targets of mounts before a sentry sees them (gVisor `runsc/cmd/gofer.go`,
//! `resolveMounts`). Nobody does for a container with a prestarted gofer, for mounts that no gofer serves, and
//! for working directories, and a sentry is literal: it makes `/data/certs/` by making its parent
//! `/data/certs` and then fails to make that again (`runsc/boot/vfs.go`, `makeMountPoint`), mounts
//! what has the shorter path first, and hides a volume at `/tmp/`, which it does not take for
//! `/tmp`.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{Mode, mkdirat},
};
use serde_json::Value;

use crate::error::{Error, Result};

/// Lists of objects that have a path at a key.
const OBJECTS: [(&str, &str); 2] = [("/mounts", "destination"), ("/linux/devices", "path")];

/// Lists of paths.
const LISTS: [&str; 2] = ["/linux/maskedPaths", "/linux/readonlyPaths"];

/// Cleans all paths of a spec that the runtime looks up inside the container.
pub(crate) fn clean_spec(spec: &mut Value) {
    if let Some(process) = spec.get_mut("process") {
        clean_process(process);
    }
    for (list, key) in OBJECTS {
        let items = spec.pointer_mut(list).and_then(Value::as_array_mut);
        let paths = items.into_iter().flatten().filter_map(|i| i.get_mut(key));
        paths.for_each(clean);
    }
    for list in LISTS {
        let paths = spec.pointer_mut(list).and_then(Value::as_array_mut);
        paths.into_iter().flatten().for_each(clean);
    }
}

/// Cleans the working directory of an OCI `process`.
pub(crate) fn clean_process(process: &mut Value) {
    if let Some(cwd) = process.get_mut("cwd") {
        clean(cwd);
    }
}

/// Takes empty and `.` components out of an absolute path, which then leads where it led before.
/// `..` stays: where it leads is only known when links are followed. A relative path is for the
/// runtime to refuse or to understand.
fn clean(path: &mut Value) {
    let text = path.as_str().filter(|text| text.starts_with('/'));
    let Some(text) = text else {
        return;
    };
    let cleaned: PathBuf = Path::new(text).components().collect();
    *path = cleaned.to_string_lossy().into();
}

/// Opens what is at `path` inside the root file system `root`, without access to its content. The
/// image's symbolic links cannot lead out (openat2(2)).
pub(crate) fn open_inside(root: &File, path: &Path, more: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | more)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Makes directory `path`, and those above it that are missing, inside the root file system that
/// is mounted at `rootfs`. Blocks.
///
/// # Errors
/// When something else is in the way, such as a link that leads nowhere, or nothing can be made.
pub(crate) fn make_dir(rootfs: &Path, path: &Path) -> Result<()> {
    let root = File::open(rootfs).map_err(Error::io("open", rootfs))?;
    let failed = |e: Errno| Error::io("make in the image", path)(e.into());
    let mut dir = open_inside(&root, Path::new("."), OFlag::O_DIRECTORY).map_err(failed)?;
    let mut done = PathBuf::new();
    let parts = path.components();
    for part in parts.filter(|part| *part != Component::RootDir) {
        done.push(part);
        dir = match open_inside(&root, &done, OFlag::O_DIRECTORY) {
            // It follows no link in its last component.
            Err(Errno::ENOENT) => mkdirat(&dir, part.as_os_str(), Mode::from_bits_truncate(0o755))
                .and_then(|()| open_inside(&root, &done, OFlag::O_DIRECTORY)),
            found => found,
        }
        .map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use serde_json::json;

    use super::*;

    /// Whether one of the paths that [`clean_spec`] cleans has a component that leads nowhere.
    pub(crate) fn has_unclean(spec: &Value) -> bool {
        let items = |list| spec.pointer(list).and_then(Value::as_array);
        let mut paths = vec![&spec["process"]["cwd"]];
        for (list, key) in OBJECTS {
            paths.extend(items(list).into_iter().flatten().map(|item| &item[key]));
        }
        for list in LISTS {
            paths.extend(items(list).into_iter().flatten());
        }
        let is_unclean = |path: &str| {
            let inner = path.strip_prefix('/').filter(|inner| !inner.is_empty());
            inner.is_some_and(|inner| inner.split('/').any(|part| matches!(part, "" | ".")))
        };
        paths.into_iter().filter_map(Value::as_str).any(is_unclean)
    }

    #[test]
    fn only_what_leads_nowhere_is_taken_out() {
        for (path, expected) in [
            ("/", "/"),
            ("//", "/"),
            ("/.", "/"),
            ("/./", "/"),
            ("/a", "/a"),
            ("/a/", "/a"),
            ("/a//", "/a"),
            ("//a", "/a"),
            ("/a//b", "/a/b"),
            ("/a/./b/.", "/a/b"),
            ("/./a", "/a"),
            ("/a/../b/", "/a/../b"),
            ("/a/..", "/a/.."),
            ("/../a", "/../a"),
            ("/.a/b./...", "/.a/b./..."),
            ("/a b/ü/\n/", "/a b/ü/\n"),
            ("", ""),
            (".", "."),
            ("a//b/", "a//b/"),
            ("./a/", "./a/"),
        ] {
            let mut value = json!(path);
            clean(&mut value);
            assert_eq!(value, expected, "{path:?}");
        }
    }

    #[test]
    fn all_paths_inside_the_container_are_cleaned_and_no_others() {
        let mut spec = json!({
            "process": {"cwd": "/w/", "args": ["/bin//sh"]},
            "root": {"path": "/r/"},
            "mounts": [{"destination": "/data//certs/", "source": "/v//"}, {"type": "proc"}],
            "linux": {
                "cgroupsPath": "/c/",
                "devices": [{"path": "/dev/./x"}],
                "maskedPaths": ["/m/."],
                "readonlyPaths": ["//o"],
            },
        });
        assert!(has_unclean(&spec));
        clean_spec(&mut spec);
        let expected = json!({
            "process": {"cwd": "/w", "args": ["/bin//sh"]},
            "root": {"path": "/r/"},
            "mounts": [{"destination": "/data/certs", "source": "/v//"}, {"type": "proc"}],
            "linux": {
                "cgroupsPath": "/c/",
                "devices": [{"path": "/dev/x"}],
                "maskedPaths": ["/m"],
                "readonlyPaths": ["/o"],
            },
        });
        assert_eq!(spec, expected);
        assert!(!has_unclean(&spec));
    }

    #[test]
    fn directories_are_made_inside_the_image_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let [rootfs, outside] = ["rootfs", "outside"].map(|name| dir.path().join(name));
        fs::create_dir_all(rootfs.join("real/dir")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(rootfs.join("file"), "").unwrap();
        for (target, link) in [
            ("/real", "absolute"),
            ("../../../../real", "up"),
            ("/nowhere", "dangling"),
            (outside.to_str().unwrap(), "out"),
            ("../../outside", "out-too"),
        ] {
            symlink(target, rootfs.join(link)).unwrap();
        }
        for (path, made) in [
            ("/", ""),
            ("/a/b/c", "a/b/c"),
            ("/a/b", "a/b"),
            ("/a/../d", "d"),
            ("/../e", "e"),
            ("/real/dir", "real/dir"),
            ("/absolute/f", "real/f"),
            ("/up/g", "real/g"),
        ] {
            make_dir(&rootfs, Path::new(path)).unwrap();
            assert!(rootfs.join(made).is_dir(), "{path}");
        }
        for path in [
            "/file",
            "/file/x",
            "/dangling",
            "/dangling/x",
            "/out",
            "/out/x",
            "/out-too/x",
            "/file/../x",
        ] {
            let refused = make_dir(&rootfs, Path::new(path));
            assert!(refused.is_err(), "{path}: {refused:?}");
        }
        assert!(fs::read_dir(&outside).unwrap().next().is_none());
        assert!(!rootfs.join("nowhere").exists() && !rootfs.join("x").exists());
        let mode = fs::metadata(rootfs.join("a/b")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o022, 0);
    }
}
