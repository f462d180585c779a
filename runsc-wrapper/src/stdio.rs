// SPDX-License-Identifier: Apache-2.0

//! Descriptors that become the standard streams of contained processes.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::OwnedFd,
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Opens a null device that is not the host's.
///
/// runsc gives the standard streams to the sandbox's user (`fchown` in gVisor's
/// `configureStdios`), and the sandbox may do with an owner's rights what it likes, such as
/// `fchmod`. On the host's `/dev/null` that would hit every process of the host. So this is a
/// node of its own, without a name. Where none can be made, it is the host's after all.
pub(crate) fn null_device() -> io::Result<OwnedFd> {
    private_null().or_else(|e| {
        log::debug!("make a null device: {e}; using the host's");
        Ok(open(Path::new("/dev/null"))?.into())
    })
}

fn private_null() -> io::Result<OwnedFd> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    // In /dev, because other places are mounted `nodev`.
    let name = format!(
        "/dev/.null-{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = Path::new(&name);
    mknod(
        path,
        SFlag::S_IFCHR,
        Mode::S_IRUSR | Mode::S_IWUSR,
        makedev(1, 3),
    )?;
    let opened = open(path);
    std::fs::remove_file(path)?;
    Ok(opened?.into())
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::MetadataExt};

    use super::*;

    #[test]
    fn null_takes_everything_and_is_not_the_hosts() {
        let mut null = File::from(null_device().unwrap());
        null.write_all(b"gone").unwrap();
        let (own, host) = (
            null.metadata().unwrap(),
            std::fs::metadata("/dev/null").unwrap(),
        );
        assert_eq!(own.rdev(), host.rdev());
        if nix::unistd::geteuid().is_root() {
            assert_ne!(own.ino(), host.ino());
            assert_eq!(own.nlink(), 0);
        }
    }
}
