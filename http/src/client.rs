// SPDX-License-Identifier: Apache-2.0

//! Clients of a listener.

use std::{net::IpAddr, sync::Arc};

use crate::places::Hold;

/// The other end of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    pub(crate) address: IpAddr,
    pub(crate) has_tls: bool,
}

/// Who has sent a request.
#[derive(Clone)]
pub struct Client {
    /// Its address; IPv4 if it is one that IPv6 has written in its own way.
    pub address: IpAddr,
    /// Whether its connection has TLS.
    pub has_tls: bool,
    /// The request's place. Who upgrades the connection keeps this until the end of it.
    pub hold: Arc<Hold>,
}

impl Client {
    pub(crate) fn new(caller: Caller, hold: &Arc<Hold>) -> Self {
        Self {
            address: caller.address,
            has_tls: caller.has_tls,
            hold: Arc::clone(hold),
        }
    }
}
