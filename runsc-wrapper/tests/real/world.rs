// SPDX-License-Identifier: Apache-2.0

//! What a test needs of the world: a runtime with a root of its own, bundles with a busybox in
//! them, and the certainty that nothing is left when it ends, however it ends.

use std::{
    collections::BTreeSet,
    fs,
    io::Read,
    os::{fd::OwnedFd, unix::fs::symlink},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use kiln_host::reap;
use nix::mount::{MntFlags, umount2};
use runsc_wrapper::{
    Config, ContainerId, CreateOpts, Exec, ExecOpts, Exit, ExitFuture, Result, Runsc, Runtime,
    Stdio,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::mpsc;

/// Longest wait for anything a runtime does, on a machine with other work.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Which runtime, and how it is driven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavor {
    Runsc,
    /// Without the control socket.
    RunscCli,
    /// The release of February 2026.
    Runsc202602,
    /// A release of 2024.
    Runsc2024,
}

/// Makes a test of `$body` for each flavor.
#[macro_export]
macro_rules! for_flavors {
    ($flavors:tt: $($name:ident)*) => {
        $(for_flavors!(@one $name: $flavors);)*
    };
    (@one $name:ident: [$($flavor:ident)*]) => {
        mod $name {
            $(
                #[allow(non_snake_case)]
                #[tokio::test]
                #[ignore = "needs root and runsc"]
                async fn $flavor() {
                    if let Some(world) = $crate::world::World::new($crate::world::Flavor::$flavor) {
                        super::$name(world).await;
                    }
                }
            )*
        }
    };
}

pub(crate) struct World {
    pub(crate) flavor: Flavor,
    pub(crate) runtime: Arc<Runsc>,
    pub(crate) config: Config,
    pub(crate) dir: TempDir,
    made: Mutex<Vec<ContainerId>>,
}

/// A container that runs.
pub(crate) struct Started {
    pub(crate) id: ContainerId,
    pub(crate) pid: u32,
    pub(crate) exit: ExitFuture,
    /// What it writes to both of its outputs.
    pub(crate) output: Output,
}

/// What comes out of a pipe. A thread reads it, since a read cannot be given up.
pub(crate) struct Output(mpsc::UnboundedReceiver<String>);

impl Output {
    fn of(mut pipe: std::io::PipeReader) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(read @ 1..) = pipe.read(&mut chunk) {
                if sender
                    .send(String::from_utf8_lossy(&chunk[..read]).into_owned())
                    .is_err()
                {
                    return;
                }
            }
        });
        Self(receiver)
    }

    /// Everything until all writers are gone.
    pub(crate) async fn all(mut self) -> String {
        let mut text = String::new();
        while let Some(some) = tokio::time::timeout(PATIENCE, self.0.recv()).await.unwrap() {
            text.push_str(&some);
        }
        text
    }

    /// The next bytes.
    pub(crate) async fn some(&mut self) -> String {
        tokio::time::timeout(PATIENCE, self.0.recv())
            .await
            .unwrap()
            .unwrap_or_default()
    }

    /// What is there already.
    pub(crate) fn drain(&mut self) -> String {
        let mut text = String::new();
        while let Ok(some) = self.0.try_recv() {
            text.push_str(&some);
        }
        text
    }
}

pub(crate) fn id(id: &str) -> ContainerId {
    id.parse().unwrap()
}

/// Standard streams whose outputs lead to one pipe.
pub(crate) fn piped() -> (Stdio, Output) {
    let (reader, writer) = std::io::pipe().unwrap();
    let writer = OwnedFd::from(writer);
    let stdio = Stdio {
        stdin: None,
        stdout: Some(writer.try_clone().unwrap()),
        stderr: Some(writer),
    };
    (stdio, Output::of(reader))
}

/// Waits for a process with the patience of a test.
pub(crate) async fn end_of(exit: ExitFuture) -> Exit {
    tokio::time::timeout(PATIENCE, exit)
        .await
        .expect("the process did not end")
        .unwrap()
}

/// Looks again and again until `true`.
pub(crate) async fn until(what: &str, mut look: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !look().await {
        assert!(
            start.elapsed() < PATIENCE,
            "{what}: not so after {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

impl World {
    pub(crate) fn new(flavor: Flavor) -> Option<Self> {
        Self::with(flavor, "")
    }

    /// A world with further lines for `[runsc_config]`.
    pub(crate) fn with(flavor: Flavor, flags: &str) -> Option<Self> {
        let program = match flavor {
            Flavor::Runsc | Flavor::RunscCli => "runsc",
            Flavor::Runsc202602 => "runsc-2026-02",
            Flavor::Runsc2024 => "runsc-2024",
        };
        let cache = std::env::var("KILN_CACHE")
            .unwrap_or_else(|_| format!("{}/.cache/kiln", std::env::var("HOME").unwrap()));
        let binary = Path::new(&cache).join("bin").join(program);
        if !nix::unistd::geteuid().is_root() || !binary.is_file() {
            println!("SKIPPED: needs root and {}", binary.display());
            return None;
        }
        reap::become_subreaper().unwrap();
        let dir = tempfile::Builder::new().prefix("kw").tempdir().unwrap();
        let root = dir.path().join("root").display().to_string();
        // Cgroups of the host are the shim's business.
        let defaults: String = [("ignore-cgroups", "true"), ("network", "'none'")]
            .into_iter()
            .filter(|(flag, _)| !flags.contains(flag))
            .map(|(flag, value)| format!("{flag} = {value}\n"))
            .collect();
        let text = format!(
            "binary_name = '{}'\nroot = '{root}'\n[runsc_config]\n{defaults}{flags}\n",
            binary.display(),
        );
        let config = Config {
            control_socket: flavor != Flavor::RunscCli,
            ..Config::parse(&text).unwrap()
        };
        let runtime = Arc::new(Runsc::new(config.clone()));
        fs::copy(busybox(&cache), dir.path().join("busybox")).unwrap();
        Some(Self {
            flavor,
            runtime,
            config,
            dir,
            made: Mutex::default(),
        })
    }

    /// Another object for the same root, as a new process would have it.
    pub(crate) fn another(&self) -> Arc<Runsc> {
        Arc::new(Runsc::new(self.config.clone()))
    }

    /// Writes a bundle. `sandbox` is the container's own name for a sandbox.
    pub(crate) fn bundle(&self, name: &str, sandbox: &str, args: &[&str]) -> PathBuf {
        self.bundle_with(name, sandbox, args, |_| {})
    }

    pub(crate) fn bundle_with(
        &self,
        name: &str,
        sandbox: &str,
        args: &[&str],
        change: impl FnOnce(&mut Value),
    ) -> PathBuf {
        let bundle = self.dir.path().join("bundles").join(name);
        let rootfs = bundle.join("rootfs");
        if !rootfs.exists() {
            make_rootfs(&rootfs, &self.dir.path().join("busybox"));
        }
        let namespaces = ["pid", "ipc", "uts", "mount", "network"];
        let capabilities = ["CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_NET_RAW"];
        let mut spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/",
                "env": ["PATH=/bin", "HOME=/"],
                "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            },
            "root": {"path": rootfs, "readonly": false},
            "hostname": "test",
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666"]},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
            ],
            "annotations": {
                "io.kubernetes.cri.container-type": if name == sandbox { "sandbox" } else { "container" },
                "io.kubernetes.cri.sandbox-id": sandbox,
            },
            "linux": {
                "namespaces": namespaces.iter().map(|n| json!({"type": n})).collect::<Vec<_>>(),
                "cgroupsPath": format!("/{}/{name}", self.cgroup()),
            },
        });
        change(&mut spec);
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    fn cgroup(&self) -> String {
        self.dir
            .path()
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    }

    pub(crate) fn create_opts(
        &self,
        name: &str,
        sandbox: &str,
        bundle: PathBuf,
        stdio: Stdio,
    ) -> CreateOpts {
        CreateOpts {
            id: id(name),
            sandbox: id(sandbox),
            bundle,
            stdio,
            console_socket: None,
            log_dir: None,
        }
    }

    /// Creates a container, and remembers it for the end of the world.
    pub(crate) async fn create(&self, opts: &CreateOpts) -> Result<u32> {
        self.made.lock().unwrap().push(opts.id.clone());
        self.runtime.create(opts).await
    }

    /// Creates and starts a container, watched from before its start.
    pub(crate) async fn run(&self, name: &str, sandbox: &str, args: &[&str]) -> Started {
        let bundle = self.bundle(name, sandbox, args);
        self.run_bundle(name, sandbox, bundle).await
    }

    pub(crate) async fn run_bundle(&self, name: &str, sandbox: &str, bundle: PathBuf) -> Started {
        let (stdio, output) = piped();
        let opts = self.create_opts(name, sandbox, bundle, stdio);
        let pid = self.create(&opts).await.unwrap();
        let exit = self.runtime.watch(&opts.id).await.unwrap();
        self.runtime.start(&opts.id, &opts.stdio).await.unwrap();
        Started {
            id: opts.id,
            pid,
            exit,
            output,
        }
    }

    /// A sandbox whose root container does nothing, and a container with `args` in it.
    pub(crate) async fn run_in_sandbox(&self, args: &[&str]) -> (Started, Started) {
        let root = self.run("pod", "pod", &["/bin/sleep", "1000"]).await;
        let container = self.run("app", "pod", args).await;
        (root, container)
    }

    pub(crate) fn exec_opts(&self, container: &str, args: &[&str], stdio: Stdio) -> ExecOpts {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let scratch = self.dir.path().join(format!("exec-{count}"));
        fs::create_dir(&scratch).unwrap();
        ExecOpts {
            container: id(container),
            process: json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}),
            stdio,
            console_socket: None,
            scratch,
        }
    }

    /// Starts a process in a container.
    pub(crate) async fn exec(&self, container: &str, args: &[&str]) -> Result<(Exec, Output)> {
        let (stdio, output) = piped();
        let exec = self
            .runtime
            .exec(&self.exec_opts(container, args, stdio))
            .await?;
        Ok((exec, output))
    }

    /// Runs a process in a container to its end.
    pub(crate) async fn exec_to_end(&self, container: &str, args: &[&str]) -> (u32, String) {
        let (exec, output) = self.exec(container, args).await.unwrap();
        let code = end_of(exec.exit).await.code;
        (code, output.all().await)
    }

    /// Deletes containers, last first, and asserts that nothing is left of them.
    pub(crate) async fn delete_all(&self) {
        let made = std::mem::take(&mut *self.made.lock().unwrap());
        for id in made.iter().rev() {
            self.runtime.delete(id).await.unwrap();
        }
        self.assert_nothing_left().await;
    }

    /// Files of the runtime's state that are a container's.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.config.root).into_iter().flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| !path.ends_with(GOFERS_NETNS)).collect()
    }

    /// Asserts that no state file, socket or process is left.
    pub(crate) async fn assert_nothing_left(&self) {
        let files = self.files();
        assert!(files.is_empty(), "left in root: {files:?}");
        for bundle in fs::read_dir(self.dir.path().join("bundles")).unwrap() {
            let rootfs = fs::read_dir(bundle.unwrap().path().join("rootfs")).unwrap();
            let left: Vec<_> = rootfs
                .map(|entry| entry.unwrap().path())
                .filter(|path| path.to_string_lossy().contains(".gvisor"))
                .collect();
            assert!(left.is_empty(), "left in rootfs: {left:?}");
        }
        until("no process is left", async || self.processes().is_empty()).await;
    }

    /// Processes of the host that have to do with this world, by their command lines.
    pub(crate) fn processes(&self) -> Vec<(u32, String)> {
        let mark = self.dir.path().display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap() {
            let Ok(pid) = entry.unwrap().file_name().to_string_lossy().parse::<u32>() else {
                continue;
            };
            let args = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let args = String::from_utf8_lossy(&args).replace('\0', " ");
            if pid != std::process::id() && args.contains(&mark) {
                found.push((pid, args));
            }
        }
        found
    }
}

/// Where runsc keeps the network namespace of its gofers, from one sandbox to the next (gVisor
/// `runsc/container/null_netns.go`).
const GOFERS_NETNS: &str = "null-netns";

impl Drop for World {
    fn drop(&mut self) {
        // By hand, since a test may end by panic and its runtime with it. State files go with
        // the directory.
        let of_cgroup = cgroups(&self.cgroup())
            .into_iter()
            .filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok())
            .flat_map(|procs| {
                procs
                    .lines()
                    .filter_map(|pid| pid.parse().ok())
                    .collect::<Vec<u32>>()
            });
        let left: BTreeSet<u32> = self
            .processes()
            .into_iter()
            .map(|(pid, _)| pid)
            .chain(of_cgroup)
            .collect();
        // One lies on another where sandboxes were made at the same time.
        let netns = self.config.root.join(GOFERS_NETNS);
        while umount2(&netns, MntFlags::MNT_DETACH).is_ok() {}
        for pid in &left {
            println!("killed {pid}, left by a test");
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        for dir in cgroups(&self.cgroup()) {
            // A test may have ended in the middle of a pause; the frozen cannot die.
            let _ = fs::write(dir.join("freezer.state"), "THAWED");
            let _ = fs::write(dir.join("cgroup.freeze"), "0");
        }
        for pid in left {
            // Ours if its parent is dead; a cgroup cannot be removed while it has a zombie.
            let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
            let _ = nix::sys::wait::waitpid(pid, None);
        }
        for dir in cgroups(&self.cgroup()) {
            let _ = fs::remove_dir(dir);
        }
    }
}

/// The cgroups of a world in all hierarchies, the deepest first.
fn cgroups(world: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for controller in fs::read_dir("/sys/fs/cgroup")
        .into_iter()
        .flatten()
        .flatten()
    {
        let top = controller.path().join(world);
        let children = fs::read_dir(&top).into_iter().flatten().flatten();
        found.extend(
            children
                .map(|child| child.path())
                .filter(|path| path.is_dir()),
        );
        if top.is_dir() {
            found.push(top);
        }
    }
    found
}

fn busybox(cache: &str) -> PathBuf {
    let own = Path::new(cache).join("bin/busybox");
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    places
        .into_iter()
        .chain([own])
        .find(|path| path.is_file())
        .expect("busybox-static is not installed")
}

fn make_rootfs(rootfs: &Path, busybox: &Path) {
    let bin = rootfs.join("bin");
    fs::create_dir_all(&bin).unwrap();
    for dir in ["proc", "dev", "tmp", "root"] {
        fs::create_dir(rootfs.join(dir)).unwrap();
    }
    fs::hard_link(busybox, bin.join("busybox")).unwrap();
    for name in [
        "sh", "sleep", "true", "false", "cat", "echo", "id", "env", "kill", "tty", "stty", "nc",
        "ls", "head",
    ] {
        symlink("busybox", bin.join(name)).unwrap();
    }
}
