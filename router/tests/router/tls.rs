// SPDX-License-Identifier: Apache-2.0

//! Clients that use TLS.

use rcgen::generate_simple_self_signed;
use rustls::{ClientConfig, RootCertStore, crypto::ring::default_provider};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::*;

/// A router with TLS, and how to connect to it.
async fn router() -> (Fixture, ClientConfig) {
    let made = generate_simple_self_signed(["router".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = (folder.path().join("crt"), folder.path().join("key"));
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = Tls::new(&certificate, &key).unwrap();
    let router = Fixture::listening(Auth::Open, Loopback::Allowed, BOUNDS, Some(tls)).await;
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (router, config)
}

async fn connect(router: &Fixture, mut config: ClientConfig, alpn: &[u8]) -> TlsStream<TcpStream> {
    config.alpn_protocols = vec![alpn.to_vec()];
    let stream = TcpStream::connect(router.address).await.unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let name = "router".try_into().unwrap();
    connector.connect(name, stream).await.unwrap()
}

#[tokio::test]
async fn tls_has_both_versions_of_http() {
    let (router, config) = router().await;
    let sandbox = Sandbox::new().await;
    let mut one = connect(&router, config.clone(), b"http/1.1").await;
    one.write_all(sandbox.get("").as_bytes()).await.unwrap();
    let head = sandbox.answers(OK).await;
    assert!(head.contains("x-forwarded-proto: https\r\n"), "{head}");
    let mut answer = String::new();
    one.read_to_string(&mut answer).await.unwrap();
    expect(&answer, 200, "ok");
    let two = connect(&router, config, b"h2").await;
    assert_eq!(two.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut sender, connection) = h2::client::handshake(two).await.unwrap();
    tokio::spawn(connection);
    let port = sandbox.listener.local_addr().unwrap().port();
    let request = hyper::Request::builder()
        .uri("https://router/")
        .header("x-sandbox-id", "box")
        .header("x-sandbox-pod-ip", "127.0.0.1")
        .header("x-sandbox-port", port);
    let (answer, _) = sender
        .send_request(request.body(()).unwrap(), true)
        .unwrap();
    sandbox.answers(OK).await;
    assert_eq!(answer.await.unwrap().status(), 200);
}

/// A handshake that stops half-way holds its place no longer than a head does.
#[tokio::test]
async fn who_speaks_no_tls_is_given_up() {
    let (router, _) = router().await;
    let mut plain = router.client().await;
    plain.send("GET / HTTP/1.1\r\n\r\n").await;
    plain.bytes().await;
    router.counts("sandbox_router_connections 0").await;
}
