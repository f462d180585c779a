// SPDX-License-Identifier: Apache-2.0

//! What the agent listens at: two sockets for shims, and one port for probes and metrics.

mod agent;
mod gofers;
pub mod http;
mod listener;

pub use agent::{Shims, serve};
pub use gofers::serve_gofers;

/// Calls that are worked on at a time; more are answered with a miss at once, so that a flood
/// delays nobody.
const AT_ONCE: usize = 64;
