// SPDX-License-Identifier: Apache-2.0

//! Which Task API a containerd before 2.3 speaks: nothing in how it runs a shim says so, and
//! 1.7 refuses a reply that announces version 3. So its own binary is asked, once per binary.

use std::{
    fs,
    io::Read,
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};

/// Remembers the answer for one build of containerd.
const CACHE: &str = "/run/kiln/containerd-task-api";

/// Whether the containerd at `binary` knows `containerd.task.v3.Task`, which 2.0 brought. One
/// that cannot be asked is taken for an old one: every version still serves v2.
pub(super) fn knows_task_v3(binary: &Path) -> bool {
    let Ok(meta) = fs::metadata(binary) else {
        return false;
    };
    let build = format!(
        "{} {} {}",
        meta.dev(),
        meta.ino(),
        meta.mtime_nsec() ^ meta.mtime()
    );
    if let Ok(known) = fs::read_to_string(CACHE)
        && let Some(answer) = known.strip_prefix(&build)
    {
        return answer.trim() == "3";
    }
    let v3 = ask(binary).is_some_and(|version| major(&version) >= 2);
    // A cache that cannot be written costs the next Pod some milliseconds.
    fs::write(CACHE, format!("{build} {}", if v3 { 3 } else { 2 })).ok();
    v3
}

fn ask(binary: &Path) -> Option<String> {
    let mut child = Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut words = String::new();
    child
        .stdout
        .take()?
        .take(4096)
        .read_to_string(&mut words)
        .ok()?;
    child.wait().ok()?.success().then_some(words)
}

/// The major version in `containerd github.com/containerd/containerd/v2 v2.1.9 <commit>`.
fn major(words: &str) -> u32 {
    let version = words.split_whitespace().nth(2).unwrap_or_default();
    let number = version.trim_start_matches('v').split('.').next();
    number.and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_as_containerd_prints_it() {
        assert_eq!(
            major("containerd github.com/containerd/containerd/v2 v2.1.9 abc\n"),
            2
        );
        assert_eq!(major("containerd containerd.io 1.7.28 b98a3aa\n"), 1);
        assert_eq!(
            major("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1\n"),
            1
        );
        assert_eq!(major(""), 0);
    }
}
