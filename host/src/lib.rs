// SPDX-License-Identifier: Apache-2.0

//! Linux as the programs on a node use it: cgroups, processes and their exits, network namespaces
//! with the packet filter of a Pod, timer slack, and files.
//!
//! Nothing here knows a runtime, containerd or Kubernetes.

mod blocking;
pub mod cgroup;
pub mod egress;
mod exit;
pub mod fs;
mod interrupt;
mod netns;
pub mod oom;
pub mod reap;
pub mod timer_slack;

pub use blocking::blocking;
pub use exit::Exit;
pub use interrupt::uninterrupted;
pub use netns::in_netns;
