// SPDX-License-Identifier: Apache-2.0

//! The shim without containerd: a test plays containerd's part.
//!
//! [`Mini`] starts the real binary with the arguments, environment and standard input that
//! containerd 2.4 uses (`core/runtime/v2/command.go`), speaks the Task service to it and takes
//! its events. So a test sees every reply and every event, can hang up half-way, and can send
//! what containerd never would. [`bundle`] makes what a shim is started on.

pub mod bundle;
pub mod events;
pub mod fifo;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{
    api::{self, CreateTaskRequest, DeleteResponse},
    bootstrap_api::{BootstrapParams, BootstrapResult, Extension, LogLevel},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim_async::{Client, TaskClient},
    ttrpc::{self, context},
};
use tokio::sync::Mutex;

use self::{
    bundle::{Bundle, BundleBuilder},
    events::Events,
    fifo::Output,
};
use crate::{
    leaks::bears,
    place::{Place, SHIM_SOCKETS},
    process::{self, Cmd, Proc},
    suite::Fixture,
    tools,
};

/// containerd's namespace of containers that name no other.
pub const NAMESPACE: &str = "k8s.io";

/// Deadline of a call, as generous as containerd's own.
const CALL: Duration = Duration::from_secs(120);

/// What the shim drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// runsc, with the sentry's control socket.
    Runsc,
    /// runsc by command line only.
    RunscCli,
}

impl Runtime {
    /// All of them, with the names that tests show.
    pub const ALL: [(&'static str, Self); 2] =
        [("runsc", Self::Runsc), ("runsc-cli", Self::RunscCli)];

    /// Keys of the `[kiln]` table that choose it.
    fn keys(self) -> &'static str {
        match self {
            Self::Runsc => "",
            Self::RunscCli => "control_socket = false\n",
        }
    }

    /// Directory of its state in the place.
    fn root(self) -> &'static str {
        match self {
            Self::Runsc => "rs",
            Self::RunscCli => "rc",
        }
    }
}

/// How a configuration of the shim differs from the usual.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// More keys of the `[kiln]` table, as TOML.
    pub kiln: String,
    /// Another binary of the runtime, such as a wrapper around it.
    pub binary: Option<PathBuf>,
}

/// Plays containerd for any number of shims.
#[derive(Debug)]
pub struct Mini {
    place: Place,
    shim: PathBuf,
    events: Arc<Events>,
    server: Mutex<Option<events::Server>>,
}

impl Mini {
    /// Makes a place with a root file system and an Events service.
    ///
    /// # Errors
    /// When something of it cannot be made.
    pub async fn start() -> Result<Self> {
        let mut place = Place::new()?;
        make_rootfs(&place.dir().join("rootfs")).await?;
        for dir in ["b", "io"] {
            fs::create_dir(place.dir().join(dir))?;
        }
        let events = Arc::new(Events::default());
        place.set_baseline()?;
        let mini = Self {
            place,
            shim: tools::shim()?,
            events,
            server: Mutex::default(),
        };
        mini.start_events().await?;
        Ok(mini)
    }

    /// Serves the Events service.
    ///
    /// # Errors
    /// When its socket cannot be listened on.
    pub async fn start_events(&self) -> Result<()> {
        let server = events::serve(&self.events, &self.dir().join("c.sock.ttrpc")).await?;
        *self.server.lock().await = Some(server);
        Ok(())
    }

    /// Ends the Events service, as a containerd that restarts does.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop_events(&self) -> Result<()> {
        if let Some(server) = self.server.lock().await.take() {
            server.stop().await?;
        }
        fs::remove_file(self.dir().join("c.sock.ttrpc")).context("remove the Events socket")
    }

    /// Where everything of it is.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.place.dir()
    }

    /// What shims have published.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The shim's binary.
    pub fn binary(&self) -> &Path {
        &self.shim
    }

    /// A bundle for container `id`, to be described and written.
    pub fn bundle(&self, id: &str) -> BundleBuilder<'_> {
        self.place.remember(id);
        BundleBuilder::new(self.dir(), self.place.cgroup(), id)
    }

    /// Writes a configuration file of the shim and returns its path.
    ///
    /// # Errors
    /// When it cannot be written, or the runtime's program is missing.
    pub fn config(&self, runtime: Runtime, config: &Config) -> Result<PathBuf> {
        let binary = config.binary.clone().map_or_else(tools::runsc, Ok)?;
        let text = format!(
            "binary_name = \"{}\"\nroot = \"{}\"\n[runsc_config]\nplatform = \"systrap\"\n[kiln]\n{}{}",
            binary.display(),
            self.dir().join(runtime.root()).display(),
            runtime.keys(),
            config.kiln
        );
        let file = tempfile::Builder::new()
            .suffix(".toml")
            .tempfile_in(self.dir())?;
        fs::write(file.path(), text)?;
        Ok(file.into_temp_path().keep()?)
    }

    /// A run of the binary in `bundle` with the flags that containerd gives it.
    pub fn command(&self, bundle: &Bundle, action: &str) -> Cmd {
        self.command_of(Path::new("/usr/bin/containerd"), bundle, action)
    }

    /// The same by the containerd at `containerd`, which a shim may ask for its version.
    pub fn command_of(&self, containerd: &Path, bundle: &Bundle, action: &str) -> Cmd {
        let grpc = self.dir().join("c.sock").display().to_string();
        Cmd::new(&self.shim)
            .dir(bundle.dir())
            .cgroup(self.place.cgroup())
            .env("TTRPC_ADDRESS", format!("{grpc}.ttrpc"))
            .env("GRPC_ADDRESS", &grpc)
            .env("NAMESPACE", bundle.namespace())
            .env("MAX_SHIM_VERSION", "2")
            .args([
                "-namespace",
                bundle.namespace(),
                "-address",
                &grpc,
                "-id",
                bundle.id(),
                "-publish-binary",
            ])
            .args([containerd])
            .args(if action == "delete" {
                vec!["-bundle".to_owned(), bundle.dir().display().to_string()]
            } else {
                vec![]
            })
            .args([action])
    }

    /// The message that containerd 2.3 and later pipe into `start`.
    pub fn bootstrap(&self, bundle: &Bundle, options: Option<&Path>) -> BootstrapParams {
        let grpc = self.dir().join("c.sock").display().to_string();
        BootstrapParams {
            instance_id: bundle.id().to_owned(),
            namespace: bundle.namespace().to_owned(),
            log_level: LogLevel::LOG_LEVEL_DEBUG.into(),
            containerd_version: "2.4.2".to_owned(),
            containerd_ttrpc_address: format!("{grpc}.ttrpc"),
            containerd_grpc_address: grpc,
            containerd_binary: "/usr/bin/containerd".to_owned(),
            extensions: options
                .map(|file| Extension {
                    value: MessageField::some(options_message(file)),
                    ..Extension::default()
                })
                .into_iter()
                .collect(),
            socket_dir: Some(self.dir().join(SHIM_SOCKETS).display().to_string()),
            ..BootstrapParams::default()
        }
    }

    /// Starts a shim on `bundle`, with the configuration in `config`.
    ///
    /// # Errors
    /// When `start` fails, or its reply is not what containerd 2.3 reads.
    pub async fn shim(&self, bundle: &Bundle, config: &Path) -> Result<Shim> {
        let params = self.bootstrap(bundle, Some(config)).write_to_bytes()?;
        let output = self
            .command(bundle, "start")
            .input(&params)
            .output()
            .await?;
        ensure!(
            output.status.success(),
            "start: {}: {}",
            output.status,
            output.errors()
        );
        // containerd reads both streams together as the reply.
        ensure!(
            output.stderr.is_empty(),
            "start wrote to its standard error: {}",
            output.errors()
        );
        let reply = BootstrapResult::parse_from_bytes(&output.stdout).context("reply to start")?;
        ensure!(
            reply.version == 3 && reply.protocol == "ttrpc",
            "reply to start: {reply}"
        );
        self.connect(bundle, &reply.address, config).await
    }

    /// Connects to the shim of `bundle` at `address`.
    ///
    /// # Errors
    /// When nobody listens there.
    pub async fn connect(&self, bundle: &Bundle, address: &str, config: &Path) -> Result<Shim> {
        let client = connect(address).await?;
        let task = TaskClient::new(client.clone());
        let (id, address, log) = (bundle.id().to_owned(), address.to_owned(), bundle.log());
        Ok(Shim {
            id,
            address,
            config: config.to_owned(),
            client,
            task,
            log,
        })
    }

    /// Runs `delete` on `bundle`, as containerd does when a shim is gone.
    ///
    /// # Errors
    /// When it fails, or its reply is none.
    pub async fn delete(&self, bundle: &Bundle) -> Result<DeleteResponse> {
        let output = self.command(bundle, "delete").output().await?;
        ensure!(
            output.status.success(),
            "delete: {}: {}",
            output.status,
            output.errors()
        );
        DeleteResponse::parse_from_bytes(&output.stdout).context("reply to delete")
    }

    /// The processes of the shims of sandbox `id`.
    pub fn shims_of(&self, id: &str) -> Vec<Proc> {
        let shims = self.place.processes().into_iter();
        shims
            .filter(|p| {
                p.argv.contains("containerd-shim-kiln-v2") && bears(&p.argv, &format!("-id {id}"))
            })
            .collect()
    }
}

impl Fixture for Mini {
    async fn finish(self) -> Result<()> {
        let clean = self.place.check_for_leaks().await;
        self.place.destroy().and(clean)
    }

    fn log(&self) -> String {
        let logs = fs::read_dir(self.dir().join("b"))
            .into_iter()
            .flatten()
            .flatten();
        logs.map(|b| {
            format!(
                "--- log of shim {}\n{}",
                b.file_name().to_string_lossy(),
                process::tail(&b.path().join("shim.log"))
            )
        })
        .collect()
    }
}

/// Connects to a ttrpc server.
///
/// # Errors
/// When nobody listens there.
pub async fn connect(address: &str) -> Result<Client> {
    Client::connect(address)
        .await
        .with_context(|| format!("connect to {address}"))
}

/// A handler's options as containerd sends them: `runtimeoptions.v1.Options` with the
/// configuration's path in field 2.
pub fn options_message(config: &Path) -> Any {
    let path = config.display().to_string();
    let length = u8::try_from(path.len()).unwrap_or(0x7f);
    let value = [&[0x12, length][..], path.as_bytes()].concat();
    Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value,
        ..Any::default()
    }
}

/// The code of a call that was refused; `None` for one that went through.
///
/// # Errors
/// For an error without a code, as a lost connection gives.
pub fn code<T>(answer: Result<T, ttrpc::Error>) -> Result<Option<ttrpc::Code>> {
    match answer {
        Ok(_) => Ok(None),
        Err(ttrpc::Error::RpcStatus(status)) => Ok(Some(status.code())),
        Err(e) => bail!("no status: {e}"),
    }
}

/// Deadline for one call.
pub fn ctx() -> context::Context {
    context::with_duration(CALL)
}

/// A shim that runs.
#[derive(Clone)]
pub struct Shim {
    id: String,
    address: String,
    config: PathBuf,
    client: Client,
    task: TaskClient,
    log: PathBuf,
}

impl Shim {
    /// The container that it was started for.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The address of its socket.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        Path::new(
            self.address
                .strip_prefix("unix://")
                .unwrap_or(&self.address),
        )
    }

    /// The connection, for services that have no client of their own here.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its Task service.
    pub fn task(&self) -> &TaskClient {
        &self.task
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        process::tail(&self.log)
    }

    /// The request that makes the container of `bundle`, without stdio.
    pub fn create_request(&self, bundle: &Bundle) -> CreateTaskRequest {
        CreateTaskRequest {
            id: bundle.id().to_owned(),
            bundle: bundle.dir().display().to_string(),
            rootfs: bundle.mounts(),
            options: MessageField::some(options_message(&self.config)),
            ..CreateTaskRequest::default()
        }
    }

    /// Makes the container of `bundle`, with its output collected.
    ///
    /// # Errors
    /// The shim's.
    pub async fn create(&self, bundle: &Bundle) -> Result<Output> {
        let output = Output::new(bundle.id(), bundle.io_dir())?;
        let request = CreateTaskRequest {
            stdout: output.stdout.path(),
            stderr: output.stderr.path(),
            ..self.create_request(bundle)
        };
        self.task
            .create(ctx(), &request)
            .await
            .with_context(|| format!("create {}", bundle.id()))?;
        Ok(output)
    }

    /// Makes and starts the container of `bundle`.
    ///
    /// # Errors
    /// The shim's.
    pub async fn run(&self, bundle: &Bundle) -> Result<Output> {
        let output = self.create(bundle).await?;
        self.start(bundle.id(), "").await?;
        Ok(output)
    }

    /// Starts a container or an exec of it.
    ///
    /// # Errors
    /// The shim's.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = api::StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..api::StartRequest::default()
        };
        Ok(self
            .task
            .start(ctx(), &request)
            .await
            .with_context(|| format!("start {id} {exec_id}"))?
            .pid)
    }

    /// Adds an exec to a container, with its output collected.
    ///
    /// # Errors
    /// The shim's.
    pub async fn exec(&self, bundle: &Bundle, exec_id: &str, args: &[&str]) -> Result<Output> {
        let output = Output::new(exec_id, bundle.io_dir())?;
        let request = api::ExecProcessRequest {
            stdout: output.stdout.path(),
            stderr: output.stderr.path(),
            ..exec_request(bundle.id(), exec_id, args)
        };
        self.task
            .exec(ctx(), &request)
            .await
            .with_context(|| format!("exec {exec_id} in {}", bundle.id()))?;
        Ok(output)
    }

    /// Waits for the end of a container or exec, and returns its exit code.
    ///
    /// # Errors
    /// The shim's.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = api::WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..api::WaitRequest::default()
        };
        Ok(self
            .task
            .wait(ctx(), &request)
            .await
            .with_context(|| format!("wait for {id} {exec_id}"))?
            .exit_status)
    }

    /// Sends a signal to a container or exec.
    ///
    /// # Errors
    /// The shim's.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: i32) -> Result<(), ttrpc::Error> {
        let signal = signal.unsigned_abs();
        let request = api::KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            ..api::KillRequest::default()
        };
        self.task.kill(ctx(), &request).await.map(drop)
    }

    /// Removes a container or exec, and returns its exit code.
    ///
    /// # Errors
    /// The shim's.
    pub async fn remove(&self, id: &str, exec_id: &str) -> Result<u32> {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..api::DeleteRequest::default()
        };
        Ok(self
            .task
            .delete(ctx(), &request)
            .await
            .with_context(|| format!("delete {id} {exec_id}"))?
            .exit_status)
    }

    /// What a container or exec is doing.
    ///
    /// # Errors
    /// The shim's.
    pub async fn state(&self, id: &str, exec_id: &str) -> Result<api::StateResponse, ttrpc::Error> {
        let request = api::StateRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..api::StateRequest::default()
        };
        self.task.state(ctx(), &request).await
    }

    /// Asks the shim to end.
    ///
    /// # Errors
    /// The shim's.
    pub async fn shutdown(&self) -> Result<()> {
        let request = api::ShutdownRequest {
            id: self.id.clone(),
            ..api::ShutdownRequest::default()
        };
        self.task
            .shutdown(ctx(), &request)
            .await
            .context("shutdown")?;
        Ok(())
    }

    /// Kills a container if it runs, removes it, and returns its exit code.
    ///
    /// # Errors
    /// The shim's.
    pub async fn end(&self, id: &str) -> Result<u32> {
        match code(self.kill(id, "", libc::SIGKILL).await)? {
            None | Some(ttrpc::Code::NOT_FOUND) => {}
            Some(other) => bail!("kill {id}: {other:?}"),
        }
        self.wait(id, "").await?;
        self.remove(id, "").await
    }
}

/// The request that adds an exec without stdio to a container.
pub fn exec_request(id: &str, exec_id: &str, args: &[&str]) -> api::ExecProcessRequest {
    let process = serde_json::json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        "user": {"uid": 0, "gid": 0},
    });
    let type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
    api::ExecProcessRequest {
        id: id.to_owned(),
        exec_id: exec_id.to_owned(),
        spec: MessageField::some(Any {
            type_url,
            value: process.to_string().into_bytes(),
            ..Any::default()
        }),
        ..api::ExecProcessRequest::default()
    }
}

/// A root file system of busybox with all its applets.
async fn make_rootfs(dir: &Path) -> Result<()> {
    let busybox = tools::program("busybox")?;
    for name in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        fs::create_dir_all(dir.join(name))?;
    }
    fs::copy(&busybox, dir.join("bin/busybox")).context("copy busybox")?;
    for applet in Cmd::new(&busybox)
        .args(["--list"])
        .run()
        .await?
        .lines()
        .filter(|a| *a != "busybox")
    {
        symlink("busybox", dir.join("bin").join(applet))
            .with_context(|| format!("link {applet}"))?;
    }
    Ok(())
}
