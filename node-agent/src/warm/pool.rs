// SPDX-License-Identifier: Apache-2.0

//! Which warm sandboxes there are, which there should be, and what follows from that. Nothing
//! here acts.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use kiln_agent_api::Shape;
use kiln_crds::fair;

use super::sandbox::WarmSandbox;
use kiln_node_install::config::Limits;

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
    /// The runtime or its configuration has changed between the shim's reading of it and the agent's.
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

/// How many sandboxes of a shape should be ready, and which class says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Name of the class.
    pub(crate) class: String,
    /// Number of sandboxes.
    pub(crate) count: u32,
}

/// What there is of one shape, and what became of earlier sandboxes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShapeReport {
    pub(crate) shape: Shape,
    /// `None` for a shape that was learned.
    pub(crate) wanted: Option<Wanted>,
    /// Sandboxes that can be handed out.
    pub(crate) ready: u32,
    /// Sandboxes that boot.
    pub(crate) warming: u32,
    /// Sandboxes that were handed out and became Pods.
    pub(crate) adopted: u64,
    /// Pods that got none.
    pub(crate) missed: u64,
    /// Median of the last boots.
    pub(crate) boot_time: Option<Duration>,
}

/// What is counted of one shape.
#[derive(Debug, Clone, Default)]
struct Tally {
    warming: u32,
    adopted: u64,
    missed: u64,
    boots: Recent,
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
    /// Sandboxes in the order in which they became ready.
    ready: VecDeque<WarmSandbox>,
    tallies: BTreeMap<Shape, Tally>,
}

impl Pool {
    /// Makes an empty one.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            wanted: BTreeMap::new(),
            learned: BTreeMap::new(),
            ready: VecDeque::new(),
            tallies: BTreeMap::new(),
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

    /// Drops the tallies of shapes that nobody asks for and none is left of: a stream of Pods of
    /// ever new shapes must not fill the memory.
    fn prune(&mut self) {
        let (wanted, learned, ready) = (&self.wanted, &self.learned, &self.ready);
        self.tallies.retain(|shape, tally| {
            tally.warming > 0
                || wanted.contains_key(shape)
                || learned.contains_key(shape)
                || ready.iter().any(|sandbox| sandbox.shape == *shape)
        });
    }

    fn tally(&mut self, shape: &Shape) -> &mut Tally {
        self.tallies.entry(shape.clone()).or_default()
    }

    /// Counts sandboxes of `shape` that are ready.
    fn ready_of(&self, shape: &Shape) -> u32 {
        let ready = self.ready.iter().filter(|sandbox| sandbox.shape == *shape);
        u32::try_from(ready.count()).unwrap_or(u32::MAX)
    }

    fn warming(&self) -> u32 {
        self.tallies.values().map(|tally| tally.warming).sum()
    }

    /// Decides how many of each shape should be ready: what was asked for, shared fairly between the shapes,
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

    /// Decides which shape to boot next: the one that lacks most.
    pub(crate) fn next_boot(&self) -> Option<Shape> {
        if self.room() == 0 || self.warming() >= self.limits.boots.max(1) {
            return None;
        }
        let lacks = |shape: &Shape, target: u32| {
            let warming = self.tallies.get(shape).map_or(0, |tally| tally.warming);
            target.saturating_sub(self.ready_of(shape) + warming)
        };
        let targets = self.targets().into_iter();
        let lacking = targets.map(|(shape, target)| (lacks(shape, target), shape));
        // Of several that lack the same the last is taken: seen from the end, what was asked for
        // comes before what was learned.
        let lacking: Vec<_> = lacking.filter(|(lacks, _)| *lacks > 0).collect();
        let most = lacking.into_iter().rev().max_by_key(|(lacks, _)| *lacks);
        most.map(|(_, shape)| shape.clone())
    }

    /// Takes the ready sandboxes that are more than there should be, oldest first.
    pub(crate) fn take_surplus(&mut self) -> Vec<WarmSandbox> {
        let mut room: BTreeMap<Shape, u32> = BTreeMap::new();
        for (shape, target) in self.targets() {
            *room.entry(shape.clone()).or_default() += target;
        }
        let (mut kept, mut surplus) = (VecDeque::new(), VecDeque::new());
        // Seen from the newest, so that the oldest are the surplus.
        while let Some(sandbox) = self.ready.pop_back() {
            match room.get_mut(&sandbox.shape) {
                Some(left) if *left > 0 => {
                    *left -= 1;
                    kept.push_front(sandbox);
                }
                _ => surplus.push_front(sandbox),
            }
        }
        self.ready = kept;
        surplus.into()
    }

    /// Notes that a sandbox of `shape` begins to boot.
    pub(crate) fn booting(&mut self, shape: &Shape) {
        self.tally(shape).warming += 1;
    }

    /// Notes that a boot of `shape` has ended: well after `took`, or in vain.
    pub(crate) fn booted(&mut self, shape: &Shape, took: Option<Duration>) {
        let tally = self.tally(shape);
        tally.warming = tally.warming.saturating_sub(1);
        if let Some(took) = took {
            tally.boots.add(took);
        }
    }

    /// Holds a sandbox that can be handed out.
    pub(crate) fn add(&mut self, sandbox: WarmSandbox) {
        self.ready.push_back(sandbox);
    }

    /// Takes the ready sandbox `id` out, if it is there.
    pub(crate) fn take(&mut self, id: &str) -> Option<WarmSandbox> {
        let at = self.ready.iter().position(|sandbox| sandbox.id == id)?;
        self.ready.remove(at)
    }

    /// Lets go of all ready sandboxes.
    pub(crate) fn clear(&mut self) {
        self.ready.clear();
    }

    /// Hands out the sandbox of `shape` that has been ready for longest.
    ///
    /// # Errors
    /// The reason why there is none.
    pub(crate) fn hand_out(&mut self, shape: &Shape, now: Instant) -> Result<WarmSandbox, Miss> {
        let oldest = self.ready.iter().position(|ready| ready.shape == *shape);
        if let Some(sandbox) = oldest.and_then(|at| self.ready.remove(at)) {
            if let Some(at) = self.learned.get_mut(shape) {
                *at = now;
            }
            return Ok(sandbox);
        }
        let known = self.wanted.contains_key(shape) || self.learned.contains_key(shape);
        self.learn(shape, now);
        if known || self.learned.contains_key(shape) {
            self.tally(shape).missed += 1;
        }
        Err(if known { Miss::Empty } else { Miss::Unknown })
    }

    /// Notes that a sandbox of `shape` has become a Pod.
    pub(crate) fn adopted(&mut self, shape: &Shape) {
        self.tally(shape).adopted += 1;
    }

    /// Notes that a Pod has missed a sandbox of `shape`, as far as shapes are learned.
    pub(crate) fn learn(&mut self, shape: &Shape, now: Instant) {
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

    /// Reports every shape that is wanted, was learned, or of which something was counted.
    pub(crate) fn shapes(&self) -> Vec<ShapeReport> {
        let mut all: Vec<&Shape> = self.wanted.keys().chain(self.tallies.keys()).collect();
        all.extend(self.learned.keys());
        all.sort_unstable();
        all.dedup();
        let report = |shape: &Shape| {
            let tally = self.tallies.get(shape).cloned().unwrap_or_default();
            ShapeReport {
                shape: shape.clone(),
                wanted: self.wanted.get(shape).cloned(),
                ready: self.ready_of(shape),
                warming: tally.warming,
                adopted: tally.adopted,
                missed: tally.missed,
                boot_time: tally.boots.median(),
            }
        };
        all.into_iter().map(report).collect()
    }

    /// Lists those that can be handed out, the oldest first.
    pub(crate) fn ids(&self) -> Vec<String> {
        self.ready.iter().map(|ready| ready.id.clone()).collect()
    }

    /// Says how many more there is room for.
    pub(crate) fn room(&self) -> u32 {
        let ready = u32::try_from(self.ready.len()).unwrap_or(u32::MAX);
        let held = ready.saturating_add(self.warming());
        self.limits.total.saturating_sub(held)
    }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use kiln_agent_api::{RuntimeFile, Setup};
    use kiln_host::reap::Tracked;
    use runsc_wrapper::StartWay;
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
            pool.booted(&shape, Some(Duration::from_millis(5)));
            pool.add(WarmSandbox {
                id: id.clone(),
                shape,
                process: Arc::new(Tracked::gone(1)),
                gofer: None,
                way: StartWay::Command,
            });
            ids.push(id);
        }
        ids
    }

    fn take_surplus(pool: &mut Pool) -> Vec<String> {
        let surplus = pool.take_surplus().into_iter();
        surplus.map(WarmSandbox::into_id).collect()
    }

    fn hand_out(pool: &mut Pool, memory: u64, now: Instant) -> Result<String, Miss> {
        let handed = pool.hand_out(&shape(memory), now);
        handed.map(WarmSandbox::into_id)
    }

    #[tokio::test]
    async fn what_is_wanted_is_booted_within_the_bounds() {
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
        two_at_a_time.booted(&shape(1), None);
        assert_eq!(two_at_a_time.next_boot(), Some(shape(1)));
    }

    #[tokio::test]
    async fn a_shape_that_is_wanted_without_end_leaves_the_others_their_share() {
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
        assert_eq!(full.take_surplus().len(), 4);
    }

    #[tokio::test]
    async fn each_is_handed_out_once_and_the_oldest_first() {
        let mut pool = pool(16, 0, &[(1, 3)]);
        let ids = fill(&mut pool);
        let now = Instant::now();
        let taken: Vec<_> = (0..3)
            .map(|_| hand_out(&mut pool, 1, now).unwrap())
            .collect();
        assert_eq!(taken, ids);
        assert_eq!(hand_out(&mut pool, 1, now), Err(Miss::Empty));
        assert_eq!(hand_out(&mut pool, 2, now), Err(Miss::Unknown));
        assert!(pool.take(&taken[0]).is_none());
        assert_eq!(pool.next_boot(), Some(shape(1)));
    }

    #[tokio::test]
    async fn a_shape_that_pods_miss_is_learned_and_forgotten_again() {
        let mut pool = pool(16, 2, &[(1, 1)]);
        fill(&mut pool);
        let start = Instant::now();
        for (after, memory) in [(0, 2), (1, 3), (2, 4)] {
            let now = start + Duration::from_secs(after);
            assert_eq!(hand_out(&mut pool, memory, now), Err(Miss::Unknown));
        }
        // Only the last two are held.
        assert_eq!(fill(&mut pool), ["w0-4", "w1-3"]);
        assert_eq!(hand_out(&mut pool, 4, start).unwrap(), "w0-4");
        assert!(pool.take_surplus().is_empty());
        pool.forget(start + FORGET + Duration::from_secs(1), |_| true);
        assert_eq!(take_surplus(&mut pool), ["w1-3"]);
        pool.forget(start, |_| false);
        assert_eq!(pool.next_boot(), None);
    }

    #[tokio::test]
    async fn what_is_no_longer_wanted_is_surplus_oldest_first() {
        let mut pool = pool(16, 0, &[(1, 3)]);
        let ids = fill(&mut pool);
        let class = Wanted {
            class: "c".into(),
            count: 1,
        };
        pool.want(BTreeMap::from([(shape(1), class)]));
        assert_eq!(take_surplus(&mut pool), ids[..2]);
        pool.want(BTreeMap::new());
        assert_eq!(take_surplus(&mut pool), ids[2..]);
        pool.want(BTreeMap::new());
        assert!(pool.shapes().is_empty());
    }

    #[test]
    fn ever_new_shapes_leave_nothing_behind() {
        let mut pool = pool(4, 3, &[]);
        let start = Instant::now();
        for memory in 1..1000 {
            let now = start + Duration::from_millis(memory);
            assert!(pool.hand_out(&shape(memory), now).is_err());
            assert!(pool.shapes().len() <= 3);
        }
    }
}
