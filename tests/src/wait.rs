// SPDX-License-Identifier: Apache-2.0

//! Waiting for things that happen on their own: polled, with a deadline, never slept for.

use std::{
    panic::Location,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// Pause between two looks.
const POLL: Duration = Duration::from_millis(20);

/// How long things may take that take no time on an idle machine: the machines that tests run on
/// are not idle.
pub const SOON: Duration = Duration::from_secs(120);

/// Polls `probe` until it finds something, and returns that.
///
/// # Errors
/// After `limit`, with `what` was waited for and where.
#[track_caller]
pub fn until<T, P>(
    what: &str,
    limit: Duration,
    mut probe: P,
) -> impl Future<Output = Result<T>> + use<T, P>
where
    P: AsyncFnMut() -> Option<T>,
{
    let caller = Location::caller();
    let what = what.to_owned();
    async move {
        let start = Instant::now();
        loop {
            if let Some(found) = probe().await {
                return Ok(found);
            }
            if start.elapsed() > limit {
                bail!(
                    "{what}: not within {} ms, waited for at {caller}",
                    limit.as_millis()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Polls `condition` until it holds.
///
/// # Errors
/// After `limit`, with `what` was waited for and where.
#[track_caller]
pub fn until_true(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> bool,
) -> impl Future<Output = Result<()>> {
    until(what, limit, async move || condition().then_some(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_ends_with_what_it_finds_or_says_what_it_missed() {
        let mut looks = 0;
        let third = until("third look", SOON, async || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(third.await.unwrap(), 3);
        let missed = until_true("the end", Duration::ZERO, || false)
            .await
            .unwrap_err()
            .to_string();
        assert!(missed.starts_with("the end: not within 0 ms"), "{missed}");
        assert!(missed.contains("wait.rs"), "{missed}");
    }
}
