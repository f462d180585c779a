// SPDX-License-Identifier: Apache-2.0

//! Listeners for probes and metrics.

use std::{error::Error, io, net::SocketAddr, time::Duration};

use hyper::{Request, Response, body::Body};
use tokio_util::sync::CancellationToken;

use crate::{
    bounds::Bounds,
    places::Counts,
    serve::{Listener, serve},
    socket::bind,
};

/// Those who ask are a kubelet, a few Prometheus and people.
const BOUNDS: Bounds = Bounds {
    connections: 32,
    per_client: 8,
    head: Duration::from_secs(10),
    idle: Duration::from_secs(10),
};

/// Has `answer` answer requests at `address`, by their path, until the process ends. Returns the
/// address, with its port.
///
/// # Errors
/// When it cannot be listened there.
pub fn serve_probes<F, B>(address: SocketAddr, answer: F) -> io::Result<SocketAddr>
where
    F: Fn(&str) -> Response<B> + Clone + Send + Sync + 'static,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let socket = bind(address)?;
    let address = socket.local_addr()?;
    let answer = move |request: Request<_>, _| {
        let response = answer(request.uri().path());
        async move { response }
    };
    let never = CancellationToken::new();
    let listener = Listener { socket, tls: None };
    serve(vec![listener], BOUNDS, Counts::default(), never, answer);
    Ok(address)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpSocket, TcpStream},
        time::timeout,
    };

    use super::*;

    /// Longest that a kubelet should have to wait here.
    const SOON: Duration = Duration::from_secs(5);

    /// A client whose address ends with `host`.
    async fn client(host: u8, server: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        let own = Ipv4Addr::new(127, 0, 0, host);
        socket.bind((own, 0).into()).unwrap();
        socket.connect(server).await.unwrap()
    }

    /// What is answered at last.
    async fn ask(mut client: TcpStream) -> String {
        let request = b"GET /healthz HTTP/1.1\r\nHost: p\r\nConnection: close\r\n\r\n";
        client.write_all(request).await.unwrap();
        let mut answer = String::new();
        let read = timeout(SOON, client.read_to_string(&mut answer)).await;
        read.expect("no answer").unwrap();
        answer
    }

    #[tokio::test]
    async fn idle_clients_keep_nobody_from_probes() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = serve_probes(any, |path| Response::new(path.to_owned())).unwrap();
        let mut idle = Vec::new();
        for n in 0..BOUNDS.connections {
            let host = 2 + u8::try_from(n / BOUNDS.per_client).unwrap();
            idle.push(client(host, server).await);
        }
        let own = ask(client(1, server).await).await;
        assert!(own.starts_with("HTTP/1.1 200 ") && own.ends_with("/healthz"));
        // The first of these has given way.
        let greedy = ask(client(3, server).await).await;
        assert!(greedy.starts_with("HTTP/1.1 429 "), "{greedy}");
    }
}
