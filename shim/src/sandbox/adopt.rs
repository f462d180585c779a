// SPDX-License-Identifier: Apache-2.0

//! A sandbox that the node's agent has booted ahead becomes that of a Pod.
//!
//! All of it happens while the Pod's sandbox is created, in this order: the agent hands one out,
//! the file that stands for it is renamed into the shim's own directory (from then on it is nobody
//! else's), and its processes move into the Pod's cgroup while the runtime starts it on the Pod's
//! network and it gets the Pod's host name. What fails up to there costs the Pod nothing but time:
//! the sandbox is destroyed, and the Pod starts cold.

use std::{
    fmt,
    fs::{self, File},
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kiln_agent_api::{
    Agent, AgentError, RuntimeFile, Setup, Shape, api::Warm, gofer, gofer_socket, naming_process,
};
use kiln_host::{blocking, cgroup::Cgroup, in_netns};
use log::{debug, info, warn};
use nix::ifaddrs::getifaddrs;
use runsc_wrapper::{ContainerId, ExecOpts, PrestartedGofer, StartWay, Stdio};

use crate::{
    bundle::{Network, Spec},
    error::{Error, Result},
    sandbox::{Origin, boot::Boot, restore::Restore, scratch::Scratch},
    systemd,
};

/// How long a Pod waits for a gofer before it does without: no longer than the command takes on a
/// busy node by which its container is made then.
const GOFER: Duration = Duration::from_secs(1);

/// How long a Pod that is restored waits for a sandbox, and how often it asks.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);

/// A sandbox that has become the Pod's, and that was started.
pub(crate) struct Adopted {
    /// The id that the runtime knows it by.
    pub(crate) id: ContainerId,
    /// Its sentry.
    pub(crate) pid: u32,
    /// A gofer for its first container, if the agent had one.
    pub(crate) gofer: Option<PrestartedGofer>,
}

/// How long each step of an adoption took.
struct Steps {
    last: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn new() -> Self {
        Self {
            last: Instant::now(),
            done: Vec::new(),
        }
    }

    fn done(&mut self, step: &'static str) {
        let now = Instant::now();
        self.done.push((step, now - self.last));
        self.last = now;
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (step, took) in &self.done {
            write!(f, " {step}={}", took.as_micros())?;
        }
        Ok(())
    }
}

/// A sandbox that was handed out.
struct Handed {
    agent: Agent,
    id: ContainerId,
    pid: u32,
    file: PathBuf,
    cgroup: Cgroup,
    way: StartWay,
    /// Where its gofer can be had, if it has one.
    gofer: Option<PathBuf>,
    /// Of the Pod.
    netns: OwnedFd,
}

/// Gets a sandbox for the Pod of `spec`, which must be as the runtime would get it, from the agent
/// at `socket`, and restores it from `snapshot` if there is one. `None` when the Pod starts cold.
///
/// # Errors
/// When the Pod cannot start cold either: a start that failed half-way has taken the addresses of
/// its network.
pub(crate) async fn adopt(
    boot: &Boot,
    socket: &Path,
    spec: &Spec,
    bundle: &Path,
    snapshot: Option<&Restore>,
) -> Result<Option<Adopted>> {
    let begun = Instant::now();
    let mut steps = Steps::new();
    let handed = match snapshot {
        None => acquire(boot, socket, spec).await,
        Some(_) => acquire_patiently(boot, socket, spec).await,
    };
    let Some(handed) = handed else {
        return Ok(None);
    };
    steps.done("acquire");
    let id = handed.id.clone();
    let become_sandbox = handed.become_sandbox(boot, spec, bundle, snapshot, &mut steps);
    if let Err(e) = become_sandbox.await {
        warn!("{id} cannot be adopted, the Pod starts cold: {e}");
        handed.discard(boot, &e).await?;
        return Ok(None);
    }
    // What is restored has its containers made by command.
    let gofer = handed.gofer().await.filter(|_| snapshot.is_none());
    steps.done("slots");
    let took = begun.elapsed();
    info!("adopted {id} in {} us:{steps}", took.as_micros());
    let (agent, warm, pod) = (handed.agent, id.clone(), boot.plan.id.clone());
    tokio::spawn(async move {
        if let Err(e) = agent.adopted(warm.as_str(), pod.as_str(), took).await {
            debug!("tell the agent: {e}");
        }
    });
    Ok(Some(Adopted {
        id,
        pid: handed.pid,
        gofer,
    }))
}

/// Asks the agent until it has a sandbox, for three seconds at most: memory is worth waiting for.
async fn acquire_patiently(boot: &Boot, socket: &Path, spec: &Spec) -> Option<Handed> {
    let end = Instant::now() + PATIENCE;
    loop {
        let handed = acquire(boot, socket, spec).await;
        if handed.is_some() || Instant::now() > end {
            return handed;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Asks the agent. Whatever goes wrong here means that the Pod starts cold.
async fn acquire(boot: &Boot, socket: &Path, spec: &Spec) -> Option<Handed> {
    let Network::Netns(netns) = boot.plan.network.clone() else {
        info!("starts cold: it has no network of its own");
        return None;
    };
    let agent = match Agent::connect(socket).await {
        Ok(agent) => agent,
        Err(AgentError::Absent(_)) => return None,
        Err(e) => {
            warn!("starts cold: {e}");
            return None;
        }
    };
    let (spec, runtime) = (spec.clone(), boot.plan.runtime_record());
    let root = runtime.root.join(&boot.plan.namespace);
    let looked = blocking(move || {
        let setup = Setup {
            runtime: RuntimeFile::of(&runtime.binary)
                .map_err(Error::io("look at", &runtime.binary))?,
            root: &root,
            flags: &runtime.flags,
        };
        let netns = File::open(&netns).map_err(Error::io("open", &netns))?;
        Ok::<_, Error>((Shape::of(spec.value(), setup), OwnedFd::from(netns)))
    });
    let (shape, netns) = match looked.await {
        Ok((Ok(shape), netns)) => (shape, netns),
        Ok((Err(why), _)) => {
            info!("starts cold: {why}");
            return None;
        }
        Err(e) => {
            warn!("starts cold: {e}");
            return None;
        }
    };
    match agent.acquire(&shape, boot.plan.id.as_str()).await {
        Ok(warm) => Handed::new(agent, socket, &warm, netns, &boot.plan.cgroup)
            .inspect_err(|e| warn!("the agent's answer makes no sense: {e}"))
            .ok(),
        Err(e) => {
            info!("starts cold: {e}");
            None
        }
    }
}

impl Handed {
    fn new(
        agent: Agent,
        socket: &Path,
        warm: &Warm,
        netns: OwnedFd,
        pods: &Cgroup,
    ) -> Result<Self> {
        Ok(Self {
            agent,
            id: warm.id.parse()?,
            pid: warm.pid,
            file: PathBuf::from(&warm.file),
            cgroup: pods.beside(&warm.cgroup)?,
            way: StartWay::by_method(&warm.network_call),
            gofer: warm.has_gofer.then(|| gofer_socket(socket)),
            netns,
        })
    }

    async fn become_sandbox(
        &self,
        boot: &Boot,
        spec: &Spec,
        bundle: &Path,
        snapshot: Option<&Restore>,
        steps: &mut Steps,
    ) -> Result<()> {
        let record = boot.record(&Origin::Adopted(self.id.clone()));
        let (from, to) = (self.file.clone(), boot.scratch.adopted());
        let bundle = bundle.to_owned();
        blocking(move || {
            // Whoever cleans up after this shim must know of the sandbox before it is ours.
            record.save(&bundle)?;
            fs::rename(&from, &to).map_err(Error::io("take", &from))
        })
        .await?;
        steps.done("take");
        let (runtime, cgroup) = (&boot.runtime, &boot.plan.cgroup);
        let started = async {
            if let Some(Restore { image, .. }) = snapshot {
                // The host name is in the image: a Sandbox's Pods have the same.
                let netns = self.netns.as_fd();
                runtime.restore_on_network(&self.id, netns, image).await?;
                steps.done("restore");
                return Ok(());
            }
            let started = runtime.start_on_network(&self.id, self.netns.as_fd(), self.way);
            started.await?;
            steps.done("start");
            let name = spec.hostname().unwrap_or_default();
            self.set_hostname(boot, name).await?;
            steps.done("hostname");
            Ok::<_, Error>(())
        };
        // The kernel takes its time to move processes, and nothing else waits for it.
        let (moved, started) = tokio::join!(self.move_to(cgroup), started);
        started?;
        steps.done.push(("cgroup", moved?));
        runtime.note_cgroup(&self.id, &cgroup.spec_path()).await?;
        Ok(())
    }

    /// Moves its processes, and returns how long that took.
    async fn move_to(&self, cgroup: &Cgroup) -> Result<Duration> {
        let begun = Instant::now();
        let (old, new) = (self.cgroup.clone(), cgroup.clone());
        // Systemd refuses a process that has ended, as one of those that serve the sentry may have
        // by then. The others follow below.
        if let Some(scope) = new.scope()
            && let Err(e) = systemd::start_scope(&scope, &[self.pid]).await
        {
            warn!("systemd may take away what limits this sandbox: {e}");
        }
        blocking(move || {
            new.make()?;
            new.take_all(&old)?;
            old.remove()
        })
        .await?;
        Ok(begun.elapsed())
    }

    /// Its gofer, which it can do without.
    async fn gofer(&self) -> Option<PrestartedGofer> {
        let (socket, id) = (self.gofer.clone()?, self.id.clone());
        blocking(move || receive_gofer(&socket, id.as_str()))
            .await
            .inspect_err(|e| info!("{e}"))
            .ok()
    }

    async fn set_hostname(&self, boot: &Boot, name: &str) -> Result<()> {
        let scratch = boot.scratch.subdir()?;
        let exec = boot
            .runtime
            .exec(&ExecOpts {
                container: self.id.clone(),
                process: naming_process(name),
                stdio: Stdio::default(),
                console_socket: None,
                scratch: scratch.clone(),
            })
            .await;
        let exit = match exec {
            Ok(exec) => exec.exit.await,
            Err(e) => Err(e),
        };
        Scratch::remove_dir(&scratch)?;
        match exit?.code {
            0 => Ok(()),
            code => Err(Error::InvalidArgument(format!(
                "host name {name:?} is refused with error {code}"
            ))),
        }
    }

    async fn destroy(&self, boot: &Boot) -> Result<()> {
        let taken = boot.scratch.adopted();
        if !taken.exists() {
            return Ok(()); // the agent does it
        }
        // A gofer that nobody will use would keep the cgroups.
        drop(self.gofer().await);
        boot.runtime.delete(&self.id).await?;
        let (old, new) = (self.cgroup.clone(), boot.plan.cgroup.clone());
        blocking(move || {
            fs::remove_file(&taken).map_err(Error::io("remove", &taken))?;
            old.remove()?;
            // The runtime takes one that is there for set up already.
            new.remove().map_err(Error::from)
        })
        .await
    }

    /// Destroys a sandbox that did not become the Pod's. What stays of it is for the Pod's own
    /// clean-up, which knows of it by the record.
    async fn discard(&self, boot: &Boot, why: &Error) -> Result<()> {
        if let Err(e) = self.destroy(boot).await {
            warn!("destroy {}: {e}", self.id);
        }
        if let Err(e) = self.agent.release(self.id.as_str(), &why.to_string()).await {
            debug!("tell the agent: {e}");
        }
        let netns = self
            .netns
            .try_clone()
            .map_err(Error::io("hold", Path::new("the network")))?;
        if blocking(move || has_addresses(&netns)).await? {
            return Ok(());
        }
        let message =
            format!("its network was left without addresses by a start that failed: {why}");
        Err(Error::InvalidArgument(message))
    }
}

/// Gets the gofer of the sandbox `id` at `socket`. Blocks.
fn receive_gofer(socket: &Path, id: &str) -> Result<PrestartedGofer> {
    let received =
        gofer::request(socket, id, GOFER).and_then(|stream| PrestartedGofer::receive(&stream));
    received.map_err(Error::io("get a gofer at", socket))
}

/// Ends the gofer of the sandbox `id` that the agent at `socket` may still have: it would keep the
/// sandbox's cgroups. Blocks.
pub(crate) fn end_gofer(socket: &Path, id: &str) {
    if let Err(e) = receive_gofer(&gofer_socket(socket), id) {
        debug!("{e}"); // none is left, or none was there
    }
}

/// Whether any link of `netns` but loopback has an address: those that a sandbox gets are taken
/// from the host's side. Blocks.
fn has_addresses(netns: &OwnedFd) -> Result<bool> {
    let look = || {
        Ok(getifaddrs()?.any(|link| {
            let address = link.address.as_ref();
            let v4 = address
                .and_then(|a| a.as_sockaddr_in())
                .map(|a| IpAddr::from(a.ip()));
            let v6 = address
                .and_then(|a| a.as_sockaddr_in6())
                .map(|a| IpAddr::from(a.ip()));
            v4.or(v6)
                .is_some_and(|ip| !ip.is_loopback() && !is_link_local(ip))
        }))
    };
    in_netns(netns.as_fd(), look).map_err(Error::io("look into", Path::new("the network")))
}

/// Whether the kernel gives such an address to a link by itself.
fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}
