// SPDX-License-Identifier: Apache-2.0

//! Who is compared.

/// One of the shims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    /// Our shim with runsc.
    Ours,
    /// gVisor's own shim with the same runsc.
    GoShim,
    /// containerd's shim with runc, for scale: it has no sandbox.
    Runc,
}

impl Side {
    pub(crate) const ALL: [Self; 3] = [Self::Ours, Self::GoShim, Self::Runc];

    /// All of them, each round with another one first.
    pub(crate) fn rotated(round: usize) -> impl Iterator<Item = Self> {
        let first = round % Self::ALL.len();
        Self::ALL
            .into_iter()
            .cycle()
            .skip(first)
            .take(Self::ALL.len())
    }

    /// The handler of the test node.
    pub(crate) fn handler(self) -> &'static str {
        match self {
            Self::Ours => "gvisor",
            Self::GoShim => "runsc-go",
            Self::Runc => "runc",
        }
    }

    /// For people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::GoShim => "Go shim",
            Self::Runc => "runc",
        }
    }

    /// The key in the JSON file.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::GoShim => "go_shim",
            Self::Runc => "runc",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_side_is_first_in_turn() {
        let first: Vec<_> = (0..4)
            .filter_map(|round| Side::rotated(round).next())
            .collect();
        assert_eq!(first, [Side::Ours, Side::GoShim, Side::Runc, Side::Ours]);
        assert_eq!(
            Side::rotated(1).collect::<Vec<_>>(),
            [Side::GoShim, Side::Runc, Side::Ours]
        );
    }
}
