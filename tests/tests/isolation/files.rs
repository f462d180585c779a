// SPDX-License-Identifier: Apache-2.0

//! S1 to S3, S5, S8 and S9: images, volumes and what else of a Pod is on disk.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use kiln_images::OUTSIDE;
use kiln_tests::{
    mounts,
    node::{Node, NodeOpts},
    pod::Container,
    process::Proc,
    wait::{self, SOON},
};
use nix::mount::MsFlags;

use crate::{
    HOSTILE,
    attempts::{PROBE, attacker, attempt, reported, try_all, with_probe},
    posture::{digest, gofer},
};

const MIB: u64 = 1 << 20;

/// What would be found outside.
const SECRET: &str = "of-the-host";

/// Writing, deleting and replacing files leaves the layers below as they were, and where the root
/// file system is read-only there is no writing at all.
pub(crate) async fn s1_an_image_is_never_written_to(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let layers = lower_layers(&gofer(&container)?)?;
    ensure!(!layers.is_empty(), "no layers");
    let before = fingerprint(&layers)?;
    ensure!(before.len() > 10, "{before:?}");
    container
        .sh(
            "rm -r /etc /home; echo x > /bin/new; echo x >> /bin/busybox; chmod 777 /bin/ls; \
             mv /usr /gone; ln -sf /probe /bin/cat; chown 5:5 /root; true",
        )
        .await?;
    ensure!(fingerprint(&layers)? == before, "a layer has changed");
    let read_only = with_probe(pod.idle())?.read_only().start().await?;
    let words = [
        "write /new x",
        "write /etc/passwd x",
        "mknod c 1 3 /null",
        "offer /socket",
    ];
    for attempt in try_all(&read_only, &words).await? {
        attempt.fails_with(&["EROFS"])?;
    }
    pod.remove().await?;
    ensure!(
        fingerprint(&layers)? == before,
        "a layer has changed at the end"
    );
    Ok(())
}

/// The directories below the root file system of a container.
fn lower_layers(gofer: &Proc) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", gofer.pid))?;
    // At the root, or in the slot that is the root.
    let root = mounts.lines().find(|l| l.contains("lowerdir="));
    let options = root.and_then(|l| l.rsplit(' ').next()).context("no root")?;
    let lower = options.split(',').find_map(|o| o.strip_prefix("lowerdir="));
    Ok(lower
        .context("no layers")?
        .split(':')
        .map(PathBuf::from)
        .collect())
}

fn fingerprint(dirs: &[PathBuf]) -> Result<BTreeMap<PathBuf, (u32, u32, u64)>> {
    let mut found = BTreeMap::new();
    let mut left: Vec<PathBuf> = dirs.to_vec();
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
        let content = if meta.is_file() {
            digest(&path)?
        } else {
            meta.len()
        };
        found.insert(path, (meta.mode(), meta.uid(), content));
    }
    Ok(found)
}

/// What a Pod writes to its root file system is in the figures by which a kubelet evicts it.
pub(crate) async fn s2_what_is_written_is_counted(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let container = attacker(&pod).await?;
    let before = written(&container).await?;
    attempt(&container, &format!("fill /root/file {}", 64 * MIB))
        .await?
        .finds()?;
    let counted = wait::until("64 MiB to be counted", SOON, async || {
        (written(&container).await.ok()? >= before + 64 * MIB).then_some(())
    });
    counted.await?;
    pod.remove().await
}

async fn written(container: &Container<'_, '_>) -> Result<u64> {
    let layer = container.stats().await?.writable_layer;
    Ok(layer.and_then(|l| l.used_bytes).map_or(0, |b| b.value))
}

/// Where the node gives root file systems a size, that is what they have.
pub(crate) async fn s2_a_limit_of_the_node_holds(_: &Node) -> Result<()> {
    let opts = NodeOpts {
        runsc_flags: vec![("overlay2".to_owned(), "root:self,size=32m".to_owned())],
        ..NodeOpts::default()
    };
    let node = Node::start(opts).await?;
    let pod = node.pod("gvisor").run().await?;
    let container = attacker(&pod).await?;
    let fill = attempt(&container, &format!("fill /root/file {}", 256 * MIB)).await?;
    fill.fails_with(&["ENOSPC"])?;
    let full: u64 = fill.found.parse()?;
    ensure!(full <= 32 * MIB, "{full} bytes of 32 MiB");
    // It goes on, and can make room.
    container
        .sh("rm /root/file && echo fine > /root/other")
        .await?;
    pod.remove().await?;
    node.stop().await
}

/// A volume in memory with a size, as a kubelet mounts it, is full at that size; one on disk is
/// the host's own directory, in which a kubelet counts.
pub(crate) async fn s3_a_volume_is_as_large_as_its_limit(node: &Node, handler: &str) -> Result<()> {
    let (memory, disk) = (node.volume()?, node.volume()?);
    nix::mount::mount(
        Some("tmpfs"),
        &memory,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=8m"),
    )?;
    let pod = node.pod(handler).run().await?;
    let container = with_probe(pod.idle())?
        .mount(&memory, "/memory")
        .mount(&disk, "/disk");
    let container = container.start().await?;
    let fill = attempt(&container, &format!("fill /memory/file {}", 64 * MIB)).await?;
    fill.fails_with(&["ENOSPC"])?;
    let full: u64 = fill.found.parse()?;
    ensure!(full <= 8 * MIB, "{full} bytes of 8 MiB");
    attempt(&container, &format!("fill /disk/file {}", 16 * MIB))
        .await?
        .finds()?;
    ensure!(fs::metadata(disk.join("file"))?.len() == 16 * MIB);
    pod.remove().await?;
    mounts::unmount_below(&memory)
}

/// A directory of the host at which links of an image point.
struct Outside;

impl Outside {
    fn new() -> Result<Self> {
        fs::create_dir_all(OUTSIDE)?;
        for name in ["canary", "hosts", "hostname", "resolv.conf"] {
            fs::write(Path::new(OUTSIDE).join(name), SECRET)?;
        }
        Ok(Self)
    }

    /// Nothing was made, changed or mounted there but the empty directory `name`: runsc's gofer
    /// makes the place of a mount by its path, and looks where it is before it mounts.
    fn has_at_most(&self, name: &str) -> Result<()> {
        match fs::remove_dir(Path::new(OUTSIDE).join(name)) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e).context("not an empty directory"),
            _ => self.is_untouched(),
        }
    }

    /// Nothing was made, changed or mounted there.
    fn is_untouched(&self) -> Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(OUTSIDE)? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        ensure!(
            names == ["canary", "hostname", "hosts", "resolv.conf"],
            "{names:?} are outside"
        );
        for name in names {
            let text = fs::read_to_string(Path::new(OUTSIDE).join(&name))?;
            ensure!(text == SECRET, "{name} has changed: {text:?}");
        }
        let mounted = mounts::below(Path::new(OUTSIDE))?;
        ensure!(mounted.is_empty(), "{mounted:?} is mounted");
        Ok(())
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        // The next run makes it anew where it cannot be removed.
        fs::remove_dir_all(OUTSIDE).ok();
    }
}

/// A gofer has mounts where its container has them, and nowhere else.
fn only_expected_mounts(gofer: &Proc) -> Result<()> {
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", gofer.pid))?;
    for point in mounts.lines().filter_map(|l| l.split(' ').nth(4)) {
        let known = ["/dev/", "/etc/", "/mnt/", "/vol", "/probe"];
        let inside = point == "/"
            || point.starts_with(OUTSIDE)
            || known.iter().any(|k| point.starts_with(k));
        ensure!(inside, "{point} is mounted: {mounts}");
    }
    Ok(())
}

/// Files and volumes whose place in the image is a link that leads out, or a path that does.
pub(crate) async fn s5_a_mount_stays_inside(node: &Node, handler: &str) -> Result<()> {
    let outside = Outside::new()?;
    let volume = node.volume()?;
    fs::write(volume.join("of-the-volume"), "x")?;
    let pod = node.pod(handler).run().await?;
    // Who is shown it sees it.
    let shown = with_probe(pod.idle())?.mount(Path::new(OUTSIDE), "/shown");
    let shown = attempt(&shown.start().await?, "read /shown/canary").await?;
    ensure!(shown.finds()?.contains(SECRET), "{shown:?}");
    let climb = format!("/../../../../../..{OUTSIDE}/made");
    let mut ran = 0;
    for target in ["/mnt/up", "/mnt/absolute/made", "/mnt/proc", &climb] {
        let container = pod.idle().image(HOSTILE).mount(&volume, target);
        let started = with_probe(container)?.start().await;
        outside.is_untouched().with_context(|| target.to_owned())?;
        // It may be refused; where it is not, it is what it was asked to be, inside.
        if let Ok(container) = started {
            ran += 1;
            only_expected_mounts(&gofer(&container)?)?;
            container
                .sh(&format!("test -e {target}/of-the-volume"))
                .await?;
            no_secret_inside(&container).await?;
            container.sh(&format!("echo inside > {OUTSIDE}/canary; mkdir -p {OUTSIDE}/dir; echo x > /etc/hosts; true")).await?;
            outside
                .is_untouched()
                .with_context(|| format!("written by way of {target}"))?;
        }
    }
    ensure!(ran > 0, "no container has started");
    // Paths to be hidden that are not where they seem.
    let masked = pod.idle().image(HOSTILE).with(|c| {
        let linux = c.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        security.masked_paths = vec!["/mnt/up".to_owned(), "/mnt/proc".to_owned()];
        security.readonly_paths = vec!["/mnt/absolute".to_owned()];
    });
    if let Ok(container) = with_probe(masked)?.start().await {
        only_expected_mounts(&gofer(&container)?)?;
        no_secret_inside(&container).await?;
    }
    outside.is_untouched()?;
    // A directory to be made before the container starts.
    for target in [
        "/mnt/up/made",
        "/mnt/absolute/made",
        "/mnt/proc/made",
        &climb,
    ] {
        let container = pod.idle().image(HOSTILE).read_only();
        let container = container.with(|c| c.working_dir = target.to_owned());
        if let Ok(container) = with_probe(container)?.start().await {
            no_secret_inside(&container).await?;
        }
        outside.is_untouched().with_context(|| target.to_owned())?;
    }
    pod.remove().await
}

async fn no_secret_inside(container: &Container<'_, '_>) -> Result<()> {
    let words = [
        format!("read {OUTSIDE}/canary"),
        "read /mnt/up/canary".to_owned(),
        "read /mnt/absolute/canary".to_owned(),
        "read /mnt/proc/canary".to_owned(),
        "read /etc/resolv.conf".to_owned(),
        "read /etc/hosts".to_owned(),
        "read /etc/hostname".to_owned(),
    ];
    for attempt in try_all(container, &words).await? {
        ensure!(!attempt.found.contains(SECRET), "{attempt:?}");
    }
    Ok(())
}

/// The same while somebody who has the volume swaps directory and link under the mount.
pub(crate) async fn s5_a_mount_stays_inside_while_links_change(
    node: &Node,
    handler: &str,
) -> Result<()> {
    let outside = Outside::new()?;
    let (volume, inner) = (node.volume()?, node.volume()?);
    fs::write(inner.join("of-the-volume"), "x")?;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777))?;
    let pod = node.pod(handler).run().await?;
    let race = format!("/vol/place {OUTSIDE} 6000");
    let race: Vec<_> = [PROBE, "race"].into_iter().chain(race.split(' ')).collect();
    let racer = with_probe(pod.container(race))?
        .mount(&volume, "/vol")
        .start()
        .await?;
    crate::process::until_there(&volume.join("place")).await?;
    let (mut tries, mut ran) = (0, 0);
    // Who wins each race has each of them refused.
    while tries < 6 || (ran == 0 && tries < 30) {
        tries += 1;
        let victim = with_probe(pod.idle())?
            .mount(&volume, "/vol")
            .mount(&inner, "/vol/place/deep");
        if let Ok(victim) = victim.start().await {
            ran += 1;
            let gofer = gofer(&victim)?;
            only_expected_mounts(&gofer)?;
            no_secret_inside(&victim).await?;
            victim.stop(0).await?;
        }
        outside.has_at_most("deep")?;
    }
    ensure!(ran > 0, "no container has started");
    let report = reported(&racer).await?;
    ensure!(report.finds()?.parse::<u64>()? > 10, "{report:?}");
    pod.remove().await?;
    outside.has_at_most("deep")
}

/// What a container is told in its environment is in no log, argument or readable file, also when
/// its sandbox has crashed.
pub(crate) async fn s8_secrets_stay_with_the_pod(node: &Node, handler: &str) -> Result<()> {
    let canary = node.unique("canary-of-a-secret");
    let pod = node.pod(handler).run().await?;
    let container = pod.idle().env("SECRET", &canary).start().await?;
    container.sh("test -n \"$SECRET\"").await?;
    for process in Proc::all() {
        ensure!(!process.argv.contains(&canary), "{process:?}");
    }
    // With a crash the sentry writes what it was doing.
    kiln_tests::process::signal_to(pod.sentry()?.pid, nix::sys::signal::Signal::SIGABRT)?;
    container.ended().await?;
    let mut dirs = vec![
        node.dir().join("logs"),
        node.dir().join("state"),
        "/run/kiln".into(),
    ];
    dirs.extend(["rs", "rw"].map(|dir| node.dir().join(dir)));
    dirs.push(node.agent()?.state().to_owned());
    for dir in dirs {
        for (path, open) in files_with(&dir, &canary) {
            ensure!(
                !open,
                "{} may be read by all and has the secret",
                path.display()
            );
            // containerd has handed it over in the bundle; it is nobody else's business.
            ensure!(
                path.ends_with("config.json"),
                "{} has the secret",
                path.display()
            );
        }
    }
    let log = fs::read(node.dir().join("containerd.log"))?;
    ensure!(!contains(&log, &canary), "containerd's log has the secret");
    for dir in ["rs", "rw"].map(|dir| node.dir().join(dir)) {
        if let Ok(meta) = fs::metadata(dir.join("k8s.io")) {
            ensure!(
                meta.mode() & 0o022 == 0,
                "{} may be written by others",
                dir.display()
            );
        }
    }
    pod.remove().await
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|w| w == text.as_bytes())
}

/// The files below `dir` that hold `text`, with whether every user can read them.
fn files_with(dir: &Path, text: &str) -> Vec<(PathBuf, bool)> {
    let mut found = Vec::new();
    let mut left = vec![(dir.to_owned(), true)];
    while let Some((path, reachable)) = left.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        if meta.is_dir() {
            let reachable = reachable && meta.mode() & 0o001 != 0;
            // Root file systems are the image's and the Pod's.
            if path.file_name().is_some_and(|n| n != "rootfs") {
                let entries = fs::read_dir(&path).into_iter().flatten().flatten();
                left.extend(entries.map(|e| (e.path(), reachable)));
            }
        } else if meta.is_file() && fs::read(&path).is_ok_and(|bytes| contains(&bytes, text)) {
            found.push((path, reachable && meta.mode() & 0o004 != 0));
        }
    }
    found
}

/// Neither of a Pod that ends as it should nor of one whose sentry or gofer is killed.
pub(crate) async fn s9_nothing_is_left(node: &Node, handler: &str) -> Result<()> {
    for victim in [None, Some("runsc-sandbox"), Some("runsc-gofer")] {
        let volume = node.volume()?;
        let pod = node.pod(handler).run().await?;
        let container = with_probe(pod.idle())?
            .mount(&volume, "/volume")
            .start()
            .await?;
        container
            .sh("dd if=/dev/zero of=/tmp/file bs=1M count=8 2>/dev/null")
            .await?;
        let (sandbox, gofer) = (pod.sandbox(), gofer(&container)?);
        let store = filestores(&lower_and_upper(&gofer)?);
        ensure!(
            !store.is_empty(),
            "the file behind the root file system is not where it was"
        );
        for victim in victim
            .map(|name| pod.runtime_processes(name))
            .into_iter()
            .flatten()
        {
            victim.kill().await?;
        }
        let mut last = None;
        // containerd refuses while it is finding out what has died; a kubelet tries again.
        let removed = wait::until("removal of the Pod", Duration::from_secs(60), async || {
            last = node.remove_pod(pod.id()).await.err();
            last.is_none().then_some(())
        });
        removed.await.with_context(|| format!("{last:?}"))?;
        node.expect_gone(pod.id()).await?;
        node.expect_gone(&sandbox).await?;
        wait::until_true("the file to be gone", SOON, || {
            store.iter().all(|f| !f.exists())
        })
        .await?;
        ensure!(volume.exists(), "the volume is not the Pod's to remove");
    }
    Ok(())
}

/// The directories that a container's root file system is made of.
fn lower_and_upper(gofer: &Proc) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", gofer.pid))?;
    let options: Vec<_> = mounts
        .lines()
        .filter_map(|l| l.rsplit(' ').next())
        .collect();
    let dirs = options
        .iter()
        .flat_map(|o| o.split(','))
        .filter_map(|o| o.strip_prefix("upperdir="));
    Ok(dirs.map(PathBuf::from).collect())
}

fn filestores(dirs: &[PathBuf]) -> Vec<PathBuf> {
    let entries = dirs
        .iter()
        .flat_map(|d| fs::read_dir(d).into_iter().flatten().flatten());
    let stores = entries.filter(|e| {
        e.file_name()
            .to_string_lossy()
            .starts_with(".gvisor.filestore")
    });
    stores.map(|e| e.path()).collect()
}
