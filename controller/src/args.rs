// SPDX-License-Identifier: Apache-2.0

//! Flags. Those that upstream's controller has keep their names and meaning; what it has and we
//! do not is accepted with a warning, so that its Deployment starts ours as well.

use std::{
    ffi::OsString,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use clap::{ArgAction, CommandFactory, Parser};

use crate::{
    options::{Allowed, ClaimAnnotations, Options},
    queue::Limits,
};

/// Where the Deployment mounts its ConfigMap, each key a file.
const CONFIG: &str = "/etc/sandbox-config";
/// Key of the domains that a claim's labels may have, one a line.
const LABEL_DOMAINS: &str = "allowed-label-domains";
/// Key of those that its annotations may have.
const ANNOTATION_DOMAINS: &str = "allowed-annotation-domains";
/// Flags that are keys of the ConfigMap too, as upstream has it.
const TUNABLE: [&str; 10] = [
    "disable-claim-events",
    "disable-claim-observability-annotations",
    "disable-sandbox-events",
    "enable-warm-pool-eviction",
    "sandbox-claim-concurrent-workers",
    "sandbox-concurrent-workers",
    "sandbox-template-concurrent-workers",
    "sandbox-warm-pool-concurrent-workers",
    "sandbox-warm-pool-max-batch-size",
    "sandbox-warm-pool-readiness-grace-period",
];

/// Controller of Sandbox, SandboxTemplate, SandboxWarmPool and SandboxClaim.
#[derive(Debug, Clone, Parser)]
#[command(name = "kiln-controller", version, args_override_self = true)]
#[command(
    after_help = "Keys of the ConfigMap agent-sandbox-config are such flags, without the \
    dashes: the --sandbox-… ones, --enable-warm-pool-eviction and --disable-…. A flag that is given \
    goes before its key."
)]
pub(crate) struct Args {
    /// Whether templates, pools and claims are served, and not Sandboxes alone.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) extensions: bool,

    /// Whether several controllers agree on one that works, by a Lease.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) leader_elect: bool,

    /// Namespace of the Lease; that of the Pod when unset.
    #[arg(long, env = "POD_NAMESPACE", default_value = "agent-sandbox-system")]
    pub(crate) leader_election_namespace: String,

    /// Namespace of the router, whom the default NetworkPolicy lets in; that of the Pod when unset.
    #[arg(long, env = "POD_NAMESPACE", default_value = "agent-sandbox-system")]
    pub(crate) router_namespace: String,

    /// Address of /metrics; 0 for none.
    #[arg(long, default_value = ":8080", value_parser = address)]
    pub(crate) metrics_bind_address: Address,

    /// Address of /healthz and /readyz; 0 for none.
    #[arg(long, default_value = ":8081", value_parser = address)]
    pub(crate) health_probe_bind_address: Address,

    /// DNS domain of the cluster.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,

    /// Sandboxes worked on at the same time.
    #[arg(long, default_value_t = 32)]
    sandbox_concurrent_workers: usize,

    /// Claims worked on at the same time.
    #[arg(long, default_value_t = 32)]
    sandbox_claim_concurrent_workers: usize,

    /// Pools worked on at the same time.
    #[arg(long, default_value_t = 4)]
    sandbox_warm_pool_concurrent_workers: usize,

    /// Templates worked on at the same time.
    #[arg(long, default_value_t = 1)]
    sandbox_template_concurrent_workers: usize,

    /// Sandboxes of one pool made at the same time.
    #[arg(long, default_value_t = 16)]
    sandbox_warm_pool_max_batch_size: usize,

    /// Time that a pool's Sandbox has to become ready before it is replaced.
    #[arg(long, default_value = "5m", value_parser = duration)]
    sandbox_warm_pool_readiness_grace_period: Duration,

    /// Whether cluster-autoscaler may evict Pods of a pool that nobody has claimed.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    enable_warm_pool_eviction: bool,

    /// No events for claims that get what they ask for. Those of failures come always.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    disable_claim_events: bool,

    /// No events for Sandboxes that become what they should: their Pod made, ready, suspended,
    /// finished, expired. Those of what goes wrong come always.
    #[arg(long, default_value_t = true, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    disable_sandbox_events: bool,

    /// No annotations on claims: neither times nor the Sandbox that one has from a pool.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    disable_claim_observability_annotations: bool,

    /// Which claims get annotations with the times at which they were seen and ready, and with the
    /// Sandbox that they have from a pool.
    #[arg(long, value_enum, default_value_t = ClaimAnnotations::Auto)]
    claim_observability_annotations: ClaimAnnotations,

    /// Whether a claim may put any annotation on its Pod that is not of kubernetes.io, k8s.io or
    /// agents.x-k8s.io, as upstream has it. Otherwise only those of the allowed domains.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_any_claim_annotation: bool,

    /// DNS servers of Pods that their template's NetworkPolicy cuts off from the cluster's;
    /// empty leaves them the cluster's.
    #[arg(long, default_value = "8.8.8.8,1.1.1.1", value_delimiter = ',')]
    dns_servers: Vec<String>,

    /// Time after which a pool's status says that fewer are ready; that more are, it says at once.
    #[arg(long, default_value = "2s", value_parser = duration)]
    pool_status_delay: Duration,

    /// Time after which a node that reports nothing counts as one without warm sandboxes.
    #[arg(long, default_value = "1m", value_parser = duration)]
    node_heartbeat_timeout: Duration,

    /// Threads that do the work.
    #[arg(long, default_value_t = 2)]
    pub(crate) threads: usize,

    /// Log as JSON.
    #[arg(long, default_value_t = false, action = ArgAction::Set, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) log_json: bool,
}

impl Args {
    /// What the ConfigMap and the arguments of this process say, which go before it, and what of both
    /// means nothing to us. Ends the process after `--help` and for values that make no sense.
    pub(crate) fn of_process() -> (Self, Vec<String>) {
        let (mut known, mut unknown) = sort_out(std::env::args_os());
        let (flags, keys) = configured(Path::new(CONFIG));
        known.splice(1..1, flags);
        unknown.extend(keys);
        (Self::parse_from(known), unknown)
    }

    /// What the flags come to.
    ///
    /// # Errors
    /// For what is no address.
    pub(crate) fn options(&self) -> anyhow::Result<Options> {
        let servers = self.dns_servers.iter().filter(|s| !s.is_empty());
        let servers = servers
            .map(|s| s.parse::<IpAddr>())
            .collect::<Result<_, _>>()?;
        let annotations = match self.disable_claim_observability_annotations {
            true => ClaimAnnotations::Never,
            false => self.claim_observability_annotations,
        };
        Ok(Options {
            cluster_domain: self.cluster_domain.clone(),
            router_namespace: self.router_namespace.clone(),
            dns_servers: servers,
            evict_warm_pods: self.enable_warm_pool_eviction,
            claim_metadata: self.claim_metadata(),
            claim_annotations: annotations,
            claim_events: !self.disable_claim_events,
            sandbox_events: !self.disable_sandbox_events,
            pool_batch: self.sandbox_warm_pool_max_batch_size,
            pool_grace: self.sandbox_warm_pool_readiness_grace_period,
            pool_status_delay: self.pool_status_delay,
            node_heartbeat_timeout: self.node_heartbeat_timeout,
        })
    }

    fn claim_metadata(&self) -> Allowed {
        let read = |key| {
            domains(
                fs::read_to_string(Path::new(CONFIG).join(key))
                    .ok()
                    .as_deref(),
            )
        };
        Allowed {
            labels: read(LABEL_DOMAINS),
            annotations: (!self.allow_any_claim_annotation).then(|| read(ANNOTATION_DOMAINS)),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits {
            claims: self.sandbox_claim_concurrent_workers.max(1),
            sandboxes: self.sandbox_concurrent_workers.max(1),
            pools: self.sandbox_warm_pool_concurrent_workers.max(1),
            templates: self.sandbox_template_concurrent_workers.max(1),
        }
    }

    #[cfg(test)]
    pub(crate) fn defaults() -> Self {
        Self::parse_from(["kiln-controller"])
    }
}

/// Where to serve, if at all.
pub(crate) type Address = Option<SocketAddr>;

/// An address as Go writes it: `:8080` is any address of the machine, be it IPv6 or IPv4.
fn address(text: &str) -> Result<AddressArg, String> {
    if matches!(text, "0" | "") {
        return Ok(None);
    }
    let whole = match text.strip_prefix(':') {
        Some(port) => format!("[::]:{port}"),
        None => text.to_owned(),
    };
    whole.parse().map(Some).map_err(|e| format!("{text}: {e}"))
}

/// `Option` as the type of a value: clap takes the alias by its name for an optional argument.
type AddressArg = Address;

/// A duration as Go writes it: `1m30s`.
fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|e| format!("{text}: {e}"))?;
    Duration::try_from(parsed).map_err(|e| format!("{text}: {e}"))
}

/// The domains in a file, one a line; without any, upstream's.
fn domains(file: Option<&str>) -> Vec<String> {
    let lines = file.into_iter().flat_map(str::lines).map(str::trim);
    let domains: Vec<String> = lines
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_lowercase)
        .collect();
    if domains.is_empty() {
        return vec!["sandbox.users.io".to_owned()];
    }
    domains
}

/// The flags that the keys of a ConfigMap in `dir` are, and keys that are none. Those that begin with
/// a dot or an underscore are for people.
fn configured(dir: &Path) -> (Vec<OsString>, Vec<String>) {
    let mut flags = Vec::new();
    let mut unknown = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(['.', '_']) || [LABEL_DOMAINS, ANNOTATION_DOMAINS].contains(&&*name) {
            continue;
        }
        let value = fs::read_to_string(entry.path()).ok();
        match value.filter(|_| TUNABLE.contains(&&*name)) {
            Some(value) => flags.push(format!("--{name}={}", value.trim()).into()),
            None => unknown.push(format!("{name} of the ConfigMap")),
        }
    }
    (flags, unknown)
}

/// Parts flags that are known from those that are not. Go's flags may have one dash.
fn sort_out(args: impl IntoIterator<Item = OsString>) -> (Vec<OsString>, Vec<String>) {
    let command = Args::command();
    let is_known = |name: &str| {
        matches!(name, "help" | "h" | "version" | "V")
            || command
                .get_arguments()
                .any(|arg| arg.get_long() == Some(name))
    };
    let mut args = args.into_iter().peekable();
    let mut known: Vec<OsString> = args.next().into_iter().collect();
    let mut unknown = Vec::new();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        let Some(flag) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')) else {
            known.push(arg);
            continue;
        };
        let name = flag.split_once('=').map_or(flag, |(name, _)| name);
        if is_known(name) {
            let short = name.len() == 1;
            known.push(if short {
                arg
            } else {
                format!("--{flag}").into()
            });
            continue;
        }
        unknown.push(text.clone());
        let has_value = !text.contains('=')
            && args
                .peek()
                .is_some_and(|next| !next.to_string_lossy().starts_with('-'));
        if has_value {
            args.next();
        }
    }
    (known, unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> (Args, Vec<String>) {
        let all = ["kiln-controller"].iter().chain(args).map(OsString::from);
        let (known, unknown) = sort_out(all);
        (Args::try_parse_from(known).unwrap(), unknown)
    }

    #[test]
    fn flags_of_upstreams_deployment_are_taken() {
        let (args, unknown) = parse(&[
            "--extensions",
            "-leader-elect=false",
            "--kube-api-qps=-1",
            "--webhook-port",
            "9443",
            "--enable-pprof",
            "--sandbox-warm-pool-readiness-grace-period=1m30s",
            "--metrics-bind-address=:9090",
            "--health-probe-bind-address=0",
        ]);
        assert!(args.extensions && !args.leader_elect);
        assert_eq!(
            unknown,
            ["--kube-api-qps=-1", "--webhook-port", "--enable-pprof"]
        );
        assert_eq!(args.options().unwrap().pool_grace, Duration::from_secs(90));
        assert_eq!(args.metrics_bind_address, "[::]:9090".parse().ok());
        assert_eq!(args.health_probe_bind_address, None);
    }

    #[test]
    fn keys_of_the_config_map_are_flags_that_flags_override() {
        let dir = tempfile::tempdir().unwrap();
        for (key, value) in [
            ("sandbox-warm-pool-readiness-grace-period", "90s\n"),
            ("disable-sandbox-events", "false"),
            ("sandbox-concurrent-workers", "7"),
            ("allow-any-claim-annotation", "true"),
            ("allowed-label-domains", "a.example"),
            ("_note", "any"),
        ] {
            fs::write(dir.path().join(key), value).unwrap();
        }
        let (mut all, unknown) = configured(dir.path());
        assert_eq!(unknown, ["allow-any-claim-annotation of the ConfigMap"]);
        all.insert(0, "kiln-controller".into());
        all.push("--sandbox-concurrent-workers=9".into());
        let args = Args::try_parse_from(all).unwrap();
        let options = args.options().unwrap();
        assert_eq!(options.pool_grace, Duration::from_secs(90));
        assert!(options.sandbox_events);
        assert_eq!(args.limits().sandboxes, 9);
        for flag in TUNABLE {
            assert!(
                Args::command()
                    .get_arguments()
                    .any(|a| a.get_long() == Some(flag)),
                "{flag}"
            );
        }
        let nothing = configured(&dir.path().join("missing"));
        assert_eq!(nothing, (Vec::new(), Vec::new()));
    }

    #[test]
    fn dns_servers_can_be_left_alone() {
        let (args, _) = parse(&["--dns-servers="]);
        assert!(args.options().unwrap().dns_servers.is_empty());
        let (args, _) = parse(&["--dns-servers=10.0.0.10"]);
        assert_eq!(
            args.options().unwrap().dns_servers,
            ["10.0.0.10".parse::<IpAddr>().unwrap()]
        );
    }

    #[test]
    fn domains_come_from_the_file_or_are_upstreams() {
        assert_eq!(domains(None), ["sandbox.users.io"]);
        assert_eq!(domains(Some("# ours\nA.example\n\n")), ["a.example"]);
    }
}
