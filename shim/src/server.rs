// SPDX-License-Identifier: Apache-2.0

//! The server process of one Pod.
//!
//! `start` gives it the bound socket as standard input, so that the address is connectable
//! before the server runs, and waits for one byte on its standard output, so that a server that
//! cannot come up is a failed `start` and not a dead socket.

use std::{
    collections::HashMap,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::{fd::AsFd, unix::net::UnixListener},
    path::Path,
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    shim_async::{Task, create_task},
    ttrpc::r#async::{Server, Service, transport::Listener},
};
use kiln_agent_api::{NodeConfig, api::create_snapshots};
use kiln_host::reap;
use log::{info, warn};
use nix::unistd::dup2_stdin;
use runsc_wrapper::{Runsc, WarmRuntime};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    error::{Error, Result},
    events::{EventSink, Publisher},
    host_dirs::HostDirs,
    logging,
    pod::Pod,
    snapshots::SnapshotService,
    task::TaskService,
};

/// Sent to the `start` that waits.
pub(crate) const READY: u8 = b'+';

/// How long the last events may take to reach containerd when the shim ends.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// What the server must know.
#[derive(Debug)]
pub(crate) struct ServerOpts {
    pub(crate) id: String,
    pub(crate) namespace: String,
    pub(crate) ttrpc_address: String,
    pub(crate) debug: bool,
}

/// Serves until the Pod is gone or the process is told to end. Containers outlive the latter.
pub(crate) async fn serve(opts: ServerOpts) -> Result<()> {
    logging::init(Path::new("log"), &opts.id, opts.debug);
    reap::become_subreaper().map_err(|e| Error::Io {
        what: "become a subreaper".to_owned(),
        source: e,
    })?;
    let listener = inherited_listener()?;
    let socket = listener
        .local_addr()
        .and_then(|a| {
            a.as_pathname()
                .map(Path::to_owned)
                .ok_or_else(|| io::Error::other("it has no path"))
        })
        .map_err(Error::io("look at", Path::new("the socket")))?;
    let publisher = Publisher::new(opts.ttrpc_address, opts.namespace.clone());
    let events = Arc::clone(&publisher) as Arc<dyn EventSink>;
    let pod = Pod::new(
        opts.namespace,
        HostDirs::default(),
        socket.clone(),
        Box::new(runtime),
        events,
    );
    let rpc = |e| Error::Io {
        what: "serve".to_owned(),
        source: io::Error::other(e),
    };
    let listener = Listener::try_from(listener).map_err(rpc)?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(services(&pod));
    server.start().await.map_err(|e| rpc(io::Error::other(e)))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(rpc)?;
    protect_from_oom();
    if let Err(e) = say_ready() {
        // `start` is gone: nobody will ever know of the socket.
        remove_socket(&socket);
        return Err(e);
    }
    info!("serving");

    tokio::select! {
        () = pod.done() => info!("the Pod is gone"),
        _ = terminate.recv() => warn!("terminated; containers go on without their shim"),
    }
    // The reply to Shutdown leaves before the connections are closed.
    server
        .shutdown()
        .await
        .map_err(|e| rpc(io::Error::other(e)))?;
    publisher.flush(LAST_EVENTS).await;
    remove_socket(&socket);
    Ok(())
}

/// The Task service under both names, for containerd 1.7 knows it as v2 with the same messages, and
/// what the node's agent asks.
fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let snapshots = create_snapshots(Arc::new(SnapshotService::new(Arc::clone(pod))));
    let task: Arc<dyn Task + Send + Sync> = Arc::new(TaskService::new(Arc::clone(pod)));
    let v2 = create_task(Arc::clone(&task))
        .into_values()
        .map(|s| ("containerd.task.v2.Task".to_owned(), s));
    v2.chain(create_task(task)).chain(snapshots).collect()
}

/// The runtime that the node's configuration describes, with its state apart per namespace.
pub(crate) fn runtime(config: &NodeConfig, namespace: &str) -> Result<Arc<dyn WarmRuntime>> {
    let runtime = config.runtime.clone().in_namespace(namespace);
    let runtime = runtime.map_err(|e| Error::InvalidArgument(e.to_string()))?;
    Ok(Arc::new(Runsc::new(runtime)))
}

/// Takes the socket from standard input and leaves `/dev/null` there.
fn inherited_listener() -> Result<UnixListener> {
    let take = || {
        let listener = io::stdin().as_fd().try_clone_to_owned()?;
        let null = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        dup2_stdin(&null)?;
        let listener = UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    take().map_err(|source| Error::Io {
        what: "take the inherited socket".to_owned(),
        source,
    })
}

/// Tells `start`, and lets go of its pipe.
fn say_ready() -> Result<()> {
    let say = || {
        io::stdout().write_all(&[READY])?;
        io::stdout().flush()?;
        let null = OpenOptions::new().write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(&null)?;
        Ok(())
    };
    say().map_err(|source| Error::Io {
        what: "report to start".to_owned(),
        source,
    })
}

/// The shim should be the last to go when memory is short: it is what tells containerd. It needs
/// CAP_SYS_RESOURCE and goes on without.
fn protect_from_oom() {
    if let Err(e) = fs::write("/proc/self/oom_score_adj", "-998") {
        warn!("oom_score_adj stays as it is: {e}");
    }
}

fn remove_socket(path: &Path) {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => warn!("remove {}: {e}", path.display()),
        _ => {}
    }
}
