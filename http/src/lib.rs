// SPDX-License-Identifier: Apache-2.0

//! HTTP listeners of Kiln's programs.
//!
//! Every listener has bounds (`Bounds`): connections at the same time, connections of one client,
//! and times. A connection has a place (`places`) until it ends, or, if it becomes a WebSocket,
//! until that ends. Connections that wait for a request give way when places are short.
//!
//! A connection is of HTTP/1.1 or HTTP/2, as its first bytes say (`opening`), with TLS (`tls`) or
//! without. Further requests of a connection of HTTP/2 at the same time have places of their own,
//! and `streams` ends those that do not move. The buffers of a connection have fixed sizes
//! (`socket`, `BUFFER`, `WINDOW`), so that places bound the memory.

#![forbid(unsafe_code)]

mod bounds;
mod client;
mod connection;
mod opening;
mod places;
mod probes;
mod serve;
mod socket;
mod streams;
mod timed;
mod tls;

pub use self::{
    bounds::{BUFFER, Bounds},
    client::Client,
    connection::{STREAMS, WINDOW},
    places::{Counts, Hold, Reason},
    probes::serve_probes,
    serve::{Listener, Serving, serve},
    socket::{SOCKET_BUFFER, bind, socket},
    timed::Timed,
    tls::{BadCertificate, Tls},
};
