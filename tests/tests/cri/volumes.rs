// SPDX-License-Identifier: Apache-2.0

//! Files that containers share with each other and with the host.

use std::{
    env, fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::Node,
    pod::{Container, GUEST, Pod},
    wait,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub(crate) async fn containers_share_a_directory(node: &Node, handler: &str) -> Result<()> {
    let volume = node.volume()?;
    fs::write(volume.join("from-host"), "host")?;
    let pod = node.pod(handler).run().await?;
    let a = pod.idle().mount(&volume, "/data").start().await?;
    let b = pod.idle().mount(&volume, "/other").start().await?;
    ensure!(a.sh("cat /data/from-host").await? == "host");
    a.sh("echo from a > /data/a; mkdir /data/dir; mv /data/from-host /data/dir/moved")
        .await?;
    ensure!(
        b.sh("cat /other/a /other/dir/moved; echo from b >> /other/a")
            .await?
            == "from a\nhost"
    );
    ensure!(a.sh("cat /data/a").await? == "from a\nfrom b\n");
    ensure!(fs::read_to_string(volume.join("a"))? == "from a\nfrom b\n");
    a.sh("rm -r /data/dir").await?;
    ensure!(!volume.join("dir").exists());
    pod.remove().await
}

pub(crate) async fn containers_share_memory(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let a = pod.idle().start().await?;
    let b = pod.idle().start().await?;
    a.sh("echo shared > /dev/shm/file").await?;
    ensure!(b.sh("cat /dev/shm/file").await? == "shared\n");
    ensure!(
        a.exec(["sh", "-c", "echo x > /tmp/own; sleep 0"])
            .await?
            .code
            == 0
    );
    ensure!(
        b.exec(["cat", "/tmp/own"]).await?.code != 0,
        "/tmp is not shared"
    );
    pod.remove().await
}

/// Lines that each of two containers appends to one file.
const LINES: u32 = 20_000;

/// Starts a container that holds a lock and listens at a socket in `dir`, where `volume` is if
/// there is one.
async fn holder<'p, 'n>(
    pod: &'p Pod<'n>,
    dir: &str,
    volume: Option<&Path>,
) -> Result<Container<'p, 'n>> {
    let script = format!("listen {dir}/socket hello & lock {dir}/lock 3600");
    let holder = pod.script(&script).image(GUEST);
    let holder = match volume {
        Some(volume) => holder.mount(volume, dir),
        None => holder,
    };
    let holder = holder.start().await?;
    holder.logged("locked").await?;
    Ok(holder)
}

/// Two containers do to each other in `dir` what two processes of one machine do.
async fn expect_one_file_system(
    (holder, other): (&Container<'_, '_>, &Container<'_, '_>),
    dir: &str,
) -> Result<()> {
    let lock = other.exec(["lock", &format!("{dir}/lock"), "0"]).await?;
    ensure!(lock.stdout == "refused\n", "two have the lock: {lock:?}");
    let said = other.exec(["ask", &format!("{dir}/socket")]).await?;
    ensure!(said.stdout == "hello\n", "{said:?}");
    let lines = |word| format!("append {dir}/log {LINES} {word}");
    let (one, two) = (lines("one"), lines("two"));
    tokio::try_join!(holder.sh(&one), other.sh(&two))?;
    let count = other.sh(&format!("wc -l <{dir}/log")).await?;
    ensure!(
        count.trim() == (2 * LINES).to_string(),
        "{count} lines of 2 times {LINES}"
    );
    Ok(())
}

pub(crate) async fn memory_is_one_file_system(node: &Node, handler: &str) -> Result<()> {
    let dir = "/dev/shm";
    let pod = node.pod(handler).run().await?;
    let a = holder(&pod, dir, None).await?;
    let b = pod.idle().image(GUEST).start().await?;
    expect_one_file_system((&a, &b), dir).await?;
    // As the host has it: 64 MiB, from which programs are run.
    let size = b.sh("df -k /dev/shm | awk 'END {print $2}'").await?;
    ensure!(size.trim() == "65536", "{size} KiB");
    let program = ["sh", "-c", "cp /bin/exit /dev/shm/exit; /dev/shm/exit 0"];
    let ran = b.exec(program).await?;
    ensure!(ran.code == 0, "{ran:?}");
    // What one leaves is there for the next.
    a.stop(0).await?;
    a.remove().await?;
    let c = pod.idle().image(GUEST).start().await?;
    let lock = c.sh("lock /dev/shm/lock 0; ls /dev/shm").await?;
    ensure!(lock == "locked\nexit\nlock\nlog\nsocket\n", "{lock}");
    pod.remove().await
}

/// The kubelet's directory of Pods, for the node of the suite.
pub(crate) fn pods() -> PathBuf {
    env::temp_dir().join(format!("kiln-pods-{}", std::process::id()))
}

/// The directory of a Pod that a kubelet is about to run. It goes when this is dropped.
struct PodDir {
    uid: String,
    dir: PathBuf,
}

impl PodDir {
    fn new(node: &Node) -> Result<Self> {
        let uid = node.unique("uid").replace('.', "-");
        let dir = pods().join(&uid);
        fs::create_dir_all(&dir)?;
        Ok(Self { uid, dir })
    }

    /// Makes an emptyDir as a kubelet does for a Pod with an `fsGroup`.
    fn empty_dir(&self, name: &str) -> Result<PathBuf> {
        let volume = self.dir.join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&volume)?;
        own(&volume)?;
        Ok(volume)
    }

    /// Runs the Pod, which starts cold by whatever handler.
    async fn run<'n>(&self, node: &'n Node, handler: &str) -> Result<Pod<'n>> {
        let pod = node.pod(handler).with(|pod| {
            pod.metadata
                .get_or_insert_default()
                .uid
                .clone_from(&self.uid);
        });
        let pod = pod.run_cold_or_warm().await?;
        if handler == "gvisor-warm" {
            let why = node.why_cold(pod.id()).await?;
            ensure!(why.contains("share volumes"), "{why}");
        }
        Ok(pod)
    }
}

impl Drop for PodDir {
    fn drop(&mut self) {
        // What is left is found by who looks for leaks.
        let _ = fs::remove_dir_all(&self.dir);
        // The last one takes the directory with it.
        let _ = fs::remove_dir(pods());
    }
}

/// Gives a volume to group 1234.
fn own(volume: &Path) -> Result<()> {
    chown(volume, None, Some(1234))?;
    fs::set_permissions(volume, fs::Permissions::from_mode(0o2777))?;
    Ok(())
}

/// Bytes that the files directly in `dir` take.
fn usage(dir: &Path) -> Result<u64> {
    let sizes = fs::read_dir(dir)?.map(|file| Ok(file?.metadata()?.blocks() * 512));
    sizes.sum()
}

pub(crate) async fn an_empty_dir_is_one_file_system(node: &Node, handler: &str) -> Result<()> {
    let dirs = PodDir::new(node)?;
    let (volume, used) = (dirs.empty_dir("data")?, dirs.empty_dir("used")?);
    fs::write(used.join("from-host"), "host")?;
    let pod = dirs.run(node, handler).await?;
    let a = holder(&pod, "/data", Some(&volume)).await?;
    let b = pod.idle().image(GUEST);
    let b = b.mount(&volume, "/data").mount(&used, "/used");
    let b = b.start().await?;
    expect_one_file_system((&a, &b), "/data").await?;
    // What the host has put there is there.
    ensure!(b.sh("cat /used/from-host").await? == "host");
    // It belongs to whom it belongs on the host, and is counted there.
    let owner = b.sh("touch /data/new; stat -c '%a %g' /data; stat -c %g /data/new");
    let owner = owner.await?;
    ensure!(owner == "2777 1234\n1234\n", "{owner}");
    let before = usage(&volume)?;
    b.sh("head -c 8388608 /dev/zero >/data/big; sync").await?;
    let grown = usage(&volume)? - before;
    ensure!(grown >= 8 << 20, "{grown} bytes of 8 MiB are counted");
    b.sh("rm /data/big").await?;
    wait::until_true("the space to be given back", wait::SOON, || {
        usage(&volume).is_ok_and(|now| now < before + (1 << 20))
    })
    .await?;
    // What one leaves is there for the next, and nothing for the host.
    a.stop(0).await?;
    a.remove().await?;
    let c = pod.idle().image(GUEST).mount(&volume, "/data");
    let c = c.start().await?;
    let lock = c.sh("lock /data/lock 0; ls /data").await?;
    ensure!(lock == "locked\nlock\nlog\nnew\nsocket\n", "{lock}");
    // A part of it would be of the host's directory.
    let part = dirs.dir.join("volume-subpaths/data/container/0");
    fs::create_dir_all(&part)?;
    let refused = pod.idle().mount(&part, "/part").start().await;
    let refused = refused.err().context("a part is mounted")?;
    ensure!(
        format!("{refused:#}").contains("shared_empty_dirs"),
        "{refused:#}"
    );
    pod.remove().await?;
    let left: Vec<_> = fs::read_dir(&volume)?.collect();
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

pub(crate) async fn an_empty_dir_in_memory_has_its_limit(node: &Node, handler: &str) -> Result<()> {
    const LIMIT: u64 = 4 << 20;
    let dirs = PodDir::new(node)?;
    let volume = dirs.empty_dir("memory")?;
    let _mounted = Tmpfs::mount(&volume, LIMIT)?;
    own(&volume)?;
    let pod = dirs.run(node, handler).await?;
    let a = holder(&pod, "/data", Some(&volume)).await?;
    let b = pod.idle().image(GUEST).mount(&volume, "/data");
    let b = b.start().await?;
    expect_one_file_system((&a, &b), "/data").await?;
    let fill = [
        "dd",
        "if=/dev/zero",
        "of=/data/big",
        "bs=65536",
        "count=128",
    ];
    let ran = b.exec(fill).await?;
    ensure!(
        ran.code != 0 && ran.stderr.contains("No space left on device"),
        "{ran:?}"
    );
    // It is full to the end, and nobody has died of that.
    let size: u64 = b.sh("stat -c %s /data/big").await?.trim().parse()?;
    ensure!((LIMIT / 2..=LIMIT).contains(&size), "{size} of {LIMIT}");
    ensure!(usage(&volume)? == 0, "it is twice in memory");
    ensure!(a.is_running().await?);
    pod.remove().await
}

/// A tmpfs on the host, as a kubelet mounts one for medium `Memory`.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(dir: &Path, bytes: u64) -> Result<Self> {
        let (flags, size) = (MsFlags::empty(), format!("size={bytes}"));
        mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(&*size))?;
        Ok(Self(dir.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // What is left is found by who looks for leaks.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

pub(crate) async fn read_only_is_read_only(node: &Node, handler: &str) -> Result<()> {
    let volume = node.volume()?;
    fs::write(volume.join("file"), "as it was")?;
    let pod = node.pod(handler).run().await?;
    let container = pod
        .idle()
        .mount_read_only(&volume, "/data")
        .mount_read_only(&volume.join("file"), "/etc/file")
        .read_only()
        .start()
        .await?;
    for write in [
        "echo x > /data/new",
        "echo x > /data/file",
        "rm /data/file",
        "echo x > /etc/file",
        "echo x > /new",
    ] {
        let ran = container.exec(["sh", "-c", write]).await?;
        ensure!(
            ran.code != 0 && ran.stderr.contains("Read-only file system"),
            "{write}: {ran:?}"
        );
    }
    ensure!(container.sh("cat /data/file /etc/file").await? == "as it wasas it was");
    ensure!(fs::read_to_string(volume.join("file"))? == "as it was");
    pod.remove().await
}

/// A kubelet swaps a link to a directory (kubernetes `pkg/volume/util/atomic_writer.go`).
pub(crate) async fn an_update_of_a_config_map_is_seen(node: &Node, handler: &str) -> Result<()> {
    let volume = node.volume()?;
    let publish = |version: &str| -> Result<()> {
        fs::create_dir(volume.join(version))?;
        fs::write(volume.join(version).join("key"), version)?;
        symlink(version, volume.join("..data_tmp"))?;
        fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
        Ok(())
    };
    publish("..one")?;
    symlink("..data/key", volume.join("key"))?;
    let pod = node.pod(handler).run().await?;
    let container = pod
        .idle()
        .mount_read_only(&volume, "/config")
        .start()
        .await?;
    ensure!(container.sh("cat /config/key").await? == "..one");
    publish("..two")?;
    fs::remove_dir_all(volume.join("..one"))?;
    wait::until("the update", wait::SOON, async || {
        (container.sh("cat /config/key").await.ok()? == "..two").then_some(())
    })
    .await?;
    pod.remove().await
}

pub(crate) async fn the_image_is_not_written_to(node: &Node, handler: &str) -> Result<()> {
    let pod = node.pod(handler).run().await?;
    let a = pod.idle().start().await?;
    a.sh("rm /etc/passwd; echo changed > /etc/group; echo new > /root/new")
        .await?;
    let b = pod.idle().start().await?;
    b.sh("test -s /etc/passwd; grep -q root /etc/group; test ! -e /root/new")
        .await?;
    pod.remove().await
}
