// SPDX-License-Identifier: Apache-2.0

//! P3 to P6: sentry and gofers as the host's `/proc` shows them (proc(5)), against lists of what
//! they may be.

use std::{
    collections::{BTreeSet, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::{Node, NodeOpts},
    pod::{Container, Pod},
    process::Proc,
    tools,
};

use crate::{
    MARKER, Neighbour,
    attempts::{PROBE, attacker, attempt, reported, try_all, with_probe},
};

/// Namespaces that are the sandbox's own.
const OWN: [&str; 6] = ["mnt", "net", "ipc", "uts", "user", "pid"];

/// What a process may be.
struct Profile {
    /// User and group on the host.
    uid: u32,
    /// Most capabilities that it may have, in any of its sets (capabilities(7)).
    capabilities: u64,
}

/// The sentry, which opens files of the container's by itself: CHOWN, DAC_OVERRIDE,
/// DAC_READ_SEARCH, FOWNER, FSETID, and SYS_PTRACE for the processes of its own platform.
const SENTRY: Profile = Profile {
    uid: 0,
    capabilities: 0x8_001f,
};

/// The sentry that has a gofer open them.
const SENTRY_WITHOUT_DIRECTFS: Profile = Profile {
    uid: 65534,
    capabilities: 0,
};

/// A gofer: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SYS_CHROOT.
const GOFER: Profile = Profile {
    uid: 0,
    capabilities: 0x4_001f,
};

/// Every thread of the sentry and of the processes that it runs the Pod's code in.
pub(crate) async fn p3_the_sentry_has_what_it_needs(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let pod = node.pod(handler).run().await?;
    let _container = attacker(&pod).await?;
    let (ours, theirs) = (pod.sentry()?, neighbour.pod.sentry()?);
    holds(ours.pid, &SENTRY)?;
    for child in descendants(ours.pid) {
        holds(child, &SENTRY)?;
    }
    for namespace in OWN {
        ensure!(
            link(ours.pid, namespace)? != link(theirs.pid, namespace)?,
            "two sandboxes in one namespace of {namespace}"
        );
    }
    // Its root is a file system in memory with no way to the host's.
    let root: BTreeSet<_> = names(&proc_dir(ours.pid).join("root"))?
        .into_iter()
        .collect();
    ensure!(root.iter().all(|n| n == "etc" || n == "proc"), "{root:?}");
    let mounts = fs::read_to_string(proc_dir(ours.pid).join("mountinfo"))?;
    let mounts: Vec<_> = mounts.lines().collect();
    ensure!(
        mounts.len() == 1 && mounts[0].contains(" tmpfs ") && mounts[0].contains(" / / ro,"),
        "{mounts:#?}"
    );
    pod.remove().await?;
    neighbour.remove().await
}

/// A node that has gofers open all files has sentries without rights.
pub(crate) async fn p3_without_directfs_the_sentry_is_nobody(_: &Node) -> Result<()> {
    let opts = NodeOpts {
        runsc_flags: vec![("directfs".to_owned(), "false".to_owned())],
        ..NodeOpts::default()
    };
    let node = Node::start(opts).await?;
    let pod = node.pod("gvisor").run().await?;
    let container = attacker(&pod).await?;
    let sentry = pod.sentry()?;
    holds(sentry.pid, &SENTRY_WITHOUT_DIRECTFS)?;
    for child in descendants(sentry.pid) {
        holds(child, &SENTRY_WITHOUT_DIRECTFS)?;
    }
    container
        .sh("echo works > /tmp/file && cat /tmp/file /etc/passwd")
        .await?;
    pod.remove().await?;
    node.stop().await
}

/// Every gofer sees the file systems of its container, and no network.
pub(crate) async fn p4_a_gofer_has_what_it_needs(node: &Node, handler: &str) -> Result<()> {
    let volume = node.volume()?;
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().mount(&volume, "/volume").start().await?;
    let of_the_container = gofer(&container)?;
    let mut gofers = pod.runtime_processes("runsc-gofer");
    gofers.push(of_the_container.clone());
    ensure!(gofers.len() > 1, "{gofers:?}");
    let networks = [link(std::process::id(), "net")?, netns_of(node)?];
    for gofer in gofers {
        holds(gofer.pid, &GOFER)?;
        ensure!(!networks.contains(&link(gofer.pid, "net")?), "{gofer:?}");
        let devices = fs::read_to_string(proc_dir(gofer.pid).join("net/dev"))?;
        ensure!(devices.lines().count() <= 3, "more than lo: {devices}");
    }
    // What is mounted there: the root file system, the volume and what every Pod gets.
    let mounts = fs::read_to_string(proc_dir(of_the_container.pid).join("mountinfo"))?;
    let mut points: Vec<_> = mounts.lines().filter_map(|l| l.split(' ').nth(4)).collect();
    points.sort_unstable();
    let expected = [
        "/",
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/volume",
    ];
    if points.contains(&"/d0") {
        // In a gofer that was started ahead they are over empty slots.
        let is_slot = |p: &&str| *p == "/" || p.starts_with("/d") || p.starts_with("/f");
        let used = points.windows(2).filter(|pair| pair[0] == pair[1]).count();
        ensure!(
            points.iter().all(is_slot) && used == expected.len(),
            "{points:?}"
        );
    } else {
        ensure!(points == expected, "{points:?}");
    }
    ensure!(
        mounts.lines().all(|line| line.contains("nosuid")),
        "setuid files count: {mounts}"
    );
    pod.remove().await
}

/// Neither the sentry, nor a gofer, nor a program inside has an open file that it need not have;
/// and a working directory cannot be one.
pub(crate) async fn p5_no_open_file_gets_in(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    // Who starts the runtime has something to hand on.
    let agent = node.agent()?.pid().await.context("no agent")?;
    for pid in [pod.shim()?.pid, agent] {
        let inherited = open_files(pid)?.iter().any(|f| f.contains(MARKER));
        ensure!(inherited, "process {pid} lacks the marker");
    }
    let mut processes = vec![pod.sentry()?, gofer(&container)?];
    processes.extend(pod.runtime_processes("runsc-gofer"));
    for process in &processes {
        for file in open_files(process.pid)? {
            ensure!(
                may_have(&file, &pod, &container),
                "{process:?} has {file:?} open"
            );
        }
    }
    let inside = attempt(&container, "fds").await?;
    let numbers: Vec<_> = inside
        .finds()?
        .lines()
        .filter_map(|l| l.split(' ').next())
        .collect();
    ensure!(numbers == ["0", "1", "2"], "{inside:?}");
    // From a directory of the host that a process of the runtime has open, `..` would lead out.
    let mut here = names(Path::new("/"))?;
    let inside = attempt(&container, "list /").await?;
    here.retain(|name| !inside.found.split(' ').any(|other| other == name));
    ensure!(!here.is_empty(), "the host has nothing to be known by");
    let of_the_host = |found: &str| here.iter().any(|name| found.split(' ').any(|n| n == name));
    // The first is where a container may be, so that the others fail for what they are.
    for dir in ["/tmp".to_owned()]
        .into_iter()
        .chain(DESCRIPTORS.map(in_proc))
    {
        let from = with_probe(pod.container([PROBE, "list", "../../../.."]))?
            .with(|c| c.working_dir.clone_from(&dir))
            .start()
            .await;
        match from {
            Ok(started) => {
                let report = reported(&started).await?;
                ensure!(!of_the_host(&report.found), "{report:?}");
            }
            Err(e) => {
                let words = format!("{e:#}");
                ensure!(dir != "/tmp" && words.contains(&dir), "{dir}: {words}");
            }
        }
    }
    pod.remove().await
}

/// Numbers that open files of the runtime have had.
const DESCRIPTORS: [u32; 7] = [3, 5, 6, 7, 8, 14, 24];

fn in_proc(number: u32) -> String {
    format!("/proc/self/fd/{number}")
}

/// Whether a process of the runtime may have this file open.
fn may_have(file: &str, pod: &Pod<'_>, container: &Container<'_, '_>) -> bool {
    let own = [pod.id(), &pod.sandbox(), container.id()];
    let is_own = own.iter().any(|id| file.contains(*id));
    let name = file.trim_end_matches(" (deleted)");
    match name {
        // Its own standard streams, without a host behind.
        "/dev/null" => true,
        // A directory of a mount that no namespace has any more: gofers look their own files up
        // in it.
        "/" => true,
        // In a gofer's root, and so in the container's.
        _ if name == "/root" || name.starts_with("/root/") => true,
        _ if name.starts_with("socket:[") || name.starts_with("pipe:[") => true,
        _ if name.starts_with("/memfd:") => !name.contains(MARKER),
        // The io_uring is disabled and only holds files of the sentry that are slow to close.
        _ if name.starts_with("anon_inode:") => {
            ["[eventfd]", "[eventpoll]", "[io_uring]", "seccomp notify"]
                .iter()
                .any(|kind| name.ends_with(kind))
        }
        // A copy of /dev/null for each stream that a container does not have.
        _ if name.starts_with("/dev/.null-") => true,
        // What backs memory of the root file system.
        _ if name.contains("/.gvisor.filestore.") => is_own,
        // Go's runtime follows the limit of its own cgroup, open for reading (Go 1.25).
        _ if ["/cpu.cfs_period_us", "/cpu.cfs_quota_us", "/cpu.max"]
            .iter()
            .any(|limit| name.ends_with(limit)) =>
        {
            is_own
        }
        // What an adopted sandbox has its first process from, open for reading.
        _ if name.ends_with("/rootfs.erofs") => true,
        // The Pod's log of a crash, its own spec (that of slots is every sandbox's), and the FIFOs of its containers.
        _ if name.ends_with("/gvisor_panic.log") => is_own || file.contains(pod.hostname()),
        _ if name.ends_with("/config.json") => is_own || name.ends_with("/slots/config.json"),
        _ if name.ends_with("-stdout") || name.ends_with("-stderr") || name.ends_with("-stdin") => {
            is_own
        }
        _ => false,
    }
}

/// Programs of the host that run a sandbox are the same after attempts to write to them.
pub(crate) async fn p6_the_runtime_cannot_be_overwritten(node: &Node, handler: &str) -> Result<()> {
    let programs = [
        tools::runsc()?,
        tools::shim()?,
        tools::pause()?,
        tools::probe()?,
    ];
    let digests = || {
        programs
            .iter()
            .map(|p| digest(p))
            .collect::<Result<Vec<_>>>()
    };
    let before = digests()?;
    for program in &programs {
        let meta = fs::metadata(program)?;
        ensure!(
            meta.uid() == 0 && meta.mode() & 0o022 == 0,
            "{} is others' to write",
            program.display()
        );
    }
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let words = [
        "write /probe overwritten",
        "write /proc/self/exe overwritten",
        "write /proc/1/exe overwritten",
        "write /pause overwritten",
    ];
    let made = try_all(&container, &words).await?;
    for attempt in &made[..3] {
        attempt.fails_with(&["EROFS", "EACCES", "EPERM", "ETXTBSY"])?;
    }
    // A copy of its own is its own, whoever runs it.
    container.sh("cp /probe /tmp/own").await?;
    attempt(&container, "write /tmp/own x").await?.finds()?;
    // Programs that start as whatever starts them.
    for command in ["/proc/self/exe", "/proc/1/exe"] {
        let started = pod.container([command, "--version"]).start().await;
        if let Ok(started) = started {
            started.ended().await?;
            let log = started.log();
            ensure!(!log.contains("runsc"), "the runtime runs inside: {log}");
        }
    }
    pod.remove().await?;
    ensure!(digests()? == before, "a program of the host has changed");
    Ok(())
}

/// Checks user, capabilities, filter and namespaces of every thread of a process.
fn holds(pid: u32, profile: &Profile) -> Result<()> {
    let threads = fs::read_dir(proc_dir(pid).join("task"));
    for thread in threads.with_context(|| format!("process {pid}"))? {
        let Ok(status) = fs::read_to_string(thread?.path().join("status")) else {
            continue; // it has ended
        };
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name));
            line.map(str::trim)
                .with_context(|| format!("{name} is missing"))
        };
        let what = || format!("process {pid}:\n{status}");
        ensure!(field("Seccomp:")? == "2", "no filter: {}", what());
        ensure!(field("NoNewPrivs:")? == "1", "may gain rights: {}", what());
        for ids in ["Uid:", "Gid:"] {
            let wanted = profile.uid.to_string();
            ensure!(
                field(ids)?.split_whitespace().all(|id| id == wanted),
                "{}",
                what()
            );
        }
        ensure!(field("Groups:")?.is_empty(), "{}", what());
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            let has = u64::from_str_radix(field(set)?, 16)?;
            ensure!(
                has & !profile.capabilities == 0,
                "{set} {has:x}: {}",
                what()
            );
        }
    }
    for namespace in OWN {
        let own = link(pid, namespace)?;
        ensure!(
            own != link(std::process::id(), namespace)?,
            "{pid} is in the host's {namespace}"
        );
    }
    Ok(())
}

/// The gofer of a container: its own, else the one that was started with the Pod's sandbox.
pub(crate) fn gofer(container: &Container<'_, '_>) -> Result<Proc> {
    let pod = container.pod();
    let all = pod.node().processes().into_iter();
    let gofers: Vec<_> = all.filter(|p| p.argv.starts_with("runsc-gofer")).collect();
    let of = |id: &str| gofers.iter().find(|p| p.argv.contains(id)).cloned();
    let found = of(container.id()).or_else(|| of(&pod.sandbox()));
    found.context("no gofer")
}

/// All processes below `pid`. Those that run a Pod's code have no arguments to be found by.
fn descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| {
            let pid = e.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(e.path().join("status")).ok()?;
            let line = |name| status.lines().find_map(|l: &str| l.strip_prefix(name));
            // A zombie has no posture.
            let runs = !line("State:")?.trim().starts_with('Z');
            runs.then_some((pid, line("PPid:")?.trim().parse().ok()?))
        })
        .collect();
    let mut next = 0;
    while let Some(parent) = all.get(next).copied() {
        all.extend(
            parents
                .iter()
                .filter(|(_, p)| *p == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    all.split_off(1)
}

fn proc_dir(pid: u32) -> PathBuf {
    Path::new("/proc").join(pid.to_string())
}

fn link(pid: u32, namespace: &str) -> Result<PathBuf> {
    let path = proc_dir(pid).join("ns").join(namespace);
    fs::read_link(&path).with_context(|| format!("read {}", path.display()))
}

/// The network namespace in which the node's containerd is.
fn netns_of(node: &Node) -> Result<PathBuf> {
    node.netns()
        .run(|| Ok(fs::read_link("/proc/thread-self/ns/net")?))
}

fn open_files(pid: u32) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(proc_dir(pid).join("fd"))? {
        // It may be closed meanwhile.
        if let Ok(target) = fs::read_link(entry?.path()) {
            files.push(target.display().to_string());
        }
    }
    Ok(files)
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// Enough to notice a change by.
pub(crate) fn digest(path: &Path) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    fs::read(path)
        .with_context(|| format!("read {}", path.display()))?
        .hash(&mut hasher);
    Ok(hasher.finish())
}
