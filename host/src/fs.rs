// SPDX-License-Identifier: Apache-2.0

//! Files that are replaced whole, and files that may be gone already. All functions block.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// Removes a file.
///
/// # Errors
/// The kernel's, except that the file does not exist.
pub fn remove_file_if_there(path: &Path) -> io::Result<()> {
    unless_gone(fs::remove_file(path))
}

/// Removes a directory with all that is in it.
///
/// # Errors
/// The kernel's, except that the directory does not exist.
pub fn remove_dir_if_there(path: &Path) -> io::Result<()> {
    unless_gone(fs::remove_dir_all(path))
}

fn unless_gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Writes a file of mode 0600 that a crash leaves either old or new. `PATH.new` is used meanwhile.
///
/// # Errors
/// The kernel's.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    fs::rename(&temporary, path)
}

/// Reads a regular file of at most `limit` bytes as UTF-8.
///
/// # Errors
/// The kernel's, and [`io::ErrorKind::Other`] for a file that is larger or not a regular one.
pub fn read_regular(path: &Path, limit: u64) -> io::Result<String> {
    // Not blocking: the path could name a FIFO.
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = String::new();
    file.take(limit + 1).read_to_string(&mut text)?;
    if text.len() as u64 > limit {
        return Err(io::Error::other(format!("larger than {limit} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_removed_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        for content in ["a", "bc"] {
            write_atomically(&path, content.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        for _ in 0..2 {
            remove_file_if_there(&path).unwrap();
            remove_dir_if_there(&dir.path().join("none")).unwrap();
        }
    }

    #[test]
    fn only_small_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "four").unwrap();
        assert_eq!(read_regular(&path, 4).unwrap(), "four");
        let refused = |path: &Path| read_regular(path, 3).unwrap_err().to_string();
        assert_eq!(refused(&path), "larger than 3 bytes");
        let fifo = dir.path().join("fifo");
        assert!(
            Command::new("mkfifo")
                .arg(&fifo)
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(refused(&fifo), "not a regular file");
    }
}
