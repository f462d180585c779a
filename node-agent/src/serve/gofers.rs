// SPDX-License-Identifier: Apache-2.0

//! The socket for prestarted gofers.

use std::{io, path::Path, sync::Arc, time::Duration};

use kiln_agent_api::gofer;
use tokio::{net::UnixStream, sync::Semaphore};
use tracing::warn;

use super::{
    AT_ONCE,
    listener::{RebindingListener, accept},
};
use crate::warm::WarmManager;

/// How long a shim may take to ask for a gofer, and to take it.
const REQUEST_LIMIT: Duration = Duration::from_secs(1);

/// Serves the gofers of sandboxes that were handed out, at `socket`, for ever.
///
/// # Errors
/// When it cannot be listened there.
pub fn serve_gofers(manager: Arc<WarmManager>, socket: &Path) -> io::Result<()> {
    let mut listener = RebindingListener::open(Arc::clone(&manager), socket)?;
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        while let Some((Ok(stream), again)) = accept(listener).await {
            listener = again;
            // One too many is closed, and makes its container by command.
            let Ok(turn) = Arc::clone(&turns).try_acquire_owned() else {
                continue;
            };
            let manager = Arc::clone(&manager);
            tokio::spawn(async move {
                if let Err(e) = hand_out(manager, stream).await {
                    warn!("hand out a gofer: {e}");
                }
                drop(turn);
            });
        }
    });
    Ok(())
}

async fn hand_out(manager: Arc<WarmManager>, stream: UnixStream) -> io::Result<()> {
    let stream = stream.into_std()?;
    let sent = tokio::task::spawn_blocking(move || {
        let id = gofer::read_request(&stream, REQUEST_LIMIT)?;
        match manager.take_gofer(&id) {
            Some(gofer) => gofer.send(&stream),
            None => Ok(()), // the end of the stream says so
        }
    });
    sent.await.map_err(io::Error::other)?
}
