// SPDX-License-Identifier: Apache-2.0

//! The way to a sandbox.
//!
//! Every request gets a connection of its own: one that is kept can be closed by the sandbox just
//! when it is used again, and a request that runs a command must not be sent twice to find out.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{TcpStream, lookup_host},
    time::{sleep, timeout},
};
use tracing::debug;

use crate::{
    address::{Forbidden, Networks},
    target::Target,
};

/// How long one attempt may take, as with upstream.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Pause before the second attempt; later ones double it. A sandbox that was just made may not
/// listen yet, and DNS may not know it.
const PAUSE: Duration = Duration::from_millis(200);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("{name} is not known")]
    Unknown { name: String, source: io::Error },
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    #[error("connect to {address}")]
    Connect {
        address: SocketAddr,
        source: io::Error,
    },
}

impl DialError {
    /// Label of a metric.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "dns",
            Self::Forbidden(_) => "forbidden",
            Self::Connect { .. } => "dial",
        }
    }
}

/// Connects to `target`, and tries `retries` times more; `retried` hears of each of these.
pub(crate) async fn dial(
    target: &Target,
    networks: &Networks,
    domain: &str,
    retries: u32,
    retried: impl Fn(),
) -> Result<TcpStream, DialError> {
    let mut pause = PAUSE;
    for _ in 0..retries {
        match attempt(target, networks, domain).await {
            Err(e @ (DialError::Unknown { .. } | DialError::Connect { .. })) => {
                debug!("{}/{}: {e}, again", target.namespace, target.id);
            }
            done => return done,
        }
        sleep(pause).await;
        pause *= 2;
        retried();
    }
    attempt(target, networks, domain).await
}

async fn attempt(
    target: &Target,
    networks: &Networks,
    domain: &str,
) -> Result<TcpStream, DialError> {
    let addresses = match target.pod_ip {
        Some(address) => vec![address],
        None => resolve(&target.dns_name(domain), networks).await?,
    };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    let mut tried = SocketAddr::new(IpAddr::from([0; 4]), target.port);
    for address in addresses {
        tried.set_ip(address);
        match timeout(ATTEMPT, connect(tried)).await {
            Ok(Ok(stream)) => {
                // Small answers are not held back for larger ones; without it all still works.
                stream.set_nodelay(true).ok();
                return Ok(stream);
            }
            Ok(Err(e)) => last = e,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(DialError::Connect {
        address: tried,
        source: last,
    })
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    kiln_http::socket(address)?.connect(address).await
}

/// The addresses behind a name. Whoever may make a service says where its name leads, so they are
/// believed no more than a client's.
async fn resolve(name: &str, networks: &Networks) -> Result<Vec<IpAddr>, DialError> {
    let unknown = |source| DialError::Unknown {
        name: name.to_owned(),
        source,
    };
    let found = timeout(ATTEMPT, lookup_host((name, 0))).await;
    let found = found
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(unknown)?;
    let mut fine = Vec::new();
    let mut forbidden = None;
    for address in found {
        match networks.check(address.ip()) {
            Ok(address) => fine.push(address),
            Err(e) => forbidden = Some(e),
        }
    }
    match forbidden {
        Some(e) if fine.is_empty() => Err(e.into()),
        None if fine.is_empty() => Err(unknown(io::ErrorKind::NotFound.into())),
        _ => Ok(fine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Loopback;

    #[tokio::test]
    async fn a_name_leads_to_sandboxes_only() {
        let refused = Networks::new(vec!["10.0.0.0/8".parse().unwrap()], &[], Loopback::Refused);
        let error = resolve("localhost", &refused).await.unwrap_err();
        assert_eq!(error.reason(), "forbidden", "{error}");
        let allowed = Networks::new(Vec::new(), &[], Loopback::Allowed);
        let found = resolve("localhost", &allowed).await.unwrap();
        assert!(found.iter().all(IpAddr::is_loopback) && !found.is_empty());
    }

    /// A pause each, before it is given up.
    #[tokio::test(start_paused = true)]
    async fn what_does_not_listen_is_tried_again() {
        let target = Target {
            id: "box".to_owned(),
            namespace: "default".to_owned(),
            // tcpmux, which nothing has served for decades.
            port: 1,
            pod_ip: Some([127, 0, 0, 1].into()),
            timeout: None,
        };
        let networks = Networks::new(Vec::new(), &[], Loopback::Allowed);
        let retries = std::cell::Cell::new(0);
        let start = tokio::time::Instant::now();
        let count = || retries.set(retries.get() + 1);
        let error = dial(&target, &networks, "cluster.local", 2, count).await;
        assert_eq!(error.unwrap_err().reason(), "dial");
        assert_eq!(retries.get(), 2);
        assert!(start.elapsed() >= PAUSE * 3);
    }
}
