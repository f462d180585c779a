// SPDX-License-Identifier: Apache-2.0

//! Signals that end this program.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

/// Listens from now on for a signal that ends this program; the future returns the exit code that
/// shells have for it.
///
/// # Errors
/// When it cannot listen.
pub(crate) fn ended() -> Result<impl Future<Output = u8>> {
    let listen = |kind| signal(kind).context("listen for signals");
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => 130,
            _ = terminate.recv() => 143,
            _ = hangup.recv() => 129,
        }
    })
}
