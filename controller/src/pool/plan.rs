// SPDX-License-Identifier: Apache-2.0

//! What a pool does next: which Sandboxes go, and how many are made.

use std::{iter, time::Duration};

use jiff::Timestamp;
use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::Condition};
use kiln_crds::Sandbox;
use kube::{Resource, ResourceExt};

use crate::{
    blocked::{Blocked, is_unplaced},
    condition::{self, FINISHED},
};

/// How long a Sandbox that has come to its end is kept: one that ends at once must not make the pool
/// spin.
const LEAST_LIFE: Duration = Duration::from_secs(10);

/// One Sandbox of a pool.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) name: String,
    /// How long ago it was made, by the apiserver's clock and ours.
    pub(crate) age: Duration,
    /// How long this process has seen that it is not ready, by one clock.
    pub(crate) waited: Duration,
    pub(crate) is_ready: bool,
    /// Bears the pool's marks, but is not what the pool made.
    pub(crate) is_forged: bool,
    /// Made from another template than the pool's, or from an earlier state of it.
    pub(crate) is_stale: bool,
    /// Its Pod has ended.
    pub(crate) is_over: bool,
    /// Its Pod is on no node: none takes it, or a gate keeps it.
    pub(crate) is_unplaced: bool,
    pub(crate) blocked: Option<Blocked>,
}

impl Member {
    /// Describes a Sandbox with the pool's marks, and its Pod. It `is_genuine` if the pool made it; a
    /// forged one is never ready.
    pub(crate) fn of(
        sandbox: &Sandbox,
        pod: Option<&Pod>,
        is_genuine: bool,
        is_stale: bool,
        waited: Duration,
        now: Timestamp,
    ) -> Self {
        let conditions: &[Condition] = sandbox.status.as_ref().map_or(&[], |s| &s.conditions);
        Self {
            name: sandbox.name_any(),
            age: age(sandbox, now),
            waited,
            is_ready: is_genuine && condition::is_ready(sandbox),
            is_forged: !is_genuine,
            is_stale,
            is_over: condition::is_true(conditions, FINISHED),
            is_unplaced: is_unplaced(conditions),
            blocked: Blocked::of(conditions, pod),
        }
    }
}

/// How long ago an object was made.
pub(crate) fn age<K: Resource>(object: &K, now: Timestamp) -> Duration {
    let made = object.meta().creation_timestamp.as_ref();
    let age = made.and_then(|made| Duration::try_from(now.duration_since(made.0)).ok());
    age.unwrap_or_default()
}

/// How many Sandboxes to make at once, without an end: one, then twice as many each time, up to
/// `most`, which is at least one: nothing would come of batches of none.
pub(crate) fn batches(most: usize) -> impl Iterator<Item = usize> {
    let most = most.max(1);
    iter::successors(Some(1), move |last: &usize| {
        Some(last.saturating_mul(2).min(most))
    })
}

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) make: usize,
    pub(crate) delete: Vec<String>,
    /// How many of these were not ready in time.
    pub(crate) late: usize,
    /// When something else will be to do, if nothing changes.
    pub(crate) again: Option<Duration>,
}

/// Decides. `replaces_stale` is the pool's strategy, `grace` the time that a Sandbox has to
/// become ready; one that no node takes is kept, because another would fare no better.
pub(crate) fn plan(
    desired: usize,
    members: &[Member],
    replaces_stale: bool,
    can_make: bool,
    grace: Duration,
) -> Plan {
    let mut plan = Plan::default();
    let mut kept = Vec::new();
    for member in members {
        let limit = if member.is_over {
            Some(LEAST_LIFE)
        } else if member.is_ready || member.is_unplaced {
            None
        } else {
            Some(grace)
        };
        let left = limit.map(|limit| limit.saturating_sub(member.waited));
        let is_due = left == Some(Duration::ZERO);
        let goes = member.is_forged || (member.is_stale && replaces_stale) || is_due;
        if can_make && goes {
            plan.late += usize::from(is_due && !member.is_over);
            plan.delete.push(member.name.clone());
            continue;
        }
        plan.again = plan.again.into_iter().chain(left).min();
        kept.push(member);
    }
    if kept.len() > desired {
        // The first to go are of no use yet, or of the old template, or the youngest.
        kept.sort_by_key(|m| (m.is_ready, !m.is_stale, m.age));
        let excess = kept.len() - desired;
        plan.delete
            .extend(kept[..excess].iter().map(|m| m.name.clone()));
    } else if can_make {
        plan.make = desired - kept.len();
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(300);

    fn member(name: &str) -> Member {
        Member {
            name: name.to_owned(),
            age: Duration::from_secs(60),
            waited: Duration::ZERO,
            is_ready: true,
            is_forged: false,
            is_stale: false,
            is_over: false,
            is_unplaced: false,
            blocked: None,
        }
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.delete.iter().map(String::as_str).collect()
    }

    #[test]
    fn a_pool_makes_what_it_lacks_and_drops_what_it_has_too_much() {
        let members = [member("a"), member("b")];
        let of = |desired| plan(desired, &members, false, true, GRACE);
        assert_eq!(of(5).make, 3);
        assert_eq!(of(2), Plan::default());
        assert_eq!(of(0).delete.len(), 2);
    }

    #[test]
    fn the_unready_go_first_then_the_stale_then_the_young() {
        let starting = Member {
            is_ready: false,
            ..member("starting")
        };
        let stale = Member {
            is_stale: true,
            ..member("stale")
        };
        let young = Member {
            age: Duration::from_secs(1),
            ..member("young")
        };
        let members = [member("old"), young, stale, starting];
        for (desired, gone) in [
            (3, vec!["starting"]),
            (2, vec!["starting", "stale"]),
            (1, vec!["starting", "stale", "young"]),
        ] {
            assert_eq!(names(&plan(desired, &members, false, true, GRACE)), gone);
        }
    }

    #[test]
    fn what_is_broken_is_replaced_in_its_time() {
        let over = |age| Member {
            is_ready: false,
            is_over: true,
            waited: Duration::from_secs(age),
            ..member("over")
        };
        let soon = plan(1, &[over(4)], false, true, GRACE);
        assert_eq!(
            (soon.make, soon.delete.len(), soon.again),
            (0, 0, Some(Duration::from_secs(6)))
        );
        let now = plan(1, &[over(10)], false, true, GRACE);
        assert_eq!((now.make, names(&now)), (1, vec!["over"]));
        let slow = Member {
            is_ready: false,
            waited: GRACE,
            ..member("slow")
        };
        let late = plan(1, std::slice::from_ref(&slow), false, true, GRACE);
        assert_eq!((names(&late), late.late), (vec!["slow"], 1));
        // What a clock says that is ahead of the apiserver's counts for nothing.
        let seems_old = Member {
            age: 10 * GRACE,
            waited: Duration::from_secs(1),
            ..slow.clone()
        };
        let kept = plan(1, &[seems_old], false, true, GRACE);
        let left = GRACE - Duration::from_secs(1);
        assert_eq!((kept.delete.len(), kept.again), (0, Some(left)));
        let homeless = Member {
            is_unplaced: true,
            ..slow
        };
        assert_eq!(plan(1, &[homeless], false, true, GRACE), Plan::default());
    }

    #[test]
    fn stale_ones_stay_unless_the_pool_replaces_them() {
        let stale = Member {
            is_stale: true,
            ..member("stale")
        };
        assert_eq!(
            plan(1, std::slice::from_ref(&stale), false, true, GRACE),
            Plan::default()
        );
        let replaced = plan(1, std::slice::from_ref(&stale), true, true, GRACE);
        assert_eq!((replaced.make, names(&replaced)), (1, vec!["stale"]));
    }

    #[test]
    fn what_bears_a_pools_marks_and_is_not_of_its_making_goes() {
        let forged = Member {
            is_ready: false,
            is_forged: true,
            age: Duration::from_secs(3600),
            ..member("forged")
        };
        let members = [forged, member("own")];
        for replaces_stale in [false, true] {
            let plan = plan(2, &members, replaces_stale, true, GRACE);
            assert_eq!((plan.make, names(&plan)), (1, vec!["forged"]));
        }
    }

    #[test]
    fn without_a_template_nothing_is_made_and_nothing_taken_for_broken() {
        let over = Member {
            is_over: true,
            waited: GRACE,
            ..member("over")
        };
        assert_eq!(plan(3, &[over], true, false, GRACE).make, 0);
    }

    /// Age in seconds, readiness, staleness, end, and whether no node takes it.
    type Some = (u16, bool, bool, bool, bool);

    fn members(all: &[Some]) -> Vec<Member> {
        let member = |(index, (age, ready, stale, over, homeless)): (usize, &Some)| Member {
            name: format!("m{index}"),
            age: Duration::from_secs((*age).into()),
            waited: Duration::from_secs((*age).into()),
            is_ready: *ready && !over,
            is_forged: false,
            is_stale: *stale,
            is_over: *over,
            is_unplaced: *homeless,
            blocked: None,
        };
        all.iter().enumerate().map(member).collect()
    }

    /// The members after a plan was carried out, with new ones that are ready at once.
    fn carried_out(members: &[Member], plan: &Plan) -> Vec<Member> {
        let stay = members.iter().filter(|m| !plan.delete.contains(&m.name));
        let made = (0..plan.make).map(|n| Member {
            age: Duration::ZERO,
            waited: Duration::ZERO,
            ..member(&format!("new{n}"))
        });
        stay.cloned().chain(made).collect()
    }

    #[test]
    fn any_pool_gets_what_it_lacks_no_more_and_rests() {
        bolero::check!()
            .with_type::<(u8, Vec<Some>, bool, bool)>()
            .for_each(|(desired, all, replaces_stale, can_make)| {
                let desired = usize::from(*desired);
                let before = members(all);
                let plan_of = |m: &[Member]| plan(desired, m, *replaces_stale, *can_make, GRACE);
                let first = plan_of(&before);
                let after = carried_out(&before, &first);
                assert_eq!(after.len(), before.len() - first.delete.len() + first.make);
                if *can_make {
                    assert_eq!(after.len(), desired);
                } else {
                    assert_eq!(after.len(), desired.min(before.len()));
                }
                let rest = plan_of(&after);
                assert_eq!((rest.make, rest.delete.len()), (0, 0));
                // Later, what waits for its time is replaced, and then it rests again.
                let later: Vec<Member> = after
                    .iter()
                    .map(|m| Member {
                        waited: m.waited + rest.again.unwrap_or_default(),
                        ..m.clone()
                    })
                    .collect();
                let last = carried_out(&later, &plan_of(&later));
                let rest = plan_of(&last);
                assert_eq!((rest.make, rest.delete.len()), (0, 0));
            });
    }

    #[test]
    fn of_what_any_pool_has_too_much_the_ready_go_last() {
        bolero::check!()
            .with_type::<(u8, Vec<Some>)>()
            .for_each(|(desired, all)| {
                let before = members(all);
                // Without a template nothing but the number counts.
                let plan = plan(usize::from(*desired), &before, true, false, GRACE);
                let goes = |m: &&Member| plan.delete.contains(&m.name);
                let loses_ready = before.iter().filter(goes).any(|m| m.is_ready);
                let keeps_unready = before.iter().filter(|m| !goes(m)).any(|m| !m.is_ready);
                assert!(!(loses_ready && keeps_unready));
            });
    }

    #[test]
    fn batches_grow_and_never_end() {
        let take = |most, count| batches(most).take(count).collect::<Vec<_>>();
        assert_eq!(take(10, 6), [1, 2, 4, 8, 10, 10]);
        assert_eq!(take(0, 3), [1; 3]);
        assert_eq!(take(usize::MAX, 200).last(), Some(&usize::MAX));
    }
}
