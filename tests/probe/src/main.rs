// SPDX-License-Identifier: Apache-2.0

//! Tries to get out of the sandbox that it runs in, and says how far it came.
//!
//! `kiln-probe ATTEMPT [ARG…] [-- ATTEMPT [ARG…]]…` makes its attempts one after the other in one
//! process, so that one can build on what another has reached, and prints a line of JSON for each:
//!
//! ```json
//! {"attempt":"mount","args":["tmpfs","/mnt","tmpfs"],"done":false,"error":"EPERM","found":""}
//! ```
//!
//! `done` says whether the attempt succeeded, `error` is the kernel's refusal, and `found` is what
//! was seen either way. The exit code is 0 when all attempts were made, however they went.
//!
//! | attempt | what it tries |
//! |---|---|
//! | `uname`, `dmesg` | to learn of the host's kernel |
//! | `read PATH`, `list PATH`, `open PATH`, `write PATH TEXT` | to get at a file |
//! | `fill PATH BYTES` | to write more than there may be room for; finds how much was written |
//! | `race PATH TARGET MILLISECONDS` | swaps a directory and a symbolic link to `TARGET` at `PATH` |
//! | `climb` | to leave its root directory by chroot(2); finds what is at the top |
//! | `fds` | finds what its own open files are |
//! | `kill PID`, `ptrace PID`, `setns PATH` | to reach processes and namespaces of others |
//! | `identity` | finds its user ids and effective capabilities |
//! | `setuid`, `raise` | to become root, to get all capabilities |
//! | `unshare KIND` | to enter a new namespace: `user`, `mount`, `pid`, `net` |
//! | `fork COUNT` | to start that many processes; finds how many ran at once |
//! | `call NAME` | a system call for administrators of a machine |
//! | `mount SOURCE TARGET TYPE`, `mknod KIND MAJOR MINOR PATH` | to get at devices and file systems |
//! | `dial PATH`, `offer PATH` | to reach or to be a UNIX socket; `@` starts an abstract name |
//! | `socket FAMILY TYPE`, `option NAME` | to get sockets that forge packets |
//! | `connect ADDRESS:PORT`, `send ADDRESS:PORT`, `bind ADDRESS` | to reach by TCP or UDP, or to be an address |
//! | `address IF IP`, `hwaddr IF` | to change an interface's address |
//! | `random` | finds what should be different in every sandbox |

mod file;
mod kernel;
mod network;
mod process;

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use nix::errno::Errno;
use serde::Serialize;

/// Exit code for a wrong command line (`EX_USAGE` of sysexits.h).
const USAGE: u8 = 64;

/// Most that is told of what was found, in bytes.
const MOST: usize = 64 << 10;

/// How an attempt went: what was found, or why not.
type Tried = Result<String, Failure>;

/// Why an attempt did not succeed.
#[derive(Debug)]
enum Failure {
    /// Its arguments make no sense.
    Usage,
    /// The system refused, after this much was found.
    Refused(Errno, String),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Failure::Refused(errno, String::new())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Errno::from_raw(number).into(),
            None => Failure::Refused(Errno::UnknownErrno, error.to_string()),
        }
    }
}

/// A line of the answer.
#[derive(Serialize)]
struct Line<'a> {
    attempt: &'a str,
    args: &'a [String],
    done: bool,
    error: String,
    found: String,
}

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    if words.is_empty() {
        return ExitCode::from(USAGE);
    }
    for attempt in words.split(|word| word == "--") {
        let Some((name, args)) = attempt.split_first() else {
            return ExitCode::from(USAGE);
        };
        let (done, error, mut found) = match make(name, args) {
            Ok(found) => (true, String::new(), found),
            Err(Failure::Refused(errno, found)) => (false, format!("{errno:?}"), found),
            Err(Failure::Usage) => return ExitCode::from(USAGE),
        };
        found.truncate(found.floor_char_boundary(MOST));
        let line = Line {
            attempt: name,
            args,
            done,
            error,
            found,
        };
        if print(&line).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Makes one attempt.
fn make(name: &str, args: &[String]) -> Tried {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match (name, args.as_slice()) {
        ("uname", []) => kernel::uname(),
        ("dmesg", []) => kernel::dmesg(),
        ("call", [name]) => kernel::call(name),
        ("mount", [source, target, kind]) => kernel::mount(source, target, kind),
        ("mknod", [kind, major, minor, path]) => kernel::mknod(kind, major, minor, path),
        ("random", []) => kernel::random(),
        ("read", [path]) => file::read(path),
        ("list", [path]) => file::list(path),
        ("open", [path]) => file::open(path),
        ("write", [path, text]) => file::write(path, text),
        ("fill", [path, bytes]) => file::fill(path, number(bytes)?),
        ("race", [path, target, millis]) => file::race(path, target, number(millis)?),
        ("climb", []) => file::climb(),
        ("fds", []) => file::fds(),
        ("kill", [pid]) => process::kill(number(pid)?),
        ("ptrace", [pid]) => process::ptrace(number(pid)?),
        ("setns", [path]) => process::setns(path),
        ("identity", []) => process::identity(),
        ("setuid", []) => process::setuid(),
        ("raise", []) => process::raise(),
        ("unshare", [kind]) => process::unshare(kind),
        ("fork", [count]) => process::fork(number(count)?),
        ("dial", [path]) => network::dial(path),
        ("offer", [path]) => network::offer(path),
        ("socket", [family, kind]) => network::socket(family, kind),
        ("option", [name]) => network::option(name),
        ("connect", [address]) => network::connect(address),
        ("send", [address]) => network::send(address),
        ("bind", [address]) => network::bind(address),
        ("address", [interface, ip]) => network::address(interface, ip),
        ("hwaddr", [interface]) => network::hwaddr(interface),
        _ => Err(Failure::Usage),
    }
}

fn number<T: std::str::FromStr>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|_| Failure::Usage)
}

fn print(line: &Line<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, line)?;
    writeln!(out)?;
    out.flush()
}
