// SPDX-License-Identifier: Apache-2.0

//! Flags and variables. Those that one of upstream's routers has keep their names and meaning.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::{ArgAction, Parser};
use ipnet::IpNet;
use kiln_http::{BadCertificate, Bounds, Tls};

use crate::{
    address::{Loopback, Networks},
    auth::{Auth, NoAuth},
    forward::Limits,
};

/// Default of --max-connections. `memory` compares it with what the container may take.
pub(crate) const MAX_CONNECTIONS: usize = 1024;

/// How long a client may take for the head of a request, and between two of them. Less, if places
/// are short.
const HEAD: Duration = Duration::from_secs(30);

/// Why the router cannot be run as it is told to.
#[derive(Debug, thiserror::Error)]
pub enum BadArgs {
    /// The file with the token.
    #[error("cannot read {}", .path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// Nobody could use it, or anybody could.
    #[error(transparent)]
    Auth(#[from] NoAuth),
    /// It could connect to nothing.
    #[error("neither --pod-cidr nor --guess-pod-network with --pod-ip says where sandboxes are")]
    NoNetwork,
}

/// Passes HTTP requests on to the sandboxes that their X-Sandbox-* headers name.
#[derive(Debug, Parser)]
#[command(name = "kiln-router", version, args_override_self = true)]
pub struct Args {
    /// Address for clients.
    #[arg(long, default_value = ":8080", value_parser = address)]
    pub http_bind_address: SocketAddr,

    /// Address for clients that use TLS. Unset: there is none.
    #[arg(long, value_parser = address, requires_all = ["tls_cert_file", "tls_key_file"])]
    pub https_bind_address: Option<SocketAddr>,

    /// PEM file with the certificate for --https-bind-address, and those that it depends on. Read
    /// again when it changes.
    #[arg(long, requires = "tls_key_file")]
    tls_cert_file: Option<PathBuf>,

    /// PEM file with the certificate's key. Read again when it changes.
    #[arg(long, requires = "tls_cert_file")]
    tls_key_file: Option<PathBuf>,

    /// Address of /healthz and /readyz.
    #[arg(long, default_value = ":8081", value_parser = address)]
    pub health_probe_bind_address: SocketAddr,

    /// Address of /metrics.
    #[arg(long, default_value = ":9090", value_parser = address)]
    pub metrics_bind_address: SocketAddr,

    /// DNS domain of the cluster.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,

    /// How long a sandbox may take to begin its answer, and how long nothing may come of it
    /// afterwards; in seconds if there is no unit.
    #[arg(long, env = "PROXY_TIMEOUT_SECONDS", default_value = "180s", value_parser = duration)]
    proxy_timeout: Duration,

    /// Further attempts to connect to a sandbox.
    #[arg(long, default_value_t = 3)]
    upstream_max_retries: u32,

    /// How long the router still takes connections after SIGTERM, while it says that it is not
    /// ready; in seconds if there is no unit. Those who send it clients need a moment to see that.
    #[arg(long, default_value = "5s", value_parser = pause)]
    pub shutdown_delay: Duration,

    /// How long requests may go on after that.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub shutdown_timeout: Duration,

    /// Connections of clients at the same time, WebSockets among them. Each request of a connection
    /// of HTTP/2 beyond one counts as a connection. Each may take 928 KiB of memory.
    #[arg(long, default_value_t = MAX_CONNECTIONS)]
    max_connections: usize,

    /// Connections of one client address at the same time. Unset: half of --max-connections. As
    /// many as --max-connections if all clients come by way of one proxy.
    #[arg(long)]
    max_connections_per_client: Option<usize>,

    /// How long nothing may be sent on a WebSocket, and how long a client or a sandbox may take
    /// none of what it is sent; in seconds if there is no unit. --proxy-timeout if that is longer.
    #[arg(long, default_value = "10m", value_parser = duration)]
    idle_timeout: Duration,

    /// Networks in which Pods are. An address that a client gives or that DNS knows is connected
    /// to only if it is in one of them.
    #[arg(long, env = "POD_CIDRS", value_delimiter = ',')]
    pod_cidr: Vec<IpNet>,

    /// Take the /16 (IPv6: /56) around each --pod-ip for the Pods' networks if there is no
    /// --pod-cidr. Where nodes or other machines are in it, clients reach them.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    guess_pod_network: bool,

    /// The router's own addresses, which are never connected to.
    #[arg(long, env = "POD_IPS", value_delimiter = ',', value_parser = ip)]
    pod_ip: Vec<IpAddr>,

    /// Addresses of its node, which are never connected to.
    #[arg(long, env = "NODE_IPS", value_delimiter = ',', value_parser = ip)]
    node_ip: Vec<IpAddr>,

    /// The apiserver's service, which is never connected to.
    #[arg(long, env = "KUBERNETES_SERVICE_HOST")]
    apiserver: Option<String>,

    /// Whether sandboxes may be behind loopback addresses, as where one shares the router's Pod.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_loopback_pod_ip: bool,

    /// File with the token that clients must show (`Authorization: Bearer TOKEN`); else it is
    /// the variable ROUTER_AUTH_TOKEN.
    #[arg(long)]
    auth_token_file: Option<PathBuf>,

    /// Let everybody in who reaches the router, if there is no token.
    #[arg(long, env = "ALLOW_UNAUTHENTICATED_ROUTER", default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_unauthenticated: bool,

    /// Threads that do the work.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,

    /// Log as JSON.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub log_json: bool,
}

impl Args {
    /// Who may use the router; `variable` is the token of the environment.
    ///
    /// # Errors
    /// When the file cannot be read, and when nothing says who may.
    pub fn auth(&self, variable: Option<&str>) -> Result<Auth, BadArgs> {
        let file = self.auth_token_file.as_ref().map(|path| {
            std::fs::read_to_string(path).map_err(|source| BadArgs::Token {
                path: path.clone(),
                source,
            })
        });
        let file = file.transpose()?;
        let token = file.as_deref().or(variable);
        // An empty file is a mistake, and not the wish to let everybody in.
        let is_open = self.allow_unauthenticated && self.auth_token_file.is_none();
        Ok(Auth::new(token, is_open)?)
    }

    /// The certificate for clients that use TLS, if there are such.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn tls(&self) -> Result<Option<Arc<Tls>>, BadCertificate> {
        match (&self.tls_cert_file, &self.tls_key_file) {
            (Some(certificate), Some(key)) => Tls::new(certificate, key).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether nobody says where sandboxes are.
    #[must_use]
    pub fn guesses(&self) -> bool {
        self.pod_cidr.is_empty() && self.guess_pod_network
    }

    /// Where sandboxes are.
    ///
    /// # Errors
    /// When nothing says where, and it may not be guessed.
    pub fn networks(&self) -> Result<Networks, BadArgs> {
        let mut pods = self.pod_cidr.clone();
        if self.guesses() {
            pods.extend(self.pod_ip.iter().copied().map(Networks::around));
        }
        if pods.is_empty() && !self.allow_loopback_pod_ip {
            return Err(BadArgs::NoNetwork);
        }
        // A name is looked up by whoever uses it, and none of a service's leads to a Pod.
        let apiserver = self.apiserver.iter().filter_map(|host| ip(host).ok());
        let own = self.pod_ip.iter().chain(&self.node_ip).copied();
        let never: Vec<IpAddr> = own.chain(apiserver).collect();
        let loopback = match self.allow_loopback_pod_ip {
            true => Loopback::Allowed,
            false => Loopback::Refused,
        };
        Ok(Networks::new(pods, &never, loopback))
    }

    /// How much, and how long.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            patience: self.proxy_timeout,
            retries: self.upstream_max_retries,
            idle: self.idle(),
        }
    }

    /// How many connections of clients, and for how long.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        let connections = self.max_connections.max(1);
        let half = connections.div_ceil(2);
        Bounds {
            connections,
            per_client: self.max_connections_per_client.unwrap_or(half).max(1),
            head: HEAD,
            idle: self.idle(),
        }
    }

    /// A sandbox that may be silent for long is not cut off before that.
    fn idle(&self) -> Duration {
        self.idle_timeout.max(self.proxy_timeout)
    }
}

/// An address as Go writes it: `:8080` is any address of the machine, be it IPv6 or IPv4.
fn address(text: &str) -> Result<SocketAddr, String> {
    let whole = match text.strip_prefix(':') {
        Some(port) => format!("[::]:{port}"),
        None => text.to_owned(),
    };
    whole.parse().map_err(|e| format!("{text}: {e}"))
}

fn ip(text: &str) -> Result<IpAddr, String> {
    text.trim().parse().map_err(|e| format!("{text}: {e}"))
}

/// A duration as Go writes it, `1m30s`, or in seconds, and not zero.
fn duration(text: &str) -> Result<Duration, String> {
    match pause(text)? {
        Duration::ZERO => Err(format!("{text}: no time at all")),
        duration => Ok(duration),
    }
}

/// The same, or zero.
fn pause(text: &str) -> Result<Duration, String> {
    let parsed = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string()),
        Err(_) => text
            .parse::<jiff::SignedDuration>()
            .and_then(Duration::try_from)
            .map_err(|e| e.to_string()),
    };
    parsed.map_err(|e| format!("{text}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Args {
        Args::try_parse_from(["kiln-router"].iter().chain(args)).unwrap()
    }

    #[test]
    fn nothing_is_allowed_unless_it_is_said() {
        let args = parse(&[]);
        assert!(args.auth(None).is_err());
        assert!(args.auth(Some("")).is_err());
        assert!(args.auth(Some("secret")).is_ok());
        assert!(args.networks().is_err());
        let open = parse(&["--allow-unauthenticated"]);
        assert!(matches!(open.auth(None), Ok(Auth::Open)));
        assert!(matches!(open.auth(Some("secret")), Ok(Auth::Token(_))));
    }

    #[test]
    fn a_file_goes_before_the_variable_and_must_hold_something() {
        let flags = ["--allow-unauthenticated", "--auth-token-file=/dev/null"];
        assert!(parse(&flags).auth(None).is_err());
        let missing = parse(&["--auth-token-file=/nowhere/token"]);
        assert!(missing.auth(Some("secret")).is_err());
    }

    #[test]
    fn networks_are_given_or_guessed() {
        let text = |args: &[&str]| {
            let networks = parse(args).networks().unwrap();
            networks
                .pods()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
        let own = "--pod-ip=10.244.3.7";
        assert!(parse(&[own]).networks().is_err());
        assert!(parse(&["--guess-pod-network"]).networks().is_err());
        assert_eq!(text(&[own, "--guess-pod-network"]), ["10.244.0.0/16"]);
        let given = [
            own,
            "--guess-pod-network",
            "--pod-cidr=10.4.0.0/14,fd00::/48",
        ];
        assert_eq!(text(&given), ["10.4.0.0/14", "fd00::/48"]);
        let near = [own, "--guess-pod-network", "--node-ip=10.244.9.9"];
        let networks = parse(&near).networks().unwrap();
        for never in ["10.244.3.7", "10.244.9.9"] {
            assert!(networks.check(never.parse().unwrap()).is_err(), "{never}");
        }
    }

    #[test]
    fn one_client_has_half_of_the_places_unless_it_is_said() {
        let of = |args: &[&str]| {
            let bounds = parse(args).bounds();
            (bounds.connections, bounds.per_client)
        };
        assert_eq!(of(&[]), (MAX_CONNECTIONS, MAX_CONNECTIONS / 2));
        assert_eq!(of(&["--max-connections=1"]), (1, 1));
        assert_eq!(of(&["--max-connections=0"]), (1, 1));
        let proxy = ["--max-connections=8", "--max-connections-per-client=8"];
        assert_eq!(of(&proxy), (8, 8));
    }

    #[test]
    fn a_sandbox_may_be_silent_as_long_as_it_is_waited_for() {
        let idle = |args: &[&str]| {
            let args = parse(args);
            assert_eq!(args.limits().idle, args.bounds().idle);
            args.bounds().idle.as_secs()
        };
        assert_eq!(idle(&[]), 600);
        assert_eq!(idle(&["--idle-timeout=20m"]), 1200);
        assert_eq!(idle(&["--proxy-timeout=1h"]), 3600);
    }

    #[test]
    fn times_are_as_in_go_or_in_seconds() {
        for (text, seconds) in [("180", 180.0), ("0.5", 0.5), ("1m30s", 90.0)] {
            let args = parse(&["--proxy-timeout", text]);
            assert_eq!(args.limits().patience.as_secs_f64(), seconds, "{text}");
        }
        for bad in ["0", "-1", "soon", "nan", "-1s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!(address(":80"), Ok("[::]:80".parse().unwrap()));
    }
}
