// SPDX-License-Identifier: Apache-2.0

//! The shim layer: the shims of a node and their satellites, and how much memory they hold.

use std::{collections::HashMap, fs};

use kiln_tests::{node::Node, process::Proc};

/// Bytes of a MB.
const MB: f64 = 1e6;

/// Commands of runsc that a shim may keep running beside it.
const WAITING: [&str; 2] = ["wait", "exec"];

/// Everything that runs for the node's Pods beside sentries, gofers and containers.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) shims: Vec<Proc>,
    /// Runs of runsc that last as long as a container or an exec does.
    pub(crate) satellites: Vec<Proc>,
}

/// Memory of processes, in MB.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Memory {
    pub(crate) rss: f64,
    /// Pages that processes share, divided by their number.
    pub(crate) pss: f64,
    pub(crate) anonymous: f64,
}

impl Layer {
    /// The layer of all Pods that `node` has now.
    pub(crate) fn of(node: &Node) -> Self {
        let processes = node.processes();
        let shims: Vec<_> = processes
            .iter()
            .filter(|p| p.program().starts_with("containerd-shim"))
            .cloned()
            .collect();
        let parents: HashMap<_, _> = processes.iter().map(|p| (p.pid, p.parent)).collect();
        let is_below_shim = |p: &Proc| {
            let mut above = std::iter::successors(parents.get(&p.pid), |pid| parents.get(pid));
            above.any(|pid| shims.iter().any(|shim| shim.pid == *pid))
        };
        let satellites = processes
            .iter()
            .filter(|p| is_satellite(&p.argv) && is_below_shim(p))
            .cloned()
            .collect();
        Self { shims, satellites }
    }

    /// What it holds together. A process that ends meanwhile holds nothing.
    pub(crate) fn memory(&self) -> Memory {
        let rollups = self.shims.iter().chain(&self.satellites);
        let rollups = rollups
            .filter_map(|p| fs::read_to_string(format!("/proc/{}/smaps_rollup", p.pid)).ok());
        rollups
            .map(|text| parse(&text))
            .fold(Memory::default(), |sum, one| Memory {
                rss: sum.rss + one.rss,
                pss: sum.pss + one.pss,
                anonymous: sum.anonymous + one.anonymous,
            })
    }
}

/// `runsc … wait …`, `runsc … exec …` and its other half, `runsc-exec …`; not the sandbox's own
/// `runsc-sandbox … boot …` and `runsc-gofer … gofer …`.
fn is_satellite(argv: &str) -> bool {
    let mut words = argv.split(' ');
    let program = words.next().unwrap_or_default();
    let program = program.rsplit('/').next().unwrap_or_default();
    matches!(program, "runsc" | "runsc-exec" | "exe") && words.any(|word| WAITING.contains(&word))
}

/// Lines are `NAME: NUMBER kB` (Documentation/filesystems/proc.rst of Linux).
fn parse(rollup: &str) -> Memory {
    let field = |name: &str| {
        let line = rollup
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
        number.unwrap_or_default() * 1024.0 / MB
    };
    Memory {
        rss: field("Rss"),
        pss: field("Pss"),
        anonymous: field("Anonymous"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_satellite_waits_and_is_not_the_sandbox() {
        assert!(is_satellite("/opt/runsc --root=/r --log=/l wait abc"));
        assert!(is_satellite("runsc-exec --root=/r exec --pid-file=/p abc"));
        assert!(!is_satellite(
            "runsc-sandbox --root=/r boot --bundle=/exec abc"
        ));
        assert!(!is_satellite("runsc-gofer --root=/r gofer --bundle=/b"));
        assert!(!is_satellite("/opt/runsc --root=/r start abc"));
        assert!(!is_satellite("sh -c wait"));
    }

    #[test]
    fn fields_are_told_from_those_whose_names_begin_alike() {
        let memory = parse(
            "00-7f ---p 0 00:00 0 [rollup]\nRss: 1000 kB\nPss: 500 kB\nPss_Anon: 7 kB\nAnonymous: 250 kB\n",
        );
        assert_eq!(
            memory,
            Memory {
                rss: 1.024,
                pss: 0.512,
                anonymous: 0.256
            }
        );
    }
}
