// SPDX-License-Identifier: Apache-2.0

//! HTTP listeners of Kiln's programs.
//!
//! Every listener has bounds (`Bounds`): connections at the same time, connections of one client,
//! and times. A connection has a `Place` (`places`) until it ends, or, if it becomes a WebSocket,
//! until that ends. Connections that wait for a request give way when places are short. The buffers
//! of a connection have fixed sizes (`socket`, `BUFFER`), so that places bound the memory.

#![forbid(unsafe_code)]

mod places;
mod probes;
mod serve;
mod socket;
mod timed;

pub use self::{
    places::{Counts, Place, Reason},
    probes::serve_probes,
    serve::{BUFFER, Bounds, Client, Serving, serve},
    socket::{SOCKET_BUFFER, bind, socket},
    timed::Timed,
};
