// SPDX-License-Identifier: Apache-2.0

//! Clients of HTTP/2, and sandboxes that know gRPC.

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream, client, client::SendRequest, ext::Protocol, server,
    server::SendResponse,
};
use hyper::http::{HeaderMap, Method, Request, Response, StatusCode, request};

use super::*;

/// A connection to the router, and a request's head for `sandbox`.
struct Client {
    sender: SendRequest<Bytes>,
    port: u16,
}

impl Client {
    async fn new(router: &Fixture, sandbox: &Sandbox) -> Self {
        Self::of(router.address, sandbox).await
    }

    async fn of(router: SocketAddr, sandbox: &Sandbox) -> Self {
        let stream = TcpStream::connect(router).await.unwrap();
        let (sender, connection) = client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let port = sandbox.listener.local_addr().unwrap().port();
        Self { sender, port }
    }

    fn head(&self, method: Method) -> request::Builder {
        Request::builder()
            .method(method)
            .uri("http://router/a/b?c=d")
            .header("x-sandbox-id", "box")
            .header("x-sandbox-pod-ip", "127.0.0.1")
            .header("x-sandbox-port", self.port)
    }

    fn grpc(&self) -> Request<()> {
        let head = self.head(Method::POST);
        let head = head.header("content-type", "application/grpc");
        head.header("te", "trailers").body(()).unwrap()
    }

    async fn send(&mut self, request: Request<()>, is_all: bool) -> (Answer, SendStream<Bytes>) {
        self.sender = self.sender.clone().ready().await.unwrap();
        let (answer, body) = self.sender.send_request(request, is_all).unwrap();
        (Answer(answer), body)
    }
}

struct Answer(client::ResponseFuture);

impl Answer {
    async fn come(self) -> Result<Response<RecvStream>, h2::Error> {
        timeout(SOON, self.0).await.expect("no answer")
    }
}

async fn read(body: &mut RecvStream) -> Bytes {
    let data = timeout(SOON, body.data()).await.expect("no data");
    let data = data.unwrap().unwrap();
    body.flow_control().release_capacity(data.len()).unwrap();
    data
}

type Asked = (Request<RecvStream>, SendResponse<Bytes>);

/// Takes a connection of gRPC, and returns its only request.
async fn asked(sandbox: &Sandbox) -> Asked {
    let peer = sandbox.accept().await;
    let mut connection = server::handshake(peer.stream).await.unwrap();
    let asked = timeout(SOON, connection.accept()).await.unwrap();
    tokio::spawn(async move { while connection.accept().await.is_some() {} });
    asked.unwrap().unwrap()
}

#[tokio::test]
async fn grpc_streams_both_ways_and_has_trailers() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = Client::new(&router, &sandbox).await;
    let (answer, mut body) = client.send(client.grpc(), false).await;
    let (request, mut respond) = asked(&sandbox).await;
    let (head, mut from_client) = request.into_parts();
    assert_eq!(head.method, Method::POST);
    assert_eq!(head.uri.path_and_query().unwrap(), "/a/b?c=d");
    assert_eq!(head.headers["te"], "trailers");
    assert_eq!(head.headers["x-forwarded-host"], "router");
    assert!(!head.headers.contains_key("x-sandbox-id") && !head.headers.contains_key("host"));
    let begin = Response::builder().header("content-type", "application/grpc");
    let mut to_client = respond
        .send_response(begin.body(()).unwrap(), false)
        .unwrap();
    let (head, mut from_sandbox) = answer.come().await.unwrap().into_parts();
    assert_eq!(head.headers["content-type"], "application/grpc");
    for piece in ["one", "two"] {
        body.send_data(piece.into(), false).unwrap();
        assert_eq!(read(&mut from_client).await, piece);
        to_client.send_data(piece.into(), false).unwrap();
        assert_eq!(read(&mut from_sandbox).await, piece);
    }
    // The client has said all; the sandbox has not.
    body.send_data("end".into(), true).unwrap();
    assert_eq!(read(&mut from_client).await, "end");
    to_client.send_data("more".into(), false).unwrap();
    assert_eq!(read(&mut from_sandbox).await, "more");
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    to_client.send_trailers(trailers.clone()).unwrap();
    let came = timeout(SOON, from_sandbox.trailers()).await.unwrap();
    assert_eq!(came.unwrap(), Some(trailers));
    drop((body, from_client));
    router.counts("sandbox_router_inflight_requests 0").await;
}

/// Sandboxes need not know HTTP/2.
#[tokio::test]
async fn what_is_no_grpc_goes_by_http1() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = Client::new(&router, &sandbox).await;
    let head = client.head(Method::POST);
    let head = head.header("content-type", "application/grpc-web+proto");
    let head = head.header("cookie", "a=1").header("cookie", "b=2");
    let (answer, mut body) = client.send(head.body(()).unwrap(), false).await;
    body.send_data("web".into(), true).unwrap();
    let mut peer = sandbox.accept().await;
    let head = peer.head().await;
    assert!(head.starts_with("POST /a/b?c=d HTTP/1.1\r\n"), "{head}");
    assert!(head.contains("cookie: a=1; b=2\r\n"), "{head}");
    peer.until("3\r\nweb\r\n0\r\n\r\n").await;
    peer.send(OK).await;
    let mut answer = answer.come().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(read(answer.body_mut()).await, "ok");
}

#[tokio::test]
async fn a_websocket_goes_through_http2() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = Client::new(&router, &sandbox).await;
    // The client has to see that the router takes these.
    while !client.sender.is_extended_connect_protocol_enabled() {
        sleep(Duration::from_millis(5)).await;
    }
    let mut open = client.head(Method::CONNECT).body(()).unwrap();
    open.extensions_mut()
        .insert(Protocol::from_static("websocket"));
    let (answer, mut to_sandbox) = client.send(open, false).await;
    let mut peer = sandbox.accept().await;
    let head = peer.head().await;
    for part in [
        "GET /a/b?c=d HTTP/1.1\r\n",
        "upgrade: websocket\r\n",
        "sec-websocket-key: ",
    ] {
        assert!(head.contains(part), "{part} is not in {head}");
    }
    peer.send(SWITCH).await;
    let mut answer = answer.come().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(!answer.headers().contains_key("sec-websocket-accept"));
    assert_eq!(read(answer.body_mut()).await, "\u{1}\u{5}hello");
    to_sandbox
        .send_data(Bytes::from_static(b"\x81\x85maskframe"), false)
        .unwrap();
    peer.until("maskframe").await;
    router.counts("sandbox_router_connections 1").await;
    router.stop.cancel();
    assert_eq!(read(answer.body_mut()).await, [0x88, 2, 0x03, 0xe9][..]);
    assert_eq!(peer.bytes().await[..2], [0x88, 0x82]);
}

#[tokio::test]
async fn who_opens_no_websocket_is_told_so() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = Client::new(&router, &sandbox).await;
    while !client.sender.is_extended_connect_protocol_enabled() {
        sleep(Duration::from_millis(5)).await;
    }
    for (protocol, status) in [("websocket", 502), ("other", 405)] {
        let mut open = client.head(Method::CONNECT).body(()).unwrap();
        open.extensions_mut()
            .insert(Protocol::from_static(protocol));
        let (answer, _body) = client.send(open, false).await;
        if protocol == "websocket" {
            sandbox.answers(OK).await;
        }
        assert_eq!(answer.come().await.unwrap().status(), status, "{protocol}");
    }
}

#[tokio::test]
async fn each_request_at_the_same_time_takes_a_place() {
    let sandbox = Sandbox::new().await;
    let router = Fixture::bounded(Bounds {
        per_client: 3,
        ..BOUNDS
    })
    .await;
    let mut client = Client::new(&router, &sandbox).await;
    let mut open = Vec::new();
    for count in 1..=3 {
        let (answer, _) = client.send(client.grpc(), true).await;
        open.push((answer, asked(&sandbox).await));
        let line = format!("sandbox_router_connections {count}");
        router.counts(&line).await;
    }
    let (refused, _) = client.send(client.grpc(), true).await;
    let error = refused.come().await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::REFUSED_STREAM));
    let (answer, (_, mut respond)) = open.remove(0);
    respond.send_response(Response::new(()), true).unwrap();
    assert!(answer.come().await.is_ok());
    router.counts("sandbox_router_connections 3").await;
    drop(open);
    router.counts("sandbox_router_connections 1").await;
}

#[tokio::test]
async fn who_gives_up_request_after_request_is_cut_off() {
    let sandbox = Sandbox::new().await;
    let router = Fixture::new().await;
    let client = Client::new(&router, &sandbox).await;
    let start = Instant::now();
    let mut open = Vec::new();
    for _ in 0..10_000 {
        let Ok(mut sender) = client.sender.clone().ready().await else {
            router.counts("sandbox_router_connections 0").await;
            return;
        };
        let Ok((answer, mut body)) = sender.send_request(client.grpc(), false) else {
            break;
        };
        // One after the other, each of which costs a connection.
        tokio::select! {
            accepted = sandbox.listener.accept() => open.push(accepted),
            _ = answer => {}
        }
        body.send_reset(Reason::CANCEL);
        assert!(start.elapsed() < SOON, "it is never cut off");
    }
    router.counts("sandbox_router_connections 0").await;
}

#[tokio::test]
async fn a_connection_without_a_request_ends() {
    let sandbox = Sandbox::new().await;
    let router = Fixture::bounded(Bounds {
        head: Duration::from_secs(1),
        ..BOUNDS
    })
    .await;
    let mut client = Client::new(&router, &sandbox).await;
    let (answer, _) = client.send(client.grpc(), true).await;
    let (_, mut respond) = asked(&sandbox).await;
    // A request that lasts keeps it.
    sleep(Duration::from_secs(3)).await;
    respond.send_response(Response::new(()), true).unwrap();
    answer.come().await.unwrap();
    router.counts("sandbox_router_connections 0").await;
    let again = client.sender.clone().ready().await;
    assert!(again.is_err());
}

#[tokio::test]
async fn a_request_that_is_not_read_ends_alone() {
    let sandbox = Sandbox::new().await;
    let idle = Duration::from_secs(2);
    let router = Fixture::bounded(Bounds { idle, ..BOUNDS }).await;
    let mut client = Client::new(&router, &sandbox).await;
    let (stuck, _) = client.send(client.grpc(), true).await;
    let (_, mut respond) = asked(&sandbox).await;
    let mut endless = respond.send_response(Response::new(()), false).unwrap();
    let stuck = stuck.come().await.unwrap();
    endless.send_data(vec![0; 4 << 20].into(), false).unwrap();
    let start = Instant::now();
    // Others go on meanwhile.
    while start.elapsed() < idle * 2 {
        let (answer, _) = client.send(client.grpc(), true).await;
        let (_, mut respond) = asked(&sandbox).await;
        respond.send_response(Response::new(()), true).unwrap();
        answer.come().await.unwrap();
        sleep(idle / 8).await;
    }
    router.counts("sandbox_router_inflight_requests 0").await;
    drop(stuck);
}

#[tokio::test]
async fn the_end_waits_for_requests_that_have_begun() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = Client::new(&router, &sandbox).await;
    let (answer, _) = client.send(client.grpc(), true).await;
    let (_, mut respond) = asked(&sandbox).await;
    router.stop.cancel();
    // It is told to begin no others.
    while client.sender.clone().ready().await.is_ok() {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(!router.serving.ended(Duration::from_millis(50)).await);
    respond.send_response(Response::new(()), true).unwrap();
    assert!(answer.come().await.is_ok());
    assert!(router.serving.ended(SOON).await);
}

/// A head that never ends is not kept.
#[tokio::test]
async fn a_flood_of_continuations_is_cut_off() {
    let router = Fixture::new().await;
    let mut client = router.client().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    client.stream.write_all(preface).await.unwrap();
    // HEADERS and then CONTINUATION of stream 1, none of them with END_HEADERS.
    client
        .stream
        .write_all(b"\0\0\0\x01\0\0\0\0\x01")
        .await
        .unwrap();
    let piece = [b"\0\0\x01\x09\0\0\0\0\x01".as_slice(), &[0x82]].concat();
    let flood = async {
        while client.stream.write_all(&piece).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, flood).await.expect("it is never cut off");
    router.counts("sandbox_router_connections 0").await;
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() {
    let (router, sandbox) = (Fixture::new().await, Sandbox::new().await);
    let mut client = Client::new(&router, &sandbox).await;
    let large = client
        .head(Method::GET)
        .header("x-large", "a".repeat(20 << 10));
    let (answer, _) = client.send(large.body(()).unwrap(), true).await;
    let is_refused = match answer.come().await {
        Ok(answer) => answer.status() == StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        Err(_) => true,
    };
    assert!(is_refused);
}

/// Neither the client nor sandboxes read, and both send as much as is taken.
#[tokio::test]
async fn a_request_of_http2_takes_no_more_than_is_said() {
    const COUNT: usize = 50;
    let (router, sandbox) = (Process::start(), Sandbox::new().await);
    let before = router.resident();
    let mut client = Client::of(router.address, &sandbox).await;
    let much = Bytes::from(vec![0; 4 << 20]);
    let mut open = Vec::new();
    for _ in 0..COUNT {
        let (answer, mut body) = client.send(client.grpc(), false).await;
        let (request, mut respond) = asked(&sandbox).await;
        let mut to_client = respond.send_response(Response::new(()), false).unwrap();
        let answer = answer.come().await.unwrap();
        body.send_data(much.clone(), false).unwrap();
        to_client.send_data(much.clone(), false).unwrap();
        open.push((answer, body, request, to_client));
    }
    // Until it takes no more.
    let mut after = 0;
    while after < router.resident() {
        after = router.resident();
        sleep(Duration::from_secs(1)).await;
    }
    let each = (after - before) / COUNT;
    assert!(each > BUFFER && each <= OWN_BYTES, "{each} of {OWN_BYTES}");
}
