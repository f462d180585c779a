// SPDX-License-Identifier: Apache-2.0

//! Which proxy leads to the apiserver, as kubectl has it: a kubeconfig's `proxy-url` always, else
//! `$HTTPS_PROXY` unless `$NO_PROXY` names the apiserver. The rules are those of Go:
//! <https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config>.

use std::net::IpAddr;

use anyhow::{Context, Result};
use http::Uri;
use ipnet::IpNet;
use kube::config::Kubeconfig;

/// Reads an environment variable.
type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The proxy to `server`, if there is one. `named` is that of the kubeconfig.
///
/// # Errors
/// When it is no address.
pub(crate) fn proxy(server: &Uri, named: Option<&str>, env: Env<'_>) -> Result<Option<Uri>> {
    if let Some(named) = named {
        return parse(named)
            .map(Some)
            .context("proxy-url of the kubeconfig");
    }
    let (upper, lower) = match server.scheme_str() {
        Some("http") => ("HTTP_PROXY", "http_proxy"),
        _ => ("HTTPS_PROXY", "https_proxy"),
    };
    let Some(proxy) = either(env, upper, lower) else {
        return Ok(None);
    };
    let is_direct = is_direct(
        server,
        &either(env, "NO_PROXY", "no_proxy").unwrap_or_default(),
    );
    match is_direct {
        true => Ok(None),
        false => parse(&proxy).map(Some).with_context(|| format!("${upper}")),
    }
}

/// The `proxy-url` of the cluster that a kubeconfig's context is of: the current one if none is
/// named.
pub(crate) fn named(kubeconfig: &Kubeconfig, context: Option<&str>) -> Option<String> {
    let context = context.or(kubeconfig.current_context.as_deref())?;
    let context = kubeconfig.contexts.iter().find(|c| c.name == context)?;
    let cluster = &context.context.as_ref()?.cluster;
    let cluster = kubeconfig.clusters.iter().find(|c| c.name == *cluster)?;
    let proxy = cluster.cluster.as_ref()?.proxy_url.clone()?;
    (!proxy.is_empty()).then_some(proxy)
}

fn either(env: Env<'_>, upper: &str, lower: &str) -> Option<String> {
    let set = |name: &str| env(name).filter(|value| !value.is_empty());
    set(upper).or_else(|| set(lower))
}

/// An address, of a proxy that speaks HTTP if it does not say.
fn parse(proxy: &str) -> Result<Uri> {
    let with_scheme = match proxy.contains("://") {
        true => proxy.to_owned(),
        false => format!("http://{proxy}"),
    };
    let address = with_scheme.parse();
    address.with_context(|| format!("{proxy} is no address of a proxy"))
}

/// Whether a server is reached without a proxy: it is on this machine, or `exceptions` names it.
fn is_direct(server: &Uri, exceptions: &str) -> bool {
    let host = server.host().unwrap_or_default().to_ascii_lowercase();
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let port = server.port_u16().unwrap_or(match server.scheme_str() {
        Some("http") => 80,
        _ => 443,
    });
    let address: Option<IpAddr> = host.parse().ok();
    host == "localhost"
        || address.is_some_and(|a| a.is_loopback())
        || exceptions
            .split(',')
            .any(|e| excepts(e, host, address, port))
}

/// Whether an entry of `$NO_PROXY` names a server: `*`, a network, or an address or a domain with
/// or without a port. A domain is also its subdomains; with a dot before it, only those.
fn excepts(entry: &str, host: &str, address: Option<IpAddr>, port: u16) -> bool {
    let entry = entry.trim().to_ascii_lowercase();
    if entry.is_empty() {
        return false;
    }
    if entry == "*" {
        return true;
    }
    if let Ok(network) = entry.parse::<IpNet>() {
        return address.is_some_and(|a| network.contains(&a));
    }
    let (name, of_port) = with_port(&entry);
    if of_port.is_some_and(|p| p != port) {
        return false;
    }
    if let Ok(excepted) = name.parse::<IpAddr>() {
        return address == Some(excepted);
    }
    let name = name.strip_prefix('*').unwrap_or(name);
    match name.strip_prefix('.') {
        Some(_) => host.ends_with(name),
        None => host == name || host.ends_with(&format!(".{name}")),
    }
}

/// Takes `name:port` and `[address]:port` apart; an IPv6 address without brackets has no port.
fn with_port(entry: &str) -> (&str, Option<u16>) {
    let (name, port) = match entry.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => {
            (name, port.parse().ok())
        }
        _ => (entry, None),
    };
    (name.trim_start_matches('[').trim_end_matches(']'), port)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The proxy to a server with these variables set.
    fn to(server: &str, named: Option<&str>, variables: &[(&str, &str)]) -> Option<String> {
        let env = |name: &str| {
            let found = variables.iter().find(|(n, _)| *n == name)?;
            Some(found.1.to_owned())
        };
        let found = proxy(&server.parse().unwrap(), named, &env).unwrap();
        found.map(|uri| uri.to_string())
    }

    const PROXY: (&str, &str) = ("HTTPS_PROXY", "proxy.example:3128");

    #[test]
    fn a_kubeconfigs_proxy_is_always_used_and_the_environments_for_others() {
        let server = "https://k8s.example:6443";
        let theirs = Some("http://10.0.0.1:1/".to_owned());
        let none = ("NO_PROXY", "*");
        assert_eq!(to(server, None, &[]), None);
        assert_eq!(to(server, theirs.as_deref(), &[PROXY, none]), theirs);
        let proxy = Some("http://proxy.example:3128/".to_owned());
        assert_eq!(to(server, None, &[PROXY]), proxy);
        assert_eq!(to(server, None, &[("https_proxy", PROXY.1)]), proxy);
        assert_eq!(to(server, None, &[("HTTP_PROXY", PROXY.1)]), None);
        assert_eq!(to(server, None, &[PROXY, none]), None);
        let socks = Some("socks5://10.0.0.1:1080/".to_owned());
        assert_eq!(to(server, socks.as_deref(), &[]), socks);
    }

    #[test]
    fn servers_that_no_proxy_names_are_reached_without_one() {
        for (server, exceptions, is_direct) in [
            ("https://127.0.0.1:6443", "", true),
            ("https://LOCALHOST:6443", "", true),
            ("https://[::1]:6443", "", true),
            ("https://10.1.2.3:6443", "", false),
            ("https://10.1.2.3:6443", "x, 10.1.2.3 ,", true),
            ("https://10.1.2.3:6443", "10.1.2.3:6443", true),
            ("https://10.1.2.3:6443", "10.1.2.3:443", false),
            ("https://10.1.2.3:6443", "10.0.0.0/8", true),
            ("https://10.1.2.3:6443", "10.2.0.0/16", false),
            ("https://10.1.2.3:6443", "2.4", false),
            ("https://[fd00::1]:6443", "fd00::1", true),
            ("https://[fd00::1]:6443", "[fd00::1]:6443", true),
            ("https://[fd00::1]:6443", "fd00::/8", true),
            ("https://k8s.example", "k8s.example:443", true),
            ("https://k8s.example", "K8s.Example", true),
            ("https://k8s.example", "example", true),
            ("https://k8s.example", ".example", true),
            ("https://k8s.example", "*.example", true),
            ("https://k8s.example", ".k8s.example", false),
            ("https://k8s.example", "s.example", false),
            ("https://k8s.example", "example.org", false),
        ] {
            let proxy = to(server, None, &[PROXY, ("NO_PROXY", exceptions)]);
            assert_eq!(proxy.is_none(), is_direct, "{server} {exceptions}");
        }
    }

    #[test]
    fn the_contexts_cluster_says_which_proxy() {
        let cluster =
            |name: &str, proxy: &str| json!({"name": name, "cluster": {"proxy-url": proxy}});
        let context = |name: &str, cluster: &str| json!({"name": name, "context": {"cluster": cluster, "user": "u"}});
        let kubeconfig: Kubeconfig = serde_json::from_value(json!({
            "clusters": [cluster("a", "http://a"), cluster("b", "http://b"), cluster("c", "")],
            "contexts": [context("in-a", "a"), context("in-b", "b"), context("in-c", "c")],
            "current-context": "in-b",
        }))
        .unwrap();
        assert_eq!(named(&kubeconfig, None).as_deref(), Some("http://b"));
        assert_eq!(
            named(&kubeconfig, Some("in-a")).as_deref(),
            Some("http://a")
        );
        assert_eq!(named(&kubeconfig, Some("in-c")), None);
        assert_eq!(named(&kubeconfig, Some("other")), None);
    }
}
