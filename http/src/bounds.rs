// SPDX-License-Identifier: Apache-2.0

//! Limits of a listener and its connections.

use std::time::Duration;

/// Size of hyper's buffers, in bytes, and so of the largest head of a request. For each direction a
/// connection of HTTP/1.1 has up to four of them: what was read, what is handed over, and what is to
/// be written with the piece that made it too much.
pub const BUFFER: usize = 16 << 10;

/// How many connections a listener has, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Connections at the same time.
    pub connections: usize,
    /// Connections of one client address at the same time.
    pub per_client: usize,
    /// How long a client may take for the head of a request, and between two of them.
    pub head: Duration,
    /// How long nothing may come from a client nor go to it, also after an upgrade.
    pub idle: Duration,
}
