// SPDX-License-Identifier: Apache-2.0
//! `ipcs [-m]`: the System V shared memory segments of the IPC namespace.
//!
//! It asks with `shmctl` rather than read /proc/sysvipc, which gVisor does not have.

use std::io;
use std::mem::MaybeUninit;

use crate::{Failure, print};

/// `shmctl` commands of linux/shm.h that crate libc does not name.
const SHM_STAT: libc::c_int = 13;
const SHM_INFO: libc::c_int = 14;

/// `struct shm_info` of linux/shm.h; only its size matters.
#[repr(C)]
struct ShmInfo {
    used_ids: libc::c_int,
    pages: [libc::c_ulong; 5],
}

/// Prints a table of the segments.
pub(crate) fn run(args: &[String]) -> Result<u8, Failure> {
    if args.iter().any(|arg| arg != "-m") {
        return Err(Failure::Usage("ipcs [-m]"));
    }
    let mut table = String::from(
        "------ Shared Memory Segments ------\nkey        shmid      owner      perms      bytes      nattch\n",
    );
    for index in 0..=last_index()? {
        if let Some((id, segment)) = segment(index) {
            let (key, owner, perms) = (
                segment.shm_perm.__key,
                segment.shm_perm.uid,
                segment.shm_perm.mode & 0o777,
            );
            let (bytes, attached) = (segment.shm_segsz, segment.shm_nattch);
            table +=
                &format!("0x{key:08x} {id:<10} {owner:<10} {perms:<10o} {bytes:<10} {attached}\n");
        }
    }
    print(&table)?;
    Ok(0)
}

/// The highest index in use in the kernel's table of segments.
fn last_index() -> Result<libc::c_int, Failure> {
    let mut info = MaybeUninit::<ShmInfo>::uninit();
    // SAFETY: SHM_INFO writes one struct shm_info, which `ShmInfo` mirrors, and reads nothing.
    let last = unsafe { libc::shmctl(0, SHM_INFO, info.as_mut_ptr().cast()) };
    if last < 0 {
        return Err(Failure::io("ask for shared memory")(
            io::Error::last_os_error(),
        ));
    }
    Ok(last)
}

/// The id and state of the segment at `index`; `None` if the slot is free or not ours to see.
fn segment(index: libc::c_int) -> Option<(libc::c_int, libc::shmid_ds)> {
    let mut segment = MaybeUninit::<libc::shmid_ds>::uninit();
    // SAFETY: SHM_STAT writes one struct shmid_ds and reads nothing.
    let id = unsafe { libc::shmctl(index, SHM_STAT, segment.as_mut_ptr()) };
    // SAFETY: the call succeeded, so the kernel filled it in.
    (id >= 0).then(|| (id, unsafe { segment.assume_init() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_found() {
        // SAFETY: makes a new segment, touching no memory of ours.
        let made = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600) };
        assert!(made >= 0);
        let found = (0..=last_index().unwrap())
            .filter_map(segment)
            .any(|(id, s)| id == made && s.shm_segsz == 4096);
        // SAFETY: removes the segment that is not attached anywhere.
        unsafe { libc::shmctl(made, libc::IPC_RMID, std::ptr::null_mut()) };
        assert!(found);
    }
}
