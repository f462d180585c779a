// SPDX-License-Identifier: Apache-2.0

//! The router of Agent Sandbox: HTTP from clients outside of the Pod network to sandboxes.
//!
//! A request says in its headers which sandbox it is for (`target`). It is let in (`auth`), its
//! sandbox is found by the address that it gives or by DNS, an address that is no Pod's is refused
//! (`address`, `dial`), and it is passed on without what concerns one connection only (`headers`,
//! `forward`), by HTTP/1.1, or HTTP/2 if it is gRPC (`connection`). Bodies flow both ways as they
//! come (`body`), and so do WebSockets (`websocket`).
//!
//! Connections are those of `kiln-http`; `memory` says what they take at most.
//!
//! It knows no apiserver and keeps nothing between requests, so that any number may run.

#![forbid(unsafe_code)]

mod address;
mod args;
mod auth;
mod body;
mod connection;
mod dial;
mod forward;
mod headers;
mod memory;
mod metrics;
mod probes;
mod refusal;
mod target;
mod websocket;

pub use self::{
    address::{Forbidden, Loopback, Networks},
    args::{Args, BadArgs},
    auth::{Auth, NoAuth},
    forward::{Limits, Router},
    memory::{CONNECTION_BYTES, OWN_BYTES},
    metrics::Metrics,
    probes::Probes,
};
