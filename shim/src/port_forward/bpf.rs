// SPDX-License-Identifier: Apache-2.0

//! The `sk_lookup` program of port-forward, put together by hand: it is some twenty instructions,
//! and a BPF library would cost each Pod's shim more memory than all of this module.
//!
//! Numbers are those of the kernel's `include/uapi/linux/bpf.h`.

use std::{
    io,
    mem::size_of_val,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;

const FUNC_MAP_LOOKUP_ELEM: i32 = 1;
const FUNC_SK_RELEASE: i32 = 86;
const FUNC_SK_ASSIGN: i32 = 124;

/// Offsets in `struct bpf_sk_lookup`.
const CTX_FAMILY: i16 = 8;
const CTX_PROTOCOL: i16 = 12;
const CTX_LOCAL_IP4: i16 = 40;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Insn {
    code: u8,
    /// Destination register in the low four bits, source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn {
        code,
        registers: dst | src << 4,
        offset,
        immediate,
    }
}

const fn load_word(dst: u8, src: u8, offset: i16) -> Insn {
    insn(0x61, dst, src, offset, 0)
}

const fn mov(dst: u8, src: u8) -> Insn {
    insn(0xbf, dst, src, 0, 0)
}

const fn mov_imm(dst: u8, immediate: i32) -> Insn {
    insn(0xb7, dst, 0, 0, immediate)
}

/// At instruction `at`: goes to the end unless the register has this value.
const fn end_unless(at: i16, register: u8, immediate: i32) -> Insn {
    insn(0x55, register, 0, END - at - 1, immediate)
}

/// At instruction `at`: goes to the end if the register is 0.
const fn end_if_null(at: i16, register: u8) -> Insn {
    insn(0x15, register, 0, END - at - 1, 0)
}

const fn call(function: i32) -> Insn {
    insn(0x85, 0, 0, 0, function)
}

/// Where [`program`] lets the lookup go on.
const END: i16 = 21;
/// Register of the stack frame.
const FRAME: u8 = 10;

/// Gives every TCP connection to 127.0.0.1 the socket in `map`; all else goes its usual way.
fn program(map: BorrowedFd<'_>) -> [Insn; 23] {
    let loopback = i32::from_ne_bytes([127, 0, 0, 1]);
    [
        mov(6, 1), // the context survives calls in r6
        load_word(2, 6, CTX_FAMILY),
        end_unless(2, 2, libc::AF_INET),
        load_word(2, 6, CTX_PROTOCOL),
        end_unless(4, 2, libc::IPPROTO_TCP),
        load_word(2, 6, CTX_LOCAL_IP4),
        end_unless(6, 2, loopback),
        insn(0x62, FRAME, 0, -4, 0),          // the key, 0, on the stack
        insn(0x18, 1, 1, 0, map.as_raw_fd()), // r1 = map, two instructions wide
        insn(0, 0, 0, 0, 0),
        mov(2, FRAME),
        insn(0x07, 2, 0, 0, -4), // r2 = &key
        call(FUNC_MAP_LOOKUP_ELEM),
        end_if_null(13, 0),
        mov(7, 0), // the socket survives calls in r7
        mov(1, 6),
        mov(2, 7),
        mov_imm(3, 0),
        // Assigning fails only for a socket that is closing; the connection is refused then.
        call(FUNC_SK_ASSIGN),
        mov(1, 7),
        call(FUNC_SK_RELEASE),
        mov_imm(0, 1), // SK_PASS
        insn(0x95, 0, 0, 0, 0),
    ]
}

/// Directs TCP connections to 127.0.0.1 in `netns` to `listener` for as long as the returned
/// link is open.
pub(super) fn direct_loopback(
    listener: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
) -> io::Result<OwnedFd> {
    let map = create_map()?;
    set_socket(map.as_fd(), listener)?;
    let program = load(map.as_fd())?;
    link(program.as_fd(), netns)
}

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

fn create_map() -> io::Result<OwnedFd> {
    let attr = MapCreate {
        map_type: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
    };
    bpf_fd(BPF_MAP_CREATE, &attr)
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn set_socket(map: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    let key = 0u32;
    let value = u64::from(socket.as_raw_fd().cast_unsigned());
    let attr = MapUpdate {
        map: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attr).map(drop)
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_count: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

fn load(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let insns = program(map);
    let license = c"Apache-2.0";
    let attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_SK_LOOKUP,
        insn_count: u32::try_from(insns.len()).map_err(io::Error::other)?,
        insns: insns.as_ptr().addr() as u64,
        license: license.as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"kiln_forward\0\0\0\0",
        ifindex: 0,
        expected_attach_type: BPF_SK_LOOKUP,
    };
    bpf_fd(BPF_PROG_LOAD, &attr)
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn link(program: BorrowedFd<'_>, netns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attr = LinkCreate {
        program: program.as_raw_fd().cast_unsigned(),
        target: netns.as_raw_fd().cast_unsigned(),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf_fd(BPF_LINK_CREATE, &attr)
}

fn bpf_fd<A>(command: libc::c_int, attr: &A) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: these commands return a descriptor that nobody else owns (bpf(2)).
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<A>(command: libc::c_int, attr: &A) -> io::Result<libc::c_int> {
    // SAFETY: bpf(2) reads `size` bytes at `attr`, which is a plain struct without padding that
    // lives through the call, as does what its pointers name.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of_val(attr),
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(rc).map_err(io::Error::other)
}
