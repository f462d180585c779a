// SPDX-License-Identifier: Apache-2.0
//! Attempts on the kernel itself, and on the devices and file systems that it has.

use std::{fs, io, ptr};

use nix::{
    errno::Errno,
    mount::MsFlags,
    sys::{
        stat::{Mode, SFlag, makedev},
        utsname,
    },
};

use crate::{Failure, Tried, file, number};

/// `uname`: what the kernel calls itself, and at the end the domain's name.
pub(crate) fn uname() -> Tried {
    let name = utsname::uname()?;
    let words = [
        name.sysname(),
        name.release(),
        name.version(),
        name.domainname(),
    ];
    Ok(words.map(|w| w.to_string_lossy().into_owned()).join(" "))
}

/// `dmesg`: the kernel's log (`SYSLOG_ACTION_READ_ALL`, syslog(2)).
pub(crate) fn dmesg() -> Tried {
    const READ_ALL: libc::c_int = 3;
    let mut buffer = vec![0u8; 256 << 10];
    let size = libc::c_int::try_from(buffer.len()).map_err(|_| Failure::Usage)?;
    // SAFETY: the buffer is valid for `size` bytes.
    let read = unsafe { libc::klogctl(READ_ALL, buffer.as_mut_ptr().cast(), size) };
    let read = usize::try_from(Errno::result(read)?).unwrap_or_default();
    Ok(String::from_utf8_lossy(&buffer[..read]).into_owned())
}

/// `call NAME`: a system call that an administrator of a machine needs, with arguments for which
/// it does nothing where it is allowed.
pub(crate) fn call(name: &str) -> Tried {
    let (number, args): (libc::c_long, [libc::c_long; 4]) = match name {
        // BPF_MAP_CREATE with no attributes.
        "bpf" => (libc::SYS_bpf, [0; 4]),
        "init_module" => (libc::SYS_init_module, [0; 4]),
        "delete_module" => (libc::SYS_delete_module, [0; 4]),
        "kexec_load" => (libc::SYS_kexec_load, [0; 4]),
        "perf_event_open" => (libc::SYS_perf_event_open, [0, 0, -1, -1]),
        #[cfg(target_arch = "x86_64")]
        "iopl" => (libc::SYS_iopl, [3, 0, 0, 0]),
        #[cfg(target_arch = "x86_64")]
        "ioperm" => (libc::SYS_ioperm, [0x80, 1, 1, 0]),
        "swapoff" => (libc::SYS_swapoff, [0; 4]),
        // LINUX_REBOOT_CMD_CAD_OFF: what Ctrl-Alt-Del does, and nothing now.
        "reboot" => (libc::SYS_reboot, [0xfee1_dead, 0x2812_1969, 0, 0]),
        "settimeofday" => (libc::SYS_settimeofday, [0; 4]),
        "io_uring_setup" => (libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        "userfaultfd" => (libc::SYS_userfaultfd, [0; 4]),
        "open_by_handle_at" => (libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
        "acct" => (libc::SYS_acct, [0; 4]),
        "vhangup" => (libc::SYS_vhangup, [0; 4]),
        "quotactl" => (libc::SYS_quotactl, [0; 4]),
        "fsopen" => (libc::SYS_fsopen, [0; 4]),
        "move_mount" => (libc::SYS_move_mount, [-1, 0, -1, 0]),
        "process_vm_readv" => (libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        _ => return Err(Failure::Usage),
    };
    // SAFETY: pointers among the arguments are null, which no call writes to.
    let done = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], 0, 0) };
    Ok(Errno::result(done)?.to_string())
}

/// `mount SOURCE TARGET TYPE`; finds what is at the target then.
pub(crate) fn mount(source: &str, target: &str, kind: &str) -> Tried {
    let (kind, flags) = match kind {
        "bind" => (None, MsFlags::MS_BIND),
        kind => (Some(kind), MsFlags::empty()),
    };
    nix::mount::mount(Some(source), target, kind, flags, None::<&str>)?;
    file::list(target)
}

/// `mknod KIND MAJOR MINOR PATH`: a device node, which is then opened.
pub(crate) fn mknod(kind: &str, major: &str, minor: &str, path: &str) -> Tried {
    let kind = match kind {
        "b" => SFlag::S_IFBLK,
        "c" => SFlag::S_IFCHR,
        _ => return Err(Failure::Usage),
    };
    let device = makedev(number(major)?, number(minor)?);
    nix::sys::stat::mknod(path, kind, Mode::from_bits_truncate(0o666), device)?;
    file::open(path)
}

/// `random`: what a sandbox must not share with another: bytes of getrandom(2), the 16 that the
/// kernel gives to every program, an address of the stack, and the boot's id.
pub(crate) fn random() -> Tried {
    let mut bytes = [0u8; 16];
    // SAFETY: the buffer is valid for 16 bytes.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if Errno::result(got)? != 16 {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    // SAFETY: AT_RANDOM is the address of 16 bytes, which stay (getauxval(3)).
    let at_start = unsafe {
        let address = libc::getauxval(libc::AT_RANDOM) as *const [u8; 16];
        if address.is_null() { [0; 16] } else { *address }
    };
    let stack = format!("{:p}", ptr::addr_of!(bytes));
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Ok(format!(
        "getrandom={} start={} stack={stack} boot={}",
        hex(&bytes),
        hex(&at_start),
        boot.trim()
    ))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
