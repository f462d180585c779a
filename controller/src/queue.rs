// SPDX-License-Identifier: Apache-2.0

//! What is to be looked at next.
//!
//! An object is in the queue once, and is never worked on twice at the same time. Claims go
//! first: somebody waits for them, while nobody waits for what refills a pool. What an apiserver
//! does at a time it does slower, so that while claims come, little else is begun.
//!
//! Namespaces take turns in each class. Many claims of one hold up its own pools, not those of others.

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
/// How many of a class may be worked on while claims come, and while many are worked on.
const BESIDE_CLAIMS: usize = 4;
const BESIDE_MANY: usize = 1;
/// How many may be worked on that need large objects, of all classes.
const HEAVY: usize = 2;
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
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Work {
    pub(crate) class: Class,
    pub(crate) key: Key,
}

impl Work {
    pub(crate) fn new(class: Class, key: Key) -> Self {
        Self { class, key }
    }
}

/// Who may work on what. Large objects are not kept ([`crate::known`]): work that needs one is done
/// where few are held at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Lane {
    /// Whoever needs a large object gives up.
    Light,
    /// For what has given up.
    Heavy,
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

/// How many claims there are to work on, as a namespace sees it: its own, and one for each other
/// namespace that has some.
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
    waiting: HashMap<(Class, Lane), Turns>,
    queued: HashSet<Work>,
    running: HashMap<Work, Lane>,
    /// What needs large objects, by the last look at it.
    heavy: HashSet<Work>,
    running_of: HashMap<Class, usize>,
    /// To be looked at again after the run that is under way.
    again: HashSet<Work>,
    later: Later,
    failures: HashMap<Work, u32>,
    rush: Rush,
}

/// Objects of one class that wait, namespace by namespace in turns.
#[derive(Default)]
struct Turns {
    order: VecDeque<String>,
    names: HashMap<String, VecDeque<String>>,
}

impl Turns {
    fn push(&mut self, key: Key) {
        let names = self.names.entry(key.namespace.clone()).or_default();
        if names.is_empty() {
            self.order.push_back(key.namespace);
        }
        names.push_back(key.name);
    }

    /// Takes the first object of the first namespace that `may` go on.
    fn take(&mut self, may: impl Fn(&str) -> bool) -> Option<Key> {
        let turn = self.order.iter().position(|namespace| may(namespace))?;
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

/// What is to be looked at when its time comes.
#[derive(Default)]
struct Later {
    due: HashMap<Work, Instant>,
    /// The earliest first. A time that is not in `due` any more counts for nothing.
    order: BinaryHeap<Reverse<(Instant, Work)>>,
}

impl Later {
    /// The earliest time counts.
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

/// The claims that come, by namespace.
#[derive(Default)]
struct Rush {
    namespaces: HashMap<String, Coming>,
    /// When to look whether a namespace is quiet, the earliest first.
    quiet: VecDeque<(Instant, String)>,
}

/// The claims that come in a namespace.
#[derive(Default)]
struct Coming {
    /// Those that wait or are worked on.
    count: usize,
    /// When the last claim was done.
    last: Option<Instant>,
    /// When there were many claims last.
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

    /// Forgets namespaces in which no more claims come, and returns when to look again.
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

/// Whether something is longer ago than others are expected after it.
fn is_past(at: Option<Instant>, now: Instant) -> bool {
    at.is_none_or(|at| at + QUIET <= now)
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
        self.state().later.add(work, Instant::now() + pause);
        self.changed.notify_one();
    }

    /// Waits for the next thing to do. It counts as under way until [`Queue::done`]. For one
    /// caller at a time.
    pub(crate) async fn next(&self) -> (Work, Lane) {
        loop {
            let changed = self.changed.notified();
            let due = {
                let mut state = self.state();
                let now = Instant::now();
                let due = state.wake(now);
                // What claims have held up goes on when no more come.
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

    /// Ends a run: `again` is when to look again, if ever.
    pub(crate) fn done(&self, work: &Work, outcome: Outcome) {
        let mut state = self.state();
        state.running.remove(work);
        let now = Instant::now();
        if work.class == Class::Claim {
            state.rush.end(&work.key.namespace, now);
        }
        if let Some(n) = state.running_of.get_mut(&work.class) {
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

    /// How many claims come now, as `namespace` sees it.
    pub(crate) fn claims(&self, namespace: &str) -> Claims {
        let now = Instant::now();
        let mut state = self.state();
        state.rush.settle(now);
        state.rush.seen_by(namespace, now)
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
    /// To be done at once in the lane for it.
    Heavy,
    /// To be tried again, after a pause that grows.
    Failed,
}

impl State {
    fn add(&mut self, work: Work) {
        if self.running.contains_key(&work) {
            self.again.insert(work);
        } else if self.queued.insert(work.clone()) {
            if work.class == Class::Claim {
                self.rush.begin(&work.key.namespace);
            }
            let lane = match self.heavy.remove(&work) {
                true => Lane::Heavy,
                false => Lane::Light,
            };
            let turns = self.waiting.entry((work.class, lane)).or_default();
            turns.push(work.key);
        }
    }

    /// Queues what is due, and returns when something will be.
    fn wake(&mut self, now: Instant) -> Option<Instant> {
        while let Some(work) = self.later.take(now) {
            self.add(work);
        }
        self.later.next()
    }

    fn pick(&mut self, limits: &Limits, now: Instant) -> Option<(Work, Lane)> {
        let heavy = self.running.values().filter(|l| **l == Lane::Heavy).count();
        for class in CLASSES {
            // Of those there are few, which would never come behind all others.
            for lane in [Lane::Heavy, Lane::Light] {
                if lane == Lane::Heavy && heavy >= HEAVY {
                    continue;
                }
                let mut turns = self.waiting.remove(&(class, lane)).unwrap_or_default();
                let key = turns.take(|namespace| self.may(limits, class, namespace, now));
                self.waiting.insert((class, lane), turns);
                if let Some(key) = key {
                    let work = Work::new(class, key);
                    *self.running_of.entry(class).or_default() += 1;
                    self.queued.remove(&work);
                    self.running.insert(work.clone(), lane);
                    return Some((work, lane));
                }
            }
        }
        None
    }

    /// Whether one more of a class may be worked on, for a namespace.
    fn may(&self, limits: &Limits, class: Class, namespace: &str, now: Instant) -> bool {
        let count = self.running_of.get(&class).copied().unwrap_or_default();
        let claims = match class {
            Class::Claim => Claims::None,
            _ => self.rush.seen_by(namespace, now),
        };
        let is_of = |w: &Work| w.class == class && w.key.namespace == namespace;
        let beside = match claims {
            Claims::None => usize::MAX,
            Claims::Few => BESIDE_CLAIMS,
            // Others, which are held up less, would never leave it a turn.
            Claims::Many if !self.running.keys().any(is_of) => BESIDE_CLAIMS,
            Claims::Many => BESIDE_MANY,
        };
        count < limits.of(class).min(beside)
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
        while let Ok((next, _)) = tokio::time::timeout(brief, queue.next()).await {
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
                assert_eq!(queue.next().await.0.class, Class::Claim);
            }
            assert_eq!(queue.claims("ns"), number);
            assert_eq!(takes(&queue, Class::Sandbox).await, beside);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_goes_on_when_no_more_claims_come() {
        let queue = Queue::new(LIMITS);
        queue.add(work(Class::Claim, "x"));
        let (claim, _) = queue.next().await;
        for n in 0..20 {
            queue.add(work(Class::Sandbox, &n.to_string()));
        }
        queue.done(&claim, Outcome::Done);
        assert_eq!(takes(&queue, Class::Sandbox).await, BESIDE_CLAIMS);
        let start = Instant::now();
        queue.next().await;
        assert!(start.elapsed() <= QUIET);
        assert_eq!(queue.claims("ns"), Claims::None);
        let left = LIMITS.sandboxes - BESIDE_CLAIMS - 1;
        assert_eq!(takes(&queue, Class::Sandbox).await, left);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_worked_on_twice_at_the_same_time() {
        let queue = Queue::new(LIMITS);
        let claim = work(Class::Claim, "x");
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
        let pool = work(Class::Pool, "p");
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
            Work::new(Class::Claim, Key::new(namespace, &n.to_string()))
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
            queue.add(Work::new(Class::Claim, key.clone()));
            queue.add(Work::new(Class::Sandbox, key));
        }
        for n in 0..20 {
            queue.add(work(Class::Sandbox, &n.to_string()));
        }
        assert_eq!(queue.claims("flood"), Claims::Many);
        assert_eq!(queue.claims("ns"), Claims::Few);
        for _ in 0..LIMITS.claims {
            assert_eq!(queue.next().await.0.class, Class::Claim);
        }
        let mut of = HashMap::<String, usize>::new();
        while let Ok((next, _)) = tokio::time::timeout(Duration::from_millis(1), queue.next()).await
        {
            assert_eq!(next.class, Class::Sandbox);
            *of.entry(next.key.namespace).or_default() += 1;
        }
        let expected = [("flood", BESIDE_MANY), ("ns", BESIDE_CLAIMS - BESIDE_MANY)];
        assert_eq!(of, expected.map(|(ns, n)| (ns.to_owned(), n)).into());
        // Those of several are many to all.
        for n in 0..MANY {
            queue.add(Work::new(Class::Claim, Key::new(&n.to_string(), "x")));
        }
        assert_eq!(queue.claims("ns"), Claims::Many);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_due_later_comes_in_the_order_of_its_time() {
        let queue = Queue::new(LIMITS);
        for n in (0..100_u64).rev() {
            let pool = work(Class::Pool, &n.to_string());
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
            queue.add(work(Class::Sandbox, &n.to_string()));
        }
        for _ in 0..LIMITS.sandboxes {
            assert_eq!(queue.next().await.1, Lane::Light);
        }
        for n in 0..4 {
            queue.done(&work(Class::Sandbox, &n.to_string()), Outcome::Heavy);
        }
        let mut lanes = Vec::new();
        let brief = Duration::from_millis(1);
        while let Ok((_, lane)) = tokio::time::timeout(brief, queue.next()).await {
            lanes.push(lane);
        }
        // They do not wait for all others either.
        let expected = [Lane::Heavy, Lane::Heavy, Lane::Light, Lane::Light];
        assert_eq!(lanes, expected);
        queue.done(&work(Class::Sandbox, "0"), Outcome::Done);
        let next = queue.next().await;
        assert_eq!(next, (work(Class::Sandbox, "2"), Lane::Heavy));
    }
}
