// SPDX-License-Identifier: Apache-2.0

//! containerd's Task API (`containerd.task.v3.Task`; v2 has the same messages): requests in,
//! calls of [`Pod`], replies out. All 17 methods are here, because one that is missing would
//! answer NOT_FOUND, which containerd takes for "already gone".
//!
//! ttrpc drops a handler half-way when its client hangs up or its deadline passes, so every
//! method that changes something runs in a task of its own and the handler only waits for it.

use std::{future::Future, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::MessageField,
    shim::oci::ProcessDetails,
    shim_async::Task,
    ttrpc::{Result as RpcResult, r#async::TtrpcContext},
};

use crate::{
    error::{Error, Result},
    events::{pack, timestamp},
    io::IoSpec,
    pod::Pod,
    request::CreateRequest,
    state::State,
    stats,
};

/// The Task service of one Pod.
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// Serves `pod`.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    /// Runs `work` to its end, whatever becomes of the client.
    async fn detached<T, F>(&self, work: impl FnOnce(Arc<Pod>) -> F) -> RpcResult<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let done = tokio::spawn(work(Arc::clone(&self.pod))).await;
        let lost = |e: tokio::task::JoinError| Error::Io {
            what: "run the call".to_owned(),
            source: e.into(),
        };
        Ok(done.map_err(lost)??)
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        req: CreateTaskRequest,
    ) -> RpcResult<CreateTaskResponse> {
        let request = CreateRequest {
            id: req.id,
            bundle: PathBuf::from(req.bundle),
            rootfs: req.rootfs,
            io: IoSpec {
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
                terminal: req.terminal,
            },
            checkpoint: req.checkpoint,
            options: req.options.into_option(),
        };
        let pid = self
            .detached(|pod| async move { pod.create(request).await })
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> RpcResult<StartResponse> {
        let pid = self
            .detached(|pod| async move { pod.start(&req.id, &req.exec_id).await })
            .await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> RpcResult<DeleteResponse> {
        let (pid, exit) = self
            .detached(|pod| async move { pod.delete(&req.id, &req.exec_id).await })
            .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> RpcResult<Empty> {
        let io = IoSpec {
            stdin: req.stdin,
            stdout: req.stdout,
            stderr: req.stderr,
            terminal: req.terminal,
        };
        self.pod.exec(&req.id, &req.exec_id, io, &req.spec.value)?;
        Ok(Empty::default())
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> RpcResult<Empty> {
        let KillRequest {
            id,
            exec_id,
            signal,
            all,
            ..
        } = req;
        self.detached(|pod| async move { pod.kill(&id, &exec_id, signal, all).await })
            .await?;
        Ok(Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> RpcResult<Empty> {
        self.detached(|pod| async move { pod.pause(&req.id).await })
            .await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> RpcResult<Empty> {
        self.detached(|pod| async move { pod.resume(&req.id).await })
            .await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: CheckpointTaskRequest) -> RpcResult<Empty> {
        let options = req.options.into_option();
        let call = |pod: Arc<Pod>| async move {
            pod.checkpoint(&req.id, &req.path, options.as_ref()).await
        };
        self.detached(call).await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> RpcResult<Empty> {
        let call = |pod: Arc<Pod>| async move { pod.update(&req.id, &req.resources.value).await };
        self.detached(call).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> RpcResult<Empty> {
        self.pod
            .resize(&req.id, &req.exec_id, req.width, req.height)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> RpcResult<Empty> {
        if req.stdin {
            self.pod.close_io(&req.id, &req.exec_id)?;
        }
        Ok(Empty::default())
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> RpcResult<StateResponse> {
        let report = self.pod.report(&req.id, &req.exec_id)?;
        let exit = report.state.exit();
        Ok(StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: report.bundle.display().to_string(),
            pid: report.pid,
            status: status(report.state).into(),
            stdin: report.io.stdin,
            stdout: report.io.stdout,
            stderr: report.io.stderr,
            terminal: report.io.terminal,
            exit_status: exit.map_or(0, |e| e.code),
            exited_at: exit.map(|e| timestamp(e.at)).unwrap_or_default(),
            ..StateResponse::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> RpcResult<WaitResponse> {
        let exit = self.pod.wait(&req.id, &req.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> RpcResult<PidsResponse> {
        let mut processes = Vec::new();
        for (pid, exec_id) in self.pod.pids(&req.id).await? {
            let details = |exec_id| ProcessDetails {
                exec_id,
                ..ProcessDetails::default()
            };
            let info = exec_id
                .map(|id| pack("containerd.runc.v1", &details(id)))
                .transpose()?;
            processes.push(ProcessInfo {
                pid,
                info: info.into(),
                ..ProcessInfo::default()
            });
        }
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> RpcResult<StatsResponse> {
        let metrics = stats::metrics(&req.id, &self.pod.stats(&req.id).await?)?;
        Ok(StatsResponse {
            stats: MessageField::some(metrics),
            ..StatsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> RpcResult<ConnectResponse> {
        let report = self.pod.report(&req.id, "")?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: report.pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, req: ShutdownRequest) -> RpcResult<Empty> {
        // containerd never asks for that; `delete` does.
        self.pod.shutdown(req.now);
        Ok(Empty::default())
    }
}

fn status(state: State) -> Status {
    match state {
        State::Created => Status::CREATED,
        State::Running => Status::RUNNING,
        State::Paused => Status::PAUSED,
        State::Stopped(_) => Status::STOPPED,
    }
}
