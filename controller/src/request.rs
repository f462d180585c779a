// SPDX-License-Identifier: Apache-2.0

//! Requests to the apiserver: in whose name, and for how long.

use std::time::Duration;

/// Name under which the controller's changes appear in `managedFields`.
pub(crate) const FIELD_MANAGER: &str = "kiln-controller";
/// How long the apiserver may take for an answer: what takes longer fails, and is tried again.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for an answer, though not for ever: without one, nobody knows whether the request has come
/// to pass.
pub(crate) async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(answer) => answer,
        Err(late) => Err(kube::Error::Service(late.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error;

    #[tokio::test(start_paused = true)]
    async fn an_apiserver_that_says_nothing_is_not_waited_for() {
        let silence = answer(std::future::pending::<kube::Result<()>>()).await;
        assert!(silence.is_err_and(|e| error::is_unanswered(&e)));
    }
}
