// SPDX-License-Identifier: Apache-2.0

//! What `delete` takes away.

use std::{
    env, fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::SystemTime,
};

use containerd_shim::Flags;
use containerd_shim_protos::{
    api::{DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, WaitRequest},
    shim_async::{Client, TaskClient},
    ttrpc::{self, context},
};
use runsc_wrapper::{ContainerId, Exit};

use super::{address_in, socket_path};
use kiln_host::cgroup::Cgroup;

use crate::{
    error::{Error, Result},
    events::timestamp,
    host_dirs::HostDirs,
    rootfs,
    sandbox::{adopt::end_gofer, record::Record, scratch::Scratch},
    server,
};

/// How long a server may take to answer `delete`, in nanoseconds: containerd gives that five
/// seconds (`cleanupTimeout`), and there is more to do.
const ANSWER: i64 = 1_000_000_000;

/// Takes away what a container left whose shim is gone, or is not asked any more. Everything that
/// fails is reported, and the rest is done all the same.
pub(super) async fn delete(flags: &Flags, id: &ContainerId) -> Result<DeleteResponse> {
    let bundle = match flags.bundle.as_str() {
        "" => env::current_dir().map_err(Error::io("find", Path::new(".")))?,
        bundle => PathBuf::from(bundle),
    };
    kiln_host::reap::become_subreaper().map_err(|source| Error::Io {
        what: "become a subreaper".to_owned(),
        source,
    })?;
    let host = HostDirs::default();
    let mut errors = Vec::new();
    let server = Server::of(&bundle);
    if let Some(server) = server.as_ref().filter(|s| s.listens()) {
        errors.extend(server.end().await.err());
    }
    match Record::load(&bundle) {
        Ok(record) => {
            let of_pod = Server::of(&bundle.with_file_name(&record.sandbox));
            let serves = |s: &&Server| record.sandbox != id.as_str() && s.listens();
            let serving = of_pod.as_ref().filter(serves);
            if let Some(server) = serving {
                errors.extend(server.forget(id).await.err());
            }
            let pod = LeftPod {
                is_lost: serving.is_none(),
                scratch: of_pod
                    .as_ref()
                    .and_then(|s| s.scratch(&host, &record.sandbox)),
                host,
            };
            delete_recorded(flags, id, &record, &pod, &mut errors).await;
        }
        // No record: create never came to the runtime.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            if let Some(server) = &server {
                let dir = Scratch::place(&host, id, socket_path(&server.address));
                errors.extend(Scratch::remove_dir(&dir).err());
            }
        }
        Err(e) => errors.push(e),
    }
    errors.extend(rootfs::unmount(&bundle.join("rootfs")).err());
    if let Some(server) = server.filter(|s| !s.listens()) {
        // That its socket is gone already is as good.
        fs::remove_file(socket_path(&server.address)).ok();
    }
    if let Some(first) = errors.into_iter().next() {
        return Err(first);
    }
    let killed = Exit::now(Exit::KILLED);
    Ok(DeleteResponse {
        exit_status: killed.code,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    })
}

/// What a container's Pod still has.
struct LeftPod {
    /// It has no shim that serves it.
    is_lost: bool,
    /// The directory for its calls, where its bundle tells that.
    scratch: Option<PathBuf>,
    host: HostDirs,
}

/// Takes away a container that came to the runtime, and the whole Pod where that has lost its shim.
async fn delete_recorded(
    flags: &Flags,
    id: &ContainerId,
    record: &Record,
    pod: &LeftPod,
    errors: &mut Vec<Error>,
) {
    let is_lost = pod.is_lost;
    // containerd deletes all containers of a Pod at once, and runsc's files suffer from it.
    let _alone = pod.scratch.as_deref().and_then(Scratch::lock);
    let config = record.node_config();
    if let (Ok(config), true) = (&config, is_lost && !record.adopted.is_empty()) {
        end_gofer(&config.policy.agent, &record.adopted);
    }
    match config.and_then(|config| server::runtime(&config, &flags.namespace)) {
        Ok(runtime) => {
            // What lives in a sentry that is gone is gone at once, where runsc would wait for
            // each container to stop.
            let sandbox = record.runtime_id().parse().unwrap_or_else(|_| id.clone());
            let member = (record.sandbox != id.as_str()).then_some(id);
            for left in [is_lost.then_some(&sandbox), member].into_iter().flatten() {
                errors.extend(runtime.delete(left).await.err().map(Error::from));
            }
        }
        Err(e) => errors.push(e),
    }
    if !record.cgroup.is_empty() {
        let cgroup = Cgroup::new(&pod.host.cgroups, &record.cgroup);
        let removed = cgroup.and_then(|cgroup| {
            if !record.adopted.is_empty() {
                // The agent may have kept a gofer of which the runtime does not know.
                cgroup.kill();
            }
            cgroup.remove()
        });
        errors.extend(removed.err().map(Error::from));
    }
    if let Some(dir) = pod
        .scratch
        .as_deref()
        .filter(|_| record.sandbox == id.as_str())
    {
        errors.extend(Scratch::remove_dir(dir).err());
    }
}

/// The server of a sandbox. That it still listens means that containerd has one of its containers
/// for dead and will never ask it for that again: it was too slow when containerd came back, or the
/// containerd before has deleted the last container and died before it said so
/// (`core/runtime/v2/shim_load.go`).
struct Server {
    address: String,
}

impl Server {
    /// That of the sandbox of `bundle`; a member's bundle has none.
    fn of(bundle: &Path) -> Option<Self> {
        address_in(bundle).map(|address| Self { address })
    }

    /// The directory for calls of the sandbox that it serves.
    fn scratch(&self, host: &HostDirs, sandbox: &str) -> Option<PathBuf> {
        let id = sandbox.parse().ok()?;
        Some(Scratch::left_by(host, &id, socket_path(&self.address)))
    }

    fn listens(&self) -> bool {
        UnixStream::connect(socket_path(&self.address)).is_ok()
    }

    /// Ends it, if it is not about to end anyway. One that is too slow still ends when it gets
    /// there.
    async fn end(&self) -> Result<()> {
        match self.shut_down().await {
            Err(e) if self.listens() => Err(e),
            _ => Ok(()),
        }
    }

    async fn shut_down(&self) -> Result<()> {
        let shutdown = ShutdownRequest {
            now: true,
            ..ShutdownRequest::default()
        };
        let task = self.connect().await?;
        let ended = task.shutdown(context::with_timeout(ANSWER), &shutdown);
        ended.await.map(drop).map_err(|e| self.failed(e))
    }

    /// Has it kill and delete a member, for which it would wait before it ends.
    async fn forget(&self, id: &ContainerId) -> Result<()> {
        let task = self.connect().await?;
        let kill = KillRequest {
            id: id.to_string(),
            signal: libc::SIGKILL.cast_unsigned(),
            all: true,
            ..KillRequest::default()
        };
        let wait = WaitRequest {
            id: id.to_string(),
            ..WaitRequest::default()
        };
        let delete = DeleteRequest {
            id: id.to_string(),
            ..DeleteRequest::default()
        };
        // One that has ended cannot be killed, and is as good.
        task.kill(context::with_timeout(ANSWER), &kill).await.ok();
        let deleted = async {
            task.wait(context::with_timeout(ANSWER), &wait).await?;
            task.delete(context::with_timeout(ANSWER), &delete).await
        };
        match deleted.await {
            Ok(_) => Ok(()),
            // It does not know it.
            Err(ttrpc::Error::RpcStatus(s)) if s.code() == ttrpc::Code::NOT_FOUND => Ok(()),
            Err(e) => Err(self.failed(e)),
        }
    }

    async fn connect(&self) -> Result<TaskClient> {
        let client = Client::connect(&self.address).await;
        client.map(TaskClient::new).map_err(|e| self.failed(e))
    }

    fn failed(&self, e: ttrpc::Error) -> Error {
        Error::Io {
            what: format!("ask the server at {}", self.address),
            source: io::Error::other(e),
        }
    }
}
