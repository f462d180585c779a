// SPDX-License-Identifier: Apache-2.0

//! Files that containers share with each other and with the host.

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::{Result, ensure};
use kiln_tests::{
    node::Node,
    pod::{Container, GUEST, Pod},
    wait,
};

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
