// SPDX-License-Identifier: Apache-2.0

//! The socket for gofers that were started with sandboxes.

use std::{io, path::Path, sync::Arc, time::Duration};

use kiln_agent_api::gofer;
use tokio::{net::UnixStream, sync::Semaphore};
use tracing::warn;

use super::{
    AT_ONCE,
    listener::{Door, accept},
};
use crate::warm::Keeper;

/// How long a shim may take to say which gofer it wants.
const ASK: Duration = Duration::from_secs(1);

/// Hands out the gofers of sandboxes that were handed out, at `socket`, for ever.
///
/// # Errors
/// When it cannot be listened there.
pub fn serve_slots(keeper: Arc<Keeper>, socket: &Path) -> io::Result<()> {
    let mut listener = Door::open(Arc::clone(&keeper), socket)?;
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        while let Some((Ok(stream), again)) = accept(listener).await {
            listener = again;
            // One too many is closed, and makes its container by command.
            let Ok(turn) = Arc::clone(&turns).try_acquire_owned() else {
                continue;
            };
            let keeper = Arc::clone(&keeper);
            tokio::spawn(async move {
                if let Err(e) = hand_out_slots(keeper, stream).await {
                    warn!("hand out a gofer: {e}");
                }
                drop(turn);
            });
        }
    });
    Ok(())
}

async fn hand_out_slots(keeper: Arc<Keeper>, stream: UnixStream) -> io::Result<()> {
    let stream = stream.into_std()?;
    let sent = tokio::task::spawn_blocking(move || {
        let id = gofer::read_request(&stream, ASK)?;
        match keeper.gofers.take(&id) {
            Some(slots) => slots.send(&stream),
            None => Ok(()), // the end of the stream says so
        }
    });
    sent.await.map_err(io::Error::other)?
}
