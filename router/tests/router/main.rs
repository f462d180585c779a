// SPDX-License-Identifier: Apache-2.0

//! The router between a client and a sandbox that are both this test, byte for byte.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod http2;
mod tls;

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use kiln_http::{BUFFER, Bounds, Listener, Serving, Tls, bind, serve};
use kiln_router::{Auth, CONNECTION_BYTES, Limits, Loopback, Metrics, Networks, OWN_BYTES, Router};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Longest that anything here may take.
const SOON: Duration = Duration::from_secs(60);

const BOUNDS: Bounds = Bounds {
    connections: 8,
    per_client: 8,
    head: SOON,
    idle: SOON,
};

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\
     Upgrade: websocket\r\nSec-WebSocket-Accept: accept\r\n\r\n\u{1}\u{5}hello";

const ENDLESS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

const OK: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// A router that knows sandboxes on loopback addresses.
struct Fixture {
    address: SocketAddr,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    serving: Serving,
}

impl Fixture {
    async fn new() -> Self {
        Self::bounded(BOUNDS).await
    }

    async fn bounded(bounds: Bounds) -> Self {
        Self::with(Auth::Open, Loopback::Allowed, bounds).await
    }

    async fn with(auth: Auth, loopback: Loopback, bounds: Bounds) -> Self {
        Self::listening(auth, loopback, bounds, None).await
    }

    async fn listening(
        auth: Auth,
        loopback: Loopback,
        bounds: Bounds,
        tls: Option<Arc<Tls>>,
    ) -> Self {
        let (metrics, stop) = (Arc::new(Metrics::default()), CancellationToken::new());
        let router = Arc::new(Router {
            auth,
            networks: Networks::new(Vec::new(), &[], loopback),
            domain: "invalid".to_owned(),
            limits: Limits {
                patience: SOON,
                retries: 0,
                idle: bounds.idle,
            },
            metrics: Arc::clone(&metrics),
            stop: stop.clone(),
            tunnels: TaskTracker::new(),
        });
        let socket = bind(([127, 0, 0, 1], 0).into()).unwrap();
        let address = socket.local_addr().unwrap();
        let listeners = vec![Listener { socket, tls }];
        let answer = move |request, client| {
            let router = Arc::clone(&router);
            async move { router.answer(request, client).await }
        };
        let counts = metrics.connections();
        Self {
            address,
            metrics,
            serving: serve(listeners, bounds, counts, stop.clone(), answer),
            stop,
        }
    }

    async fn client(&self) -> Peer {
        Peer::new(TcpStream::connect(self.address).await.unwrap())
    }

    /// Clients that have sent nothing, and whose connections have a place.
    async fn idle_clients(&self, count: usize) -> Vec<Peer> {
        let mut clients = Vec::new();
        for _ in 0..count {
            clients.push(self.client().await);
        }
        self.counts(&format!("sandbox_router_connections {count}"))
            .await;
        clients
    }

    /// Opens a WebSocket to `sandbox`; both ends of it.
    async fn websocket(&self, sandbox: &Sandbox) -> (Peer, Peer) {
        let mut client = self.client().await;
        let request = format!(
            "GET /ws HTTP/1.1\r\n{}Connection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Key: key\r\n\r\n",
            sandbox.headers
        );
        client.send(&request).await;
        let mut peer = sandbox.accept().await;
        let head = peer.head().await;
        assert!(
            head.contains("upgrade: websocket") && head.contains("key"),
            "{head}"
        );
        peer.send(SWITCH).await;
        expect(&client.until("hello").await, 101, "hello");
        (client, peer)
    }

    /// Waits until the metrics have `line`.
    async fn counts(&self, line: &str) {
        let counted = async {
            while !self.metrics.text().unwrap().contains(&format!("{line}\n")) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let counted = timeout(SOON, counted).await;
        assert!(
            counted.is_ok(),
            "{line} is not in\n{}",
            self.metrics.text().unwrap()
        );
    }

    /// Sends a whole request, and returns the whole answer.
    async fn ask(&self, request: &str) -> String {
        let mut client = self.client().await;
        client.send(request).await;
        client.rest().await
    }
}

/// A sandbox.
struct Sandbox {
    listener: TcpListener,
    /// What a request to it has in its head.
    headers: String,
}

impl Sandbox {
    async fn new() -> Self {
        // With buffers of the router's sizes, so that what is in flight is known.
        let listener = bind(([127, 0, 0, 1], 0).into()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let headers = format!(
            "Host: router\r\nX-Sandbox-ID: box\r\nX-Sandbox-Port: {port}\r\n\
             X-Sandbox-Pod-IP: 127.0.0.1\r\n"
        );
        Self { listener, headers }
    }

    fn get(&self, more: &str) -> String {
        let headers = &self.headers;
        format!("GET / HTTP/1.1\r\n{headers}{more}Connection: close\r\n\r\n")
    }

    async fn accept(&self) -> Peer {
        let accepted = timeout(SOON, self.listener.accept()).await;
        Peer::new(accepted.expect("nobody connects").unwrap().0)
    }

    /// Answers one request with `answer`, and returns its head.
    async fn answers(&self, answer: &str) -> String {
        let mut peer = self.accept().await;
        let head = peer.head().await;
        peer.send(answer).await;
        head
    }
}

/// One end of a connection.
struct Peer {
    stream: TcpStream,
    read: String,
}

impl Peer {
    fn new(stream: TcpStream) -> Self {
        let read = String::new();
        Self { stream, read }
    }

    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads until `end` has come, and returns all up to there.
    #[track_caller]
    fn until(&mut self, end: &str) -> impl Future<Output = String> {
        let caller = std::panic::Location::caller();
        async move {
            loop {
                if let Some(at) = self.read.find(end) {
                    let rest = self.read.split_off(at + end.len());
                    return std::mem::replace(&mut self.read, rest);
                }
                let more = self.more().await;
                assert!(more, "{caller}: no {end:?} after {:?}", self.read);
            }
        }
    }

    /// Sends chunks of a body until the connection has taken nothing for a second or has ended.
    /// Returns how many bytes it took.
    async fn flood(&mut self) -> usize {
        let chunk = format!("1000\r\n{}\r\n", "a".repeat(0x1000)).into_bytes();
        let quiet = Duration::from_secs(1);
        let mut taken = 0;
        loop {
            let rest = &chunk[taken % chunk.len()..];
            match timeout(quiet, self.stream.write(rest)).await {
                Ok(Ok(count)) => taken += count,
                Ok(Err(_)) | Err(_) => return taken,
            }
        }
    }

    async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// All bytes that still come.
    async fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.read).into_bytes();
        let read = timeout(SOON, self.stream.read_to_end(&mut bytes)).await;
        read.expect("no end").unwrap_or_default();
        bytes
    }

    async fn rest(&mut self) -> String {
        while self.more().await {}
        std::mem::take(&mut self.read)
    }

    /// Whether more came than the end.
    async fn more(&mut self) -> bool {
        let mut buffer = [0; 4096];
        let read = timeout(SOON, self.stream.read(&mut buffer)).await;
        // Who is reset has read the end, too.
        let count = read.expect("nothing comes").unwrap_or_default();
        self.read
            .push_str(&String::from_utf8_lossy(&buffer[..count]));
        count > 0
    }
}

#[track_caller]
fn expect(answer: &str, status: u16, body: &str) {
    let head = format!("HTTP/1.1 {status} ");
    assert!(
        answer.starts_with(&head) && answer.ends_with(body),
        "{answer}"
    );
}

#[tokio::test]
async fn a_request_and_its_answer_are_passed_on() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let request = format!(
        "POST /a%2Fb/../c?d=%20e HTTP/1.1\r\n{}Authorization: Bearer mine\r\n\
         X-Forwarded-For: 1.2.3.4\r\nX-Own: 1\r\nConnection: close, x-gone\r\nX-Gone: 1\r\n\
         Content-Length: 4\r\n\r\nbody",
        sandbox.headers
    );
    let exchange = async {
        let mut peer = sandbox.accept().await;
        let head = peer.until("body").await;
        peer.send(
            "HTTP/1.1 418 Teapot\r\nX-Its: 1\r\nKeep-Alive: x\r\nContent-Length: 2\r\n\r\nok",
        )
        .await;
        head
    };
    let (answer, head) = tokio::join!(router.ask(&request), exchange);
    let lower = head.to_lowercase();
    assert!(
        head.starts_with("POST /a%2Fb/../c?d=%20e HTTP/1.1\r\n"),
        "{head}"
    );
    let port = sandbox.listener.local_addr().unwrap().port();
    let host = format!("host: 127.0.0.1:{port}\r\n");
    let there = [
        &host,
        "x-own: 1\r\n",
        "x-forwarded-for: 127.0.0.1\r\n",
        "x-forwarded-host: router\r\n",
    ];
    for there in there {
        assert!(lower.contains(there), "{there} is not in {head}");
    }
    for gone in [
        "authorization",
        "x-sandbox",
        "x-gone",
        "connection",
        "1.2.3.4",
    ] {
        assert!(!lower.contains(gone), "{gone} is in {head}");
    }
    expect(&answer, 418, "\r\n\r\nok");
    let answer = answer.to_lowercase();
    assert!(
        answer.contains("x-its: 1\r\n") && !answer.contains("keep-alive"),
        "{answer}"
    );
    let text = router.metrics.text().unwrap();
    assert!(
        text.contains(r#"requests_total{method="POST",code="418"} 1"#),
        "{text}"
    );
}

#[tokio::test]
async fn bodies_flow_both_ways_as_they_come() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = router.client().await;
    let head = format!(
        "POST / HTTP/1.1\r\n{}Transfer-Encoding: chunked\r\n\r\n3\r\none\r\n",
        sandbox.headers
    );
    client.send(&head).await;
    let mut peer = sandbox.accept().await;
    peer.until("3\r\none\r\n").await;
    let begin = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nuno\r\n";
    peer.send(begin).await;
    client.until("3\r\nuno\r\n").await;
    client.send("3\r\ntwo\r\n").await;
    peer.until("3\r\ntwo\r\n").await;
    peer.send("3\r\ndue\r\n").await;
    client.until("3\r\ndue\r\n").await;
    client.send("0\r\n\r\n").await;
    peer.until("0\r\n\r\n").await;
    peer.send("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn what_is_refused_is_said_in_upstreams_words() {
    let router = Fixture::new().await;
    let ask = async |headers: &str| {
        let request = format!("GET / HTTP/1.1\r\nHost: r\r\n{headers}Connection: close\r\n\r\n");
        router.ask(&request).await
    };
    let detail = |text: &str| format!("\r\n\r\n{{\"detail\":\"{text}\"}}");
    expect(
        &ask("").await,
        400,
        &detail("X-Sandbox-ID header is required."),
    );
    let id = ask("X-Sandbox-ID: a.b\r\n").await;
    expect(&id, 400, &detail("Invalid sandbox ID format."));
    let metadata = ask("X-Sandbox-ID: a\r\nX-Sandbox-Pod-IP: 169.254.169.254\r\n").await;
    expect(&metadata, 400, &detail("Invalid target IP address."));
    // tcpmux, which nothing has served for decades.
    let nobody = ask("X-Sandbox-ID: a\r\nX-Sandbox-Pod-IP: 127.0.0.1\r\nX-Sandbox-Port: 1\r\n");
    let unreachable = detail("Could not connect to the backend sandbox: a");
    expect(&nobody.await, 502, &unreachable);
    expect(
        &router
            .ask("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nConnection: close\r\n\r\n")
            .await,
        405,
        "}",
    );
    let text = router.metrics.text().unwrap();
    assert!(
        text.contains(r#"upstream_errors_total{reason="dial"} 1"#),
        "{text}"
    );
}

#[tokio::test]
async fn an_address_that_is_no_pods_is_not_connected_to() {
    let router = Fixture::with(Auth::Open, Loopback::Refused, BOUNDS).await;
    let sandbox = Sandbox::new().await;
    expect(&router.ask(&sandbox.get("")).await, 400, "IP address.\"}");
    let came = timeout(Duration::from_millis(100), sandbox.listener.accept()).await;
    assert!(came.is_err(), "it was connected to");
}

#[tokio::test]
async fn who_shows_no_token_stays_out() {
    let auth = Auth::new(Some("secret"), false).unwrap();
    let router = Fixture::with(auth, Loopback::Allowed, BOUNDS).await;
    let sandbox = Sandbox::new().await;
    expect(
        &router.ask(&sandbox.get("")).await,
        401,
        "Authorization header.\"}",
    );
    let wrong = sandbox.get("Authorization: Bearer guess\r\n");
    expect(&router.ask(&wrong).await, 401, "Invalid token.\"}");
    let right = sandbox.get("Authorization: Bearer secret\r\n");
    let (answer, head) = tokio::join!(router.ask(&right), sandbox.answers(OK));
    expect(&answer, 200, "ok");
    assert!(!head.contains("secret"), "{head}");
    let health = "GET /healthz HTTP/1.1\r\nHost: r\r\nConnection: close\r\n\r\n";
    expect(&router.ask(health).await, 200, r#"{"status":"ok"}"#);
}

/// Both sides must see the same end of a request.
#[tokio::test]
async fn nothing_is_hidden_in_a_body() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    for lengths in [
        "Content-Length: 3\r\nContent-Length: 4\r\n",
        "Content-Length: +3\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding : chunked\r\n",
    ] {
        let request = format!("POST / HTTP/1.1\r\n{}{lengths}\r\nabc", sandbox.headers);
        expect(&router.ask(&request).await, 400, "\r\n\r\n");
    }
    let both = format!(
        "POST / HTTP/1.1\r\n{}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\
         Connection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        sandbox.headers
    );
    let seen = async {
        let mut peer = sandbox.accept().await;
        let head = peer.head().await.to_lowercase();
        let body = peer.until("0\r\n\r\n").await;
        peer.send(OK).await;
        (head, body)
    };
    let (answer, (head, body)) = tokio::join!(router.ask(&both), seen);
    expect(&answer, 200, "ok");
    assert!(head.contains("transfer-encoding: chunked") && !head.contains("content-length"));
    assert_eq!(body, "3\r\nabc\r\n0\r\n\r\n");
}

#[tokio::test]
async fn a_large_head_is_refused() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let large = format!("X-Large: {}\r\n", "a".repeat(40 << 10));
    expect(&router.ask(&sandbox.get(&large)).await, 431, "\r\n\r\n");
    let many: String = (0..120).map(|n| format!("X-{n}: 1\r\n")).collect();
    expect(&router.ask(&sandbox.get(&many)).await, 431, "\r\n\r\n");
}

#[tokio::test]
async fn a_sandbox_that_says_nothing_is_given_up() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let start = Instant::now();
    let request = sandbox.get("X-Sandbox-Timeout: 0.2\r\n");
    let (answer, mut peer) = tokio::join!(router.ask(&request), sandbox.accept());
    expect(
        &answer,
        504,
        "Timed out waiting for the backend sandbox: box\"}",
    );
    assert!(start.elapsed() < SOON / 2);
    peer.rest().await;
}

#[tokio::test]
async fn an_answer_that_stops_half_way_is_cut() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    // Within that time the first half has to come, too.
    let request = sandbox.get("X-Sandbox-Timeout: 3\r\n");
    let half = async {
        let mut peer = sandbox.accept().await;
        peer.head().await;
        peer.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
            .await;
        peer.rest().await;
    };
    let (answer, ()) = tokio::join!(router.ask(&request), half);
    expect(&answer, 200, "half");
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_request_along() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = router.client().await;
    client.send(&sandbox.get("")).await;
    let mut peer = sandbox.accept().await;
    peer.head().await;
    peer.send("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        .await;
    client.until("half").await;
    drop(client);
    peer.rest().await;
    router.counts("sandbox_router_inflight_requests 0").await;
}

#[tokio::test]
async fn a_websocket_goes_through_and_ends_with_the_router() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let (mut client, mut peer) = router.websocket(&sandbox).await;
    peer.stream.write_all(b"\x81\x05frame").await.unwrap();
    client.until("frame").await;
    client.stream.write_all(b"\x81\x85maskfr").await.unwrap();
    peer.until("fr").await;
    router.stop.cancel();
    // Half a frame is not torn apart.
    client.stream.write_all(b"ame").await.unwrap();
    peer.until("ame").await;
    let text = |close: &[u8]| String::from_utf8_lossy(close).into_owned();
    let to_sandbox = [0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe9];
    assert_eq!(peer.rest().await, text(&to_sandbox));
    assert_eq!(client.rest().await, text(&[0x88, 2, 0x03, 0xe9]));
}

/// What goes through need not have frames.
#[tokio::test]
async fn a_websocket_without_frames_ends_with_the_router_too() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let (mut client, mut peer) = router.websocket(&sandbox).await;
    client.send("from the client").await;
    peer.until("from the client").await;
    router.stop.cancel();
    peer.bytes().await;
    client.bytes().await;
}

#[tokio::test]
async fn one_side_of_a_websocket_can_end_before_the_other() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let (mut client, mut peer) = router.websocket(&sandbox).await;
    client.stream.shutdown().await.unwrap();
    assert_eq!(peer.rest().await, "");
    peer.send("last words").await;
    client.until("last words").await;
}

#[tokio::test]
async fn a_body_is_asked_for_when_the_sandbox_can_be_sent_it() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = router.client().await;
    let head = format!(
        "POST / HTTP/1.1\r\n{}Expect: 100-continue\r\nContent-Length: 4\r\n\r\n",
        sandbox.headers
    );
    client.send(&head).await;
    client.until("HTTP/1.1 100 Continue\r\n\r\n").await;
    client.send("body").await;
    let mut peer = sandbox.accept().await;
    assert!(!peer.head().await.to_lowercase().contains("expect"));
    peer.until("body").await;
    peer.send(OK).await;
    client.until("ok").await;
}

#[tokio::test]
async fn other_protocols_are_not_switched_to() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n";
    let request = sandbox.get("").replace(
        "Connection: close\r\n",
        "Connection: close, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n",
    );
    let (answer, head) = tokio::join!(router.ask(&request), sandbox.answers(switch));
    expect(&answer, 502, "}");
    let head = head.to_lowercase();
    assert!(
        !head.contains("upgrade") && !head.contains("http2"),
        "{head}"
    );
}

#[tokio::test]
async fn the_end_waits_for_what_has_begun() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut idle = router.client().await;
    let mut client = router.client().await;
    client.send(&sandbox.get("")).await;
    let mut peer = sandbox.accept().await;
    peer.head().await;
    router.stop.cancel();
    idle.rest().await;
    assert!(!router.serving.ended(Duration::from_millis(50)).await);
    peer.send(OK).await;
    expect(&client.rest().await, 200, "ok");
    assert!(router.serving.ended(SOON).await);
    assert!(TcpStream::connect(router.address).await.is_err());
}

#[tokio::test]
async fn a_websocket_keeps_the_place_of_its_connection() {
    let sandbox = Sandbox::new().await;
    let router = Fixture::bounded(Bounds {
        connections: 2,
        ..BOUNDS
    })
    .await;
    let first = router.websocket(&sandbox).await;
    let (mut client, mut peer) = router.websocket(&sandbox).await;
    let full = router.ask(&sandbox.get("")).await;
    expect(&full, 503, "{\"detail\":\"Too many connections.\"}");
    router
        .counts(r#"sandbox_router_refused_connections_total{reason="full"} 1"#)
        .await;
    client.send("from the client").await;
    peer.until("from the client").await;
    drop(first);
    router.counts("sandbox_router_connections 1").await;
    let request = sandbox.get("");
    let (answer, _) = tokio::join!(router.ask(&request), sandbox.answers(OK));
    expect(&answer, 200, "ok");
}

#[tokio::test]
async fn one_client_does_not_get_all_places() {
    let sandbox = Sandbox::new().await;
    let router = Fixture::bounded(Bounds {
        connections: 4,
        per_client: 2,
        ..BOUNDS
    })
    .await;
    let clients = router.idle_clients(2).await;
    let refused = router.ask(&sandbox.get("")).await;
    let detail = "{\"detail\":\"Too many connections from this address.\"}";
    expect(&refused, 429, detail);
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
    let mut other = Peer::new(socket.connect(router.address).await.unwrap());
    other.send(&sandbox.get("")).await;
    let (answer, _) = tokio::join!(other.rest(), sandbox.answers(OK));
    expect(&answer, 200, "ok");
    drop(clients);
    router.counts("sandbox_router_connections 0").await;
    let request = sandbox.get("");
    let (answer, _) = tokio::join!(router.ask(&request), sandbox.answers(OK));
    expect(&answer, 200, "ok");
}

#[tokio::test]
async fn connections_without_a_request_give_way() {
    let sandbox = Sandbox::new().await;
    let router = Fixture::bounded(Bounds {
        connections: 3,
        ..BOUNDS
    })
    .await;
    let mut busy = router.client().await;
    busy.send(&sandbox.get("")).await;
    let mut peer = sandbox.accept().await;
    let mut half = router.client().await;
    half.send("GET / HTTP/1.1\r\nHo").await;
    let mut kept = router.client().await;
    kept.send(&sandbox.get("").replace("Connection: close\r\n", ""))
        .await;
    sandbox.answers(OK).await;
    kept.until("ok").await;
    let start = Instant::now();
    let _first = router.websocket(&sandbox).await;
    assert_eq!(half.rest().await, "");
    let _second = router.websocket(&sandbox).await;
    assert_eq!(kept.rest().await, "");
    assert!(start.elapsed() < SOON / 2);
    peer.send(OK).await;
    expect(&busy.rest().await, 200, "ok");
}

#[tokio::test]
async fn a_websocket_without_traffic_ends() {
    let (idle, sandbox) = (Duration::from_secs(1), Sandbox::new().await);
    let router = Fixture::bounded(Bounds { idle, ..BOUNDS }).await;
    let (mut client, mut peer) = router.websocket(&sandbox).await;
    // Traffic in one direction is enough.
    for _ in 0..8 {
        sleep(idle / 4).await;
        peer.send("tick").await;
        client.until("tick").await;
    }
    let start = Instant::now();
    client.rest().await;
    peer.rest().await;
    assert!(start.elapsed() > idle / 2 && start.elapsed() < SOON / 2);
    router.counts("sandbox_router_connections 0").await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_given_up() {
    let (idle, sandbox) = (Duration::from_secs(1), Sandbox::new().await);
    let router = Fixture::bounded(Bounds { idle, ..BOUNDS }).await;
    let mut client = router.client().await;
    client.send(&sandbox.get("")).await;
    let mut peer = sandbox.accept().await;
    peer.head().await;
    peer.send(ENDLESS).await;
    peer.flood().await;
    peer.rest().await;
    router.counts("sandbox_router_connections 0").await;
}

/// The router as a process, which ends with this.
struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start() -> Self {
        let any = "127.0.0.1:0";
        let mut child = Command::new(env!("CARGO_BIN_EXE_kiln-router"))
            .args(["--allow-unauthenticated", "--allow-loopback-pod-ip"])
            .args(["--max-connections-per-client=1024", "--log-json"])
            .arg(format!("--http-bind-address={any}"))
            .arg(format!("--health-probe-bind-address={any}"))
            .arg(format!("--metrics-bind-address={any}"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let mut lines = log.lines().map(Result::unwrap);
        let address = lines.find_map(|line| {
            let (_, rest) = line.split_once("listens on ")?;
            rest.split('"').next()?.parse().ok()
        });
        // The rest is read, too, so that it can go on writing.
        std::thread::spawn(move || lines.count());
        Self {
            child,
            address: address.expect("it listens nowhere"),
        }
    }

    /// Its memory, in bytes.
    fn resident(&self) -> usize {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kibibytes = line.unwrap().trim().trim_end_matches(" kB");
        kibibytes.parse::<usize>().unwrap() << 10
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Neither clients nor sandboxes read, and both send as much as is taken.
#[tokio::test]
async fn a_connection_takes_no_more_than_is_said() {
    const COUNT: usize = 100;
    let (router, sandbox) = (Process::start(), Sandbox::new().await);
    let before = router.resident();
    let request = format!(
        "POST / HTTP/1.1\r\n{}Transfer-Encoding: chunked\r\n\r\n",
        sandbox.headers
    );
    let mut ends = Vec::new();
    for _ in 0..COUNT {
        let socket = kiln_http::socket(router.address).unwrap();
        let mut client = Peer::new(socket.connect(router.address).await.unwrap());
        client.send(&request).await;
        let mut peer = sandbox.accept().await;
        peer.head().await;
        peer.send(ENDLESS).await;
        client.head().await;
        for mut end in [client, peer] {
            ends.push(tokio::spawn(async move {
                let taken = end.flood().await;
                (end, taken)
            }));
        }
    }
    // Half of it for one direction, and as much for what the sockets of this test hold.
    let most = CONNECTION_BYTES;
    let mut open = Vec::new();
    for end in ends {
        let (end, taken) = end.await.unwrap();
        assert!(taken > BUFFER && taken <= most, "{taken} of {most}");
        open.push(end);
    }
    let each = (router.resident() - before) / COUNT;
    assert!(each <= OWN_BYTES, "{each} of {OWN_BYTES}");
}
