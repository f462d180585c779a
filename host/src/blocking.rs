// SPDX-License-Identifier: Apache-2.0

//! Work that blocks, away from the threads of async code.

use std::{future, panic};

/// Runs `work` on a thread that may block. A panic of `work` goes on in the caller.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failure) => match failure.try_into_panic() {
            Ok(reason) => panic::resume_unwind(reason),
            // The runtime shuts down, and no task of it will be continued.
            Err(_) => future::pending().await,
        },
    }
}
