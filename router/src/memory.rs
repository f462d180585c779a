// SPDX-License-Identifier: Apache-2.0

//! Memory that connections take, so that the router's limit is above it.
//!
//! The worst are clients and sandboxes that send in both directions and do not read. A client's
//! connection is then two sockets, the client's and the sandbox's:
//!
//! | | each | number | KiB |
//! |---|---|---|---|
//! | buffers of the kernel, which are twice as large as was asked for | 2 × 64 KiB | 2 sockets, 2 directions | 512 |
//! | what HTTP/2 takes before it is read | 64 KiB | 2 directions | 128 |
//! | what HTTP/2 has to send, frames that are read and written | 16 KiB | 4 for each direction | 128 |
//! | buffers of TLS | 16 KiB | 2 for each direction | 64 |
//! | heads, tasks, timers, what the kernel has for two sockets, and the last packet that makes a buffer of its own too large | | | 96 |
//!
//! HTTP/1.1 takes less: hyper has four buffers of 16 KiB for each direction. So does a WebSocket:
//! two of 8 KiB. Further requests of a connection of HTTP/2 have places of their own, so that this
//! is enough for each of them: they have one socket less.

use kiln_http::{BUFFER, SOCKET_BUFFER, WINDOW};

/// What a connection takes at most of the router's own memory, in bytes.
pub const OWN_BYTES: usize = 2 * (WINDOW as usize + 4 * BUFFER + 2 * BUFFER) + (96 << 10);

/// What a connection takes at most, in bytes: its buffers in the kernel are the container's, too.
pub const CONNECTION_BYTES: usize = 2 * 2 * 2 * SOCKET_BUFFER as usize + OWN_BYTES;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Args, MAX_CONNECTIONS};

    /// What the router takes without connections.
    const BASE: usize = 64 << 20;

    /// The limit of the container in `deploy/base`, in bytes.
    fn limit() -> usize {
        let manifest = include_str!("../../deploy/base/router.yaml");
        let (_, limits) = manifest.split_once("limits:\n").unwrap();
        let (_, memory) = limits.split_once("memory: ").unwrap();
        let gibibytes = memory.lines().next().and_then(|m| m.strip_suffix("Gi"));
        gibibytes.unwrap().parse::<usize>().unwrap() << 30
    }

    #[test]
    fn all_connections_fit_into_the_containers_memory() {
        let most = BASE + MAX_CONNECTIONS * CONNECTION_BYTES;
        assert!(most <= limit(), "{most} of {}", limit());
    }

    #[test]
    fn what_is_said_of_it_is_so() {
        let said = format!("{} KiB", CONNECTION_BYTES >> 10);
        let help = <Args as clap::CommandFactory>::command()
            .render_long_help()
            .to_string();
        let operations = include_str!("../../docs/operations.md");
        for text in [help.as_str(), operations] {
            assert!(text.contains(&said), "{said} is not in {text}");
        }
        let default = format!("`--max-connections` | {MAX_CONNECTIONS} |");
        assert!(operations.contains(&default), "{default}");
    }
}
