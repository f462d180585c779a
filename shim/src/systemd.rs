// SPDX-License-Identifier: Apache-2.0

//! Scopes: the cgroups of sandboxes below slices, which are systemd's to make on hosts that it runs.
//!
//! From a directory that somebody else makes below a slice, systemd takes the controllers away when
//! it next looks after the slice (a property of it is set, a scope begins in it), and with them
//! limits and figures. A transient scope with `Delegate=yes` keeps them, and what is below it is
//! ours (systemd's `docs/CGROUP_DELEGATION.md`).
//!
//! A scope begins with a process in it. [`start`] is run by this binary as a short-lived process of
//! its own, `scope SLICE UNIT [PID…]`: what speaks D-Bus would otherwise stay in the memory of each
//! Pod's shim. Without a PID that process itself is in the scope, until its input ends.

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    path::Path,
    process::Stdio,
    time::Duration,
};

use kiln_host::{cgroup::Scope, reap};
use tokio::{
    io::AsyncReadExt,
    process::{Child, ChildStdin, Command},
    time::timeout,
};
use zbus::{
    blocking::{Connection, Proxy},
    zvariant::{OwnedObjectPath, Value},
};

use crate::error::{Error, Result};

/// The action of the command line that makes one.
pub(crate) const ACTION: &str = "scope";

/// How long systemd may take: it starts a scope at once, but on a busy node behind others.
const TIME: Duration = Duration::from_secs(10);

/// Longest reason of a failure that is read, in bytes.
const WORDS: u64 = 4 << 10;

/// What the process writes when the scope is there.
const STARTED: u8 = b'\n';

/// What keeps a scope from ending before there is another process in it. Dropping it lets go.
#[derive(Debug)]
pub(crate) struct Held {
    /// The process in it ends when this does.
    _input: Option<ChildStdin>,
}

/// Has systemd start `scope` with these processes; without any, with one that is held.
///
/// # Errors
/// What systemd, or the way to it, says.
pub(crate) async fn start_scope(scope: &Scope, pids: &[u32]) -> Result<Held> {
    let mut command = Command::new("/proc/self/exe");
    command
        .args([ACTION, &scope.slice, &scope.unit])
        .args(pids.iter().map(u32::to_string))
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let failed = |source| Error::Io {
        what: format!("start {} in {}", scope.unit, scope.slice),
        source,
    };
    let (mut child, owned) = reap::spawn(&mut command).map_err(failed)?;
    let input = child.stdin.take();
    let answer = timeout(TIME, answer(&mut child)).await;
    let answer = answer.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    if answer.is_err() {
        // It may have ended by itself.
        child.start_kill().ok();
    }
    tokio::spawn(async move {
        // How it ends says no more than its answer.
        child.wait().await.ok();
        drop(owned);
    });
    answer.map_err(failed)?;
    Ok(Held { _input: input })
}

/// What the process says: that the scope is there, or why it is not.
async fn answer(child: &mut Child) -> io::Result<()> {
    let mut byte = [0];
    if let Some(out) = &mut child.stdout
        && out.read(&mut byte).await? == 1
        && byte == [STARTED]
    {
        return Ok(());
    }
    let mut words = String::new();
    if let Some(errors) = &mut child.stderr {
        errors.take(WORDS).read_to_string(&mut words).await?;
    }
    Err(io::Error::other(words.trim().to_owned()))
}

/// Starts the scope that `arguments` name, says so, and stays until the input ends where it is
/// itself what is in there. Blocks.
///
/// # Errors
/// For other arguments, and what systemd, or the way to it, says.
pub(crate) fn start(arguments: &[OsString]) -> Result<()> {
    let words: Option<Vec<&str>> = arguments.iter().map(|a| a.to_str()).collect();
    let words = words.unwrap_or_default();
    let Some((&[slice, unit], pids)) = words.split_first_chunk() else {
        let usage = format!("usage: {ACTION} SLICE UNIT [PID…]");
        return Err(Error::InvalidArgument(usage));
    };
    let number = |pid: &&str| {
        let number = pid.parse::<u32>();
        number.map_err(|_| Error::InvalidArgument(format!("{pid:?} is no process id")))
    };
    let mut pids = pids.iter().map(number).collect::<Result<Vec<_>>>()?;
    let stays = pids.is_empty();
    if stays {
        pids.push(std::process::id());
    }
    start_transient(slice, unit, &pids).map_err(|e| Error::Io {
        what: "ask systemd".to_owned(),
        source: io::Error::other(e),
    })?;
    let mut out = io::stdout();
    out.write_all(&[STARTED])
        .and_then(|()| out.flush())
        .map_err(Error::io("write", Path::new("standard output")))?;
    if stays {
        // It ends with whoever holds the other end.
        io::stdin().read_exact(&mut [0]).ok();
    }
    Ok(())
}

/// Asks systemd, and waits until it is done.
fn start_transient(slice: &str, unit: &str, pids: &[u32]) -> zbus::Result<()> {
    let connection = Connection::system()?;
    let manager = Proxy::new(
        &connection,
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
    )?;
    let done = manager.receive_signal("JobRemoved")?;
    let properties = [
        ("Description", Value::from("Sandbox of a Pod")),
        ("Slice", slice.into()),
        ("PIDs", Value::from(pids.to_vec())),
        ("Delegate", true.into()),
        ("CPUAccounting", true.into()),
        ("IOAccounting", true.into()),
        ("MemoryAccounting", true.into()),
        ("TasksAccounting", true.into()),
        // containerd ends Pods before the host goes down, or they end with it.
        ("DefaultDependencies", false.into()),
        // Also one whose sentry the OOM killer has killed goes without a trace.
        ("CollectMode", "inactive-or-failed".into()),
    ];
    let others: [(&str, Vec<(&str, Value<'_>)>); 0] = [];
    let job: OwnedObjectPath = manager.call(
        "StartTransientUnit",
        &(unit, "replace", &properties[..], &others[..]),
    )?;
    for message in done {
        let body = message.body();
        let (_, path, _, result): (u32, OwnedObjectPath, String, String) = body.deserialize()?;
        if path == job {
            return match result.as_str() {
                "done" => Ok(()),
                other => Err(zbus::Error::Failure(format!("{unit}: {other}"))),
            };
        }
    }
    Err(zbus::Error::Failure("the bus is gone".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_without_a_scope_is_refused() {
        for words in [
            &[][..],
            &["a.slice"],
            &["a.slice", "b.scope", "x"],
            &["a.slice", "b.scope", "-1"],
        ] {
            let arguments: Vec<_> = words.iter().map(OsString::from).collect();
            let refused = start(&arguments).unwrap_err();
            assert!(
                matches!(refused, Error::InvalidArgument(_)),
                "{words:?}: {refused}"
            );
        }
    }
}
