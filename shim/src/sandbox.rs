// SPDX-License-Identifier: Apache-2.0

//! What the containers of one Pod share: the runtime that drives them, the node's policy, the
//! host cgroup, and a directory for what a call needs on disk.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use kiln_host::{blocking, fs::write_atomically, timer_slack};
use log::warn;
use nix::fcntl::{Flock, FlockArg};
use runsc_wrapper::{ContainerId, Slots, WarmRuntime};
use serde::{Deserialize, Serialize};

use kiln_host::cgroup::{Cgroup, Limits};

use crate::{
    adopt::Adopter,
    bundle::Network,
    config::Policy,
    egress::Egress,
    error::{Error, Result},
    hints::Shared,
    io::read_capped,
    turn::Turn,
};

/// Where shims keep sockets and files of calls in flight, one directory per sandbox
/// ([`scratch_dir`]). Short, because the path of a UNIX socket ends at 107 bytes.
pub(crate) const RUN_DIR: &str = "/run/kiln";

/// How many characters of its socket's name are in the name of a sandbox's directory: all that fit
/// beside the longest id.
const MARK: usize = 8;

/// More memory than a sentry needs to boot, in bytes.
const BOOT_ROOM: i64 = 64 << 20;
/// Memory for a container's gofer and what the sentry keeps for it, in bytes: 5 MiB measured.
const GOFER_ROOM: u64 = 8 << 20;

/// How long after it was made a sandbox keeps others from starting. containerd's CRI plugin starts
/// it at once.
const UNSTARTED: Duration = Duration::from_secs(10);

/// One sandbox.
pub(crate) struct Sandbox {
    pub(crate) id: ContainerId,
    pub(crate) runtime: Arc<dyn WarmRuntime>,
    pub(crate) policy: Policy,
    /// The file that runtime and policy came from.
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) network: Network,
    /// What of its packets is dropped.
    pub(crate) egress: Egress,
    pub(crate) cgroup: Cgroup,
    /// The limits that CRI named for the Pod.
    pub(crate) pod_limits: Limits,
    pub(crate) scratch: Scratch,
    /// What its containers share beside the network.
    pub(crate) shared: Shared,
    /// Its turn to start, until it has.
    pub(crate) turn: Mutex<Option<Turn>>,
    /// What may still adopt a sandbox for this Pod.
    pub(crate) adopter: Mutex<Option<Adopter>>,
    /// The id of the sandbox in the runtime, where it was made ahead and adopted.
    pub(crate) adopted: OnceLock<ContainerId>,
    /// A gofer for a container of it, where one was started ahead.
    pub(crate) slots: Mutex<Option<Slots>>,
    /// See [`Sandbox::pid`]; 0 before the sandbox is made.
    pub(crate) pid: AtomicU32,
    /// Bytes of memory that the sandbox used before its first container.
    pub(crate) empty: OnceLock<u64>,
}

impl Sandbox {
    /// The host process that stands for the sandbox, once it is made.
    pub(crate) fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid > 0)
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Relaxed);
    }

    /// Lets the timers of a sandbox that runs be as late as the node allows. One whose timers are
    /// in time costs more CPU, and is as good.
    pub(crate) async fn slacken(&self) {
        let by = Duration::from_micros(self.policy.timer_slack_us);
        let Some(pid) = self.pid().filter(|_| !by.is_zero()) else {
            return;
        };
        let failed = move |source| Error::Io {
            what: format!("slacken the timers of sentry {pid}"),
            source,
        };
        if let Err(e) = blocking(move || timer_slack::set(pid, by).map_err(failed)).await {
            warn!("sandbox {}: {e}", self.id);
        }
    }

    /// Takes what may adopt a sandbox: a Pod tries once.
    pub(crate) fn take_adopter(&self) -> Option<Adopter> {
        let mut adopter = self.adopter.lock().unwrap_or_else(PoisonError::into_inner);
        adopter.take()
    }

    pub(crate) fn begin_turn(&self, new: Option<Turn>) {
        let mut turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        *turn = new;
    }

    /// Lets another sandbox start: this one has, or never will.
    pub(crate) fn end_turn(&self) {
        self.begin_turn(None);
    }

    /// Does so in a while: nobody need start what was made.
    pub(crate) fn end_turn_unstarted(self: &Arc<Self>) {
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(UNSTARTED).await;
            if let Some(sandbox) = sandbox.upgrade() {
                sandbox.end_turn();
            }
        });
    }

    /// Takes the gofer that was started ahead.
    pub(crate) fn take_slots(&self) -> Option<Slots> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.take()
    }

    /// The id that the runtime knows the sandbox by.
    pub(crate) fn runtime_id(&self) -> &ContainerId {
        self.adopted.get().unwrap_or(&self.id)
    }

    /// The limits that the sandbox is made with, and by which its sentry says how much memory
    /// and how many CPUs there are; `own` are those of its first container.
    pub(crate) fn boot_limits(&self, own: Option<Limits>) -> Limits {
        if self.cgroup.in_kubepods() {
            return self.cgroup.parent_limits();
        }
        let limits = self.pod_limits.or(&own.unwrap_or_default());
        Limits {
            memory: limits.memory.map(|m| m.saturating_add(BOOT_ROOM)),
            ..limits
        }
    }

    /// Brings the limits of the sandbox's cgroup up to date with those of its containers, or
    /// with those that a kubelet gave the Pod around it.
    pub(crate) fn limit(&self, containers: &[Limits]) {
        if containers.is_empty() {
            return;
        }
        let limits = if self.cgroup.in_kubepods() {
            self.cgroup.parent_limits()
        } else {
            let limits = self.pod_limits.or(&Limits::sum(containers));
            let own = self.overhead(containers.len());
            Limits {
                memory: limits.memory.map(|m| m.saturating_add(own)),
                ..limits
            }
        };
        if let Err(e) = self.cgroup.apply(&limits) {
            warn!("limit sandbox {}: {e}", self.id);
        }
    }

    /// Bytes that the sandbox needs for itself: what it used before its first container, and a
    /// gofer for each. A kubelet gets this figure from the RuntimeClass.
    fn overhead(&self, containers: usize) -> i64 {
        let empty = *self.empty.get_or_init(|| self.cgroup.usage().memory);
        let bytes = empty.saturating_add(GOFER_ROOM.saturating_mul(containers as u64));
        i64::try_from(bytes).unwrap_or(i64::MAX)
    }
}

/// A directory of one sandbox for what calls in flight need on disk.
#[derive(Debug)]
pub(crate) struct Scratch {
    dir: PathBuf,
    next: AtomicU64,
}

impl Scratch {
    /// Makes the directory of a sandbox below `root`, empty and only root's. `socket` is the one
    /// that its shim serves.
    pub(crate) fn new(root: &Path, id: &ContainerId, socket: &Path) -> Result<Self> {
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        match private.create(root) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make", root)(e));
            }
            _ => {}
        }
        let dir = scratch_dir(root, id, socket);
        remove_dir(&dir)?;
        private.create(&dir).map_err(Error::io("make", &dir))?;
        Ok(Self {
            dir,
            next: AtomicU64::new(0),
        })
    }

    /// Waits until no other `delete` works on the sandbox with this directory, and keeps others
    /// waiting while the result lives. `None` when the directory is gone, and with it what others
    /// could work on. Blocks.
    pub(crate) fn lock(dir: &Path) -> Option<Flock<fs::File>> {
        let dir = fs::File::open(dir).ok()?;
        Flock::lock(dir, FlockArg::LockExclusive).ok()
    }

    /// Removes the directory of a sandbox whose shim is gone.
    pub(crate) fn remove_stale(dir: &Path) -> Result<()> {
        remove_dir(dir)
    }

    /// Removes the directory.
    pub(crate) fn remove(&self) -> Result<()> {
        remove_dir(&self.dir)
    }

    /// Makes a directory that no other call uses, with a short name.
    pub(crate) fn subdir(&self) -> Result<PathBuf> {
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let dir = self.dir.join(name);
        fs::create_dir(&dir).map_err(Error::io("make", &dir))?;
        Ok(dir)
    }

    /// The place for the file that stands for an adopted sandbox.
    pub(crate) fn adopted(&self) -> PathBuf {
        self.dir.join("adopted")
    }

    /// Removes what [`Scratch::subdir`] made.
    pub(crate) fn remove_subdir(dir: &Path) -> Result<()> {
        remove_dir(dir)
    }
}

/// The directory below `root` of the sandbox `id` whose shim serves `socket`. An id is one of
/// containerd's namespace, and of one containerd. The socket's name tells those apart: it is a
/// digest of containerd's address, the namespace and the id. No id has an `@`.
pub(crate) fn scratch_dir(root: &Path, id: &ContainerId, socket: &Path) -> PathBuf {
    let name = socket.file_name().unwrap_or_default().to_string_lossy();
    let mark: String = name.chars().take(MARK).collect();
    root.join(format!("{id}@{mark}"))
}

/// The same where the shim is gone, which may have been one of a release that named directories by
/// their id alone.
pub(crate) fn left_scratch_dir(root: &Path, id: &ContainerId, socket: &Path) -> PathBuf {
    let dir = scratch_dir(root, id, socket);
    if dir.exists() {
        dir
    } else {
        root.join(id.as_str())
    }
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// What a `delete` after the shim's death must know, kept in the bundle.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    version: u32,
    /// The sandbox that the container belongs to.
    pub(crate) sandbox: String,
    /// The file of the node's configuration.
    pub(crate) config: Option<PathBuf>,
    /// The id of the sandbox in the runtime where that is another one, else empty.
    #[serde(default)]
    pub(crate) adopted: String,
    /// `cgroupsPath` of the container, empty where it has no cgroup of its own.
    pub(crate) cgroup: String,
}

impl Record {
    const FILE: &str = "kiln.json";
    const VERSION: u32 = 1;
    const MAX: u64 = 64 << 10;

    pub(crate) fn new(sandbox: &ContainerId, config: Option<PathBuf>, cgroup: String) -> Self {
        Self {
            version: Self::VERSION,
            sandbox: sandbox.to_string(),
            config,
            adopted: String::new(),
            cgroup,
        }
    }

    /// The same for a sandbox that the runtime knows by `id`.
    pub(crate) fn known_as(self, id: &ContainerId) -> Self {
        let other = (id.as_str() != self.sandbox).then(|| id.to_string());
        Self {
            adopted: other.unwrap_or_default(),
            ..self
        }
    }

    /// The id that the runtime knows the sandbox by.
    pub(crate) fn runtime_id(&self) -> &str {
        if self.adopted.is_empty() {
            &self.sandbox
        } else {
            &self.adopted
        }
    }

    pub(crate) fn save(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(Self::FILE);
        let text = serde_json::to_vec(self).map_err(|e| Error::io("encode", &path)(e.into()))?;
        write_atomically(&path, &text).map_err(Error::io("write", &path))
    }

    pub(crate) fn remove(bundle: &Path) -> Result<()> {
        let path = bundle.join(Self::FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &path)(e)),
            _ => Ok(()),
        }
    }

    pub(crate) fn load(bundle: &Path) -> Result<Self> {
        let path = bundle.join(Self::FILE);
        let text = read_capped(&path, Self::MAX)?;
        let record: Self =
            serde_json::from_slice(&text).map_err(|e| Error::io("decode", &path)(e.into()))?;
        if record.version != Self::VERSION {
            let other = io::Error::other(format!(
                "version {} is not {}",
                record.version,
                Self::VERSION
            ));
            return Err(Error::io("decode", &path)(other));
        }
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod1() -> ContainerId {
        "pod1".parse().unwrap()
    }

    #[test]
    fn scratch_is_private_and_goes_with_its_sandbox() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let socket = Path::new("/run/containerd/s/0123456789abcdef");
        let stale = root.path().join("pod1@01234567/old");
        fs::create_dir_all(&stale).unwrap();
        let scratch = Scratch::new(root.path(), &pod1(), socket).unwrap();
        assert!(!stale.exists());
        assert_eq!(
            fs::metadata(&scratch.dir).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert_ne!(scratch.subdir().unwrap(), scratch.subdir().unwrap());
        let dir = scratch.dir.clone();
        scratch.remove().unwrap();
        assert!(!dir.exists());
    }

    #[test]
    fn sandboxes_of_one_id_have_directories_of_their_own() {
        let root = tempfile::tempdir().unwrap();
        let [one, other] = [
            "/run/containerd/s/0123456789",
            "/run/containerd/s/9876543210",
        ]
        .map(|socket| Scratch::new(root.path(), &pod1(), Path::new(socket)).unwrap());
        let kept = one.subdir().unwrap();
        Scratch::new(
            root.path(),
            &pod1(),
            Path::new("/run/containerd/s/9876543210"),
        )
        .unwrap();
        other.remove().unwrap();
        assert!(kept.exists());
    }

    #[test]
    fn the_directory_of_an_older_shim_is_found_where_it_was() {
        let root = tempfile::tempdir().unwrap();
        let socket = Path::new("/run/containerd/s/0123456789");
        let left = || left_scratch_dir(root.path(), &pod1(), socket);
        let old = root.path().join("pod1");
        fs::create_dir(&old).unwrap();
        assert_eq!(left(), old);
        let new = Scratch::new(root.path(), &pod1(), socket).unwrap();
        assert_eq!(left(), new.dir);
    }

    #[test]
    fn the_socket_of_a_terminal_has_room_beside_the_longest_id() {
        const SOCKET_PATH: usize = 107;
        let id: ContainerId = "x".repeat(76).parse().unwrap();
        let dir = scratch_dir(Path::new(RUN_DIR), &id, Path::new(&"a".repeat(64)));
        let socket = dir.join("1000000").join("tty");
        assert!(socket.as_os_str().len() <= SOCKET_PATH, "{socket:?}");
    }

    #[test]
    fn a_record_is_read_back_and_another_version_is_not() {
        let bundle = tempfile::tempdir().unwrap();
        let id = "pod1".parse().unwrap();
        Record::new(&id, Some("/etc/x.toml".into()), "/pods/pod1".into())
            .save(bundle.path())
            .unwrap();
        let record = Record::load(bundle.path()).unwrap();
        assert_eq!(
            (record.sandbox.as_str(), record.cgroup.as_str()),
            ("pod1", "/pods/pod1")
        );
        fs::write(
            bundle.path().join("kiln.json"),
            r#"{"version":2,"sandbox":"a","config":null,"cgroup":""}"#,
        )
        .unwrap();
        assert!(Record::load(bundle.path()).is_err());
    }
}
