// SPDX-License-Identifier: Apache-2.0

//! Listening at a socket of root's that is made anew when its file is gone.

use std::{
    fs, io,
    os::unix::{
        self,
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kiln_host::fs::remove_file_if_there;
use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tracing::warn;

use crate::warm::{WarmManager, blocking};

/// How often the file of a socket to which nobody connects is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// Listener that binds its socket anew when the file is gone.
pub(super) struct RebindingListener {
    manager: Arc<WarmManager>,
    path: PathBuf,
    listener: UnixListener,
    /// Device and inode of its file.
    file: (u64, u64),
}

impl RebindingListener {
    /// Listens at `path`. Blocks.
    pub(super) fn open(manager: Arc<WarmManager>, path: &Path) -> io::Result<Self> {
        let listener = bind(path)?;
        Ok(Self {
            manager,
            path: path.to_owned(),
            listener,
            file: file_at(path)?,
        })
    }

    /// Listens anew where the file is gone, without which no shim comes. What another agent listens
    /// at is left to it.
    async fn rebind(&mut self) {
        // It went with all that the agent had here.
        if self.manager.is_drained() {
            return;
        }
        let (manager, path, file) = (Arc::clone(&self.manager), self.path.clone(), self.file);
        let opened = blocking("listen anew", move || {
            let is_there = file_at(&path).is_ok_and(|found| found == file);
            if is_there || unix::net::UnixStream::connect(&path).is_ok() {
                return Ok(None);
            }
            Self::open(manager, &path).map(Some)
        });
        match opened.await {
            Ok(None) => {}
            Ok(Some(new)) => {
                warn!("{} was gone, listening anew", self.path.display());
                *self = new;
            }
            Err(e) => warn!("{} is gone: {e}", self.path.display()),
        }
    }
}

fn file_at(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

fn bind(socket: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = socket.parent() {
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(dir)?;
    }
    remove_file_if_there(socket)?;
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Waits for the next connection of root's.
pub(super) async fn accept(
    mut listener: RebindingListener,
) -> Option<(io::Result<UnixStream>, RebindingListener)> {
    loop {
        let stream = match timeout(CHECK_INTERVAL, listener.listener.accept()).await {
            Ok(Ok((stream, _))) => stream,
            Err(_) => {
                listener.rebind().await;
                continue;
            }
            Ok(Err(e)) => {
                // Out of descriptors, most likely: some will be free again.
                warn!("accept: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == 0 => return Some((Ok(stream), listener)),
            Ok(peer) => warn!("user {} has no business here", peer.uid()),
            Err(e) => warn!("who connects is unknown: {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_node_install::config::Config;

    #[tokio::test]
    async fn a_socket_whose_file_is_gone_is_made_anew_unless_another_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state: dir.path().join("state"),
            ..Config::default()
        };
        let manager = WarmManager::new(config).unwrap();
        let path = dir.path().join("a.sock");
        let mut listener = RebindingListener::open(manager.clone(), &path).unwrap();
        listener.rebind().await;
        assert_eq!(file_at(&path).unwrap(), listener.file);
        fs::remove_file(&path).unwrap();
        listener.rebind().await;
        assert_eq!(file_at(&path).unwrap(), listener.file);
        let (shim, found) = tokio::join!(UnixStream::connect(&path), listener.listener.accept());
        shim.unwrap();
        found.unwrap();
        let other = RebindingListener::open(manager, &path).unwrap();
        listener.rebind().await;
        assert_eq!(file_at(&path).unwrap(), other.file);
        drop(other);
        listener.rebind().await;
        assert_eq!(file_at(&path).unwrap(), listener.file);
    }
}
