// SPDX-License-Identifier: Apache-2.0

//! P1, P2, P7 to P12: what is seen of the host's kernel and processes, and how much of the host
//! somebody can use up.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    cri::v1,
    node::Node,
    pod::{Container, GUEST},
    tools,
    wait::{self, SOON},
};
use nix::sys::{
    stat::{Mode, SFlag, makedev, mknod},
    utsname::uname,
};

use crate::{
    HOSTILE, Neighbour,
    attempts::{PROBE, attacker, attempt, reported, try_all, with_probe},
};

const MIB: i64 = 1 << 20;

/// What `/dev` of a container holds. All of it is the sentry's own.
const DEVICES: [&str; 15] = [
    "char", "fd", "full", "fuse", "net", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
    "stdout", "tty", "urandom",
];

/// Neither the kernel's version, log and command line, nor its memory.
pub(crate) async fn p1_the_hosts_kernel_is_not_seen(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let host = uname()?;
    let release = host.release().to_string_lossy();
    let version = host.version().to_string_lossy();
    let name = host.nodename().to_string_lossy();
    let command_line = fs::read_to_string("/proc/cmdline")?;
    let seen = [
        "uname",
        "read /proc/version",
        "read /proc/cmdline",
        "dmesg",
        "read /proc/self/mountinfo",
        "read /proc/sys/kernel/hostname",
    ];
    for attempt in try_all(&container, &seen).await? {
        let found = attempt.finds()?;
        for secret in [&*release, &*version, &*name, command_line.trim()] {
            // A machine may have a name of two letters, which are in everything.
            ensure!(
                secret.len() < 5 || !found.contains(secret),
                "{secret:?} of the host is in {attempt:?}"
            );
        }
    }
    let log = attempt(&container, "dmesg").await?;
    ensure!(log.finds()?.contains("gVisor"), "{log:?}");
    let hidden = [
        "read /proc/kallsyms",
        "read /proc/kcore",
        "read /proc/config.gz",
        "open /dev/kmsg",
        "open /dev/mem",
        "open /dev/port",
        "read /sys/kernel/debug/tracing/trace",
        "read /sys/firmware/dmi/tables/DMI",
    ];
    for attempt in try_all(&container, &hidden).await? {
        attempt.fails_with(&["ENOENT"])?;
    }
    let calls = [
        "bpf",
        "init_module",
        "delete_module",
        "kexec_load",
        "perf_event_open",
        "swapoff",
        "reboot",
        "settimeofday",
        "io_uring_setup",
        "userfaultfd",
        "open_by_handle_at",
        "acct",
        "vhangup",
        "quotactl",
        "fsopen",
        "move_mount",
    ];
    let calls = calls.map(|name| format!("call {name}"));
    for attempt in try_all(&container, &calls).await? {
        attempt.fails()?;
    }
    let switches = [
        "write /proc/sys/kernel/core_pattern |/probe",
        "write /proc/sys/kernel/modprobe /probe",
        "write /proc/sysrq-trigger b",
        "mount tmpfs /mnt tmpfs",
        "mount / /mnt bind",
    ];
    for attempt in try_all(&container, &switches).await? {
        attempt.fails()?;
    }
    pod.remove().await
}

/// Processes of the host and of other Pods can neither be seen nor signalled, traced or entered.
pub(crate) async fn p2_the_hosts_processes_are_not_there(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let mut targets = vec![
        std::process::id(),
        pod.shim()?.pid,
        neighbour.pod.shim()?.pid,
    ];
    for pod in [&pod, &neighbour.pod] {
        targets.extend(pod.runtime_processes("runsc-").iter().map(|p| p.pid));
    }
    ensure!(targets.len() > 5, "{targets:?}");
    for pid in targets {
        let words = ["kill", "ptrace"].map(|word| format!("{word} {pid}"));
        for attempt in try_all(&container, &words).await? {
            attempt.fails_with(&["ESRCH"])?;
        }
        let words = [
            format!("setns /proc/{pid}/ns/net"),
            format!("read /proc/{pid}/environ"),
            format!("list /proc/{pid}/root"),
        ];
        for attempt in try_all(&container, &words).await? {
            attempt.fails_with(&["ENOENT"])?;
        }
    }
    let commands = container
        .sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        .await?;
    for word in ["containerd", "runsc", "kiln-node-agent", neighbour.pod.id()] {
        ensure!(!commands.contains(word), "{word} is in {commands:?}");
    }
    pod.remove().await?;
    neighbour.remove().await
}

/// Processes without end meet the Pod's limit, and the host and others live on.
pub(crate) async fn p7_a_fork_bomb_ends_its_own_pod(node: &Node, handler: &str) -> Result<()> {
    /// Of the host's, of which a sandbox has some 25 for itself and 2 for each process inside.
    const LIMIT: i64 = 120;
    let neighbour = Neighbour::run(node, handler).await?;
    let name = format!("bomb-{handler}");
    let parent = node.cgroup().pod_of_few(&name, LIMIT)?;
    let pod = node
        .pod(handler)
        .with(|config| config.linux.get_or_insert_default().cgroup_parent = parent)
        .run()
        .await?;
    // Some processes it may have.
    let few = with_probe(pod.container([PROBE, "fork", "3"]))?
        .start()
        .await?;
    reported(&few).await?.finds()?;
    let bomb = with_probe(pod.container([PROBE, "fork", "2000"]))?
        .start()
        .await?;
    let status = bomb.ended().await?;
    // Either it was told no, or that ended the sandbox.
    if status.exit_code == 0 {
        reported(&bomb).await?.fails()?;
    }
    let all_ran = bomb.log().contains("\"done\":true");
    ensure!(!all_ran, "2000 processes within {LIMIT}: {}", bomb.log());
    neighbour.is_well().await?;
    pod.remove().await?;
    node.cgroup().remove_pod(&name)?;
    neighbour.remove().await
}

/// Memory without end, in a process or in a file system of the sandbox, kills the Pod and is told.
pub(crate) async fn p8_a_memory_bomb_ends_its_own_pod(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let pod = node.pod(handler).run().await?;
    let size = (600 * MIB).to_string();
    let bomb = pod.container(["eat", &size]).image(GUEST).memory(96 * MIB);
    let bomb = bomb.start().await?;
    let status = bomb.ended().await?;
    ensure!(
        (status.exit_code, status.reason.as_str()) == (137, "OOMKilled"),
        "{status:?}"
    );
    neighbour.is_well().await?;
    pod.remove().await?;

    // Shared memory has the size that Kubernetes gives it, and is the Pod's to fill.
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let fill = attempt(&container, &format!("fill /dev/shm/bomb {}", 200 * MIB)).await?;
    fill.fails_with(&["ENOSPC"])?;
    let written: i64 = fill.found.parse()?;
    ensure!(written <= 64 * MIB, "{written} bytes of 64 MiB");
    neighbour.is_well().await?;
    pod.remove().await?;
    neighbour.remove().await
}

/// Four busy processes of a Pod with half a CPU use half a CPU, and another Pod gets answers.
pub(crate) async fn p9_a_busy_pod_leaves_time_to_others(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let pod = node.pod(handler).run().await?;
    let busy = "for i in 1 2 3 4; do burn 60 & done; wait";
    let container = pod.script(busy).image(GUEST).cpu(500).start().await?;
    // What its start has used is not limited yet where the sandbox is.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, start) = (used(&container).await?, Instant::now());
    while start.elapsed() < Duration::from_secs(4) {
        neighbour.is_well().await?;
    }
    let share = (used(&container).await? - before) as f64 / start.elapsed().as_nanos() as f64;
    ensure!(share < 0.65, "{share:.2} CPUs used of 0.5");
    pod.remove().await?;
    neighbour.remove().await
}

async fn used(container: &Container<'_, '_>) -> Result<u64> {
    let stats = container.stats().await?;
    let used = stats.cpu.and_then(|c| c.usage_core_nano_seconds);
    Ok(used.context("no CPU time")?.value)
}

/// Neither by files that are setuid root, of the image or of a volume, nor by asking.
pub(crate) async fn p10_nobody_becomes_more_than_they_are(
    node: &Node,
    handler: &str,
) -> Result<()> {
    let volume = node.volume()?;
    let suid = volume.join("probe");
    fs::copy(tools::probe()?, &suid)?;
    fs::set_permissions(&suid, fs::Permissions::from_mode(0o4755))?;
    let pod = node.pod(handler).run().await?;
    for no_new_privs in [true, false] {
        let container = with_probe(pod.idle().image(HOSTILE))?
            .mount(&volume, "/volume")
            .with(|c| {
                let linux = c.linux.get_or_insert_default();
                let security = linux.security_context.get_or_insert_default();
                security.run_as_user = Some(v1::Int64Value { value: 1000 });
                security.no_new_privs = no_new_privs;
            })
            .start()
            .await?;
        let of_the_image = container.sh("/bin/suid nnp").await?;
        ensure!(
            of_the_image.trim() == "Effective uid: 1000",
            "{of_the_image}"
        );
        let ran = container.exec(["/volume/probe", "identity"]).await?;
        ensure!(ran.stdout.contains("1000 1000 0000000000000000"), "{ran:?}");
        for attempt in try_all(&container, &["setuid", "raise", "write /etc/passwd x"]).await? {
            attempt.fails_with(&["EPERM", "EACCES"])?;
        }
        // In a user namespace of its own it has rights over what it makes there, and no more.
        let chain = [
            "unshare user",
            "socket inet raw",
            "write /etc/shadow x",
            "mknod c 1 1 /tmp/mem",
        ];
        for attempt in &try_all(&container, &chain).await?[1..] {
            // The last for a node that can be made and stands for nothing.
            attempt.fails_with(&["EPERM", "EACCES", "ENXIO"])?;
        }
    }
    // A root of the sandbox cannot take what it was not given.
    let root = with_probe(pod.idle())?
        .with(|c| {
            let linux = c.linux.get_or_insert_default();
            let security = linux.security_context.get_or_insert_default();
            security
                .capabilities
                .get_or_insert_default()
                .drop_capabilities = vec!["ALL".to_owned()];
        })
        .start()
        .await?;
    let identity = attempt(&root, "identity").await?;
    ensure!(
        identity.finds()?.starts_with("0 0 0000000000000000"),
        "{identity:?}"
    );
    attempt(&root, "raise").await?.fails_with(&["EPERM"])?;
    pod.remove().await
}

/// `/dev` is the sentry's own, and nodes of devices, made inside or by the host, open nothing.
pub(crate) async fn p11_there_are_no_devices_of_the_host(node: &Node, handler: &str) -> Result<()> {
    // Memory, KVM, the first loop device and the kernel's log: what a host has.
    const NODES: [(&str, SFlag, u64, u64); 4] = [
        ("mem", SFlag::S_IFCHR, 1, 1),
        ("kvm", SFlag::S_IFCHR, 10, 232),
        ("loop", SFlag::S_IFBLK, 7, 0),
        ("kmsg", SFlag::S_IFCHR, 1, 11),
    ];
    let volume = node.volume()?;
    for (name, kind, major, minor) in NODES {
        mknod(
            &volume.join(name),
            kind,
            Mode::from_bits_truncate(0o666),
            makedev(major, minor),
        )?;
    }
    let pod = node.pod(handler).run().await?;
    let container = with_probe(pod.idle())?
        .mount(&volume, "/volume")
        .start()
        .await?;
    // The nodes are there, and what is no node can be read.
    fs::write(volume.join("file"), "x")?;
    let shown = attempt(&container, "list /volume").await?;
    ensure!(shown.finds()? == "file kmsg kvm loop mem", "{shown:?}");
    attempt(&container, "open /volume/file").await?.finds()?;
    let devices = attempt(&container, "list /dev").await?;
    for device in devices.finds()?.split(' ') {
        ensure!(
            DEVICES.contains(&device) || device == "zero",
            "{device} is in /dev"
        );
    }
    for (name, kind, major, minor) in NODES {
        let kind = if kind == SFlag::S_IFBLK { "b" } else { "c" };
        let words = [
            format!("mknod {kind} {major} {minor} /tmp/{name}"),
            format!("open /volume/{name}"),
            format!("read /volume/{name}"),
        ];
        for attempt in try_all(&container, &words).await? {
            attempt.fails_with(&["ENXIO", "ENODEV", "EPERM", "EACCES"])?;
        }
    }
    // One that the Pod asks for by name.
    let asked = pod.idle().with(|c| {
        c.devices.push(v1::Device {
            container_path: "/dev/asked".to_owned(),
            host_path: "/dev/kmsg".to_owned(),
            permissions: "rwm".to_owned(),
        });
    });
    let asked = with_probe(asked)?.start().await;
    if let Ok(asked) = asked {
        attempt(&asked, "read /dev/asked").await?.fails()?;
    }
    pod.remove().await
}

/// Such a container is not started, in whichever way the Pod's sandbox came to be.
pub(crate) async fn p12_privileged_is_refused(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).with(|config| {
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    });
    let pod = pod.run().await?;
    pod.expect_privileged_refused().await?;
    pod.remove().await
}

/// Waits for a file of a container to be there.
pub(crate) async fn until_there(path: &Path) -> Result<()> {
    wait::until_true(&path.display().to_string(), SOON, || path.exists()).await
}
