// SPDX-License-Identifier: Apache-2.0

//! Which warm sandboxes there are, which there should be, and what follows from that. Nothing
//! here acts.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use kiln_agent_api::Shape;
use kiln_crds::fair;

use crate::config::Limits;

/// After this time without a Pod that asks for it, a learned shape is forgotten.
const FORGET: Duration = Duration::from_secs(600);

/// Boots, or adoptions, of which the median is reported.
const RECENT: usize = 32;

/// Why a Pod got no warm sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Miss {
    /// Those of its shape are all taken or booting.
    Empty,
    /// Nobody has said that its shape will be needed.
    Unknown,
    /// The agent answers as many shims at once as it may.
    Busy,
    /// The runtime or its configuration has changed between the shim's look and the agent's.
    Stale,
    /// Warm sandboxes do not work on this node.
    Broken,
    /// The request makes no sense.
    Invalid,
}

impl Miss {
    /// Every reason there is.
    pub(crate) const ALL: [Self; 6] = [
        Self::Empty,
        Self::Unknown,
        Self::Busy,
        Self::Stale,
        Self::Broken,
        Self::Invalid,
    ];

    /// Its name in metrics and answers.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Unknown => "unknown",
            Self::Busy => "busy",
            Self::Stale => "stale",
            Self::Broken => "broken",
            Self::Invalid => "invalid",
        }
    }
}

/// How many sandboxes of a shape should be ready, and who says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Name of the class; empty for a shape that was learned.
    pub(crate) class: String,
    /// How many.
    pub(crate) count: u32,
}

/// What became of the sandboxes of one shape.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// How many can be handed out.
    pub(crate) ready: u32,
    /// How many boot.
    pub(crate) warming: u32,
    /// How many were handed out and became Pods.
    pub(crate) adopted: u64,
    /// How many Pods got none.
    pub(crate) missed: u64,
    boots: Recent,
}

impl Counts {
    /// Median of the last boots.
    pub(crate) fn boot_time(&self) -> Option<Duration> {
        self.boots.median()
    }
}

/// How long something took the last times.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recent(VecDeque<Duration>);

impl Recent {
    pub(crate) fn add(&mut self, took: Duration) {
        if self.0.len() == RECENT {
            self.0.pop_front();
        }
        self.0.push_back(took);
    }

    pub(crate) fn median(&self) -> Option<Duration> {
        let mut all: Vec<_> = self.0.iter().copied().collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied()
    }
}

/// The warm sandboxes of a node.
#[derive(Debug)]
pub(crate) struct Pool {
    limits: Limits,
    wanted: BTreeMap<Shape, Wanted>,
    /// Shapes that Pods have missed, and when.
    learned: BTreeMap<Shape, Instant>,
    ready: BTreeMap<String, Shape>,
    /// Ready ones in the order in which they became so.
    order: VecDeque<String>,
    counts: BTreeMap<Shape, Counts>,
}

impl Pool {
    /// An empty one.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            wanted: BTreeMap::new(),
            learned: BTreeMap::new(),
            ready: BTreeMap::new(),
            order: VecDeque::new(),
            counts: BTreeMap::new(),
        }
    }

    /// Replaces what should be there.
    pub(crate) fn want(&mut self, wanted: BTreeMap<Shape, Wanted>) {
        self.learned.retain(|shape, _| !wanted.contains_key(shape));
        self.wanted = wanted;
        self.prune();
    }

    /// Forgets shapes that were learned long ago, or that `made` says are not made any more.
    pub(crate) fn forget(&mut self, now: Instant, made: impl Fn(&Shape) -> bool) {
        self.learned
            .retain(|shape, at| now.duration_since(*at) < FORGET && made(shape));
        self.prune();
    }

    /// Drops the counts of shapes that nobody asks for and none is left of: a stream of Pods of
    /// ever new shapes must not fill the memory.
    fn prune(&mut self) {
        let (wanted, learned) = (&self.wanted, &self.learned);
        self.counts.retain(|shape, c| {
            c.ready + c.warming > 0 || wanted.contains_key(shape) || learned.contains_key(shape)
        });
    }

    /// How many of each shape should be ready: what was asked for, shared fairly between the shapes,
    /// then what was learned last, within the bounds.
    fn targets(&self) -> Vec<(&Shape, u32)> {
        let mut room = self.limits.total;
        let mut take = |count: u32| {
            let count = count.min(room);
            room -= count;
            count
        };
        let wants = self.wanted.iter();
        let wants = wants.map(|(shape, wanted)| (shape, wanted.count as usize));
        let shares = fair::divide(&wants.collect(), self.limits.total as usize);
        let asked: Vec<_> = shares
            .into_iter()
            .map(|(shape, share)| (shape, take(u32::try_from(share).unwrap_or(u32::MAX))))
            .collect();
        let mut recent: Vec<_> = self.learned.iter().collect();
        recent.sort_by_key(|(_, at)| std::cmp::Reverse(**at));
        let learned = recent.into_iter().take(self.limits.learned as usize);
        let learned = learned.map(|(shape, _)| (shape, take(1)));
        asked
            .into_iter()
            .chain(learned.collect::<Vec<_>>())
            .collect()
    }

    /// The shape to boot next: the one that lacks most.
    pub(crate) fn next_boot(&self) -> Option<Shape> {
        let all: u32 = self.counts.values().map(|c| c.ready + c.warming).sum();
        let warming: u32 = self.counts.values().map(|c| c.warming).sum();
        if all >= self.limits.total || warming >= self.limits.boots.max(1) {
            return None;
        }
        let lacks = |shape: &Shape, target: u32| {
            let there = self.counts.get(shape).map_or(0, |c| c.ready + c.warming);
            target.saturating_sub(there)
        };
        let targets = self.targets().into_iter();
        let lacking = targets.map(|(shape, target)| (lacks(shape, target), shape));
        // Of several that lack the same the last is taken: seen from the end, what was asked for
        // comes before what was learned.
        let lacking: Vec<_> = lacking.filter(|(lacks, _)| *lacks > 0).collect();
        let most = lacking.into_iter().rev().max_by_key(|(lacks, _)| *lacks);
        most.map(|(_, shape)| shape.clone())
    }

    /// Ready sandboxes that are more than there should be, oldest first.
    pub(crate) fn surplus(&self) -> Vec<String> {
        let mut room: BTreeMap<&Shape, u32> = BTreeMap::new();
        for (shape, target) in self.targets() {
            *room.entry(shape).or_default() += target;
        }
        let mut exceeds = |id: &&String| {
            let shape = self.ready.get(*id);
            match shape.and_then(|shape| room.get_mut(shape)) {
                Some(left) if *left > 0 => {
                    *left -= 1;
                    false
                }
                _ => true,
            }
        };
        // Seen from the newest, so that the oldest are the surplus.
        let mut surplus: Vec<_> = self
            .order
            .iter()
            .rev()
            .filter(&mut exceeds)
            .cloned()
            .collect();
        surplus.reverse();
        surplus
    }

    /// Notes that a sandbox of `shape` begins to boot.
    pub(crate) fn booting(&mut self, shape: &Shape) {
        self.counts.entry(shape.clone()).or_default().warming += 1;
    }

    /// Notes that a boot has ended; `id` is `None` where it failed.
    pub(crate) fn booted(&mut self, shape: &Shape, id: Option<&str>, took: Duration) {
        let counts = self.counts.entry(shape.clone()).or_default();
        counts.warming = counts.warming.saturating_sub(1);
        if let Some(id) = id {
            counts.boots.add(took);
            self.recovered(shape, id);
        }
    }

    /// Notes a ready sandbox.
    pub(crate) fn recovered(&mut self, shape: &Shape, id: &str) {
        self.counts.entry(shape.clone()).or_default().ready += 1;
        self.ready.insert(id.to_owned(), shape.clone());
        self.order.push_back(id.to_owned());
    }

    /// Forgets a ready sandbox, and says whether it was one.
    pub(crate) fn lost(&mut self, id: &str) -> bool {
        let Some(shape) = self.ready.remove(id) else {
            return false;
        };
        self.order.retain(|other| other != id);
        if let Some(counts) = self.counts.get_mut(&shape) {
            counts.ready = counts.ready.saturating_sub(1);
        }
        true
    }

    /// Hands out the sandbox of `shape` that has been ready for longest.
    ///
    /// # Errors
    /// The reason why there is none.
    pub(crate) fn acquire(&mut self, shape: &Shape, now: Instant) -> Result<String, Miss> {
        let fitting = |id: &&String| self.ready.get(*id) == Some(shape);
        if let Some(id) = self.order.iter().find(fitting).cloned() {
            self.lost(&id);
            if let Some(at) = self.learned.get_mut(shape) {
                *at = now;
            }
            return Ok(id);
        }
        let known = self.wanted.contains_key(shape) || self.learned.contains_key(shape);
        self.learn(shape, now);
        if known || self.learned.contains_key(shape) {
            self.counts.entry(shape.clone()).or_default().missed += 1;
        }
        Err(if known { Miss::Empty } else { Miss::Unknown })
    }

    /// Notes that a sandbox of `shape` has become a Pod.
    pub(crate) fn adopted(&mut self, shape: &Shape) {
        self.counts.entry(shape.clone()).or_default().adopted += 1;
    }

    fn learn(&mut self, shape: &Shape, now: Instant) {
        if self.limits.learned == 0 || self.wanted.contains_key(shape) {
            return;
        }
        self.learned.insert(shape.clone(), now);
        if self.learned.len() > self.limits.learned as usize {
            let oldest = self.learned.iter().min_by_key(|(_, at)| **at);
            if let Some(oldest) = oldest.map(|(shape, _)| shape.clone()) {
                self.learned.remove(&oldest);
                self.prune();
            }
        }
    }

    /// Every shape with what is wanted of it and what became of it.
    pub(crate) fn shapes(&self) -> Vec<(&Shape, Option<&Wanted>, Counts)> {
        let mut all: Vec<&Shape> = self.wanted.keys().chain(self.counts.keys()).collect();
        all.extend(self.learned.keys());
        all.sort_unstable();
        all.dedup();
        all.into_iter()
            .map(|shape| {
                let counts = self.counts.get(shape).cloned().unwrap_or_default();
                (shape, self.wanted.get(shape), counts)
            })
            .collect()
    }

    /// Those that can be handed out, the oldest first.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.order.iter().cloned().collect()
    }

    /// How many more there is room for.
    pub(crate) fn room(&self) -> u32 {
        let all: u32 = self.counts.values().map(|c| c.ready + c.warming).sum();
        self.limits.total.saturating_sub(all)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kiln_agent_api::{RuntimeFile, Setup};
    use serde_json::json;

    use super::*;

    fn shape(memory: u64) -> Shape {
        let setup = Setup {
            runtime: RuntimeFile::of(Path::new("/proc/self/exe")).unwrap(),
            root: Path::new("/run/r"),
            flags: &BTreeMap::new(),
        };
        let spec = json!({"linux": {"namespaces": [{"type": "network"}]}});
        Shape::of(&spec, setup).unwrap().with_memory(Some(memory))
    }

    fn pool(total: u32, learned: u32, wanted: &[(u64, u32)]) -> Pool {
        let limits = Limits {
            total,
            learned,
            boots: 2,
            ..Limits::default()
        };
        let mut pool = Pool::new(limits);
        let class = |(memory, count): &(u64, u32)| {
            let class = format!("c{memory}");
            (
                shape(*memory),
                Wanted {
                    class,
                    count: *count,
                },
            )
        };
        pool.want(wanted.iter().map(class).collect());
        pool
    }

    /// Boots until nothing is lacking, and returns the ids.
    fn fill(pool: &mut Pool) -> Vec<String> {
        let mut ids = Vec::new();
        while let Some(shape) = pool.next_boot() {
            pool.booting(&shape);
            let id = format!("w{}-{}", ids.len(), shape.memory.unwrap_or_default());
            pool.booted(&shape, Some(&id), Duration::from_millis(5));
            ids.push(id);
        }
        ids
    }

    #[test]
    fn what_is_wanted_is_booted_within_the_bounds() {
        let mut small = pool(16, 0, &[(1, 2), (2, 3)]);
        assert_eq!(fill(&mut small).len(), 5);
        assert_eq!((small.ids().len(), small.room()), (5, 11));
        let mut bounded = pool(4, 0, &[(1, 2), (2, 3)]);
        assert_eq!(fill(&mut bounded).len(), 4);
        let mut two_at_a_time = pool(16, 0, &[(1, 5)]);
        for _ in 0..2 {
            let shape = two_at_a_time.next_boot().unwrap();
            two_at_a_time.booting(&shape);
        }
        assert_eq!(two_at_a_time.next_boot(), None);
        two_at_a_time.booted(&shape(1), None, Duration::ZERO);
        assert_eq!(two_at_a_time.next_boot(), Some(shape(1)));
    }

    #[test]
    fn a_shape_that_is_wanted_without_end_leaves_the_others_their_share() {
        let mut pool = pool(16, 0, &[(1, u32::MAX), (512, 2), (1024, u32::MAX)]);
        let ids = fill(&mut pool);
        let of = |memory: &str| ids.iter().filter(|id| id.ends_with(memory)).count();
        assert_eq!((of("-1"), of("-512"), of("-1024")), (7, 2, 7));
        // It comes later than one that has all the room.
        let mut full = self::pool(16, 0, &[(1, u32::MAX)]);
        assert_eq!(fill(&mut full).len(), 16);
        let wanted = |memory, count| {
            (
                shape(memory),
                Wanted {
                    class: "c".into(),
                    count,
                },
            )
        };
        full.want(BTreeMap::from([wanted(1, u32::MAX), wanted(512, 4)]));
        assert_eq!(full.surplus().len(), 4);
    }

    #[test]
    fn each_is_handed_out_once_and_the_oldest_first() {
        let mut pool = pool(16, 0, &[(1, 3)]);
        let ids = fill(&mut pool);
        let now = Instant::now();
        let taken: Vec<_> = (0..3)
            .map(|_| pool.acquire(&shape(1), now).unwrap())
            .collect();
        assert_eq!(taken, ids);
        assert_eq!(pool.acquire(&shape(1), now), Err(Miss::Empty));
        assert_eq!(pool.acquire(&shape(2), now), Err(Miss::Unknown));
        assert!(!pool.lost(&taken[0]));
        assert_eq!(pool.next_boot(), Some(shape(1)));
    }

    #[test]
    fn a_shape_that_pods_miss_is_learned_and_forgotten_again() {
        let mut pool = pool(16, 2, &[(1, 1)]);
        fill(&mut pool);
        let start = Instant::now();
        for (after, memory) in [(0, 2), (1, 3), (2, 4)] {
            let now = start + Duration::from_secs(after);
            assert_eq!(pool.acquire(&shape(memory), now), Err(Miss::Unknown));
        }
        // Only the last two are held.
        assert_eq!(fill(&mut pool), ["w0-4", "w1-3"]);
        assert_eq!(pool.acquire(&shape(4), start).unwrap(), "w0-4");
        assert!(pool.surplus().is_empty());
        pool.forget(start + FORGET + Duration::from_secs(1), |_| true);
        assert_eq!(pool.surplus(), ["w1-3"]);
        pool.forget(start, |_| false);
        assert_eq!(pool.next_boot(), None);
    }

    #[test]
    fn what_is_no_longer_wanted_is_surplus_oldest_first() {
        let mut pool = pool(16, 0, &[(1, 3)]);
        let ids = fill(&mut pool);
        let class = Wanted {
            class: "c".into(),
            count: 1,
        };
        pool.want(BTreeMap::from([(shape(1), class)]));
        assert_eq!(pool.surplus(), ids[..2]);
        pool.want(BTreeMap::new());
        assert_eq!(pool.surplus(), ids);
        for id in ids {
            assert!(pool.lost(&id));
        }
        pool.want(BTreeMap::new());
        assert!(pool.shapes().is_empty());
    }

    #[test]
    fn ever_new_shapes_leave_nothing_behind() {
        let mut pool = pool(4, 3, &[]);
        let start = Instant::now();
        for memory in 1..1000 {
            let now = start + Duration::from_millis(memory);
            assert!(pool.acquire(&shape(memory), now).is_err());
            assert!(pool.shapes().len() <= 3);
        }
    }
}
