// SPDX-License-Identifier: Apache-2.0
//! `nginx` and `httpd`: stand-ins for the web servers of critest's images.
//!
//! critest looks for the page on the given port, for `master process` in the command line of
//! process 1, for `nginx` as a process name and for the number in /var/run/nginx.pid.

use std::env;
use std::ffi::CString;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::process;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::execv;

use crate::signals::{Blocked, TERMINATION};
use crate::{Failure, print};

/// What `ps` shows for nginx.
pub(crate) const NGINX_TITLE: &str = "nginx: master process nginx -g daemon off;";

/// The port when none is given.
const DEFAULT_PORT: u16 = 80;

/// Longest request head that is read, in bytes.
const MAX_HEAD: usize = 8 * 1024;

/// How long a connection may last.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many connections are served at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;

const PAGE: &str = "<!DOCTYPE html>\n<html>\n<head><title>Welcome to nginx!</title></head>\n<body><h1>Welcome to nginx!</h1></body>\n</html>\n";

/// `nginx [PORT]`.
pub(crate) fn nginx(args: &[String]) -> Result<u8, Failure> {
    let port = port(args)?;
    if env::args_os().next().is_none_or(|own| own != NGINX_TITLE) {
        return rename(port);
    }
    if let Err(error) = fs::write("/var/run/nginx.pid", format!("{}\n", process::id())) {
        // A read-only root is a normal place to serve from. Nobody is left to tell when stderr is closed.
        let _ = writeln!(io::stderr(), "nginx: no pid file: {error}");
    }
    serve("nginx", port)
}

/// `httpd [PORT]`.
pub(crate) fn httpd(args: &[String]) -> Result<u8, Failure> {
    serve("httpd", port(args)?)
}

/// The port in `[-g DIRECTIVES] [PORT]`: manifests written for the real nginx pass `-g 'daemon off;'`.
fn port(args: &[String]) -> Result<u16, Failure> {
    let port = match args {
        [option, _, rest @ ..] if option == "-g" => rest.first(),
        _ => args.first(),
    };
    port.map_or(Some(DEFAULT_PORT), |p| p.parse().ok())
        .ok_or(Failure::Usage("nginx|httpd [-g DIRECTIVES] [PORT]"))
}

/// Runs the own binary again under nginx's title; returns only when that fails.
fn rename(port: u16) -> Result<u8, Failure> {
    // By its path, not through /proc/self/exe: the process name stays `nginx`.
    let own = env::current_exe().map_err(Failure::io("find the own binary"))?;
    let c_string = |bytes: Vec<u8>| CString::new(bytes).map_err(Failure::io("pass on an argument"));
    let own = c_string(own.into_os_string().into_vec())?;
    let argv = [
        c_string(NGINX_TITLE.into())?,
        c_string(port.to_string().into())?,
    ];
    let Err(refused) = execv(&own, &argv);
    Err(Failure::io("run the own binary again")(refused))
}

/// Serves the page on `port` until TERM, INT or QUIT.
fn serve(name: &str, port: u16) -> Result<u8, Failure> {
    let termination = Blocked::new(TERMINATION)?.watch()?;
    // The IPv6 socket takes IPv4 too, unless the kernel has no IPv6.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
    let listener = listener.map_err(Failure::io(format!("listen on port {port}")))?;
    print(&format!("{name} listening on port {port}\n"))?;
    let mut server = Server::new(listener)?;
    loop {
        server.step(&termination)?;
        if termination.has_one()? {
            return Ok(0);
        }
    }
}

/// The listener and its connections, all in one thread.
struct Server {
    listener: TcpListener,
    connections: Vec<Connection>,
}

impl Server {
    fn new(listener: TcpListener) -> Result<Self, Failure> {
        listener
            .set_nonblocking(true)
            .map_err(Failure::io("listen without blocking"))?;
        Ok(Self {
            listener,
            connections: Vec::new(),
        })
    }

    /// Waits until there is something to do, or `stop` is readable, and does it.
    fn step(&mut self, stop: &impl AsFd) -> Result<(), Failure> {
        let mut files = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        files.extend(
            self.connections
                .iter()
                .map(|c| PollFd::new(c.stream.as_fd(), PollFlags::POLLIN)),
        );
        let room = self.connections.len() < MAX_CONNECTIONS;
        if room {
            files.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        // Every second a look for connections that last too long.
        let timeout = if self.connections.is_empty() {
            PollTimeout::NONE
        } else {
            PollTimeout::from(1000u16)
        };
        match poll(&mut files, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::io("wait for connections")(errno)),
        }
        self.connections
            .retain_mut(|c| c.advance().is_ok_and(|state| state == Progress::Open));
        if room {
            // A connection that fails here is the client's loss: it sees it closed.
            if let Ok(connection) = self
                .listener
                .accept()
                .and_then(|(stream, _)| Connection::new(stream))
            {
                self.connections.push(connection);
            }
        }
        Ok(())
    }
}

/// Whether a connection goes on.
#[derive(PartialEq)]
enum Progress {
    Open,
    Done,
}

/// One request, one answer, close.
struct Connection {
    stream: TcpStream,
    since: Instant,
    head: Vec<u8>,
    answered: bool,
}

impl Connection {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            since: Instant::now(),
            head: Vec::new(),
            answered: false,
        })
    }

    /// Does what can be done without waiting.
    fn advance(&mut self) -> io::Result<Progress> {
        let mut buffer = [0; 2048];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(Progress::Done),
                // What comes after the answer is read all the same: bytes left unread would turn
                // the close into a reset, which may overtake the page.
                Ok(_) if self.answered => {}
                Ok(more) => self.take(&buffer[..more])?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock && self.since.elapsed() < PATIENCE => {
                    return Ok(Progress::Open);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Takes a part of the request; answers when its head is complete.
    fn take(&mut self, part: &[u8]) -> io::Result<()> {
        self.head.extend_from_slice(part);
        if self.head.len() > MAX_HEAD || self.head.windows(4).any(|end| end == b"\r\n\r\n") {
            self.answered = true;
            // The answer is far smaller than a socket's buffer, so this does not have to wait.
            self.stream.write_all(&response(&self.head))?;
            self.stream.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }
}

/// The answer to a request; to HEAD without the page.
fn response(head: &[u8]) -> Vec<u8> {
    let length = PAGE.len();
    let mut out = format!("HTTP/1.1 200 OK\r\nServer: nginx/1.14.2\r\nContent-Type: text/html\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n").into_bytes();
    if !head.starts_with(b"HEAD ") {
        out.extend_from_slice(PAGE.as_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_defaults_to_80() {
        assert_eq!(port(&[]).unwrap(), 80);
        assert_eq!(port(&["12003".into()]).unwrap(), 12003);
        assert!(port(&["65536".into()]).is_err());
        assert!(port(&["nginx".into()]).is_err());
        assert_eq!(port(&["-g".into(), "daemon off;".into()]).unwrap(), 80);
        assert_eq!(
            port(&["-g".into(), "daemon off;".into(), "81".into()]).unwrap(),
            81
        );
        assert!(port(&["-g".into()]).is_err());
    }

    /// Runs a server for as long as `clients` runs.
    fn with_server(clients: impl FnOnce(std::net::SocketAddr) + Send) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, end) = std::os::unix::net::UnixStream::pair().unwrap();
        stop.set_nonblocking(true).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                clients(address);
                drop(end);
            });
            let mut server = Server::new(listener).unwrap();
            while (&stop).read(&mut [0]).is_err() {
                server.step(&stop).unwrap();
            }
        });
    }

    fn ask(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_client_gets_the_page_and_head_only_the_length() {
        with_server(|address| {
            let page = ask(address, "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
            assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.contains("Welcome to nginx!"));
            let head = ask(address, "HEAD / HTTP/1.1\r\nHost: x\r\n\r\n");
            assert!(
                head.contains(&format!("Content-Length: {}\r\n", PAGE.len()))
                    && !head.contains("Welcome")
            );
        });
    }

    #[test]
    fn a_silent_client_holds_up_nobody() {
        with_server(|address| {
            let _silent = TcpStream::connect(address).unwrap();
            assert!(ask(address, "GET / HTTP/1.0\r\n\r\n").contains("Welcome"));
        });
    }

    #[test]
    fn an_endless_head_is_answered_at_the_limit() {
        with_server(|address| {
            let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(MAX_HEAD));
            assert!(ask(address, &long).contains("Welcome"));
        });
    }
}
