// SPDX-License-Identifier: Apache-2.0

//! What is to be looked at next.
//!
//! An object is in the queue once, and is never worked on twice at the same time. Claims go
//! first: somebody waits for them, while nobody waits for what refills a pool. What an apiserver
//! does at a time it does slower, so that while claims come, little else is begun.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::cache::Key;

/// First pause after a failure; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How many of a class may be worked on while claims come, and while many are worked on.
const BESIDE_CLAIMS: usize = 4;
const BESIDE_MANY: usize = 1;
/// How many claims are many.
const MANY: usize = 4;
/// For so long after a claim others are expected.
const QUIET: Duration = Duration::from_millis(50);

/// The kinds of work, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Class {
    Claim,
    Sandbox,
    Pool,
    Template,
    /// All nodes together.
    Node,
}

const CLASSES: [Class; 5] = [
    Class::Claim,
    Class::Sandbox,
    Class::Pool,
    Class::Template,
    Class::Node,
];

/// An object to look at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Work {
    pub(crate) class: Class,
    pub(crate) key: Key,
}

impl Work {
    pub(crate) fn new(class: Class, key: Key) -> Self {
        Self { class, key }
    }
}

/// How many of each class are worked on at the same time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) claims: usize,
    pub(crate) sandboxes: usize,
    pub(crate) pools: usize,
    pub(crate) templates: usize,
}

impl Limits {
    fn of(&self, class: Class) -> usize {
        match class {
            Class::Claim => self.claims,
            Class::Sandbox => self.sandboxes,
            Class::Pool => self.pools,
            Class::Template => self.templates,
            Class::Node => 1,
        }
    }
}

/// How many claims there are to work on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claims {
    None,
    Few,
    Many,
}

/// The queue.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Notify,
    limits: Limits,
}

#[derive(Default)]
struct State {
    waiting: HashMap<Class, VecDeque<Key>>,
    queued: HashSet<Work>,
    running: HashSet<Work>,
    running_of: HashMap<Class, usize>,
    /// To be looked at again after the run that is under way.
    again: HashSet<Work>,
    /// To be looked at when its time comes.
    later: HashMap<Work, Instant>,
    failures: HashMap<Work, u32>,
    /// When the last claim was done.
    last_claim: Option<Instant>,
    /// When there were many claims last.
    last_many: Option<Instant>,
}

impl Queue {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            state: Mutex::default(),
            changed: Notify::new(),
            limits,
        }
    }

    /// Has `work` looked at soon.
    pub(crate) fn add(&self, work: Work) {
        self.state().add(work);
        self.changed.notify_one();
    }

    /// Has `work` looked at after `pause`, if not before.
    pub(crate) fn add_after(&self, work: Work, pause: Duration) {
        self.state().add_at(work, Instant::now() + pause);
        self.changed.notify_one();
    }

    /// Waits for the next thing to do. It counts as under way until [`Queue::done`]. For one
    /// caller at a time.
    pub(crate) async fn next(&self) -> Work {
        loop {
            let changed = self.changed.notified();
            let due = {
                let mut state = self.state();
                let now = Instant::now();
                let due = state.wake(now);
                if let Some(work) = state.pick(&self.limits, now) {
                    return work;
                }
                // What claims have held up goes on when no more come.
                let quiet = state.last_claim.map(|at| at + QUIET);
                due.into_iter().chain(quiet.filter(|at| *at > now)).min()
            };
            match due {
                Some(due) => {
                    tokio::select! {
                        () = changed => {}
                        () = tokio::time::sleep_until(due) => {}
                    }
                }
                None => changed.await,
            }
        }
    }

    /// Ends a run: `again` is when to look again, if ever.
    pub(crate) fn done(&self, work: &Work, outcome: Outcome) {
        let mut state = self.state();
        state.running.remove(work);
        if work.class == Class::Claim {
            state.last_claim = Some(Instant::now());
        }
        if let Some(n) = state.running_of.get_mut(&work.class) {
            *n = n.saturating_sub(1);
        }
        match outcome {
            Outcome::Done => {
                state.failures.remove(work);
            }
            Outcome::Again(pause) => {
                state.failures.remove(work);
                state.add_at(work.clone(), Instant::now() + pause);
            }
            Outcome::Failed => {
                let failures = state.failures.entry(work.clone()).or_default();
                let pause = FIRST_PAUSE
                    .saturating_mul(2_u32.saturating_pow(*failures))
                    .min(LONGEST_PAUSE);
                *failures += 1;
                state.add_at(work.clone(), Instant::now() + pause);
            }
        }
        if state.again.remove(work) {
            state.add(work.clone());
        }
        drop(state);
        self.changed.notify_one();
    }

    /// How many claims come now.
    pub(crate) fn claims(&self) -> Claims {
        self.state().claims(Instant::now())
    }

    /// How much waits or is under way.
    pub(crate) fn len(&self) -> usize {
        let state = self.state();
        state.queued.len() + state.running.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a run has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing to do until something changes.
    Done,
    /// To be looked at after this time.
    Again(Duration),
    /// To be tried again, after a pause that grows.
    Failed,
}

impl State {
    fn add(&mut self, work: Work) {
        if self.running.contains(&work) {
            self.again.insert(work);
        } else if self.queued.insert(work.clone()) {
            self.waiting
                .entry(work.class)
                .or_default()
                .push_back(work.key);
        }
    }

    fn add_at(&mut self, work: Work, due: Instant) {
        let known = self.later.entry(work).or_insert(due);
        *known = due.min(*known);
    }

    /// Queues what is due, and returns when something will be.
    fn wake(&mut self, now: Instant) -> Option<Instant> {
        let due: Vec<Work> = self
            .later
            .iter()
            .filter(|(_, at)| **at <= now)
            .map(|(work, _)| work.clone())
            .collect();
        for work in due {
            self.later.remove(&work);
            self.add(work);
        }
        self.later.values().min().copied()
    }

    fn claims(&mut self, now: Instant) -> Claims {
        let waiting = self.waiting.get(&Class::Claim).map_or(0, VecDeque::len);
        let running = self.running_of.get(&Class::Claim).copied();
        let count = waiting + running.unwrap_or_default();
        if count >= MANY {
            self.last_many = Some(now);
        }
        // A burst has gaps.
        let is_over = |at: Option<Instant>| at.is_none_or(|at| at + QUIET <= now);
        if !is_over(self.last_many) {
            Claims::Many
        } else if count == 0 && is_over(self.last_claim) {
            Claims::None
        } else {
            Claims::Few
        }
    }

    fn pick(&mut self, limits: &Limits, now: Instant) -> Option<Work> {
        let claims = self.claims(now);
        for class in CLASSES {
            let running = self.running_of.entry(class).or_default();
            let limit = match (class, claims) {
                (Class::Claim, _) | (_, Claims::None) => limits.of(class),
                (_, Claims::Few) => limits.of(class).min(BESIDE_CLAIMS),
                (_, Claims::Many) => limits.of(class).min(BESIDE_MANY),
            };
            if *running >= limit {
                continue;
            }
            let Some(key) = self.waiting.entry(class).or_default().pop_front() else {
                continue;
            };
            *running += 1;
            let work = Work::new(class, key);
            self.queued.remove(&work);
            self.running.insert(work.clone());
            return Some(work);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        claims: 8,
        sandboxes: 8,
        pools: 8,
        templates: 1,
    };

    fn work(class: Class, name: &str) -> Work {
        Work::new(class, Key::new("ns", name))
    }

    /// How many of `class` can be taken out at once.
    async fn takes(queue: &Queue, class: Class) -> usize {
        let mut count = 0;
        let brief = Duration::from_millis(1);
        while let Ok(next) = tokio::time::timeout(brief, queue.next()).await {
            assert_eq!(next.class, class);
            count += 1;
        }
        count
    }

    #[tokio::test(start_paused = true)]
    async fn claims_go_first_and_leave_a_little_for_the_rest() {
        for (claims, number, beside) in [
            (0, Claims::None, LIMITS.sandboxes),
            (1, Claims::Few, BESIDE_CLAIMS),
            (MANY, Claims::Many, BESIDE_MANY),
        ] {
            let queue = Queue::new(LIMITS);
            for n in 0..20 {
                queue.add(work(Class::Sandbox, &n.to_string()));
            }
            for n in 0..claims {
                queue.add(work(Class::Claim, &n.to_string()));
            }
            for _ in 0..claims {
                assert_eq!(queue.next().await.class, Class::Claim);
            }
            assert_eq!(queue.claims(), number);
            assert_eq!(takes(&queue, Class::Sandbox).await, beside);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_goes_on_when_no_more_claims_come() {
        let queue = Queue::new(LIMITS);
        queue.add(work(Class::Claim, "x"));
        let claim = queue.next().await;
        for n in 0..20 {
            queue.add(work(Class::Sandbox, &n.to_string()));
        }
        queue.done(&claim, Outcome::Done);
        assert_eq!(takes(&queue, Class::Sandbox).await, BESIDE_CLAIMS);
        let start = Instant::now();
        queue.next().await;
        assert!(start.elapsed() <= QUIET);
        assert_eq!(queue.claims(), Claims::None);
        let left = LIMITS.sandboxes - BESIDE_CLAIMS - 1;
        assert_eq!(takes(&queue, Class::Sandbox).await, left);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_worked_on_twice_at_the_same_time() {
        let queue = Queue::new(LIMITS);
        let claim = work(Class::Claim, "x");
        queue.add(claim.clone());
        queue.add(claim.clone());
        assert_eq!(queue.next().await, claim);
        queue.add(claim.clone());
        let early = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(early.is_err());
        queue.done(&claim, Outcome::Done);
        assert_eq!(queue.next().await, claim);
        queue.done(&claim, Outcome::Done);
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_waits_longer_each_time_and_starts_over_after_a_success() {
        let queue = Queue::new(LIMITS);
        let pool = work(Class::Pool, "p");
        queue.add(pool.clone());
        let mut pauses = Vec::new();
        for outcome in [
            Outcome::Failed,
            Outcome::Failed,
            Outcome::Again(Duration::ZERO),
            Outcome::Failed,
        ] {
            let start = Instant::now();
            assert_eq!(queue.next().await, pool);
            pauses.push(start.elapsed().as_millis());
            queue.done(&pool, outcome);
        }
        let start = Instant::now();
        queue.next().await;
        pauses.push(start.elapsed().as_millis());
        assert_eq!(pauses, [0, 50, 100, 0, 50]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_time_counts() {
        let queue = Queue::new(LIMITS);
        let pool = work(Class::Pool, "p");
        queue.add_after(pool.clone(), Duration::from_secs(9));
        queue.add_after(pool.clone(), Duration::from_secs(3));
        let start = Instant::now();
        assert_eq!(queue.next().await, pool);
        assert_eq!(start.elapsed().as_secs(), 3);
        queue.done(&pool, Outcome::Done);
        let quiet = tokio::time::timeout(Duration::from_secs(60), queue.next()).await;
        assert!(quiet.is_err());
    }
}
