// SPDX-License-Identifier: Apache-2.0

//! Further processes in a container: from an OCI `process` to what the sentry wants to know
//! (gVisor `runsc/cmd/exec.go`), and the terminal of a process that has one.
//!
//! The sentry itself looks the program up in `PATH` and adds `HOME`. Resource limits and the
//! umask of a process are not passed on: runsc has no way to, by socket or by command line.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    pty::openpty,
    sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg},
    unistd::{Gid, Uid, fchown},
};
use serde::Deserialize;
use tokio::{io::Interest, net::UnixStream};

use crate::{
    Stdio,
    control::{ExecArgs, TaskCapabilities},
    stdio::null_device,
};

/// Capability names by their numbers (linux/capability.h), without their prefix.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    NET_RAW,
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

const NET_RAW: &str = "NET_RAW";

/// Whether processes may keep `CAP_NET_RAW` (flag `net-raw`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RawSockets {
    Allowed,
    Denied,
}

/// The part of an OCI `process` that the sentry is told.
#[derive(Debug, Deserialize)]
struct Process {
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Option<Vec<String>>,
    #[serde(default)]
    cwd: String,
    #[serde(default)]
    user: User,
    #[serde(default, rename = "noNewPrivileges")]
    no_new_privileges: bool,
    capabilities: Option<Capabilities>,
}

#[derive(Debug, Default, Deserialize)]
struct User {
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    #[serde(default, rename = "additionalGids")]
    additional_gids: Option<Vec<u32>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Capabilities {
    bounding: Option<Vec<String>>,
    effective: Option<Vec<String>>,
    inheritable: Option<Vec<String>>,
    permitted: Option<Vec<String>>,
}

/// Turns an OCI `process` into the sentry's arguments. A process without capabilities of its
/// own gets those of the container.
///
/// # Errors
/// What is wrong with the process, in words.
pub(crate) fn exec_args(
    container: &str,
    process: &serde_json::Value,
    container_capabilities: Option<&serde_json::Value>,
    raw_sockets: RawSockets,
) -> Result<ExecArgs, String> {
    let process = Process::deserialize(process).map_err(|e| format!("process: {e}"))?;
    if process.args.is_empty() {
        return Err("args must not be empty".to_owned());
    }
    if !process.cwd.starts_with('/') {
        return Err(format!("cwd {:?} must be an absolute path", process.cwd));
    }
    let capabilities = match (process.capabilities, container_capabilities) {
        (Some(own), _) => own,
        (None, Some(inherited)) => Capabilities::deserialize(inherited)
            .map_err(|e| format!("capabilities of the container: {e}"))?,
        (None, None) => Capabilities::default(),
    };
    Ok(ExecArgs {
        argv: process.args,
        envv: process.env.unwrap_or_default(),
        cwd: process.cwd,
        uid: process.user.uid,
        gid: process.user.gid,
        extra_gids: process.user.additional_gids.unwrap_or_default(),
        no_new_privileges: process.no_new_privileges,
        capabilities: capabilities.masks(raw_sockets)?,
        stdio_is_pty: false,
        guest_fds: [0, 1, 2],
        container: container.to_owned(),
    })
}

impl Capabilities {
    /// Ambient capabilities are left out, as runsc leaves them out.
    fn masks(&self, raw_sockets: RawSockets) -> Result<TaskCapabilities, String> {
        let mask = |names: &Option<Vec<String>>| {
            names.iter().flatten().try_fold(0, |mask, name| {
                Ok::<_, String>(mask | bit(name, raw_sockets)?)
            })
        };
        Ok(TaskCapabilities {
            permitted_caps: mask(&self.permitted)?,
            inheritable_caps: mask(&self.inheritable)?,
            effective_caps: mask(&self.effective)?,
            bounding_caps: mask(&self.bounding)?,
            ambient_caps: 0,
        })
    }
}

fn bit(name: &str, raw_sockets: RawSockets) -> Result<u64, String> {
    let number = name
        .strip_prefix("CAP_")
        .and_then(|name| CAPABILITIES.iter().position(|known| *known == name))
        .ok_or_else(|| format!("unknown capability {name:?}"))?;
    if CAPABILITIES[number] == NET_RAW && raw_sockets == RawSockets::Denied {
        return Ok(0);
    }
    Ok(1 << number)
}

/// The three descriptors of a process, null devices where it has none.
#[derive(Debug)]
pub(crate) struct Descriptors<'a> {
    given: [Option<&'a OwnedFd>; 3],
    null: OwnedFd,
}

impl<'a> Descriptors<'a> {
    pub(crate) fn of(stdio: &'a Stdio) -> io::Result<Self> {
        let given = [
            stdio.stdin.as_ref(),
            stdio.stdout.as_ref(),
            stdio.stderr.as_ref(),
        ];
        Ok(Self {
            given,
            null: null_device()?,
        })
    }

    pub(crate) fn all(&self) -> [BorrowedFd<'_>; 3] {
        self.given.map(|fd| fd.unwrap_or(&self.null).as_fd())
    }

    /// Gives them to the sandbox's user, so that the sentry can open them again by name
    /// (gVisor `Sandbox.configureStdios`, which forgives the same errors).
    pub(crate) fn give_to(&self, (uid, gid): (u32, u32)) -> nix::Result<()> {
        for fd in self.all() {
            match fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))) {
                Err(e @ (nix::Error::EINVAL | nix::Error::EPERM | nix::Error::EROFS)) => {
                    log::debug!("give a stream to the sandbox: {e}");
                }
                other => other?,
            }
        }
        Ok(())
    }
}

/// Makes a terminal, sends its master end to the UNIX socket at `console` as OCI runtimes do,
/// and returns its replica end.
pub(crate) async fn open_terminal(console: &Path) -> io::Result<OwnedFd> {
    let pty = openpty(None, None)?;
    for fd in [&pty.master, &pty.slave] {
        nix::fcntl::fcntl(
            fd,
            nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
        )?;
    }
    let stream = UnixStream::connect(console).await?;
    let master = [pty.master.as_raw_fd()];
    stream
        .async_io(Interest::WRITABLE, || {
            let rights = [ControlMessage::ScmRights(&master)];
            let name = [IoSlice::new(b"pty-master")];
            let flags = MsgFlags::MSG_NOSIGNAL;
            Ok(sendmsg::<UnixAddr>(
                stream.as_raw_fd(),
                &name,
                &rights,
                flags,
                None,
            )?)
        })
        .await?;
    Ok(pty.slave)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn args(process: &serde_json::Value, raw: RawSockets) -> Result<ExecArgs, String> {
        let of_container = json!({"bounding": ["CAP_KILL"], "permitted": null});
        exec_args("c", process, Some(&of_container), raw)
    }

    #[test]
    fn a_process_becomes_arguments() {
        let process = json!({
            "args": ["sh", "-c", "true"], "env": ["A=b"], "cwd": "/tmp", "terminal": false,
            "user": {"uid": 7, "gid": 8, "umask": 18, "additionalGids": [9]},
            "noNewPrivileges": true, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1, "soft": 1}],
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_NET_RAW"], "effective": ["CAP_CHECKPOINT_RESTORE"],
                "inheritable": [], "permitted": ["CAP_CHOWN"], "ambient": ["CAP_KILL"]}
        });
        let denied = args(&process, RawSockets::Denied).unwrap();
        assert_eq!(denied.argv, ["sh", "-c", "true"]);
        assert_eq!(
            (denied.uid, denied.gid, denied.extra_gids.as_slice()),
            (7, 8, &[9][..])
        );
        assert!(denied.no_new_privileges);
        assert_eq!(
            denied.capabilities,
            TaskCapabilities {
                permitted_caps: 1,
                inheritable_caps: 0,
                effective_caps: 1 << 40,
                bounding_caps: 1,
                ambient_caps: 0
            }
        );
        let allowed = args(&process, RawSockets::Allowed).unwrap();
        assert_eq!(allowed.capabilities.bounding_caps, 1 | 1 << 13);
    }

    #[test]
    fn capabilities_of_the_container_are_the_default() {
        let bare = args(&json!({"args": ["a"], "cwd": "/"}), RawSockets::Denied).unwrap();
        assert_eq!(bare.capabilities.bounding_caps, 1 << 5);
        assert_eq!(bare.capabilities.permitted_caps, 0);
        let none = exec_args(
            "c",
            &json!({"args": ["a"], "cwd": "/"}),
            None,
            RawSockets::Denied,
        )
        .unwrap();
        assert_eq!(none.capabilities, TaskCapabilities::default());
    }

    #[test]
    fn processes_that_cannot_run_are_refused_in_words() {
        for (process, words) in [
            (json!({"args": [], "cwd": "/"}), "args must not be empty"),
            (json!({"args": ["a"]}), "cwd \"\" must be an absolute path"),
            (
                json!({"args": ["a"], "cwd": "x"}),
                "cwd \"x\" must be an absolute path",
            ),
            (
                json!({"args": ["a"], "cwd": "/", "capabilities": {"bounding": ["KILL"]}}),
                "unknown capability \"KILL\"",
            ),
            (json!({"args": "a"}), "process: invalid type"),
            (json!(7), "process: invalid type"),
        ] {
            let error = args(&process, RawSockets::Denied).unwrap_err();
            assert!(error.starts_with(words), "{process}: {error}");
        }
    }

    #[tokio::test]
    async fn a_terminals_master_goes_to_the_console() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let replica = open_terminal(&path).await.unwrap();
        let (stream, _) = listener.accept().unwrap();
        let mut text = [0; 32];
        let mut parts = [io::IoSliceMut::new(&mut text)];
        let mut space = nix::cmsg_space!([i32; 1]);
        let message = nix::sys::socket::recvmsg::<UnixAddr>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        assert_eq!(message.cmsgs().unwrap().count(), 1);
        assert!(std::io::IsTerminal::is_terminal(&replica));
    }
}
