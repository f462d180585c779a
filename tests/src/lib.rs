// SPDX-License-Identifier: Apache-2.0

//! Test harness: real containerd, runsc and runc around the shim of this workspace.
//!
//! Two ways to run the shim, both as root and both in private directories, so that many can run
//! side by side and beside a containerd of the machine's own:
//!
//! - [`node::Node`] is a containerd with its own state, network namespace, CNI bridge, cgroup and
//!   image registry. It is driven through CRI ([`cri`], [`pod`]) and through `ctr` ([`ctr`]).
//! - [`mini::Mini`] plays containerd: it starts the shim binary and talks to it over ttrpc. That
//!   shows every reply and every event, and lets a test send what containerd never would.
//!
//! [`suite`] runs the cases of one test binary on one `Node` or `Mini` and checks at the end that
//! nothing is left of them ([`leaks`]). Errors are `anyhow`'s, because what a failed test needs is
//! a chain of words.

pub mod agent;
pub mod bench;
pub mod cgroup;
pub mod cri;
pub mod ctr;
pub mod dice;
pub mod images;
pub mod leaks;
pub mod memory;
pub mod mini;
pub mod mounts;
pub mod netns;
pub mod node;
pub mod place;
pub mod pod;
pub mod process;
pub mod spans;
pub mod suite;
pub mod terminal;
pub mod tools;
pub mod wait;

/// Whether `uname -r` has this answer in a sandbox: releases of gVisor before the summer of 2026
/// call their kernel 4.4.0, later ones put their own name behind it.
#[must_use]
pub fn is_gvisors(release: &str) -> bool {
    let release = release.trim();
    release == "4.4.0" || release.ends_with("-gvisor")
}
