// SPDX-License-Identifier: Apache-2.0

//! Queue of the sandboxes of a node that are about to start, from their boot or adoption on.
//!
//! A sentry costs CPU for its timers from the moment that it boots, and a Pod that comes a little
//! later may find a warm sandbox instead. Of a hundred Pods that start at once, most therefore
//! wait: half of them are ready sooner than if all went on together, and none meets a deadline.

use std::{
    fs::{self, File},
    io,
    num::NonZero,
    os::unix::fs::DirBuilderExt,
    path::Path,
    thread,
    time::Duration,
};

use log::warn;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use runsc_wrapper::ContainerId;
use tokio::{sync::oneshot, time::timeout};

use crate::error::{Error, Result};

/// Below the directory of all shims; a dot, because the others in there are ids of sandboxes.
const DIR: &str = ".turns";

/// After so long a sandbox starts without a permit: those before it may hang. Half of the four
/// minutes that a kubelet gives a Pod's sandbox (twice its `runtimeRequestTimeout`).
const LONGEST: Duration = Duration::from_secs(120);

/// How often the first of those that wait looks for a place.
const LOOK: Duration = Duration::from_millis(5);

/// A place among those that start, free again when this is dropped or its process is gone.
#[derive(Debug)]
pub(crate) struct StartPermit(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

impl StartPermit {
    /// Waits for one of `places`, or of twice as many as there are CPUs where that is 0. `None`
    /// where there was none for [`LONGEST`], or where places cannot be had: a sandbox starts
    /// all the same.
    pub(crate) async fn wait(run: &Path, places: u32, id: &ContainerId) -> Option<Self> {
        let places = match places {
            0 => 2 * thread::available_parallelism().map_or(1, NonZero::get),
            n => n as usize,
        };
        let (sender, permit) = oneshot::channel();
        let dir = run.join(DIR);
        // Of its own, because the end of the process need not wait for it.
        let spawned = thread::Builder::new().spawn(move || {
            let taken = take(&dir, places, || sender.is_closed());
            sender.send(taken).ok();
        });
        if let Err(e) = spawned {
            warn!("sandbox {id} starts without a permit: {e}");
            return None;
        }
        match timeout(LONGEST, permit).await {
            Ok(Ok(Ok(permit))) => return Some(permit),
            Ok(Ok(Err(e))) => warn!("sandbox {id} starts without a permit: {e}"),
            Ok(Err(_)) | Err(_) => warn!("sandbox {id} starts without a permit, after {LONGEST:?}"),
        }
        None
    }
}

/// Queues for one of `places` until nobody waits for it any more. Only the first of the queue
/// looks for one that is free. Blocks.
#[expect(clippy::disallowed_methods, reason = "a thread of its own may sleep")]
fn take(dir: &Path, places: usize, given_up: impl Fn() -> bool) -> Result<StartPermit> {
    let mut private = fs::DirBuilder::new();
    private.recursive(true).mode(0o700);
    private.create(dir).map_err(Error::io("make", dir))?;
    let _first = lock(&dir.join("queue"), FlockArg::LockExclusive)?;
    let free = |place: usize| {
        lock(
            &dir.join(place.to_string()),
            FlockArg::LockExclusiveNonblock,
        )
        .transpose()
    };
    loop {
        if let Some(permit) = (0..places).find_map(free) {
            return permit.map(StartPermit);
        }
        if given_up() {
            return Err(Error::Io {
                what: "wait".to_owned(),
                source: io::ErrorKind::TimedOut.into(),
            });
        }
        thread::sleep(LOOK);
    }
}

/// Locks a file; `None` where that would block and must not.
fn lock(path: &Path, how: FlockArg) -> Result<Option<Flock<File>>> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(Error::io("open", path))?;
    match Flock::lock(file, how) {
        Ok(locked) => Ok(Some(locked)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(Error::io("lock", path)(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_had_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("turns");
        let first = take(&dir, 2, || true).unwrap();
        let second = take(&dir, 2, || true).unwrap();
        assert!(take(&dir, 2, || true).is_err());
        drop(first);
        let third = take(&dir, 2, || true).unwrap();
        assert!(take(&dir, 2, || true).is_err());
        drop((second, third));
        take(&dir, 1, || true).unwrap();
    }

    #[tokio::test]
    async fn whoever_waits_gets_the_place_that_becomes_free() {
        let run = tempfile::tempdir().unwrap();
        let id = "pod1".parse().unwrap();
        let first = StartPermit::wait(run.path(), 1, &id).await.unwrap();
        let second = tokio::spawn({
            let (run, id) = (run.path().to_owned(), id.clone());
            async move { StartPermit::wait(&run, 1, &id).await }
        });
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!second.is_finished());
        drop(first);
        assert!(second.await.unwrap().is_some());
    }
}
