// SPDX-License-Identifier: Apache-2.0

//! Copies of directories that a workload has filled. All functions block.
//!
//! Whoever wrote such a directory may still write to it, and is hostile: nothing is followed and
//! every name is looked up in a directory that is held open.

use std::{
    ffi::CString,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat, readlinkat},
    sys::stat::{
        FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstatat, mkdirat, utimensat,
    },
    sys::time::TimeSpec,
    unistd::{Gid, Uid, fchownat, mkfifoat, symlinkat},
};

/// Directories below one another that are followed: more hold a descriptor each, and are nobody's
/// honest work.
const MOST_LEVELS: usize = 128;

/// Bits of a mode that are copied.
const MODE: u32 = 0o7777;

/// Copies what is in the directory `from` into the directory `to`, with owners, modes and times, and
/// returns the bytes of its files. Sockets and devices are left out: those of a sandbox are in its
/// memory. Files with several names become several files.
///
/// # Errors
/// The kernel's, and `FileTooLarge` if the files have more than `room` bytes.
pub(super) fn copy(from: &Path, to: &Path, room: u64) -> io::Result<u64> {
    let (from, to) = (open_dir(from)?, open_dir(to)?);
    let mut left = room;
    copy_entries(&from, &to, &mut left, MOST_LEVELS)?;
    let of = nix::sys::stat::fstat(&from)?;
    copy_attributes(&to, c".", &of, AtFlags::empty())?;
    Ok(room - left)
}

/// Adds what is in the directory `dir` to `hasher`: names, kinds, owners, modes and contents.
///
/// # Errors
/// The kernel's.
pub(super) fn hash(dir: &Path, hasher: &mut blake3::Hasher) -> io::Result<()> {
    hash_entries(&open_dir(dir)?, hasher, MOST_LEVELS)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, directory(), Mode::empty())?)
}

fn directory() -> OFlag {
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// The names in a directory, in order.
fn names(dir: &OwnedFd) -> io::Result<Vec<CString>> {
    // A descriptor of its own: reading moves its position.
    let mut dir = Dir::from_fd(openat(dir, ".", directory(), Mode::empty())?)?;
    let mut names = Vec::new();
    for entry in dir.iter() {
        let name = entry?.file_name().to_owned();
        if name.as_c_str() != c"." && name.as_c_str() != c".." {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn stat(dir: &OwnedFd, name: &CString) -> io::Result<FileStat> {
    Ok(fstatat(dir, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)?)
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn level_below(levels: usize) -> io::Result<usize> {
    levels
        .checked_sub(1)
        .ok_or_else(|| io::Error::other(format!("more than {MOST_LEVELS} directories deep")))
}

/// Opens a file for reading. It is the one that `stat` is of, or an error.
fn open_file(dir: &OwnedFd, name: &CString, of: &FileStat) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(openat(dir, name.as_c_str(), flags, Mode::empty())?);
    let found = file.metadata()?;
    if (found.dev(), found.ino()) != (of.st_dev, of.st_ino) {
        return Err(io::Error::other("a file was replaced while it was copied"));
    }
    Ok(file)
}

fn copy_entries(from: &OwnedFd, to: &OwnedFd, left: &mut u64, levels: usize) -> io::Result<()> {
    let levels = level_below(levels)?;
    for name in names(from)? {
        let of = stat(from, &name)?;
        match kind(&of) {
            SFlag::S_IFDIR => {
                mkdirat(to, name.as_c_str(), Mode::S_IRWXU)?;
                let inner = openat(from, name.as_c_str(), directory(), Mode::empty())?;
                let copied = openat(to, name.as_c_str(), directory(), Mode::empty())?;
                copy_entries(&inner, &copied, left, levels)?;
            }
            SFlag::S_IFREG => copy_file(&open_file(from, &name, &of)?, to, &name, left)?,
            SFlag::S_IFLNK => {
                let target = readlinkat(from, name.as_c_str())?;
                symlinkat(target.as_os_str(), to, name.as_c_str())?;
            }
            SFlag::S_IFIFO => mkfifoat(to, name.as_c_str(), Mode::S_IRUSR | Mode::S_IWUSR)?,
            _ => continue,
        }
        copy_attributes(to, &name, &of, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn copy_file(from: &File, to: &OwnedFd, name: &CString, left: &mut u64) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let mut file = File::from(openat(to, name.as_c_str(), flags, mode)?);
    let copied = io::copy(&mut from.take(left.saturating_add(1)), &mut file)?;
    *left = left.checked_sub(copied).ok_or_else(|| {
        let message = "the Pod's emptyDirs are larger than what is left for them";
        io::Error::new(io::ErrorKind::FileTooLarge, message)
    })?;
    file.flush()
}

fn copy_attributes(
    dir: &OwnedFd,
    name: &std::ffi::CStr,
    of: &FileStat,
    follow: AtFlags,
) -> io::Result<()> {
    let (owner, group) = (Uid::from_raw(of.st_uid), Gid::from_raw(of.st_gid));
    fchownat(dir, name, Some(owner), Some(group), follow)?;
    if kind(of) != SFlag::S_IFLNK {
        // The name is of what was just made in a directory that only root may enter, or in the
        // kubelet's before the Pod has containers.
        let mode = Mode::from_bits_truncate(of.st_mode & MODE);
        fchmodat(dir, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    let modified = TimeSpec::new(of.st_mtime, of.st_mtime_nsec);
    let accessed = TimeSpec::new(of.st_atime, of.st_atime_nsec);
    match utimensat(
        dir,
        name,
        &accessed,
        &modified,
        UtimensatFlags::NoFollowSymlink,
    ) {
        Err(Errno::EOPNOTSUPP) | Ok(()) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn hash_entries(dir: &OwnedFd, hasher: &mut blake3::Hasher, levels: usize) -> io::Result<()> {
    let levels = level_below(levels)?;
    for name in names(dir)? {
        let of = stat(dir, &name)?;
        // With their lengths, so that no two trees give the same bytes.
        hasher.update(&(name.as_bytes().len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        for number in [of.st_mode, of.st_uid, of.st_gid] {
            hasher.update(&number.to_le_bytes());
        }
        match kind(&of) {
            SFlag::S_IFDIR => {
                let inner = openat(dir, name.as_c_str(), directory(), Mode::empty())?;
                hash_entries(&inner, hasher, levels)?;
                hasher.update(&u64::MAX.to_le_bytes());
            }
            SFlag::S_IFREG => {
                hasher.update(&of.st_size.to_le_bytes());
                hasher.update_reader(open_file(dir, &name, &of)?)?;
            }
            SFlag::S_IFLNK => {
                let target = readlinkat(dir, name.as_c_str())?;
                hasher.update(&(target.len() as u64).to_le_bytes());
                hasher.update(target.as_encoded_bytes());
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
    };

    use super::*;

    fn digest(dir: &Path) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hash(dir, &mut hasher).unwrap();
        hasher.finalize()
    }

    /// A directory with files, a link that leads out of it, and a FIFO.
    fn filled() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("sub/deep")).unwrap();
        fs::write(at("sub/deep/file"), "content").unwrap();
        fs::set_permissions(at("sub"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::set_permissions(at("sub/deep/file"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("/etc/passwd", at("out")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), Mode::S_IRUSR).unwrap();
        dir
    }

    #[test]
    fn a_copy_is_what_was_copied_and_nothing_is_followed() {
        let (from, to) = (filled(), tempfile::tempdir().unwrap());
        assert_eq!(copy(from.path(), to.path(), 7).unwrap(), 7);
        assert_eq!(digest(from.path()), digest(to.path()));
        let link = fs::read_link(to.path().join("out")).unwrap();
        assert_eq!(link, Path::new("/etc/passwd"));
        let mode = |name: &str| fs::metadata(to.path().join(name)).unwrap().mode() & MODE;
        assert_eq!((mode("sub"), mode("sub/deep/file")), (0o1777, 0o640));
    }

    #[test]
    fn what_has_no_room_is_not_copied() {
        let (from, to) = (filled(), tempfile::tempdir().unwrap());
        let full = copy(from.path(), to.path(), 6).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn each_change_is_another_digest() {
        let whole = digest(filled().path());
        assert_eq!(whole, digest(filled().path()));
        let change: [fn(&Path); 4] = [
            |d| fs::write(d.join("sub/deep/file"), "contenu").unwrap(),
            |d| fs::rename(d.join("sub/deep/file"), d.join("sub/file")).unwrap(),
            |d| fs::remove_file(d.join("out")).unwrap(),
            |d| fs::set_permissions(d.join("sub"), fs::Permissions::from_mode(0o755)).unwrap(),
        ];
        for (i, change) in change.into_iter().enumerate() {
            let changed = filled();
            change(changed.path());
            assert_ne!(whole, digest(changed.path()), "{i}");
        }
    }

    #[test]
    fn a_directory_that_is_a_link_is_none() {
        let (dir, other) = (tempfile::tempdir().unwrap(), filled());
        let link = dir.path().join("link");
        symlink(other.path(), &link).unwrap();
        assert!(copy(&link, dir.path(), 100).is_err());
    }
}
