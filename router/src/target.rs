// SPDX-License-Identifier: Apache-2.0

//! Which sandbox a request is for, as its headers say.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    time::Duration,
};

use hyper::header::{HeaderMap, HeaderName};

use crate::{address::Networks, refusal::Refusal};

const ID: HeaderName = HeaderName::from_static("x-sandbox-id");
const UID: HeaderName = HeaderName::from_static("x-sandbox-uid");
const NAMESPACE: HeaderName = HeaderName::from_static("x-sandbox-namespace");
const PORT: HeaderName = HeaderName::from_static("x-sandbox-port");
const POD_IP: HeaderName = HeaderName::from_static("x-sandbox-pod-ip");
const TIMEOUT: HeaderName = HeaderName::from_static("x-sandbox-timeout");

/// What is said to the router, and is not for sandboxes.
pub(crate) const HEADERS: [HeaderName; 6] = [ID, UID, NAMESPACE, PORT, POD_IP, TIMEOUT];

/// Upstream's defaults.
const DEFAULT_NAMESPACE: &str = "default";
const DEFAULT_PORT: NonZeroU16 = NonZeroU16::new(8888).expect("not zero");

/// Longest name of a namespace or a Sandbox (RFC 1123).
const LONGEST: usize = 63;

/// A sandbox's HTTP server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// Name of the Sandbox.
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) port: u16,
    /// The address that the client knows, which is one of a Pod.
    pub(crate) pod_ip: Option<IpAddr>,
    /// How long the client wants to wait.
    pub(crate) timeout: Option<Duration>,
}

impl Target {
    /// Reads and checks all of it.
    pub(crate) fn of(headers: &HeaderMap, networks: &Networks) -> Result<Self, Refusal> {
        let id = one(headers, &ID)
            .map_err(|Repeated| Refusal::Id)?
            .ok_or(Refusal::NoId)?;
        if !is_dns_label(id) {
            return Err(Refusal::Id);
        }
        let namespace = one(headers, &NAMESPACE).map_err(|Repeated| Refusal::Namespace)?;
        let namespace = namespace.unwrap_or(DEFAULT_NAMESPACE);
        if !is_dns_label(namespace) {
            return Err(Refusal::Namespace);
        }
        let port = match one(headers, &PORT).map_err(|Repeated| Refusal::Port)? {
            Some(text) => port(text).ok_or(Refusal::Port)?,
            None => DEFAULT_PORT,
        };
        let pod_ip = one(headers, &POD_IP).map_err(|Repeated| Refusal::PodIp)?;
        let pod_ip = pod_ip.map(|text| pod_address(text, networks).ok_or(Refusal::PodIp));
        Ok(Self {
            id: id.to_owned(),
            namespace: namespace.to_owned(),
            port: port.get(),
            pod_ip: pod_ip.transpose()?,
            // Upstream's router goes on with its own when it makes no sense.
            timeout: one(headers, &TIMEOUT).ok().flatten().and_then(seconds),
        })
    }

    /// The name by which DNS knows its Service. The dot at the end keeps resolvers from trying
    /// the domains of the router's Pod first.
    pub(crate) fn dns_name(&self, domain: &str) -> String {
        format!("{}.{}.svc.{domain}.", self.id, self.namespace)
    }

    /// What goes into `Host`.
    pub(crate) fn host(&self, domain: &str) -> String {
        match self.pod_ip {
            Some(address) => SocketAddr::new(address, self.port).to_string(),
            None => {
                let name = self.dns_name(domain);
                format!("{}:{}", name.trim_end_matches('.'), self.port)
            }
        }
    }
}

/// A header that may be there once was there twice: another reader might take the other one.
struct Repeated;

/// The value of a header, if it is there and not empty. What is no text is as good as `-`, which
/// no check lets through.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Repeated> {
    let mut values = headers.get_all(name).iter();
    let (value, None) = (values.next(), values.next()) else {
        return Err(Repeated);
    };
    let text = value.map(|v| v.to_str().unwrap_or("-"));
    Ok(text.filter(|t| !t.is_empty()))
}

fn is_dns_label(text: &str) -> bool {
    let is_alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.len() <= LONGEST
        && bytes.iter().all(|b| is_alphanumeric(b) || *b == b'-')
        && bytes.first().is_some_and(is_alphanumeric)
        && bytes.last().is_some_and(is_alphanumeric)
}

fn port(text: &str) -> Option<NonZeroU16> {
    let is_number = text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

fn pod_address(text: &str, networks: &Networks) -> Option<IpAddr> {
    networks.check(text.parse().ok()?).ok()
}

fn seconds(text: &str) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    let duration = Duration::try_from_secs_f64(seconds).ok()?;
    (!duration.is_zero()).then_some(duration)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Loopback;

    fn read(given: &[(&str, &str)]) -> Result<Target, Refusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            let name: HeaderName = name.parse().unwrap();
            headers.append(name, value.parse().unwrap());
        }
        let pods = vec![
            "10.244.0.0/16".parse().unwrap(),
            "fd00::/56".parse().unwrap(),
        ];
        Target::of(&headers, &Networks::new(pods, &[], Loopback::Refused))
    }

    fn with(name: &str, value: &str) -> Result<Target, Refusal> {
        read(&[("X-Sandbox-ID", "box"), (name, value)])
    }

    #[test]
    fn what_is_not_said_is_as_upstream_has_it() {
        let target = read(&[("X-Sandbox-ID", "box")]).unwrap();
        let wanted = Target {
            id: "box".to_owned(),
            namespace: "default".to_owned(),
            port: 8888,
            pod_ip: None,
            timeout: None,
        };
        assert_eq!(target, wanted);
        assert_eq!(
            target.dns_name("cluster.local"),
            "box.default.svc.cluster.local."
        );
        assert_eq!(
            target.host("cluster.local"),
            "box.default.svc.cluster.local:8888"
        );
        for name in ["X-Sandbox-Namespace", "X-Sandbox-Port", "X-Sandbox-Pod-IP"] {
            assert_eq!(with(name, ""), Ok(wanted.clone()), "{name}");
        }
    }

    #[test]
    fn what_is_said_is_taken() {
        let target = read(&[
            ("X-Sandbox-ID", "a-1"),
            ("X-Sandbox-Namespace", "team-b"),
            ("X-Sandbox-Port", "80"),
            ("X-Sandbox-Pod-IP", "fd00::7"),
            ("X-Sandbox-Timeout", "2.5"),
        ]);
        let target = target.unwrap();
        assert_eq!(target.namespace, "team-b");
        assert_eq!(target.host("cluster.local"), "[fd00::7]:80");
        assert_eq!(target.timeout, Some(Duration::from_millis(2500)));
    }

    #[test]
    fn names_are_dns_labels() {
        assert_eq!(read(&[]), Err(Refusal::NoId));
        assert_eq!(read(&[("X-Sandbox-ID", "")]), Err(Refusal::NoId));
        let long = "a".repeat(64);
        for bad in [
            "Box", "a.b", "a/b", "..", "-a", "a-", "a b", "a\u{e9}", "a:1", "a@b", "a_b", &long,
        ] {
            let id = read(&[("X-Sandbox-ID", bad)]);
            assert_eq!(id, Err(Refusal::Id), "{bad}");
            let namespace = with("X-Sandbox-Namespace", bad);
            assert_eq!(namespace, Err(Refusal::Namespace), "{bad}");
        }
        assert!(read(&[("X-Sandbox-ID", &long[1..])]).is_ok());
    }

    #[test]
    fn ports_are_ports() {
        for bad in [
            "0", "65536", "-1", "+80", "http", "80 ", " ", "1e3", "8888,80",
        ] {
            let is_space = bad.trim().is_empty();
            let result = with("X-Sandbox-Port", bad);
            assert!(is_space || result == Err(Refusal::Port), "{bad:?}");
        }
        assert_eq!(with("X-Sandbox-Port", "65535").unwrap().port, 65535);
    }

    #[test]
    fn addresses_are_those_of_pods() {
        for bad in [
            "127.0.0.1",
            "169.254.169.254",
            "10.96.0.1",
            "10.244.0.1:80",
            "0x0af40001",
            "2130706433",
            "10.244.1",
            "localhost",
            "::ffff:127.0.0.1",
            "fe80::1%eth0",
        ] {
            let result = with("X-Sandbox-Pod-IP", bad);
            assert_eq!(result, Err(Refusal::PodIp), "{bad}");
        }
        let mapped = with("X-Sandbox-Pod-IP", "::ffff:10.244.0.9").unwrap();
        assert_eq!(mapped.pod_ip, "10.244.0.9".parse().ok());
    }

    #[test]
    fn nothing_is_said_twice() {
        for (name, refusal) in [
            ("X-Sandbox-ID", Refusal::Id),
            ("X-Sandbox-Namespace", Refusal::Namespace),
            ("X-Sandbox-Port", Refusal::Port),
            ("X-Sandbox-Pod-IP", Refusal::PodIp),
        ] {
            let value = if name.ends_with("Port") { "80" } else { "box" };
            let twice = read(&[("X-Sandbox-ID", "box"), (name, value), (name, value)]);
            assert_eq!(twice, Err(refusal), "{name}");
        }
    }

    #[test]
    fn a_timeout_without_sense_is_none() {
        for bad in ["", "0", "-1", "nan", "inf", "1e400", "soon"] {
            assert_eq!(
                with("X-Sandbox-Timeout", bad).unwrap().timeout,
                None,
                "{bad}"
            );
        }
    }

    #[test]
    fn any_values_are_read_without_harm() {
        bolero::check!()
            .with_type::<(String, String, String)>()
            .for_each(|(id, port, address)| {
                let mut headers = HeaderMap::new();
                for (name, value) in [(ID, id), (PORT, port), (POD_IP, address)] {
                    if let Ok(value) = value.parse() {
                        headers.insert(name, value);
                    }
                }
                let networks = Networks::new(Vec::new(), &[], Loopback::Refused);
                if let Ok(target) = Target::of(&headers, &networks) {
                    assert!(is_dns_label(&target.id) && target.pod_ip.is_none());
                }
            });
    }
}
