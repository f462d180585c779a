// SPDX-License-Identifier: Apache-2.0

//! Port-forward into a sandbox.
//!
//! containerd forwards a port by dialling `localhost` in the Pod's network namespace, where
//! nothing listens: the Pod's servers live in the sentry's own network stack. So the shim
//! listens there, on one socket, and hands each connection to the sentry.
//!
//! To get connections to *every* port, a BPF program of type `sk_lookup` is attached to the
//! namespace: it gives TCP connections to 127.0.0.1 to the shim's socket, whatever their port
//! (kernel `Documentation/bpf/prog_sk_lookup.rst`, since 5.9). The link is a descriptor of the
//! shim: program, socket and map die with it, and nothing is written into the namespace. An
//! idle Pod pays for one socket and some hundred bytes of kernel memory.

mod bpf;

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener as StdListener},
    os::fd::{AsFd, OwnedFd},
    os::unix::net::UnixStream as StdUnixStream,
    path::Path,
    sync::Arc,
};

use log::{debug, warn};
use nix::sched::{CloneFlags, setns};
use runsc_wrapper::{ContainerId, Runtime};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

/// Connections that one Pod may have open at a time.
const MAX_CONNECTIONS: usize = 256;

/// Serves forwarded connections in `netns` until `done`; connections are handed to `runtime` for
/// container `id`.
///
/// # Errors
/// The kernel's, where it lacks `sk_lookup` or refuses it.
pub(crate) fn serve(
    netns: &Path,
    runtime: Arc<dyn Runtime>,
    id: ContainerId,
    done: CancellationToken,
) -> io::Result<()> {
    let (listener, link) = attach(netns)?;
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    tokio::spawn(async move {
        tokio::select! {
            () = accept_all(listener, runtime, id) => {}
            () = done.cancelled() => {}
        }
        drop(link);
    });
    Ok(())
}

/// Listens in `netns` and directs every connection to its loopback address there. On a thread of
/// its own, because a thread keeps the namespace that it has entered.
fn attach(netns: &Path) -> io::Result<(StdListener, OwnedFd)> {
    let work = || {
        let namespace = File::open(netns)?;
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        let listener = StdListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
        let link = bpf::direct_loopback(listener.as_fd(), namespace.as_fd())?;
        Ok((listener, link))
    };
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    done.unwrap_or_else(|_| {
        Err(io::Error::other(
            "the thread in the network namespace panicked",
        ))
    })
}

async fn accept_all(listener: TcpListener, runtime: Arc<dyn Runtime>, id: ContainerId) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed, so that this cannot fail.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
            return;
        };
        let (client, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                warn!("port-forward: accept: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let (runtime, id) = (Arc::clone(&runtime), id.clone());
        tokio::spawn(async move {
            if let Err(e) = forward(client, &*runtime, &id).await {
                debug!("port-forward: {e}");
            }
            drop(slot);
        });
    }
}

/// Forwards a connection until one side ends it. A client whose connection is not served, or is
/// broken off, gets a reset: it was accepted before it was known whether anything listens, and an
/// orderly end would say that the server had nothing to answer.
async fn forward(mut client: TcpStream, runtime: &dyn Runtime, id: &ContainerId) -> io::Result<()> {
    let done = exchange(&mut client, runtime, id).await;
    if done.is_err() {
        client.set_zero_linger()?;
    }
    done
}

async fn exchange(
    client: &mut TcpStream,
    runtime: &dyn Runtime,
    id: &ContainerId,
) -> io::Result<()> {
    // The program redirects no packets, so that the local address is still the one dialled.
    let port = client.local_addr()?.port();
    let (ours, theirs) = StdUnixStream::pair()?;
    runtime
        .port_forward(id, port, theirs.into())
        .await
        .map_err(io::Error::other)?;
    ours.set_nonblocking(true)?;
    let mut sandbox = UnixStream::from_std(ours)?;
    copy_bidirectional(client, &mut sandbox).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{io::Write, net::TcpStream as StdTcpStream, process::Command};

    use nix::sched::unshare;

    use super::*;

    /// Runs `work` on a thread in a network namespace of its own, with its loopback up.
    fn in_new_netns(work: impl FnOnce(&Path) + Send + 'static) {
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status()
                .unwrap();
            assert!(up.success());
            let tid = nix::unistd::gettid();
            work(Path::new(&format!("/proc/self/task/{tid}/ns/net")));
        });
        thread.join().unwrap();
    }

    #[test]
    #[ignore = "needs root"]
    fn every_port_of_the_namespace_leads_to_the_one_listener() {
        in_new_netns(|netns| {
            let (listener, link) = attach(netns).unwrap();
            for port in [1, 80, 8080, 65_535] {
                let mut client = StdTcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
                let (served, _) = listener.accept().unwrap();
                assert_eq!(served.local_addr().unwrap().port(), port);
                client.write_all(b"x").unwrap();
            }
            drop(link);
            assert!(
                StdTcpStream::connect((Ipv4Addr::LOCALHOST, 80)).is_err(),
                "nothing must be left"
            );
        });
    }

    #[test]
    #[ignore = "needs root"]
    fn only_the_loopback_address_is_taken() {
        in_new_netns(|netns| {
            let own = Command::new("ip")
                .args(["addr", "add", "10.99.0.1/32", "dev", "lo"])
                .status()
                .unwrap();
            assert!(own.success());
            let server = StdListener::bind("10.99.0.1:7777").unwrap();
            let (_listener, _link) = attach(netns).unwrap();
            let _client = StdTcpStream::connect("10.99.0.1:7777").unwrap();
            server.accept().unwrap();
            assert!(StdTcpStream::connect("10.99.0.1:7778").is_err());
        });
    }
}
