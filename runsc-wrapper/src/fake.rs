// SPDX-License-Identifier: Apache-2.0

//! A runtime that runs nothing, for tests of what stands on [`Runtime`].
//!
//! It keeps the states that a runtime keeps, records every call, and does as a test tells it:
//! fail, take its time, let a process write or end. Its pids lie above any `pid_max`, so that a
//! stray kill hits nobody.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io::Write,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::{SetOnce, watch};

use crate::{
    CheckpointOpts, ContainerId, CreateOpts, Exec, ExecOpts, Exit, ExitFuture, KillTarget,
    PrestartedGofer, Process, PutInPlace, Result, Runtime, RuntimeError, StartWay, Stats, Status,
    Stdio, WarmRuntime, exec::open_terminal,
};

/// First of the fake pids; Linux ends at 2^22.
const FIRST_PID: u32 = 1 << 30;

/// One call of a [`Runtime`] method.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The operation as the command line calls it: `create`, `start`, `restore`, `wait`, `exec`,
    /// `kill`, `delete`, `state`, `ps`, `pause`, `resume`, `events`, `checkpoint`, `port-forward`
    /// or `features`.
    pub op: &'static str,
    /// The container, empty for `features`.
    pub id: String,
    /// What else was asked, such as `Init 15` for a kill or the process of an exec as JSON.
    pub detail: String,
}

/// The runtime that runs nothing.
#[derive(Debug, Default)]
pub struct FakeRuntime {
    inner: Mutex<Inner>,
    last_pid: AtomicU32,
}

#[derive(Debug, Default)]
struct Inner {
    containers: BTreeMap<ContainerId, Container>,
    calls: Vec<Call>,
    failures: HashMap<&'static str, VecDeque<RuntimeError>>,
    delays: HashMap<&'static str, Duration>,
    holds: HashMap<&'static str, watch::Receiver<bool>>,
    stats: Stats,
    deaf: bool,
}

#[derive(Debug)]
struct Container {
    sandbox: ContainerId,
    pid: u32,
    status: Status,
    init: Run,
    execs: BTreeMap<u32, Run>,
}

/// A fake process.
#[derive(Debug)]
struct Run {
    exit: Arc<SetOnce<Exit>>,
    /// Kept open until the process ends, as a real one would.
    stdio: Stdio,
    terminal: Option<OwnedFd>,
}

impl Run {
    fn end(&mut self, code: u32) {
        // Ended twice, the first end counts.
        let _ = self.exit.set(Exit::now(code));
        self.stdio = Stdio::default();
        self.terminal = None;
    }

    fn has_ended(&self) -> bool {
        self.exit.initialized()
    }
}

/// Keeps calls of one operation waiting; see [`FakeRuntime::hold`].
#[derive(Debug)]
pub struct Hold(watch::Sender<bool>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

impl FakeRuntime {
    /// A runtime without containers.
    pub fn new() -> Self {
        Self::default()
    }

    /// All calls so far, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// The operations called on `id` so far, in order.
    pub fn ops(&self, id: &str) -> Vec<&'static str> {
        self.lock()
            .calls
            .iter()
            .filter(|call| call.id == id)
            .map(|call| call.op)
            .collect()
    }

    /// Lets the next call of `op` fail with `error`; more than one wait in a queue.
    pub fn fail_next(&self, op: &'static str, error: RuntimeError) {
        self.lock().failures.entry(op).or_default().push_back(error);
    }

    /// Lets every call of `op` take `time` from now on.
    pub fn delay(&self, op: &'static str, time: Duration) {
        self.lock().delays.insert(op, time);
    }

    /// Keeps calls of `op` waiting as long as the result lives.
    #[must_use]
    pub fn hold(&self, op: &'static str) -> Hold {
        let (hold, released) = watch::channel(false);
        self.lock().holds.insert(op, released);
        Hold(hold)
    }

    /// Says whether processes ignore signals other than `SIGKILL`; at first they end by each.
    pub fn ignore_signals(&self, ignore: bool) {
        self.lock().deaf = ignore;
    }

    /// What [`Runtime::stats`] will say of every container.
    pub fn set_stats(&self, stats: Stats) {
        self.lock().stats = stats;
    }

    /// Ends the first process of container `id`, and with a sandbox's root container the sandbox.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn end(&self, id: &str, code: u32) {
        let mut inner = self.lock();
        let container = inner.container_of(id);
        container.stop(code);
        let root = container.sandbox.clone();
        if root.as_str() == id {
            inner.end_sandbox(&root);
        }
    }

    /// Ends a process that was started by [`Runtime::exec`].
    ///
    /// # Panics
    /// When there is no such process.
    #[allow(clippy::expect_used)]
    pub fn end_exec(&self, id: &str, pid: u32, code: u32) {
        self.lock()
            .container_of(id)
            .execs
            .get_mut(&pid)
            .expect("no such exec")
            .end(code);
    }

    /// Kills the sandbox `id` as the host would, with all that is in it.
    ///
    /// # Panics
    /// When there is no such sandbox.
    pub fn kill_sandbox(&self, id: &str) {
        let mut inner = self.lock();
        let root = inner.container_of(id).sandbox.clone();
        inner.end_sandbox(&root);
    }

    /// Writes to the standard output, or the terminal, of a container's first process or of the
    /// exec with `pid`.
    ///
    /// # Panics
    /// When there is no such process, it has no output, or nobody reads.
    #[allow(clippy::expect_used)]
    pub fn write_output(&self, id: &str, pid: Option<u32>, text: &[u8]) {
        let copy = {
            let mut inner = self.lock();
            let container = inner.container_of(id);
            let run = match pid {
                None => &container.init,
                Some(pid) => container.execs.get(&pid).expect("no such exec"),
            };
            let output = run.terminal.as_ref().or(run.stdio.stdout.as_ref());
            output
                .expect("the process has no output")
                .try_clone()
                .expect("copy a descriptor")
        };
        std::fs::File::from(copy)
            .write_all(text)
            .expect("write output");
    }

    /// The pids of running execs of container `id`.
    ///
    /// # Panics
    /// When there is no such container.
    pub fn execs(&self, id: &str) -> Vec<u32> {
        let mut inner = self.lock();
        let execs = &inner.container_of(id).execs;
        execs
            .iter()
            .filter(|(_, run)| !run.has_ended())
            .map(|(pid, _)| *pid)
            .collect()
    }

    /// The containers that were made and not deleted.
    pub fn containers(&self) -> Vec<String> {
        self.lock()
            .containers
            .keys()
            .map(ToString::to_string)
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_pid(&self) -> u32 {
        FIRST_PID + self.last_pid.fetch_add(1, Ordering::Relaxed)
    }

    /// What every call begins with: record, wait, fail.
    async fn begin(&self, op: &'static str, id: &str, detail: String) -> Result<()> {
        let (delay, hold, failure) = {
            let mut inner = self.lock();
            inner.calls.push(Call {
                op,
                id: id.to_owned(),
                detail,
            });
            let failure = inner.failures.get_mut(op).and_then(VecDeque::pop_front);
            (
                inner.delays.get(op).copied(),
                inner.holds.get(op).cloned(),
                failure,
            )
        };
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        if let Some(mut hold) = hold {
            // A dropped hold has released first.
            let _ = hold.wait_for(|released| *released).await;
        }
        failure.map_or(Ok(()), Err)
    }

    async fn start_run(&self, stdio: &Stdio, console: Option<&Path>) -> std::io::Result<Run> {
        let terminal = match console {
            Some(console) => Some(open_terminal(console).await?),
            None => None,
        };
        let stdio = if terminal.is_some() {
            Stdio::default()
        } else {
            stdio.try_clone()?
        };
        Ok(Run {
            exit: Arc::default(),
            stdio,
            terminal,
        })
    }
}

impl Container {
    fn stop(&mut self, code: u32) {
        self.status = Status::Stopped;
        self.init.end(code);
    }
}

impl Inner {
    #[allow(clippy::expect_used)]
    fn container_of(&mut self, id: &str) -> &mut Container {
        let found = self
            .containers
            .iter_mut()
            .find(|(known, _)| known.as_str() == id);
        found.expect("no such container").1
    }

    fn get(&mut self, op: &'static str, id: &ContainerId) -> Result<&mut Container> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| RuntimeError::NotFound {
                op,
                id: id.to_string(),
                message: "no such container".to_owned(),
            })
    }

    fn end_sandbox(&mut self, sandbox: &ContainerId) {
        for container in self
            .containers
            .values_mut()
            .filter(|c| c.sandbox == *sandbox)
        {
            container.stop(Exit::KILLED);
            container
                .execs
                .values_mut()
                .for_each(|run| run.end(Exit::KILLED));
        }
    }
}

fn in_state(op: &'static str, id: &ContainerId, status: Status) -> RuntimeError {
    let message = format!(
        "cannot {op} container {:?} in state {status:?}",
        id.as_str()
    );
    RuntimeError::NotRunning {
        op,
        id: id.to_string(),
        message,
    }
}

fn future_of(run: &Run) -> ExitFuture {
    let exit = run.exit.clone();
    Box::pin(async move { Ok(*exit.wait().await) })
}

fn io_error(source: std::io::Error) -> RuntimeError {
    RuntimeError::Io {
        what: "fake a process".to_owned(),
        source,
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn create(&self, opts: &CreateOpts) -> Result<u32> {
        let id = &opts.id;
        self.begin("create", id.as_str(), format!("sandbox {}", opts.sandbox))
            .await?;
        let init = self
            .start_run(&opts.stdio, opts.console_socket.as_deref())
            .await;
        let init = init.map_err(io_error)?;
        let new_pid = self.new_pid();
        let mut inner = self.lock();
        if inner.containers.contains_key(id) {
            let message = "container already exists".to_owned();
            return Err(RuntimeError::AlreadyExists {
                op: "create",
                id: id.to_string(),
                message,
            });
        }
        let pid = if *id == opts.sandbox {
            new_pid
        } else {
            inner.get("create", &opts.sandbox)?.pid
        };
        let sandbox = opts.sandbox.clone();
        let container = Container {
            sandbox,
            pid,
            status: Status::Created,
            init,
            execs: BTreeMap::new(),
        };
        inner.containers.insert(id.clone(), container);
        Ok(pid)
    }

    async fn start(&self, id: &ContainerId, _stdio: &Stdio) -> Result<()> {
        self.begin("start", id.as_str(), String::new()).await?;
        let mut inner = self.lock();
        let container = inner.get("start", id)?;
        if container.status != Status::Created {
            return Err(in_state("start", id, container.status));
        }
        container.status = Status::Running;
        Ok(())
    }

    async fn restore(&self, id: &ContainerId, image: &Path, _stdio: &Stdio) -> Result<()> {
        self.begin("restore", id.as_str(), image.display().to_string())
            .await?;
        let mut inner = self.lock();
        let container = inner.get("restore", id)?;
        if container.status != Status::Created {
            return Err(in_state("restore", id, container.status));
        }
        container.status = Status::Running;
        Ok(())
    }

    async fn watch(&self, id: &ContainerId) -> Result<ExitFuture> {
        self.begin("wait", id.as_str(), String::new()).await?;
        Ok(future_of(&self.lock().get("wait", id)?.init))
    }

    async fn exec(&self, opts: &ExecOpts) -> Result<Exec> {
        let id = &opts.container;
        self.begin("exec", id.as_str(), opts.process.to_string())
            .await?;
        let run = self
            .start_run(&opts.stdio, opts.console_socket.as_deref())
            .await;
        let run = run.map_err(io_error)?;
        let pid = self.new_pid();
        let mut inner = self.lock();
        let container = inner.get("exec", id)?;
        if container.status != Status::Running {
            return Err(in_state("exec", id, container.status));
        }
        let exit = future_of(&run);
        container.execs.insert(pid, run);
        Ok(Exec { pid, exit })
    }

    async fn kill(&self, id: &ContainerId, target: KillTarget, signal: i32) -> Result<()> {
        self.begin("kill", id.as_str(), format!("{target:?} {signal}"))
            .await?;
        let mut inner = self.lock();
        let ends = signal == libc::SIGKILL || !inner.deaf;
        let container = inner.get("kill", id)?;
        let gone = || {
            let message = "no such process".to_owned();
            Err(RuntimeError::NotFound {
                op: "kill",
                id: id.to_string(),
                message,
            })
        };
        let code = 128 + signal.cast_unsigned();
        match target {
            KillTarget::Process(pid) => match container.execs.get_mut(&pid) {
                Some(run) if !run.has_ended() => {
                    if ends {
                        run.end(code);
                    }
                    Ok(())
                }
                _ => gone(),
            },
            KillTarget::Init | KillTarget::All => {
                if container.status == Status::Stopped {
                    return gone();
                }
                if container.status == Status::Created {
                    return Err(in_state("kill", id, Status::Created));
                }
                if !ends {
                    return Ok(());
                }
                if target == KillTarget::All {
                    container.execs.values_mut().for_each(|run| run.end(code));
                }
                container.stop(code);
                let sandbox = container.sandbox.clone();
                if sandbox == *id {
                    inner.end_sandbox(&sandbox);
                }
                Ok(())
            }
        }
    }

    async fn delete(&self, id: &ContainerId) -> Result<()> {
        self.begin("delete", id.as_str(), String::new()).await?;
        let mut inner = self.lock();
        let Some(container) = inner.containers.get(id) else {
            return Ok(());
        };
        let sandbox = container.sandbox.clone();
        if sandbox == *id {
            inner.end_sandbox(&sandbox);
        }
        if let Some(mut container) = inner.containers.remove(id) {
            container.stop(Exit::KILLED);
            container
                .execs
                .values_mut()
                .for_each(|run| run.end(Exit::KILLED));
        }
        Ok(())
    }

    async fn status(&self, id: &ContainerId) -> Result<Status> {
        self.begin("state", id.as_str(), String::new()).await?;
        Ok(self.lock().get("state", id)?.status)
    }

    async fn processes(&self, id: &ContainerId) -> Result<Vec<Process>> {
        self.begin("ps", id.as_str(), String::new()).await?;
        let mut inner = self.lock();
        let container = inner.get("ps", id)?;
        if !matches!(container.status, Status::Running | Status::Paused) {
            return Err(in_state("ps", id, container.status));
        }
        let execs = container
            .execs
            .iter()
            .filter(|(_, run)| !run.has_ended())
            .map(|(pid, _)| *pid);
        let name = |pid| Process {
            pid,
            command: "fake".to_owned(),
        };
        Ok(std::iter::once(1).chain(execs).map(name).collect())
    }

    async fn pause(&self, id: &ContainerId) -> Result<()> {
        self.begin("pause", id.as_str(), String::new()).await?;
        let mut inner = self.lock();
        let container = inner.get("pause", id)?;
        if container.status != Status::Running {
            return Err(in_state("pause", id, container.status));
        }
        container.status = Status::Paused;
        Ok(())
    }

    async fn resume(&self, id: &ContainerId) -> Result<()> {
        self.begin("resume", id.as_str(), String::new()).await?;
        let mut inner = self.lock();
        let container = inner.get("resume", id)?;
        if container.status != Status::Paused {
            return Err(in_state("resume", id, container.status));
        }
        container.status = Status::Running;
        Ok(())
    }

    async fn stats(&self, id: &ContainerId) -> Result<Stats> {
        self.begin("events", id.as_str(), String::new()).await?;
        let mut inner = self.lock();
        inner.get("events", id)?;
        Ok(inner.stats.clone())
    }

    async fn checkpoint(&self, id: &ContainerId, opts: &CheckpointOpts) -> Result<()> {
        let end = if opts.leave_running { "" } else { " stop" };
        let detail = format!("{}{end}", opts.image.display());
        self.begin("checkpoint", id.as_str(), detail).await?;
        let mut inner = self.lock();
        let sandbox = inner.get("checkpoint", id)?.sandbox.clone();
        if !opts.leave_running {
            inner.end_sandbox(&sandbox);
        }
        Ok(())
    }

    async fn port_forward(&self, id: &ContainerId, port: u16, stream: OwnedFd) -> Result<()> {
        self.begin("port-forward", id.as_str(), port.to_string())
            .await?;
        self.lock().get("port-forward", id)?;
        // Nobody listens in here.
        drop(stream);
        Ok(())
    }

    async fn features(&self) -> Result<serde_json::Value> {
        self.begin("features", "", String::new()).await?;
        Ok(serde_json::json!({ "ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0" }))
    }
}

/// A gofer is a process, of which this runtime has none.
fn no_gofer(op: &'static str, id: &ContainerId) -> RuntimeError {
    RuntimeError::Unsupported {
        op,
        id: id.to_string(),
    }
}

#[async_trait]
impl WarmRuntime for FakeRuntime {
    async fn start_gofer(
        &self,
        _: &Path,
        sandbox: &ContainerId,
        _: PutInPlace,
    ) -> Result<PrestartedGofer> {
        Err(no_gofer("start a gofer for", sandbox))
    }

    async fn create_with_gofer(
        &self,
        opts: &CreateOpts,
        _: PrestartedGofer,
    ) -> Result<Option<u32>> {
        Err(no_gofer("create", &opts.id))
    }

    async fn start_on_network(
        &self,
        id: &ContainerId,
        _netns: BorrowedFd<'_>,
        _way: StartWay,
    ) -> Result<()> {
        self.start(id, &Stdio::default()).await
    }

    async fn restore_on_network(
        &self,
        id: &ContainerId,
        _netns: BorrowedFd<'_>,
        image: &Path,
    ) -> Result<()> {
        self.restore(id, image, &Stdio::default()).await
    }

    async fn kill_sandbox(&self, id: &ContainerId) -> Result<()> {
        self.kill(id, KillTarget::All, 9).await
    }

    async fn note_cgroup(&self, id: &ContainerId, path: &str) -> Result<()> {
        self.begin("note_cgroup", id.as_str(), path.to_owned())
            .await?;
        self.lock().get("note_cgroup", id).map(drop)
    }

    fn forget(&self, _id: &ContainerId) {}
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn id(id: &str) -> ContainerId {
        id.parse().unwrap()
    }

    fn create(name: &str, sandbox: &str, stdio: Stdio) -> CreateOpts {
        CreateOpts {
            id: id(name),
            sandbox: id(sandbox),
            bundle: "/b".into(),
            stdio,
            console_socket: None,
            log_dir: None,
        }
    }

    fn exec(container: &str) -> ExecOpts {
        ExecOpts {
            container: id(container),
            process: serde_json::json!({"args": ["true"]}),
            stdio: Stdio::default(),
            console_socket: None,
            scratch: "/s".into(),
        }
    }

    #[tokio::test]
    async fn a_life_is_recorded() {
        let fake = FakeRuntime::new();
        let (mut out, stdout) = std::io::pipe().unwrap();
        let stdio = Stdio {
            stdout: Some(stdout.into()),
            ..Stdio::default()
        };
        let pid = fake
            .create(&create("p", "p", Stdio::default()))
            .await
            .unwrap();
        assert!(pid >= 1 << 30);
        let opts = create("c", "p", stdio);
        assert_eq!(fake.create(&opts).await.unwrap(), pid);
        drop(opts);
        let exit = fake.watch(&id("c")).await.unwrap();
        fake.start(&id("c"), &Stdio::default()).await.unwrap();
        fake.write_output("c", None, b"hello");
        let further = fake.exec(&exec("c")).await.unwrap();
        assert_eq!(fake.execs("c"), [further.pid]);
        fake.kill(&id("c"), KillTarget::Process(further.pid), 15)
            .await
            .unwrap();
        assert_eq!(further.exit.await.unwrap().code, 143);
        fake.end("c", 7);
        assert_eq!(exit.await.unwrap().code, 7);
        let mut text = String::new();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        fake.delete(&id("c")).await.unwrap();
        assert_eq!(
            fake.ops("c"),
            ["create", "wait", "start", "exec", "kill", "delete"]
        );
        assert_eq!(fake.containers(), ["p"]);
    }

    #[tokio::test]
    async fn the_end_of_a_sandbox_ends_all_in_it() {
        let fake = FakeRuntime::new();
        for name in ["p", "c"] {
            fake.create(&create(name, "p", Stdio::default()))
                .await
                .unwrap();
            fake.start(&id(name), &Stdio::default()).await.unwrap();
        }
        let (root, child) = (
            fake.watch(&id("p")).await.unwrap(),
            fake.watch(&id("c")).await.unwrap(),
        );
        fake.end("p", 0);
        assert_eq!(
            (root.await.unwrap().code, child.await.unwrap().code),
            (0, 137)
        );
        assert!(fake.exec(&exec("c")).await.is_err());
    }

    #[tokio::test]
    async fn operations_fail_and_wait_as_told() {
        let fake = Arc::new(FakeRuntime::new());
        fake.fail_next(
            "create",
            RuntimeError::Unsupported {
                op: "create",
                id: "p".to_owned(),
            },
        );
        assert!(
            fake.create(&create("p", "p", Stdio::default()))
                .await
                .is_err()
        );
        fake.create(&create("p", "p", Stdio::default()))
            .await
            .unwrap();
        let hold = fake.hold("start");
        let started = tokio::spawn({
            let fake = fake.clone();
            async move { fake.start(&id("p"), &Stdio::default()).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!started.is_finished());
        drop(hold);
        started.await.unwrap().unwrap();
        assert!(matches!(
            fake.kill(&id("x"), KillTarget::Init, 9).await,
            Err(RuntimeError::NotFound { .. })
        ));
        fake.ignore_signals(true);
        fake.kill(&id("p"), KillTarget::Init, 15).await.unwrap();
        assert_eq!(fake.status(&id("p")).await.unwrap(), Status::Running);
        fake.kill(&id("p"), KillTarget::All, 9).await.unwrap();
        assert_eq!(fake.status(&id("p")).await.unwrap(), Status::Stopped);
    }
}
