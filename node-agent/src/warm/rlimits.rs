// SPDX-License-Identifier: Apache-2.0

//! Limits on this process that reach into sandboxes.
//!
//! A sentry gives processes in it the limits on open files and on the size of a file that it has
//! itself, unless their spec names others (gVisor `runsc/boot/limits.go`). In a cold Pod it has them
//! from containerd, and in a warm sandbox from this process. So this process takes containerd's.

use std::{fs, io};

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, rlim_t, setrlimit};

/// The limits, and their lines in `/proc/PID/limits` (proc_pid_limits(5)).
const LIMITS: [(Resource, &str); 2] = [
    (Resource::RLIMIT_NOFILE, "Max open files"),
    (Resource::RLIMIT_FSIZE, "Max file size"),
];

/// Gives this process, and what it starts from now on, the limits that process `pid` has. Blocks.
///
/// # Errors
/// When they cannot be read or set. Hard ones above one's own need CAP_SYS_RESOURCE.
pub(crate) fn take_from(pid: u32) -> io::Result<()> {
    let text = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    for (resource, line) in LIMITS {
        let wanted = limit_in(&text, line)
            .ok_or_else(|| io::Error::other(format!("no line {line:?} in its limits")))?;
        if getrlimit(resource)? != wanted {
            setrlimit(resource, wanted.0, wanted.1)?;
        }
    }
    Ok(())
}

/// The soft and the hard limit in the line that begins with `name`.
fn limit_in(limits: &str, name: &str) -> Option<(rlim_t, rlim_t)> {
    let mut lines = limits.lines();
    let rest = lines.find_map(|line| line.strip_prefix(name))?;
    let mut numbers = rest.split_whitespace().map(|word| match word {
        "unlimited" => Some(RLIM_INFINITY),
        number => number.parse().ok(),
    });
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn limits_are_read_as_the_kernel_writes_them() {
        let mut child = Command::new("sh")
            .args(["-c", "ulimit -S -n 100; ulimit -H -n 200; read line"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let path = format!("/proc/{}/limits", child.id());
        let is_set = || {
            let text = fs::read_to_string(&path).unwrap();
            limit_in(&text, LIMITS[0].1) == Some((100, 200))
        };
        let set = (0..1000).any(|_| {
            std::thread::yield_now();
            is_set() || {
                std::thread::park_timeout(std::time::Duration::from_millis(10));
                false
            }
        });
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(set);
        let text = "Max file size             unlimited            4096                 bytes\n";
        assert_eq!(limit_in(text, LIMITS[1].1), Some((RLIM_INFINITY, 4096)));
        for text in [
            "",
            "Max file size",
            "Max file size  1",
            "Max file size  x  1",
        ] {
            assert_eq!(limit_in(text, LIMITS[1].1), None, "{text:?}");
        }
    }

    #[test]
    fn ones_own_limits_can_be_taken() {
        let own = || LIMITS.map(|(resource, _)| getrlimit(resource).unwrap());
        let before = own();
        take_from(std::process::id()).unwrap();
        assert_eq!(own(), before);
    }
}
