// SPDX-License-Identifier: Apache-2.0

//! Conditions of a status.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kiln_crds::Sandbox;

/// Types of conditions, as upstream has them.
pub(crate) const READY: &str = "Ready";
pub(crate) const SUSPENDED: &str = "Suspended";
pub(crate) const POD_SCHEDULED: &str = "PodScheduled";
/// Ours: whether a Sandbox that was suspended has its memory again.
pub(crate) const MEMORY_KEPT: &str = "MemoryKept";
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

/// Most bytes of a condition's reason and message that an apiserver takes.
const REASON: usize = 1024;
const MESSAGE: usize = 32_768;

/// Whether an apiserver takes `text` as a condition's reason (`metav1.Condition`: a word that begins
/// with a letter, and ends with a letter, digit or underscore).
pub(crate) fn is_reason(text: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.len() <= REASON
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.ends_with(is_word)
        && text.chars().all(|c| is_word(c) || matches!(c, ',' | ':'))
}

/// The beginning of `text`, of at most so many bytes.
pub(crate) fn shorten(mut text: String, most: usize) -> String {
    text.truncate(text.floor_char_boundary(most));
    text
}

/// A condition that has yet to be put among others: its time is when it changes there. The message is
/// cut to what an apiserver takes.
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
        message: shorten(message.into(), MESSAGE),
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

/// Whether a Sandbox says that it is ready, and says so of the spec that it has now.
pub(crate) fn is_ready(sandbox: &Sandbox) -> bool {
    let conditions = sandbox.status.as_ref().map(|s| &s.conditions);
    let ready = conditions.and_then(|all| find(all, READY));
    ready
        .is_some_and(|c| c.status == "True" && c.observed_generation == sandbox.metadata.generation)
}

/// The second in which a time lies.
pub(crate) fn seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_words_and_messages_have_an_end() {
        for good in ["A", "Unschedulable", "a_1", "Foo:Bar,Baz2", "x_"] {
            assert!(is_reason(good), "{good}");
        }
        for bad in [
            "",
            "1a",
            "_a",
            "pod-group not ready",
            "a b",
            "a:",
            "ä",
            "a\n",
        ] {
            assert!(!is_reason(bad), "{bad}");
        }
        assert!(!is_reason(&"x".repeat(REASON + 1)));
        let long = condition(READY, Is::False, "A", "ä".repeat(MESSAGE), None);
        assert_eq!(long.message.len(), MESSAGE);
        let odd = condition(
            READY,
            Is::False,
            "A",
            format!("x{}", "ä".repeat(MESSAGE)),
            None,
        );
        assert_eq!(odd.message.len(), MESSAGE - 1);
    }

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
