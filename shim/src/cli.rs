// SPDX-License-Identifier: Apache-2.0

//! The binary as containerd runs it: `start`, `delete`, `-info`, and without an action the
//! server that `start` spawns (containerd `core/runtime/v2/README.md`).
//!
//! containerd reads standard output and standard error of `start` together as the reply: this
//! module is the only one that prints.

mod containerd_version;
mod delete;

use std::{
    env, fs,
    io::{self, IsTerminal, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use containerd_shim::{Flags, socket_address};
use containerd_shim_protos::{
    TASK_API_VERSION,
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use runsc_wrapper::ContainerId;

use crate::{
    bundle::{Role, Spec},
    config::from_options,
    error::{Error, Result},
    io::read_capped,
    kata,
    server::{self, READY, ServerOpts},
    systemd,
};

/// File in the bundle with the address of the sandbox's server.
const ADDRESS: &str = "kiln.address";

/// Longest address, in bytes.
const MAX_ADDRESS: u64 = 4 << 10;

/// Largest message on standard input, as in containerd's own shims.
const MAX_INPUT: u64 = 10 << 20;

/// Blocking work is rare and short; its threads should not outlive it for long.
const IDLE_THREAD: Duration = Duration::from_secs(1);

/// Runs what the command line asks for.
#[allow(clippy::print_stderr)] // containerd shows it as the reason of a failed action
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-kiln-v2: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    kata::delegate(&arguments)?;
    if let Some((action, rest)) = arguments.split_first()
        && action == systemd::ACTION
    {
        return systemd::start(rest);
    }
    let flags =
        containerd_shim::parse(&arguments).map_err(|e| Error::InvalidArgument(e.to_string()))?;
    if flags.version {
        return print(
            format!("containerd-shim-kiln-v2 {}\n", env!("CARGO_PKG_VERSION")).as_bytes(),
        );
    }
    if flags.info {
        return print(&encode(&block_on(info())?)?);
    }
    let id: ContainerId = flags.id.parse()?;
    let _namespace: ContainerId = flags.namespace.parse()?;
    match flags.action.as_str() {
        "start" => start(&flags, &id),
        "delete" => print(&encode(&block_on(delete::delete(&flags, &id))?)?),
        "" => {
            let ttrpc_address = env::var("TTRPC_ADDRESS").unwrap_or_default();
            let Flags {
                id,
                namespace,
                debug,
                ..
            } = flags;
            block_on(server::serve(ServerOpts {
                id,
                namespace,
                ttrpc_address,
                debug,
            }))
        }
        other => Err(Error::InvalidArgument(format!("unknown action {other:?}"))),
    }
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .thread_keep_alive(IDLE_THREAD)
        .build()
        .map_err(|source| Error::Io {
            what: "start the event loop".to_owned(),
            source,
        })?;
    runtime.block_on(work)
}

/// How containerd wants the reply to `start`.
enum Reply {
    /// containerd 2.3 and later: a protobuf message.
    Bootstrap,
    /// containerd 2.0 to 2.2: JSON with the version of the Task API.
    Json,
    /// containerd 1.7: the bare address of a Task v2 service.
    Address,
}

/// Has a server for the sandbox of container `id`, and prints its address.
fn start(flags: &Flags, id: &ContainerId) -> Result<()> {
    let params = bootstrap_params(&read_input()?, flags)?;
    let reply = match &params {
        Some(_) => Reply::Bootstrap,
        None if containerd_version::knows_task_v3(Path::new(&flags.publish_binary)) => Reply::Json,
        None => Reply::Address,
    };
    let sandbox = match Spec::load(Path::new("."))?.role()? {
        Role::Sandbox => id.clone(),
        Role::Member(sandbox) => sandbox,
    };
    let address = address_of(flags, params.as_ref(), &sandbox);
    if sandbox != *id {
        // containerd with the Task v2 API runs `start` for every container of a Pod.
        if UnixStream::connect(socket_path(&address)).is_err() {
            return Err(Error::NotFound {
                kind: "sandbox",
                id: sandbox.to_string(),
            });
        }
    } else {
        // Before there is a socket, so that whoever cleans up after this process knows of it.
        fs::write(ADDRESS, &address).map_err(Error::io("write", Path::new(ADDRESS)))?;
        spawn_server(flags, params.as_ref(), &address)?;
    }
    if matches!(reply, Reply::Address) {
        // containerd 1.7 finds its shims by this file after a restart.
        fs::write("address", &address).map_err(Error::io("write", Path::new("address")))?;
    }
    print(&encode_reply(&reply, &address)?)
}

/// The message of containerd 2.3 and later, if `input` is one. Older ones pipe the runtime's
/// options, which decode as this message too, but with other names in it.
pub(crate) fn bootstrap_params(input: &[u8], flags: &Flags) -> Result<Option<BootstrapParams>> {
    if input.is_empty() {
        return Ok(None);
    }
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    if params.instance_id == flags.id && params.namespace == flags.namespace {
        return Ok(Some(params));
    }
    if params.containerd_grpc_address.is_empty() && params.containerd_ttrpc_address.is_empty() {
        return Ok(None);
    }
    Err(Error::InvalidArgument(format!(
        "standard input is for {}/{}, the command line for {}/{}",
        params.namespace, params.instance_id, flags.namespace, flags.id
    )))
}

fn address_of(flags: &Flags, params: Option<&BootstrapParams>, sandbox: &ContainerId) -> String {
    let address = socket_address(&flags.address, &flags.namespace, sandbox.as_str());
    match (
        params.and_then(|p| p.socket_dir.as_deref()),
        address.rsplit_once('/'),
    ) {
        (Some(dir), Some((_, name))) if !dir.is_empty() => {
            format!("unix://{}/{name}", dir.trim_end_matches('/'))
        }
        _ => address,
    }
}

/// The address that `start` noted in a bundle.
fn address_in(bundle: &Path) -> Option<String> {
    let note = read_capped(&bundle.join(ADDRESS), MAX_ADDRESS).ok()?;
    String::from_utf8(note).ok()
}

fn socket_path(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap_or(address))
}

fn spawn_server(flags: &Flags, params: Option<&BootstrapParams>, address: &str) -> Result<()> {
    let path = socket_path(address);
    let listener = bind(path)?;
    let debug = params.map_or(flags.debug, |p| {
        p.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32
    });
    let program = env::current_exe().map_err(Error::io("find", Path::new("the shim")))?;
    let mut command = Command::new(program);
    command
        .args([
            "-namespace",
            &flags.namespace,
            "-id",
            &flags.id,
            "-address",
            &flags.address,
        ])
        .args(debug.then_some("-debug"))
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0);
    let ttrpc_address = params
        .map(|p| p.containerd_ttrpc_address.clone())
        .filter(|a| !a.is_empty());
    if let Some(address) = ttrpc_address.or_else(|| env::var("TTRPC_ADDRESS").ok()) {
        command.env("TTRPC_ADDRESS", address);
    }
    let mut child = command
        .spawn()
        .map_err(Error::io("run", Path::new("the shim")))?;
    let mut byte = [0];
    let answer = child
        .stdout
        .take()
        .map_or(Ok(0), |mut out| out.read(&mut byte));
    if !matches!(answer, Ok(1)) || byte != [READY] {
        let words = child
            .wait()
            .map_or_else(|e| e.to_string(), |status| status.to_string());
        fs::remove_file(path).ok(); // the failure to report is the server's
        let source = io::Error::other(format!("it ended with {words}; its log says more"));
        return Err(Error::Io {
            what: "start the shim's server".to_owned(),
            source,
        });
    }
    Ok(())
}

/// Binds the socket, which only root may connect to. One that nobody serves is replaced.
fn bind(path: &Path) -> Result<UnixListener> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(Error::io("make", dir))?;
    }
    let listener = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(Error::AlreadyExists {
                    kind: "shim",
                    id: path.display().to_string(),
                });
            }
            fs::remove_file(path).map_err(Error::io("remove", path))?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    let listener = listener.map_err(Error::io("listen on", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(Error::io("protect", path))?;
    Ok(listener)
}

fn encode_reply(reply: &Reply, address: &str) -> Result<Vec<u8>> {
    match reply {
        Reply::Bootstrap => encode(&BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        }),
        Reply::Json => {
            let reply = serde_json::json!({"version": TASK_API_VERSION, "address": address, "protocol": "ttrpc"});
            Ok(reply.to_string().into_bytes())
        }
        Reply::Address => Ok(address.as_bytes().to_owned()),
    }
}

/// What containerd shows in `ctr plugins inspect-runtime`: version and OCI features.
async fn info() -> Result<RuntimeInfo> {
    let input = read_input()?;
    let options = Any::parse_from_bytes(&input)
        .ok()
        .filter(|any| !any.type_url.is_empty());
    let config = from_options(options.as_ref())?;
    let features = match server::runtime(&config, "info")?.features().await {
        Ok(mut features) => {
            drop_user_namespaces(&mut features);
            Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
                    .to_owned(),
                value: features.to_string().into_bytes(),
                ..Any::default()
            })
        }
        // containerd also asks without saying which runtime it means, and wants to know no more
        // than what the shim is.
        Err(_) if options.is_none() => None,
        Err(e) => return Err(e.into()),
    };
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..RuntimeVersion::default()
    };
    Ok(RuntimeInfo {
        name: "io.containerd.kiln.v2".to_owned(),
        version: MessageField::some(version),
        options: options.into(),
        features: features.into(),
        ..RuntimeInfo::default()
    })
}

/// Takes out of a runtime's features what containerd takes for support of Pods with `hostUsers: false`
/// (its `internal/cri/server/service.go`): such Pods are refused here.
fn drop_user_namespaces(features: &mut serde_json::Value) {
    if let Some(linux) = features.get_mut("linux").and_then(|l| l.as_object_mut()) {
        linux.remove("mountExtensions");
    }
}

fn read_input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    if io::stdin().is_terminal() {
        return Ok(input); // run by hand
    }
    io::stdin()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .map_err(Error::io("read", Path::new("standard input")))?;
    Ok(input)
}

fn encode(message: &impl Message) -> Result<Vec<u8>> {
    message.write_to_bytes().map_err(|e| Error::Io {
        what: "encode the reply".to_owned(),
        source: e.into(),
    })
}

fn print(reply: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(reply)
        .and_then(|()| out.flush())
        .map_err(Error::io("write", Path::new("standard output")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags {
            id: "c1".to_owned(),
            namespace: "k8s.io".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            ..Flags::default()
        }
    }

    #[test]
    fn options_of_older_containerds_are_no_bootstrap_message() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: b"\x12\x01x".to_vec(),
            ..Any::default()
        };
        assert!(
            bootstrap_params(&options.write_to_bytes().unwrap(), &flags())
                .unwrap()
                .is_none()
        );
        assert!(bootstrap_params(b"", &flags()).unwrap().is_none());
        assert!(
            bootstrap_params(b"\xff\xff\xff", &flags())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_message_for_another_container_is_refused() {
        let params = |id: &str| BootstrapParams {
            instance_id: id.to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_ttrpc_address: "/x".to_owned(),
            socket_dir: Some("/run/s/".to_owned()),
            ..BootstrapParams::default()
        };
        let read = |id| bootstrap_params(&params(id).write_to_bytes().unwrap(), &flags());
        let ours = read("c1").unwrap().unwrap();
        assert!(read("other").is_err());
        let address = address_of(&flags(), Some(&ours), &"c1".parse().unwrap());
        assert!(address.starts_with("unix:///run/s/"), "{address}");
    }

    #[test]
    fn every_containerd_gets_the_reply_that_it_reads() {
        let reply = |r| encode_reply(&r, "unix:///s").unwrap();
        let parsed = BootstrapResult::parse_from_bytes(&reply(Reply::Bootstrap)).unwrap();
        assert_eq!(
            (
                parsed.version,
                parsed.address.as_str(),
                parsed.protocol.as_str()
            ),
            (3, "unix:///s", "ttrpc")
        );
        let json: serde_json::Value = serde_json::from_slice(&reply(Reply::Json)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"version": 3, "address": "unix:///s", "protocol": "ttrpc"})
        );
        assert_eq!(reply(Reply::Address), b"unix:///s");
    }

    #[test]
    fn a_socket_is_roots_alone_and_a_dead_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/sock");
        let listener = bind(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(bind(&path).is_err());
        drop(listener);
        bind(&path).unwrap();
    }
}
