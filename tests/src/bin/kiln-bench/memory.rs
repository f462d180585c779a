// SPDX-License-Identifier: Apache-2.0

//! The shim layer: the shims of a node and their satellites, and how much memory they hold.

use std::collections::HashMap;

use kiln_tests::{memory::Memory, node::Node, process::Proc};

/// Commands of runsc that a shim may keep running beside it.
const WAITING: [&str; 2] = ["wait", "exec"];

/// Everything that runs for the node's Pods beside sentries, gofers and containers.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) shims: Vec<Proc>,
    /// Runs of runsc that last as long as a container or an exec does.
    pub(crate) satellites: Vec<Proc>,
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

    /// What it holds together.
    pub(crate) fn memory(&self) -> Memory {
        Memory::of(self.shims.iter().chain(&self.satellites))
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
}
