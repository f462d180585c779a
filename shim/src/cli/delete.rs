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
use crate::{
    adopt::end_gofer,
    cgroup::{self, Cgroup},
    config::NodeConfig,
    error::{Error, Result},
    events::timestamp,
    rootfs,
    sandbox::{Record, Scratch},
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
    runsc_wrapper::reap::become_subreaper().map_err(|source| Error::Io {
        what: "become a subreaper".to_owned(),
        source,
    })?;
    let mut errors = Vec::new();
    if let Some(server) = OldServer::find(&bundle) {
        errors.extend(server.end().await.err());
    }
    match Record::load(&bundle) {
        Ok(record) => delete_recorded(flags, id, &bundle, &record, &mut errors).await,
        // No record: create never came to the runtime.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            errors.extend(Scratch::remove_stale(id).err());
        }
        Err(e) => errors.push(e),
    }
    errors.extend(rootfs::unmount(&bundle.join("rootfs")).err());
    remove_socket(&bundle);
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

async fn delete_recorded(
    flags: &Flags,
    id: &ContainerId,
    bundle: &Path,
    record: &Record,
    errors: &mut Vec<Error>,
) {
    // containerd deletes all containers of a Pod at once, and runsc's files suffer from it.
    let _turn = Scratch::lock(&record.sandbox);
    let config = NodeConfig::load(record.config.as_deref());
    let member = (record.sandbox != id.as_str()).then_some(id);
    let server = member.and_then(|_| OldServer::find(&bundle.with_file_name(&record.sandbox)));
    let is_lost = server.is_none();
    if let Some(server) = server {
        errors.extend(server.forget(id).await.err());
    }
    if let (Ok(config), true) = (&config, is_lost && !record.adopted.is_empty()) {
        end_gofer(&config.policy.agent, &record.adopted);
    }
    match config.and_then(|config| server::runtime(&config, &flags.namespace)) {
        Ok(runtime) => {
            // Without its shim the whole Pod is lost: what lives in a sentry that is gone is
            // gone at once, where runsc would wait for each container to stop.
            let sandbox = record.runtime_id().parse().unwrap_or_else(|_| id.clone());
            let sandbox = is_lost.then_some(&sandbox);
            for doomed in [sandbox, member].into_iter().flatten() {
                errors.extend(runtime.delete(doomed, true).await.err().map(Error::from));
            }
        }
        Err(e) => errors.push(e),
    }
    if !record.cgroup.is_empty() {
        let cgroup = Cgroup::new(Path::new(cgroup::MOUNT), &record.cgroup);
        let removed = cgroup.and_then(|cgroup| {
            if !record.adopted.is_empty() {
                // The agent may have kept a gofer of which the runtime does not know.
                cgroup.kill();
            }
            cgroup.remove()
        });
        errors.extend(removed.err());
    }
    if record.sandbox == id.as_str() {
        errors.extend(Scratch::remove_stale(id).err());
    }
}

/// A server that still listens when containerd has one of its containers for dead, and will never
/// ask it for that again: it was too slow when containerd came back, or the containerd before has
/// deleted the last container and died before it said so (`core/runtime/v2/shim_load.go`).
struct OldServer {
    address: String,
}

impl OldServer {
    /// The server of the sandbox of `bundle`; a member's bundle has none.
    fn find(bundle: &Path) -> Option<Self> {
        let server = Self {
            address: address_in(bundle)?,
        };
        server.listens().then_some(server)
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
        let (kill, wait, delete) = (
            KillRequest {
                id: id.to_string(),
                signal: libc::SIGKILL.cast_unsigned(),
                all: true,
                ..KillRequest::default()
            },
            WaitRequest {
                id: id.to_string(),
                ..WaitRequest::default()
            },
            DeleteRequest {
                id: id.to_string(),
                ..DeleteRequest::default()
            },
        );
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

/// Removes the socket of a server that is gone.
fn remove_socket(bundle: &Path) {
    let Some(address) = address_in(bundle) else {
        return;
    };
    let socket = socket_path(&address);
    if UnixStream::connect(socket).is_err() {
        // That it is gone already is as good.
        fs::remove_file(socket).ok();
    }
}
