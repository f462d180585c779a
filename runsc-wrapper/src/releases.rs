// SPDX-License-Identifier: Apache-2.0

//! What is known of releases of runsc, and what is worth a trial with one that is not known.
//!
//! The command line of runsc is the same from release to release; what costs less than a command
//! is not. `releases.toml` says which forms a release has. Who relies on one has tried it out on
//! this node before.

use std::{collections::BTreeMap, sync::LazyLock};

use serde::Deserialize;

use crate::{gofer::has_plain_files, network::has_plain_network};

/// The call that gives a sandbox its network before it starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkCall {
    /// `Network.CreateLinksAndRoutes`, which makes the links at once.
    CreateLinks,
    /// `containerManager.SetNetworkArgs`; the start makes the links.
    SetArgs,
}

impl NetworkCall {
    const ALL: [Self; 2] = [Self::CreateLinks, Self::SetArgs];

    /// Name of the call at the control socket.
    #[must_use]
    pub fn method(self) -> &'static str {
        match self {
            Self::CreateLinks => "Network.CreateLinksAndRoutes",
            Self::SetArgs => "containerManager.SetNetworkArgs",
        }
    }
}

/// How a sandbox that was booted ahead is given its network and started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartWay {
    /// By the runtime's own command: any release.
    Command,
    /// Over the sentry's control socket, which costs no process.
    Control(NetworkCall),
}

impl StartWay {
    /// The call of [`StartWay::Control`]; empty for the command.
    #[must_use]
    pub fn method(self) -> &'static str {
        match self {
            Self::Command => "",
            Self::Control(call) => call.method(),
        }
    }

    /// The way that [`method`](Self::method) has this answer. A call that is not known is left to
    /// the command.
    #[must_use]
    pub fn by_method(method: &str) -> Self {
        let call = NetworkCall::ALL.into_iter().find(|c| c.method() == method);
        call.map_or(Self::Command, Self::Control)
    }
}

/// What costs less than commands with a release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forms {
    /// How a sandbox is started.
    pub start: StartWay,
    /// Whether containers can be started with a gofer that was made ahead.
    pub gofers: bool,
}

/// What `releases.toml` says of one release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// Whether the release is in the table.
    pub is_known: bool,
    /// What is worth a trial, the most promising first. Commands always work, and are not listed.
    pub forms: Vec<Forms>,
}

impl Release {
    /// Looks up the release of runsc that says `version` of itself (`release-20260224.0`) and
    /// runs with `flags`.
    ///
    /// One that is newer than all of the table has, most probably, the newest forms. One between
    /// two entries has those of either; one that is older than all, or says no date, has none.
    #[must_use]
    pub fn of(version: &str, flags: &BTreeMap<String, String>) -> Self {
        let found = date(version).map_or_else(Self::unknown, |date| look_up(&TABLE, date));
        if !has_plain_network(flags) {
            return Self {
                forms: Vec::new(),
                ..found
            };
        }
        let has_gofers = has_plain_files(flags);
        let forms = found.forms.into_iter().map(|forms| Forms {
            gofers: forms.gofers && has_gofers,
            ..forms
        });
        Self {
            forms: forms.collect(),
            ..found
        }
    }

    fn unknown() -> Self {
        Self {
            is_known: false,
            forms: Vec::new(),
        }
    }
}

/// An entry of the table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    first: u32,
    last: u32,
    network: NetworkCall,
    gofers: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    release: Vec<Entry>,
}

// A table that cannot be read is one without entries, and commands are used; a test reads it.
static TABLE: LazyLock<Vec<Entry>> = LazyLock::new(|| read().unwrap_or_default());

fn read() -> Result<Vec<Entry>, toml::de::Error> {
    toml::from_str::<Table>(include_str!("releases.toml")).map(|table| table.release)
}

/// `20260224` of `release-20260224.0`.
fn date(version: &str) -> Option<u32> {
    version.strip_prefix("release-")?.get(..8)?.parse().ok()
}

fn look_up(table: &[Entry], date: u32) -> Release {
    let forms = |entry: &Entry| Forms {
        start: StartWay::Control(entry.network),
        gofers: entry.gofers,
    };
    let known = table.iter().find(|e| (e.first..=e.last).contains(&date));
    if let Some(entry) = known {
        return Release {
            is_known: true,
            forms: vec![forms(entry)],
        };
    }
    let before = table.iter().rev().find(|e| e.last < date);
    let after = table.iter().find(|e| e.first > date);
    let Some(before) = before else {
        return Release::unknown();
    };
    let near = after.into_iter().chain([before]);
    Release {
        is_known: false,
        forms: near.map(forms).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINKS: StartWay = StartWay::Control(NetworkCall::CreateLinks);
    const ARGS: StartWay = StartWay::Control(NetworkCall::SetArgs);

    fn ways(version: &str) -> (bool, Vec<StartWay>) {
        let release = Release::of(version, &BTreeMap::new());
        let ways = release.forms.iter().map(|f| f.start).collect();
        (release.is_known, ways)
    }

    #[test]
    fn the_table_is_in_order_and_without_overlaps() {
        let table = read().unwrap();
        assert!(table.iter().all(|e| e.first <= e.last));
        assert!(table.windows(2).all(|pair| pair[0].last < pair[1].first));
    }

    #[test]
    fn a_release_has_the_forms_of_its_date_and_others_those_of_their_neighbours() {
        for (version, known, forms) in [
            ("release-20260224.0", true, vec![LINKS]),
            ("release-20260224-573d5e7127a8", true, vec![LINKS]),
            ("release-20260905-160fafc42237", true, vec![ARGS]),
            ("release-20260817.0", true, vec![ARGS]),
            ("release-20991231.0", false, vec![ARGS]),
            ("release-20260501.0", false, vec![ARGS, LINKS]),
            ("release-20240729.0", false, vec![]),
            ("release-2026", false, vec![]),
            ("0.0~20260224.0", false, vec![]),
            ("", false, vec![]),
        ] {
            assert_eq!(ways(version), (known, forms), "{version}");
        }
    }

    #[test]
    fn flags_that_change_networks_or_files_leave_these_to_commands() {
        let of = |flag: &str, value: &str| {
            let flags = BTreeMap::from([(flag.to_owned(), value.to_owned())]);
            let release = Release::of("release-20260905.0", &flags);
            assert!(release.is_known);
            release.forms.first().map(|f| (f.start, f.gofers))
        };
        assert_eq!(of("platform", "systrap"), Some((ARGS, true)));
        assert_eq!(of("host-uds", "open"), Some((ARGS, false)));
        assert_eq!(of("qdisc", "none"), None);
    }

    #[test]
    fn a_way_is_told_by_its_call_and_what_is_not_known_is_the_command() {
        for way in [StartWay::Command, LINKS, ARGS] {
            assert_eq!(StartWay::by_method(way.method()), way);
        }
        assert_eq!(StartWay::by_method("Network.Other"), StartWay::Command);
    }
}
