// SPDX-License-Identifier: Apache-2.0

//! What Pods can leave behind, listed so that two lists can be compared.
//!
//! Names only, no pids: what is the same after a restart of containerd is the same.

use std::{collections::BTreeMap, fmt::Write as _, fs, io, path::Path};

use anyhow::Result;

use crate::{cgroup::Cgroup, mounts, netns::Netns, process::Proc};

/// Where our shim keeps what calls in flight need on disk (`shim/src/host_dirs.rs`, `RUN_DIR`), by
/// sandbox.
pub const SCRATCH: &str = "/run/kiln";

/// Directories of a node in which nothing is kept of a Pod that is gone: containerd's state, the
/// sockets of its shims, and the state of the runtimes. (containerd's root is left out: it removes
/// snapshots when it likes.)
const STATE: [&str; 7] = ["state", "s", "rs", "rc", "rw", "rr", "rg"];

/// Where to look.
pub struct Scope<'a> {
    /// The node's directory.
    pub dir: &'a Path,
    /// Its cgroup.
    pub cgroup: &'a Cgroup,
    /// Its network namespace.
    pub netns: &'a Netns,
    /// Whether a container is the node's: others may run beside it.
    pub owns: &'a dyn Fn(&str) -> bool,
}

/// What is there at one time: for each kind of thing, names with how often they are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeMap<(&'static str, String), usize>,
}

impl Snapshot {
    /// Lists what is in `scope`.
    ///
    /// # Errors
    /// When something cannot be listed.
    pub fn take(scope: &Scope<'_>) -> Result<Self> {
        let mut snapshot = Self::default();
        let name = scope.dir.to_string_lossy();
        let inside = scope.cgroup.processes();
        for p in Proc::all() {
            let is_ours = inside.contains(&p.pid) || p.argv.contains(&*name);
            // containerd itself comes and goes as the test has it.
            if is_ours && p.pid != std::process::id() && p.program() != "containerd" {
                snapshot.add("process", format!("{} ({})", p.argv, p.program()));
            }
        }
        let points = mounts::below(scope.dir)?;
        for point in points.iter().filter(|p| !is_kept(p)) {
            snapshot.add("mount", point.display().to_string());
        }
        for dir in scope.cgroup.dirs() {
            snapshot.add("cgroup", dir.display().to_string());
        }
        for link in scope.netns.links()? {
            if link.starts_with("veth") {
                snapshot.add("link", link);
            }
        }
        for dir in STATE {
            snapshot.walk(&scope.dir.join(dir));
        }
        snapshot.scratch(scope.owns);
        Ok(snapshot)
    }

    fn add(&mut self, kind: &'static str, name: String) {
        *self.things.entry((kind, name)).or_default() += 1;
    }

    fn walk(&mut self, dir: &Path) {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if is_forgotten_bundle(&path) || is_kept(&path) {
                continue;
            }
            let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
            // What is in a root file system is the image's, and it shows as a mount.
            if is_dir && entry.file_name() != "rootfs" {
                self.walk(&path);
            }
            // Directories that are made once and kept do not bear the id of a Pod.
            if !is_dir || looks_like_an_id(&path) {
                self.add("file", path.display().to_string());
            }
        }
    }

    fn scratch(&mut self, owns: &dyn Fn(&str) -> bool) {
        let entries = fs::read_dir(SCRATCH).into_iter().flatten().flatten();
        for entry in entries.filter(|e| owns(sandbox_of(&e.file_name().to_string_lossy()))) {
            self.add("file", entry.path().display().to_string());
        }
    }

    /// What bears `id` in its name, in words; `None` when nothing does.
    pub fn mentions(&self, id: &str) -> Option<String> {
        let names = self.things.keys().filter(|(_, name)| bears(name, id));
        let words: Vec<_> = names
            .map(|(kind, name)| format!("  {kind} {name}\n"))
            .collect();
        (!words.is_empty()).then(|| words.concat())
    }

    /// What `now` has more than this, in words; `None` when it is nothing.
    pub fn compare(&self, now: &Self) -> Option<String> {
        let mut words = String::new();
        for ((kind, name), count) in &now.things {
            let before = self
                .things
                .get(&(*kind, name.clone()))
                .copied()
                .unwrap_or_default();
            if *count > before {
                // Writing to a String cannot fail.
                let _ = writeln!(
                    words,
                    "  {kind} {name}{}",
                    if *count - before > 1 {
                        format!(" x{}", count - before)
                    } else {
                        String::new()
                    }
                );
            }
        }
        (!words.is_empty()).then_some(words)
    }
}

/// Whether `text` names `id`, and not only another id that begins or ends with it. A dash is an
/// edge: what belongs to a container may be called after it.
#[must_use]
pub fn bears(text: &str, id: &str) -> bool {
    let is_edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric());
    text.char_indices().any(|(at, _)| {
        let rest = text[at..].strip_prefix(id);
        rest.is_some_and(|rest| {
            is_edge(text[..at].chars().next_back()) && is_edge(rest.chars().next())
        })
    })
}

/// The sandbox whose directory in [`SCRATCH`] has this name, `ID@MARK`.
fn sandbox_of(name: &str) -> &str {
    name.split_once('@').map_or(name, |(id, _)| id)
}

/// Removes what shims that were killed have left for the containers whose bundles are in `bundles`.
///
/// # Errors
/// When something cannot be removed.
pub fn remove_scratch(bundles: &Path) -> io::Result<()> {
    for entry in fs::read_dir(SCRATCH).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_left = bundles.join(sandbox_of(&name.to_string_lossy())).exists();
        if !is_left {
            continue;
        }
        match fs::remove_dir_all(entry.path()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Where runsc keeps the one network namespace that it makes for the gofers of all sandboxes (gVisor
/// `runsc/container/null_netns.go`).
pub const GOFERS_NETNS: &str = "null-netns";

fn is_kept(path: &Path) -> bool {
    path.ends_with(GOFERS_NETNS)
}

/// containerd's CRI plugin makes ids of 64 hexadecimal digits.
fn looks_like_an_id(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.len() == 64)
}

/// A bundle `ID` becomes `.ID` before it is removed, and stays for good where containerd is killed
/// in between (containerd `core/runtime/v2/bundle.go`, `atomicDelete`; `shim_load.go` passes over
/// it). What must have gone before, mounts and the files of a shim, is looked for elsewhere.
fn is_forgotten_bundle(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.len() == 65 && name[0] == b'.'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_came_on_top_is_named() {
        let mut before = Snapshot::default();
        before.add("mount", "/a".to_owned());
        let mut after = before.clone();
        assert_eq!(before.compare(&after), None);
        after.add("mount", "/a".to_owned());
        after.add("process", "runsc".to_owned());
        assert_eq!(
            before.compare(&after).unwrap(),
            "  mount /a\n  process runsc\n"
        );
        assert_eq!(after.compare(&before), None);
    }

    #[test]
    fn an_id_is_not_found_within_another() {
        for text in [
            "a-b",
            "/run/a-b",
            "runsc-a-b.sock",
            "-id a-b -address",
            "xa-b a-b",
            "a-a-b",
        ] {
            assert!(bears(text, "a-b"), "{text}");
        }
        for text in ["", "a", "a-bc", "xa-b", "a-b1/a-b2"] {
            assert!(!bears(text, "a-b"), "{text}");
        }
        assert!(bears("xa-a-a", "a-a"));
    }
}
