// SPDX-License-Identifier: Apache-2.0

//! Which headers are passed on.
//!
//! Those that concern one connection only are dropped (RFC 9110, 7.6.1), so that nobody can talk
//! past the router: with lengths that the two sides read differently, or with protocols that
//! would make a connection theirs.

use std::net::IpAddr;

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::{connection::Protocol, target};

/// Of one connection, beside those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What a client can say, but only the router knows.
const FORWARDED: [HeaderName; 6] = [
    header::FORWARDED,
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-port"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-real-ip"),
];

/// Whether a request wants to go on as a WebSocket. Other protocols are not passed on: HTTP/2
/// would hide further requests from the router.
pub(crate) fn wants_websocket(headers: &HeaderMap) -> bool {
    let names_upgrade = headers
        .get_all(header::CONNECTION)
        .iter()
        .any(|v| tokens(v).any(|t| t.eq_ignore_ascii_case("upgrade")));
    let mut protocols = headers.get_all(header::UPGRADE).iter();
    let only = (protocols.next(), protocols.next());
    names_upgrade
        && matches!(only, (Some(p), None) if p.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    pub(crate) address: IpAddr,
    pub(crate) has_tls: bool,
}

/// Makes a client's headers those of a request to `host`.
pub(crate) fn to_sandbox(
    headers: &mut HeaderMap,
    host: HeaderValue,
    from: Origin,
    protocol: Protocol,
) {
    let wants_trailers = headers
        .get_all(header::TE)
        .iter()
        .any(|v| tokens(v).any(|t| t.eq_ignore_ascii_case("trailers")));
    let asked = headers.get(header::HOST).cloned();
    let websocket = wants_websocket(headers);
    strip(headers);
    for name in target::HEADERS.iter().chain(&FORWARDED) {
        headers.remove(name);
    }
    // The router has looked at the one, and answers the other.
    headers.remove(header::AUTHORIZATION);
    headers.remove(header::EXPECT);
    headers.insert(header::HOST, host);
    if let Ok(client) = from.address.to_string().parse() {
        headers.insert("x-forwarded-for", client);
    }
    if let Some(asked) = asked {
        headers.insert("x-forwarded-host", asked);
    }
    let scheme = if from.has_tls { "https" } else { "http" };
    headers.insert("x-forwarded-proto", HeaderValue::from_static(scheme));
    match protocol {
        Protocol::One => join_cookies(headers),
        // Servers of gRPC answer nobody else.
        Protocol::Two if wants_trailers => {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
        Protocol::Two => {}
    }
    if websocket {
        // A server would compare it with its own name, which the client does not know.
        headers.remove(header::ORIGIN);
        upgrade(headers);
    }
}

/// Makes one header of several with cookies, which only HTTP/2 allows (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let mut all = headers.get_all(header::COOKIE).iter();
    if let (Some(first), Some(_)) = (all.next(), all.next()) {
        let rest = headers.get_all(header::COOKIE).iter().skip(1);
        let mut joined = first.as_bytes().to_vec();
        for value in rest {
            joined.extend_from_slice(b"; ");
            joined.extend_from_slice(value.as_bytes());
        }
        headers.remove(header::COOKIE);
        if let Ok(joined) = HeaderValue::from_bytes(&joined) {
            headers.insert(header::COOKIE, joined);
        }
    }
}

/// Makes a sandbox's headers those of an answer to a client.
pub(crate) fn to_client(headers: &mut HeaderMap) {
    strip(headers);
}

/// Has headers say that the connection goes on as a WebSocket.
pub(crate) fn upgrade(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

fn strip(headers: &mut HeaderMap) {
    let connection = headers.get_all(header::CONNECTION);
    let named: Vec<HeaderName> = connection
        .iter()
        .flat_map(tokens)
        .filter_map(|t| t.parse().ok())
        // Its body has the length that it says, whatever a client thinks of that.
        .filter(|name| *name != header::CONTENT_LENGTH)
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

fn tokens(value: &HeaderValue) -> impl Iterator<Item = &str> {
    value.to_str().unwrap_or_default().split(',').map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(given: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in given {
            let name: HeaderName = name.parse().unwrap();
            headers.append(name, value.parse().unwrap());
        }
        headers
    }

    fn sent(given: &[(&str, &str)]) -> HeaderMap {
        sent_by(Protocol::One, given)
    }

    fn sent_by(protocol: Protocol, given: &[(&str, &str)]) -> HeaderMap {
        let mut headers = map(given);
        let host = HeaderValue::from_static("10.1.2.3:8888");
        let from = Origin {
            address: "192.0.2.1".parse().unwrap(),
            has_tls: false,
        };
        to_sandbox(&mut headers, host, from, protocol);
        headers
    }

    #[test]
    fn each_protocol_gets_what_it_needs() {
        let given = [("te", "trailers, x"), ("cookie", "a=1"), ("cookie", "b=2")];
        let one = sent_by(Protocol::One, &given);
        assert_eq!(one[header::COOKIE], "a=1; b=2");
        assert_eq!(one.get_all(header::COOKIE).iter().count(), 1);
        assert!(!one.contains_key(header::TE));
        let two = sent_by(Protocol::Two, &given);
        assert_eq!(two[header::TE], "trailers");
    }

    #[test]
    fn only_what_is_for_the_sandbox_reaches_it() {
        let headers = sent(&[
            ("host", "router:8080"),
            ("authorization", "Bearer secret"),
            ("x-sandbox-id", "box"),
            ("x-sandbox-pod-ip", "10.1.2.3"),
            ("x-sandbox-timeout", "5"),
            ("x-sandbox-uid", "1"),
            ("x-forwarded-for", "198.51.100.7"),
            ("forwarded", "for=198.51.100.7"),
            ("expect", "100-continue"),
            ("content-length", "3"),
            ("cookie", "a=b"),
            ("x-own", "1"),
        ]);
        let wanted = map(&[
            ("host", "10.1.2.3:8888"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-host", "router:8080"),
            ("x-forwarded-proto", "http"),
            ("content-length", "3"),
            ("cookie", "a=b"),
            ("x-own", "1"),
        ]);
        assert_eq!(headers, wanted);
    }

    #[test]
    fn what_is_of_one_connection_stays_there() {
        let given = [
            ("connection", "keep-alive, X-Own ,content-length"),
            ("connection", "x-more"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("te", "trailers"),
            ("trailer", "x-sum"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("x-own", "1"),
            ("x-more", "1"),
            ("content-length", "3"),
        ];
        let mut answer = map(&given);
        to_client(&mut answer);
        assert_eq!(answer, map(&[("content-length", "3")]));
        let request = sent(&given);
        assert!(request.keys().all(|k| {
            ["host", "content-length"].contains(&k.as_str()) || k.as_str().starts_with("x-forw")
        }));
    }

    #[test]
    fn websockets_are_the_only_other_protocol() {
        let websocket = [
            ("connection", "keep-alive, Upgrade"),
            ("upgrade", "WebSocket"),
            ("origin", "https://router.example"),
            ("sec-websocket-key", "k"),
        ];
        let headers = sent(&websocket);
        assert_eq!(headers[header::CONNECTION], "upgrade");
        assert_eq!(headers[header::UPGRADE], "websocket");
        assert_eq!(headers["sec-websocket-key"], "k");
        assert!(!headers.contains_key(header::ORIGIN));
        for other in [
            &[("connection", "upgrade"), ("upgrade", "h2c")][..],
            &[("connection", "upgrade"), ("upgrade", "websocket, h2c")],
            &[("connection", "close"), ("upgrade", "websocket")],
            &[("upgrade", "websocket")],
            &[("connection", "upgrade")],
        ] {
            assert!(!wants_websocket(&map(other)), "{other:?}");
        }
    }
}
