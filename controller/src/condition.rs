// SPDX-License-Identifier: Apache-2.0

//! Conditions of a status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Types of conditions, as upstream has them.
pub(crate) const READY: &str = "Ready";
pub(crate) const SUSPENDED: &str = "Suspended";
pub(crate) const POD_SCHEDULED: &str = "PodScheduled";
pub(crate) const FINISHED: &str = "Finished";

/// Status of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Is {
    True,
    False,
    Unknown,
}

impl Is {
    fn text(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// A condition that has yet to be put among others: its time is when it changes there.
pub(crate) fn condition(
    kind: &str,
    is: Is,
    reason: &str,
    message: impl Into<String>,
    generation: Option<i64>,
) -> Condition {
    Condition {
        type_: kind.to_owned(),
        status: is.text().to_owned(),
        reason: reason.to_owned(),
        message: message.into(),
        observed_generation: generation,
        last_transition_time: Time(Timestamp::UNIX_EPOCH),
    }
}

/// Puts `new` in the place of the condition of its type. The time changes with the status alone.
pub(crate) fn set(conditions: &mut Vec<Condition>, mut new: Condition, now: Timestamp) {
    // Times of the API have whole seconds.
    new.last_transition_time = Time(seconds(now));
    match conditions.iter_mut().find(|c| c.type_ == new.type_) {
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = old.last_transition_time.clone();
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

/// Takes out the condition of a type.
pub(crate) fn remove(conditions: &mut Vec<Condition>, kind: &str) {
    conditions.retain(|c| c.type_ != kind);
}

pub(crate) fn find<'a>(conditions: &'a [Condition], kind: &str) -> Option<&'a Condition> {
    conditions.iter().find(|c| c.type_ == kind)
}

pub(crate) fn is_true(conditions: &[Condition], kind: &str) -> bool {
    find(conditions, kind).is_some_and(|c| c.status == "True")
}

/// The second in which a time lies.
pub(crate) fn seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_that_of_the_last_change_of_status() {
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        let mut all = Vec::new();
        set(&mut all, condition(READY, Is::False, "A", "", None), at(10));
        set(&mut all, condition(READY, Is::False, "B", "", None), at(20));
        assert_eq!(all[0].last_transition_time.0, at(10));
        assert_eq!(all[0].reason, "B");
        set(&mut all, condition(READY, Is::True, "C", "", None), at(30));
        assert_eq!(all[0].last_transition_time.0, at(30));
        assert!(is_true(&all, READY));
        remove(&mut all, READY);
        assert!(all.is_empty());
    }
}
