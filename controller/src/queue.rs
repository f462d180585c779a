// SPDX-License-Identifier: Apache-2.0

//! The queue of objects to reconcile.
//!
//! An object is queued once and is never reconciled twice at the same time. Claims go first: a
//! client waits for each of them, while nobody waits for a pool's refill. An apiserver slows down
//! under concurrent requests, so few other objects are reconciled while claims arrive.
//!
//! Within each kind of work, namespaces are served round-robin. While a namespace with few claims
//! waits for one, a namespace with a backlog gets [`SHARE`] workers of each kind. So one tenant's
//! thousands of objects fill neither the workers nor the apiserver when another tenant needs them.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::cache::Key;

/// First pause after a failure; it doubles with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Most workers of a kind other than claims beside few claims ([`Claims::Few`]).
const BESIDE_FEW: usize = 4;
/// The same beside many claims ([`Claims::Many`]).
const BESIDE_MANY: usize = 1;
/// Most workers that hold large objects, of all kinds together.
const HEAVY: usize = 2;
/// Number of claims from which on there are many.
const MANY: usize = 4;
/// Time after the last claim for which more are expected.
const QUIET: Duration = Duration::from_millis(50);
/// Number of waiting objects of one kind from which on a namespace has a backlog.
const BACKLOG: usize = 16;
/// Workers of a kind for a namespace with a backlog, while another one waits for a claim.
const SHARE: usize = 1;
/// Time after a claim for which its namespace counts as one that waits for claims.
const WAITS: Duration = Duration::from_secs(2);

/// Kinds of work, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum WorkKind {
    Claim,
    Sandbox,
    Pool,
    Template,
    /// All nodes together.
    Node,
    Trigger,
    Snapshot,
}

const KINDS: [WorkKind; 7] = [
    WorkKind::Claim,
    WorkKind::Sandbox,
    WorkKind::Pool,
    WorkKind::Template,
    WorkKind::Node,
    WorkKind::Trigger,
    WorkKind::Snapshot,
];

/// An object to reconcile.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Work {
    pub(crate) kind: WorkKind,
    pub(crate) key: Key,
}

impl Work {
    pub(crate) fn new(kind: WorkKind, key: Key) -> Self {
        Self { kind, key }
    }
}

/// Workers for objects of different size. Large objects are not cached ([`crate::known`]), so work
/// that needs one is done in the lane that holds few at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    /// Work that ends with [`Outcome::Heavy`] when it needs a large object.
    Light,
    /// Work that has ended so.
    Heavy,
}

/// Most workers of each kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) claims: usize,
    pub(crate) sandboxes: usize,
    pub(crate) pools: usize,
    pub(crate) templates: usize,
}

impl Limits {
    fn of(&self, kind: WorkKind) -> usize {
        match kind {
            WorkKind::Claim => self.claims,
            WorkKind::Sandbox => self.sandboxes,
            WorkKind::Pool => self.pools,
            WorkKind::Template => self.templates,
            WorkKind::Trigger | WorkKind::Snapshot => self.templates.max(2),
            WorkKind::Node => 1,
        }
    }
}

/// The number of claims that wait or are reconciled, as seen from one namespace: its own claims, and
/// one for each other namespace that has any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claims {
    /// No claim anywhere, nor within the last [`QUIET`].
    None,
    /// Fewer than [`MANY`].
    Few,
    /// At least [`MANY`], now or within the last [`QUIET`] in the namespace itself.
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
    waiting: HashMap<(WorkKind, Lane), RoundRobin>,
    queued: HashSet<Work>,
    running: HashMap<Work, Lane>,
    /// Work that needed large objects when it was last reconciled.
    heavy: HashSet<Work>,
    running_of: HashMap<WorkKind, usize>,
    /// Work that has changed since its run began.
    again: HashSet<Work>,
    later: Later,
    failures: HashMap<Work, u32>,
    rush: Rush,
    demand: Demand,
}

/// Waiting objects of one kind, served round-robin by namespace.
#[derive(Default)]
struct RoundRobin {
    order: VecDeque<String>,
    names: HashMap<String, VecDeque<String>>,
}

impl RoundRobin {
    fn push(&mut self, key: Key) {
        let names = self.names.entry(key.namespace.clone()).or_default();
        if names.is_empty() {
            self.order.push_back(key.namespace);
        }
        names.push_back(key.name);
    }

    fn has_backlog(&self, namespace: &str) -> bool {
        self.names
            .get(namespace)
            .is_some_and(|names| names.len() >= BACKLOG)
    }

    /// Takes the first object of the first namespace that `may` have a worker, which depends on
    /// whether it has a backlog.
    fn take(&mut self, may: impl Fn(&str, bool) -> bool) -> Option<Key> {
        let mut order = self.order.iter();
        let turn = order.position(|namespace| may(namespace, self.has_backlog(namespace)))?;
        let namespace = self.order.remove(turn)?;
        let names = self.names.get_mut(&namespace)?;
        let name = names.pop_front()?;
        let key = Key::new(&namespace, &name);
        if names.is_empty() {
            self.names.remove(&namespace);
        } else {
            self.order.push_back(namespace);
        }
        Some(key)
    }
}

/// Work that is queued when its time comes.
#[derive(Default)]
struct Later {
    due: HashMap<Work, Instant>,
    /// The earliest first. An entry that differs from `due` is void.
    order: BinaryHeap<Reverse<(Instant, Work)>>,
}

impl Later {
    /// Adds work. Of several times for the same work, the earliest counts.
    fn add(&mut self, work: Work, due: Instant) {
        if self.due.get(&work).is_none_or(|known| due < *known) {
            self.due.insert(work.clone(), due);
            self.order.push(Reverse((due, work)));
        }
    }

    /// Takes out the next that is due at `now`.
    fn take(&mut self, now: Instant) -> Option<Work> {
        self.next().filter(|due| *due <= now)?;
        let Reverse((_, work)) = self.order.pop()?;
        self.due.remove(&work);
        Some(work)
    }

    /// When the next is due.
    fn next(&mut self) -> Option<Instant> {
        while let Some(Reverse((at, work))) = self.order.peek() {
            if self.due.get(work) == Some(at) {
                return Some(*at);
            }
            self.order.pop();
        }
        None
    }
}

/// Claims that arrive, by namespace.
#[derive(Default)]
struct Rush {
    namespaces: HashMap<String, Coming>,
    /// When to look whether a namespace is quiet, the earliest first.
    quiet: VecDeque<(Instant, String)>,
}

/// Claims that arrive in one namespace.
#[derive(Default)]
struct Coming {
    /// Number of those that wait or are reconciled.
    count: usize,
    /// When the last one was done.
    last: Option<Instant>,
    /// When there were last [`MANY`].
    last_many: Option<Instant>,
}

impl Rush {
    fn begin(&mut self, namespace: &str) {
        let coming = self.namespaces.entry(namespace.to_owned()).or_default();
        coming.count += 1;
    }

    fn end(&mut self, namespace: &str, now: Instant) {
        if let Some(coming) = self.namespaces.get_mut(namespace) {
            // A burst has gaps.
            if coming.count >= MANY {
                coming.last_many = Some(now);
            }
            coming.count = coming.count.saturating_sub(1);
            coming.last = Some(now);
            self.quiet.push_back((now + QUIET, namespace.to_owned()));
        }
    }

    /// Forgets namespaces in which no more claims arrive. Returns when to look again.
    fn settle(&mut self, now: Instant) -> Option<Instant> {
        while self.quiet.front().is_some_and(|(at, _)| *at <= now) {
            let (_, namespace) = self.quiet.pop_front()?;
            let is_over = |coming: &Coming| coming.count == 0 && is_past(coming.last, now);
            if self.namespaces.get(&namespace).is_some_and(is_over) {
                self.namespaces.remove(&namespace);
            }
        }
        self.quiet.front().map(|(at, _)| *at)
    }

    fn seen_by(&self, namespace: &str, now: Instant) -> Claims {
        let own = self.namespaces.get(namespace);
        let others = self.namespaces.len() - usize::from(own.is_some());
        let count = own.map_or(0, |own| own.count) + others;
        if count >= MANY || own.is_some_and(|own| !is_past(own.last_many, now)) {
            Claims::Many
        } else if self.namespaces.is_empty() {
            Claims::None
        } else {
            Claims::Few
        }
    }
}

/// Whether `at` is longer ago than [`QUIET`].
fn is_past(at: Option<Instant>, now: Instant) -> bool {
    at.is_none_or(|at| at + QUIET <= now)
}

/// Namespaces without a backlog that waited for a claim last, and when: the latest one, and the
/// latest of all others.
#[derive(Default)]
struct Demand {
    latest: Option<(String, Instant)>,
    other: Option<Instant>,
}

impl Demand {
    fn note(&mut self, namespace: &str, now: Instant) {
        let latest = self.latest.replace((namespace.to_owned(), now));
        if let Some((other, at)) = latest
            && other != namespace
        {
            self.other = Some(at);
        }
    }

    /// Whether a namespace other than `namespace` waits for claims.
    fn is_beside(&self, namespace: &str, now: Instant) -> bool {
        let latest = self.latest.as_ref().filter(|(of, _)| of != namespace);
        let last = latest.map(|(_, at)| *at).or(self.other);
        last.is_some_and(|at| now < at + WAITS)
    }
}

impl Queue {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            state: Mutex::default(),
            changed: Notify::new(),
            limits,
        }
    }

    /// Queues `work`.
    pub(crate) fn add(&self, work: Work) {
        self.state().add(work);
        self.changed.notify_one();
    }

    /// Queues `work` after `pause`, unless it is queued before.
    pub(crate) fn add_after(&self, work: Work, pause: Duration) {
        self.state().later.add(work, Instant::now() + pause);
        self.changed.notify_one();
    }

    /// Notes that a client waits for a claim in `namespace`.
    pub(crate) fn wanted(&self, namespace: &str) {
        let mut state = self.state();
        let turns = state.waiting.get(&(WorkKind::Claim, Lane::Light));
        if turns.is_none_or(|turns| !turns.has_backlog(namespace)) {
            state.demand.note(namespace, Instant::now());
        }
    }

    /// Waits for the next work. Its run lasts until [`Queue::done`]. For one caller at a time.
    pub(crate) async fn next(&self) -> (Work, Lane) {
        loop {
            let changed = self.changed.notified();
            let due = {
                let mut state = self.state();
                let now = Instant::now();
                let due = state.wake(now);
                // Work that claims have held up goes on when no more arrive.
                let quiet = state.rush.settle(now);
                if let Some(next) = state.pick(&self.limits, now) {
                    return next;
                }
                due.into_iter().chain(quiet).min()
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

    /// Ends a run.
    pub(crate) fn done(&self, work: &Work, outcome: Outcome) {
        let mut state = self.state();
        state.running.remove(work);
        let now = Instant::now();
        if work.kind == WorkKind::Claim {
            state.rush.end(&work.key.namespace, now);
        }
        if let Some(n) = state.running_of.get_mut(&work.kind) {
            *n = n.saturating_sub(1);
        }
        match outcome {
            Outcome::Done => {
                state.failures.remove(work);
            }
            Outcome::Heavy => {
                state.heavy.insert(work.clone());
                state.again.insert(work.clone());
            }
            Outcome::Again(pause) => {
                state.failures.remove(work);
                state.later.add(work.clone(), now + pause);
            }
            Outcome::Failed => {
                let failures = state.failures.entry(work.clone()).or_default();
                let pause = FIRST_PAUSE
                    .saturating_mul(2_u32.saturating_pow(*failures))
                    .min(LONGEST_PAUSE);
                *failures += 1;
                state.later.add(work.clone(), now + pause);
            }
        }
        if state.again.remove(work) {
            state.add(work.clone());
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Returns how many claims arrive, as seen from `namespace`.
    pub(crate) fn claims(&self, namespace: &str) -> Claims {
        let now = Instant::now();
        let mut state = self.state();
        state.rush.settle(now);
        state.rush.seen_by(namespace, now)
    }

    /// Returns how many objects wait or are reconciled.
    pub(crate) fn len(&self) -> usize {
        let state = self.state();
        state.queued.len() + state.running.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing to do until something changes.
    Done,
    /// To be reconciled after this time.
    Again(Duration),
    /// To be reconciled at once in [`Lane::Heavy`].
    Heavy,
    /// To be tried again, after a pause that doubles each time.
    Failed,
}

impl State {
    fn add(&mut self, work: Work) {
        if self.running.contains_key(&work) {
            self.again.insert(work);
        } else if self.queued.insert(work.clone()) {
            if work.kind == WorkKind::Claim {
                self.rush.begin(&work.key.namespace);
            }
            let lane = match self.heavy.remove(&work) {
                true => Lane::Heavy,
                false => Lane::Light,
            };
            let turns = self.waiting.entry((work.kind, lane)).or_default();
            turns.push(work.key);
        }
    }

    /// Queues work that is due. Returns when the next will be.
    fn wake(&mut self, now: Instant) -> Option<Instant> {
        while let Some(work) = self.later.take(now) {
            self.add(work);
        }
        self.later.next()
    }

    fn pick(&mut self, limits: &Limits, now: Instant) -> Option<(Work, Lane)> {
        let heavy = self.running.values().filter(|l| **l == Lane::Heavy).count();
        for kind in KINDS {
            // Heavy work is rare, and would never get a worker behind all light work.
            for lane in [Lane::Heavy, Lane::Light] {
                if lane == Lane::Heavy && heavy >= HEAVY {
                    continue;
                }
                let mut turns = self.waiting.remove(&(kind, lane)).unwrap_or_default();
                let key = turns.take(|namespace, has_backlog| {
                    self.may(limits, kind, namespace, has_backlog, now)
                });
                self.waiting.insert((kind, lane), turns);
                if let Some(key) = key {
                    let work = Work::new(kind, key);
                    *self.running_of.entry(kind).or_default() += 1;
                    self.queued.remove(&work);
                    self.running.insert(work.clone(), lane);
                    return Some((work, lane));
                }
            }
        }
        None
    }

    /// Whether one more object of a kind may be reconciled for a namespace.
    fn may(
        &self,
        limits: &Limits,
        kind: WorkKind,
        namespace: &str,
        has_backlog: bool,
        now: Instant,
    ) -> bool {
        let is_own = |w: &&Work| w.kind == kind && w.key.namespace == namespace;
        let own = || self.running.keys().filter(is_own).count();
        if has_backlog && self.demand.is_beside(namespace, now) && own() >= SHARE {
            return false;
        }
        let claims = match kind {
            WorkKind::Claim => Claims::None,
            _ => self.rush.seen_by(namespace, now),
        };
        let beside = match claims {
            Claims::None => usize::MAX,
            Claims::Few => BESIDE_FEW,
            // Namespaces that are held up less would never leave it a worker.
            Claims::Many if own() == 0 => BESIDE_FEW,
            Claims::Many => BESIDE_MANY,
        };
        let count = self.running_of.get(&kind).copied().unwrap_or_default();
        count < limits.of(kind).min(beside)
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

    fn work(kind: WorkKind, name: &str) -> Work {
        Work::new(kind, Key::new("ns", name))
    }

    /// How many of `kind` can be taken out at once.
    async fn takes(queue: &Queue, kind: WorkKind) -> usize {
        let mut count = 0;
        let brief = Duration::from_millis(1);
        while let Ok((next, _)) = tokio::time::timeout(brief, queue.next()).await {
            assert_eq!(next.kind, kind);
            count += 1;
        }
        count
    }

    #[tokio::test(start_paused = true)]
    async fn claims_go_first_and_leave_a_little_for_the_rest() {
        for (claims, number, beside) in [
            (0, Claims::None, LIMITS.sandboxes),
            (1, Claims::Few, BESIDE_FEW),
            (MANY, Claims::Many, BESIDE_MANY),
        ] {
            let queue = Queue::new(LIMITS);
            for n in 0..20 {
                queue.add(work(WorkKind::Sandbox, &n.to_string()));
            }
            for n in 0..claims {
                queue.add(work(WorkKind::Claim, &n.to_string()));
            }
            for _ in 0..claims {
                assert_eq!(queue.next().await.0.kind, WorkKind::Claim);
            }
            assert_eq!(queue.claims("ns"), number);
            assert_eq!(takes(&queue, WorkKind::Sandbox).await, beside);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_goes_on_when_no_more_claims_come() {
        let queue = Queue::new(LIMITS);
        queue.add(work(WorkKind::Claim, "x"));
        let (claim, _) = queue.next().await;
        for n in 0..20 {
            queue.add(work(WorkKind::Sandbox, &n.to_string()));
        }
        queue.done(&claim, Outcome::Done);
        assert_eq!(takes(&queue, WorkKind::Sandbox).await, BESIDE_FEW);
        let start = Instant::now();
        queue.next().await;
        assert!(start.elapsed() <= QUIET);
        assert_eq!(queue.claims("ns"), Claims::None);
        let left = LIMITS.sandboxes - BESIDE_FEW - 1;
        assert_eq!(takes(&queue, WorkKind::Sandbox).await, left);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_worked_on_twice_at_the_same_time() {
        let queue = Queue::new(LIMITS);
        let claim = work(WorkKind::Claim, "x");
        queue.add(claim.clone());
        queue.add(claim.clone());
        assert_eq!(queue.next().await.0, claim);
        queue.add(claim.clone());
        let early = tokio::time::timeout(Duration::from_secs(1), queue.next()).await;
        assert!(early.is_err());
        queue.done(&claim, Outcome::Done);
        assert_eq!(queue.next().await.0, claim);
        queue.done(&claim, Outcome::Done);
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_waits_longer_each_time_and_starts_over_after_a_success() {
        let queue = Queue::new(LIMITS);
        let pool = work(WorkKind::Pool, "p");
        queue.add(pool.clone());
        let mut pauses = Vec::new();
        for outcome in [
            Outcome::Failed,
            Outcome::Failed,
            Outcome::Again(Duration::ZERO),
            Outcome::Failed,
        ] {
            let start = Instant::now();
            assert_eq!(queue.next().await.0, pool);
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
        let pool = work(WorkKind::Pool, "p");
        queue.add_after(pool.clone(), Duration::from_secs(9));
        queue.add_after(pool.clone(), Duration::from_secs(3));
        let start = Instant::now();
        assert_eq!(queue.next().await.0, pool);
        assert_eq!(start.elapsed().as_secs(), 3);
        queue.done(&pool, Outcome::Done);
        let quiet = tokio::time::timeout(Duration::from_secs(60), queue.next()).await;
        assert!(quiet.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn namespaces_take_turns() {
        let queue = Queue::new(LIMITS);
        let of = |namespace: &str, n: usize| {
            Work::new(WorkKind::Claim, Key::new(namespace, &n.to_string()))
        };
        for n in 0..1_000 {
            queue.add(of("flood", n));
        }
        for n in 0..3 {
            queue.add(of("other", n));
        }
        let mut order = Vec::new();
        for _ in 0..8 {
            let (next, _) = queue.next().await;
            queue.done(&next, Outcome::Done);
            order.push(next.key.to_string());
        }
        let expected = [
            "flood/0", "other/0", "flood/1", "other/1", "flood/2", "other/2", "flood/3", "flood/4",
        ];
        assert_eq!(order, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn many_claims_of_one_namespace_are_few_to_the_others() {
        let queue = Queue::new(LIMITS);
        for n in 0..1_000 {
            let key = Key::new("flood", &n.to_string());
            queue.add(Work::new(WorkKind::Claim, key.clone()));
            queue.add(Work::new(WorkKind::Sandbox, key));
        }
        for n in 0..20 {
            queue.add(work(WorkKind::Sandbox, &n.to_string()));
        }
        assert_eq!(queue.claims("flood"), Claims::Many);
        assert_eq!(queue.claims("ns"), Claims::Few);
        for _ in 0..LIMITS.claims {
            assert_eq!(queue.next().await.0.kind, WorkKind::Claim);
        }
        let mut of = HashMap::<String, usize>::new();
        while let Ok((next, _)) = tokio::time::timeout(Duration::from_millis(1), queue.next()).await
        {
            assert_eq!(next.kind, WorkKind::Sandbox);
            *of.entry(next.key.namespace).or_default() += 1;
        }
        let expected = [("flood", BESIDE_MANY), ("ns", BESIDE_FEW - BESIDE_MANY)];
        assert_eq!(of, expected.map(|(ns, n)| (ns.to_owned(), n)).into());
        // Those of several are many to all.
        for n in 0..MANY {
            queue.add(Work::new(WorkKind::Claim, Key::new(&n.to_string(), "x")));
        }
        assert_eq!(queue.claims("ns"), Claims::Many);
    }

    /// A queue with a backlog of each of `kinds` in namespace `flood`.
    fn flooded(kinds: &[WorkKind]) -> Queue {
        let queue = Queue::new(LIMITS);
        for kind in kinds {
            for n in 0..100 {
                queue.add(Work::new(*kind, Key::new("flood", &n.to_string())));
            }
        }
        queue
    }

    #[tokio::test(start_paused = true)]
    async fn a_backlog_gets_its_share_while_another_namespace_waits_for_claims() {
        for kind in [WorkKind::Claim, WorkKind::Sandbox, WorkKind::Pool] {
            let queue = flooded(&[kind]);
            queue.wanted("other");
            assert_eq!(takes(&queue, kind).await, SHARE, "{kind:?}");
            // Others have the rest of the workers.
            queue.add(Work::new(kind, Key::new("other", "x")));
            assert_eq!(takes(&queue, kind).await, 1, "{kind:?}");
            tokio::time::advance(WAITS).await;
            let left = LIMITS.of(kind) - SHARE - 1;
            assert_eq!(takes(&queue, kind).await, left, "{kind:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_alone_has_all_workers() {
        let queue = flooded(&[WorkKind::Claim]);
        queue.wanted("flood");
        assert_eq!(takes(&queue, WorkKind::Claim).await, LIMITS.claims);
    }

    #[tokio::test(start_paused = true)]
    async fn claims_behind_a_backlog_hold_up_no_other_namespace() {
        let queue = flooded(&[WorkKind::Claim]);
        for n in 0..BACKLOG {
            queue.add(work(WorkKind::Claim, &n.to_string()));
        }
        queue.wanted("flood");
        queue.wanted("ns");
        assert_eq!(takes(&queue, WorkKind::Claim).await, LIMITS.claims);
    }

    #[test]
    fn demand_is_of_other_namespaces() {
        let mut demand = Demand::default();
        let now = Instant::now();
        assert!(!demand.is_beside("a", now));
        demand.note("a", now);
        demand.note("a", now);
        assert!(!demand.is_beside("a", now));
        assert!(demand.is_beside("b", now));
        demand.note("b", now);
        demand.note("b", now + WAITS);
        assert!(demand.is_beside("b", now));
        assert!(!demand.is_beside("b", now + WAITS));
        assert!(demand.is_beside("a", now + WAITS));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_later_comes_in_the_order_of_its_time() {
        let queue = Queue::new(LIMITS);
        for n in (0..100_u64).rev() {
            let pool = work(WorkKind::Pool, &n.to_string());
            queue.add_after(pool.clone(), Duration::from_secs(1_000));
            queue.add_after(pool, Duration::from_secs(n));
        }
        for n in 0..100 {
            let (next, _) = queue.next().await;
            assert_eq!(next.key.name, n.to_string());
            queue.done(&next, Outcome::Done);
        }
        let quiet = tokio::time::timeout(Duration::from_secs(2_000), queue.next()).await;
        assert!(quiet.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn large_objects_are_held_by_few_and_hold_up_nobody_else() {
        let queue = Queue::new(LIMITS);
        for n in 0..40 {
            queue.add(work(WorkKind::Sandbox, &n.to_string()));
        }
        for _ in 0..LIMITS.sandboxes {
            assert_eq!(queue.next().await.1, Lane::Light);
        }
        for n in 0..4 {
            queue.done(&work(WorkKind::Sandbox, &n.to_string()), Outcome::Heavy);
        }
        let mut lanes = Vec::new();
        let brief = Duration::from_millis(1);
        while let Ok((_, lane)) = tokio::time::timeout(brief, queue.next()).await {
            lanes.push(lane);
        }
        // They do not wait for all others either.
        let expected = [Lane::Heavy, Lane::Heavy, Lane::Light, Lane::Light];
        assert_eq!(lanes, expected);
        queue.done(&work(WorkKind::Sandbox, "0"), Outcome::Done);
        let next = queue.next().await;
        assert_eq!(next, (work(WorkKind::Sandbox, "2"), Lane::Heavy));
    }
}
