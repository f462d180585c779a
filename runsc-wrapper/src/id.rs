// SPDX-License-Identifier: Apache-2.0

//! Checked container names: nothing else ever becomes part of a path or an argv.

use std::{fmt, str::FromStr};

/// Longest id in bytes, the limit of containerd's `identifiers.Validate`.
const MAX_LEN: usize = 76;

/// A container or exec id: `^[A-Za-z0-9][A-Za-z0-9_.-]{0,75}$`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(String);

/// An id that no path may be built from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid id {0:?}: must match [A-Za-z0-9][A-Za-z0-9_.-]{{0,75}}")]
pub struct InvalidId(String);

impl ContainerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ContainerId {
    type Err = InvalidId;

    fn from_str(id: &str) -> Result<Self, InvalidId> {
        let mut bytes = id.bytes();
        let first = bytes.next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
        if first && rest && id.len() <= MAX_LEN {
            return Ok(Self(id.to_owned()));
        }
        // The error ends up in logs: show what is wrong, not megabytes of it.
        Err(InvalidId(id.chars().take(MAX_LEN).collect()))
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_containerd_are_accepted() {
        for id in ["a", "A-1_b.c", &"f".repeat(64), &"x".repeat(76)] {
            assert_eq!(id.parse::<ContainerId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn ids_that_could_leave_a_directory_are_refused() {
        for id in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "-x",
            ".hidden",
            "a\0b",
            "a b",
            "ä",
            &"x".repeat(77),
        ] {
            assert!(id.parse::<ContainerId>().is_err(), "{id:?}");
        }
    }
}
