// SPDX-License-Identifier: Apache-2.0

//! Paths inside a container, as an OCI spec has them.
//!
//! A gofer cleans the targets of mounts before a sentry sees them (gVisor `runsc/cmd/gofer.go`,
//! `resolveMounts`). Nobody does for a container in slots, for mounts that no gofer serves, and
//! for working directories, and a sentry is literal: it makes `/data/certs/` by making its parent
//! `/data/certs` and then fails to make that again (`runsc/boot/vfs.go`, `makeMountPoint`), mounts
//! what has the shorter path first, and hides a volume at `/tmp/`, which it does not take for
//! `/tmp`.

use std::path::{Path, PathBuf};

use serde_json::Value;

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

#[cfg(test)]
pub(crate) mod tests {
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
}
