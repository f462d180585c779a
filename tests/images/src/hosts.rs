// SPDX-License-Identifier: Apache-2.0
//! Sending containerd to our registry, whatever the host in an image's name.

use std::fs;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// Writes `CERTS_DIR/_default/hosts.toml` and gives its path. `CERTS_DIR` is what containerd's
/// `registry.config_path` or ctr's `--hosts-dir` names; a directory there that is called like a
/// host goes before `_default` (containerd docs/hosts.md).
pub fn write(certs_dir: &Path, registry: SocketAddr) -> io::Result<PathBuf> {
    let directory = certs_dir.join("_default");
    fs::create_dir_all(&directory)?;
    let path = directory.join("hosts.toml");
    // Replaced in one step: containerd reads it anew for every pull.
    let mut file = NamedTempFile::new_in(&directory)?;
    // Only a server, no `[host]` table: there is nowhere to fall back to.
    writeln!(
        file,
        "server = \"http://{registry}\"\ncapabilities = [\"pull\", \"resolve\"]"
    )?;
    file.persist(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_the_registry_and_can_be_written_again() {
        let directory = tempfile::tempdir().unwrap();
        for port in [1, 2] {
            let path = write(directory.path(), SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
            assert_eq!(path, directory.path().join("_default/hosts.toml"));
            let expected = format!(
                "server = \"http://127.0.0.1:{port}\"\ncapabilities = [\"pull\", \"resolve\"]\n"
            );
            assert_eq!(fs::read_to_string(path).unwrap(), expected);
        }
    }
}
