// SPDX-License-Identifier: Apache-2.0

//! Requests of a connection of HTTP/2.
//!
//! A client can give up requests as fast as it makes them, and each of them costs an attempt to
//! connect to a sandbox. So a connection whose requests are given up and hardly ever answered ends.
//! Further, a request ends on which nothing moves for too long: the connection may carry others.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::rt::Executor;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// Requests that a client may give up before they are answered, beyond those that were answered.
const GIVEN_UP: usize = 100;

/// All requests of a connection.
#[derive(Clone)]
pub(crate) struct Streams {
    state: Arc<State>,
    idle: Duration,
}

#[derive(Default)]
struct State {
    /// Whether the next task is that of a request.
    has_begun: AtomicBool,
    given_up: AtomicUsize,
    too_many: CancellationToken,
}

impl Streams {
    /// Requests on which nothing may move for `idle` at most.
    pub(crate) fn new(idle: Duration) -> Self {
        Self {
            state: Arc::default(),
            idle,
        }
    }

    /// Notes a request, of which hyper makes a task right away.
    pub(crate) fn begin(&self) -> Unanswered {
        self.state.has_begun.store(true, Ordering::Relaxed);
        Unanswered(Some(Arc::clone(&self.state)))
    }

    /// Returns when the client has given up too many requests.
    pub(crate) fn flooded(&self) -> impl Future<Output = ()> + Send + use<> {
        self.state.too_many.clone().cancelled_owned()
    }
}

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        // The other tasks are those of upgraded requests, which may send in one direction only.
        match self.state.has_begun.swap(false, Ordering::Relaxed) {
            true => tokio::spawn(Moving::new(future, self.idle)),
            false => tokio::spawn(future),
        };
    }
}

/// A request without an answer. The client has given it up if this is dropped.
pub(crate) struct Unanswered(Option<Arc<State>>);

impl Unanswered {
    pub(crate) fn answered(mut self) {
        if let Some(state) = self.0.take() {
            let fewer = |count: usize| count.checked_sub(1);
            // None is as good as one less than none.
            let _ = state
                .given_up
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
        }
    }

    /// There is no place for it, which is not the client's choice.
    pub(crate) fn refused(mut self) {
        self.0 = None;
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(state) = &self.0
            && state.given_up.fetch_add(1, Ordering::Relaxed) >= GIVEN_UP
        {
            state.too_many.cancel();
        }
    }
}

/// A future that ends when nothing has woken it for too long.
struct Moving<F> {
    future: Pin<Box<F>>,
    most: Duration,
    last: Instant,
    over: Pin<Box<Sleep>>,
}

impl<F> Moving<F> {
    fn new(future: F, most: Duration) -> Self {
        Self {
            future: Box::pin(future),
            most,
            last: Instant::now(),
            over: Box::pin(sleep(most)),
        }
    }
}

impl<F: Future<Output = ()>> Future for Moving<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let is_over = this.over.as_mut().poll(cx).is_ready();
        if !is_over {
            this.last = Instant::now();
        }
        if this.future.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        // The timer is set again when it fires only.
        if is_over {
            let until = this.last + this.most;
            if until <= Instant::now() {
                debug!("nothing has moved on a request");
                return Poll::Ready(());
            }
            this.over.as_mut().reset(until);
            if this.over.as_mut().poll(cx).is_ready() {
                cx.waker().wake_by_ref();
            }
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::mpsc;

    use super::*;

    const MOST: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_request_lasts_as_long_as_something_moves() {
        let (sender, mut receiver) = mpsc::channel(1);
        let future = async move {
            while receiver.recv().await.is_some() {}
            pending::<()>().await;
        };
        let moving = tokio::spawn(Moving::new(future, MOST));
        for _ in 0..5 {
            sender.send(()).await.unwrap();
            sleep(MOST * 2 / 3).await;
        }
        assert!(!moving.is_finished());
        let start = Instant::now();
        moving.await.unwrap();
        assert!(start.elapsed() <= MOST);
        assert!(sender.is_closed());
    }

    #[tokio::test]
    async fn answers_make_up_for_what_is_given_up() {
        let streams = Streams::new(MOST);
        for _ in 0..GIVEN_UP * 2 {
            drop(streams.begin());
            streams.begin().answered();
            streams.begin().refused();
        }
        assert!(!streams.state.too_many.is_cancelled());
        for _ in 0..=GIVEN_UP {
            assert!(!streams.state.too_many.is_cancelled());
            drop(streams.begin());
        }
        streams.flooded().await;
    }
}
