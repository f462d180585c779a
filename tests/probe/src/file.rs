// SPDX-License-Identifier: Apache-2.0
//! Attempts on files.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::{FileTypeExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use nix::errno::Errno;

use crate::{Failure, MOST, Tried};

/// How many directories deep an escape goes up.
const HEIGHT: usize = 100;

/// `read PATH`.
pub(crate) fn read(path: &str) -> Tried {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MOST as u64)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// `list PATH`: the names in a directory, or that it is none.
pub(crate) fn list(path: &str) -> Tried {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names.join(" "))
}

/// `open PATH` for reading and writing; finds what kind of file it is, and its first bytes.
pub(crate) fn open(path: &str) -> Tried {
    let mut file = File::options().read(true).write(true).open(path)?;
    let kind = file.metadata()?.file_type();
    let kind = if kind.is_block_device() {
        "block device"
    } else if kind.is_char_device() {
        "character device"
    } else {
        "file"
    };
    let mut first = [0; 16];
    let read = file.read(&mut first).unwrap_or_default();
    Ok(format!(
        "{kind} {:?}",
        String::from_utf8_lossy(&first[..read])
    ))
}

/// `write PATH TEXT` to the start of a file, which is made where it is not there.
pub(crate) fn write(path: &str, text: &str) -> Tried {
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.flush()?;
    Ok(String::new())
}

/// `fill PATH BYTES`.
pub(crate) fn fill(path: &str, bytes: u64) -> Tried {
    let mut file = File::create(path)?;
    let block = vec![0x5a; 1 << 20];
    let mut written = 0u64;
    let refused = |e: std::io::Error, written: u64| {
        let errno = e
            .raw_os_error()
            .map_or(Errno::UnknownErrno, Errno::from_raw);
        Failure::Refused(errno, written.to_string())
    };
    while written < bytes {
        written += file.write(&block).map_err(|e| refused(e, written))? as u64;
    }
    // Only then is it known whether there was room.
    file.sync_all().map_err(|e| refused(e, written))?;
    Ok(written.to_string())
}

/// `race PATH TARGET MILLISECONDS`: finds how often it has swapped.
pub(crate) fn race(path: &str, target: &str, millis: u64) -> Tried {
    let end = Instant::now() + Duration::from_millis(millis);
    let (link, dir) = (format!("{path}.link"), format!("{path}.dir"));
    fs::create_dir_all(path)?;
    symlink(target, &link)?;
    let mut swaps = 0u64;
    while Instant::now() < end {
        // What is mounted on is busy, for a moment.
        let away = fs::rename(path, &dir).and_then(|()| fs::rename(&link, path));
        let back = fs::rename(path, &link).and_then(|()| fs::rename(&dir, path));
        swaps += u64::from(away.is_ok() && back.is_ok());
    }
    Ok(swaps.to_string())
}

/// `climb`: changes its root to a directory below its working directory, which stays outside, and
/// goes up from there.
pub(crate) fn climb() -> Tried {
    let dir = Path::new("/tmp/climb");
    fs::create_dir_all(dir)?;
    nix::unistd::chdir("/")?;
    nix::unistd::chroot(dir)?;
    for _ in 0..HEIGHT {
        nix::unistd::chdir("..")?;
    }
    nix::unistd::chroot(".")?;
    list("/")
}

/// `fds`: one `NUMBER TARGET` a line, but for the directory that is read for it.
pub(crate) fn fds() -> Tried {
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let number = path.file_name().unwrap_or_default().to_string_lossy();
        match fs::read_link(&path) {
            Ok(target) if target.ends_with("fd") => {}
            Ok(target) => lines.push(format!("{number} {}", target.display())),
            Err(e) if e.raw_os_error() == Some(Errno::ENOENT as i32) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(lines.join("\n"))
}
