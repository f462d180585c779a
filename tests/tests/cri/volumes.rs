// SPDX-License-Identifier: Apache-2.0

//! Files that containers share with each other and with the host.

use std::{fs, os::unix::fs::symlink};

use anyhow::{Result, ensure};
use kiln_tests::{node::Node, wait};

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
