// SPDX-License-Identifier: Apache-2.0

//! Paths of a container's spec lead where the spec says, also when no gofer has looked at them
//! before the sentry does.

use std::fs;

use anyhow::{Context, Result, ensure};
use kiln_tests::{node::Node, pod::Container};

use crate::{HANDLER, WARM};

/// An image with a volume of its own, whose path ends in a slash and is not in the image.
const VOLUME: &str = "docker.io/library/kiln-volume:latest";

/// Whether a container of an adopted sandbox has its files in slots. Otherwise its gofer bears the
/// id of the container.
fn is_in_slots(container: &Container<'_, '_>) -> bool {
    let all = container.pod().node().processes();
    let mut gofers = all.iter().filter(|p| p.argv.starts_with("runsc-gofer"));
    !gofers.any(|p| p.argv.contains(container.id()))
}

/// Targets of volumes, of a single file and of an image's own volume, and a working directory have
/// slashes and dots too many. The image has none of them.
pub(crate) async fn paths_need_not_be_clean(node: &Node) -> Result<()> {
    const TARGETS: [(&str, &str); 3] = [
        ("/data/certs/", "/data/certs"),
        ("/data//keys", "/data/keys"),
        ("/data/./dots/.", "/data/dots"),
    ];
    node.pull(VOLUME).await?;
    for handler in ["gvisor", HANDLER, "runc"] {
        let (volume, temporary) = (node.volume()?, node.volume()?);
        let mut sources = Vec::new();
        for (target, _) in TARGETS {
            let source = node.volume()?;
            fs::write(source.join("says"), target)?;
            sources.push(source);
        }
        fs::write(volume.join("conf"), "a file")?;
        node.agent()?.expect_ready(WARM).await?;
        let pod = node.pod(handler).run().await?;
        let mut container = pod.script("pwd; exec sleep 3600").image(VOLUME);
        for ((target, _), source) in TARGETS.iter().zip(&sources) {
            container = container.mount(source, target);
        }
        let container = container
            .mount(&volume.join("conf"), "/etc/app.conf/")
            // A sentry has an empty `/tmp` of its own unless something is mounted there.
            .mount(&temporary, "/tmp/")
            .with(|c| c.working_dir = "/made//here/.".to_owned())
            .start()
            .await
            .with_context(|| format!("{handler}\n{}", node.log()))?;
        if handler == HANDLER {
            ensure!(is_in_slots(&container), "not in slots\n{}", node.log());
        }
        for (target, clean) in TARGETS {
            let said = container.sh(&format!("cat {clean}/says")).await?;
            ensure!(said == target, "{handler}: {clean} says {said:?}");
        }
        let said = container.sh("cat /etc/app.conf").await?;
        ensure!(said == "a file", "{handler}: {said:?}");
        container.sh("echo kept > /tmp/kept").await?;
        let kept = fs::read_to_string(temporary.join("kept"));
        ensure!(
            kept.as_deref().ok() == Some("kept\n"),
            "{handler}: {kept:?}"
        );
        container.sh("echo x > /volume/of/image/x").await?;
        container.logged("/made/here\n").await?;
        // An exec begins where its container does.
        let cwd = container.sh("pwd").await?;
        ensure!(cwd == "/made/here\n", "{handler}: an exec is in {cwd:?}");
        pod.remove().await?;
    }
    Ok(())
}

/// A gofer gets what only a gofer can do right, and the Pod runs like one that starts cold.
pub(crate) async fn what_a_sentry_cannot_place_is_left_to_a_gofer(node: &Node) -> Result<()> {
    for handler in ["gvisor", HANDLER] {
        // Nothing can be made in a volume that is read-only from the start.
        let (volume, file) = (node.volume()?, node.volume()?.join("conf"));
        fs::write(volume.join("of-the-volume"), "volume")?;
        fs::write(&file, "file")?;
        // The sentry would look for what it has not made yet.
        let climbing = "/data/../other";
        for (target, look, expected) in [
            ("/config/more.conf", "cat /config/*", "filevolume"),
            (climbing, "cat /other", "file"),
        ] {
            let pod = node.pod(handler).run().await?;
            let container = pod
                .idle()
                .mount_read_only(&volume, "/config")
                .mount_read_only(&file, target)
                .start()
                .await
                .with_context(|| format!("{handler}: {target}\n{}", node.log()))?;
            ensure!(!is_in_slots(&container), "{handler}: {target} is in slots");
            let found = container.sh(look).await?;
            ensure!(found == expected, "{handler}: {target} has {found:?}");
            pod.remove().await?;
        }
    }
    Ok(())
}

/// A working directory that the image lacks is made, also where the container can write nothing.
pub(crate) async fn a_working_directory_is_made(node: &Node) -> Result<()> {
    for handler in ["gvisor", HANDLER, "runc"] {
        let pod = node.pod(handler).run().await?;
        let container = pod
            .idle()
            .read_only()
            .with(|c| c.working_dir = "/made/by/runtime".to_owned())
            .start()
            .await
            .with_context(|| format!("{handler}\n{}", node.log()))?;
        let cwd = container.sh("pwd").await?;
        ensure!(cwd == "/made/by/runtime\n", "{handler}: {cwd:?}");
        let refused = container.exec(["mkdir", "more"]).await?;
        ensure!(
            refused.stderr.contains("Read-only file system"),
            "{handler}: {refused:?}"
        );
        pod.remove().await?;
    }
    Ok(())
}
