// SPDX-License-Identifier: Apache-2.0

//! W2 and W3: a sandbox that was there before its Pod knows nothing and shares nothing.

use std::{collections::BTreeSet, fs, io::ErrorKind, os::unix::fs::MetadataExt, path::PathBuf};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use kiln_tests::{node::Node, process::Proc};

use crate::{
    HELD, WARM,
    attempts::{attacker, attempt, try_all, with_probe},
    posture::gofer,
};

/// Two Pods, of one pool where there is one, differ in all that is random, and begin with nothing.
pub(crate) async fn w2_two_sandboxes_share_nothing(node: &Node, handler: &str) -> Result<()> {
    let pods = try_join_all([node.pod(handler).run(), node.pod(handler).run()]).await?;
    let mut random: Vec<Vec<String>> = Vec::new();
    for pod in &pods {
        let container = attacker(pod).await?;
        for _ in 0..2 {
            let found = attempt(&container, "random").await?;
            random.push(found.finds()?.split(' ').map(str::to_owned).collect());
        }
        for attempt in try_all(&container, &["list /tmp", "list /dev/shm", "list /root"]).await? {
            ensure!(attempt.finds()?.is_empty(), "{attempt:?}");
        }
        attempt(&container, "read /etc/machine-id")
            .await?
            .fails_with(&["ENOENT"])?;
        ensure!(container.sh("hostname").await?.trim() == pod.hostname());
        let uname = attempt(&container, "uname").await?;
        let domain = uname.finds()?.rsplit(' ').next();
        // By the release of runsc: the Pod's own name, or none.
        ensure!(
            ["", pod.hostname()].contains(&domain.unwrap_or_default()),
            "{uname:?}"
        );
        let environment = container.sh("env").await?;
        ensure!(
            !environment.contains("KILN") && !environment.contains("runsc"),
            "{environment}"
        );
        let sockets = container
            .sh("tail -qn +2 /proc/net/tcp /proc/net/udp")
            .await?;
        ensure!(sockets.is_empty(), "connections: {sockets}");
        let clock: i64 = container.sh("date +%s").await?.trim().parse()?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        ensure!(
            clock.abs_diff(i64::try_from(now.as_secs())?) < 30,
            "it is {clock} inside"
        );
    }
    // Random bytes of all four, and what each program starts with; boots of the two.
    for field in 0..3 {
        let values: BTreeSet<_> = random.iter().map(|r| &r[field]).collect();
        ensure!(values.len() == random.len(), "{random:?}");
    }
    ensure!(
        random[0][3] == random[1][3] && random[0][3] != random[2][3],
        "{random:?}"
    );
    for pod in pods {
        pod.remove().await?;
    }
    Ok(())
}

/// What a gofer that was started ahead has before it serves something is its own, and nothing can
/// be left there, not even by root.
pub(crate) async fn w2_gofers_share_no_slots(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    let pod = node.pod(WARM).run().await?;
    let container = pod.idle().start().await?;
    agent.expect_ready(HELD).await?;
    let state = format!("--bundle={}/", agent.state().display());
    let mut gofers = node.processes();
    gofers.retain(|p| p.argv.starts_with("runsc-gofer") && p.argv.contains(&state));
    // Others have the root file system of a sandbox.
    gofers.retain(|p| p.argv.contains("/slots "));
    let own = gofer(&container)?.pid;
    ensure!(
        gofers.len() > 1 && gofers.iter().any(|p| p.pid == own),
        "{own}: {gofers:?}"
    );
    let mut devices = BTreeSet::from([fs::metadata(agent.state())?.dev()]);
    for process in gofers {
        let root = PathBuf::from(format!("/proc/{}/root", process.pid));
        // The first mount points are the last that are used.
        let slot = root.join("d0");
        let is_its_own = devices.insert(fs::metadata(&slot)?.dev());
        ensure!(is_its_own, "{process:?} shares its mount points");
        for path in [slot.join("x"), root.join("x"), root.join("f0")] {
            let written = fs::write(&path, "x").map_err(|e| e.kind());
            ensure!(
                written == Err(ErrorKind::ReadOnlyFilesystem),
                "{process:?}, {}: {written:?}",
                path.display()
            );
        }
    }
    pod.remove().await
}

/// Names, secrets and volumes of a Pod are in no sandbox but its own, and there with its
/// container only.
pub(crate) async fn w3_what_is_the_pods_comes_with_the_pod(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_some().await?;
    let secret = node.unique("secret-of-a-pod");
    let volume = node.volume()?;
    fs::write(volume.join("token"), &secret)?;
    let pod = node.pod(WARM).run().await?;
    let container = with_probe(pod.idle())?
        .mount_read_only(&volume, "/var/run/secrets")
        .env("SECRET", &secret)
        .start()
        .await?;
    let has = container
        .sh("cat /var/run/secrets/token; echo $SECRET")
        .await?;
    ensure!(has == format!("{secret}{secret}\n"), "{has:?}");
    let own = gofer(&container)?;
    // One that still boots is not shut off from the node yet.
    agent.expect_ready(HELD).await?;
    let words = [
        secret.as_str(),
        pod.id(),
        pod.hostname(),
        &*volume.to_string_lossy(),
    ];
    // Other nodes of this machine boot theirs, too.
    for process in node.processes() {
        let is_own = process.pid == own.pid || process.argv.contains(pod.id());
        let of_the_runtime = process.argv.starts_with("runsc-") && !is_own;
        let of_the_sandbox = process.argv.contains(&pod.sandbox());
        if of_the_runtime {
            let told = told(&process);
            for word in words {
                ensure!(
                    of_the_sandbox && word == pod.id() || !told.contains(word),
                    "{word} is in {process:?}"
                );
            }
        }
        // Another gofer of its sandbox has nothing of its containers.
        if of_the_sandbox && process.pid != own.pid && process.argv.starts_with("runsc-gofer") {
            ensure!(
                !told(&process).contains(&*volume.to_string_lossy()),
                "{process:?}"
            );
        }
    }
    for place in ["ready", "booting", "bundles"] {
        for (path, text) in texts_below(&agent.state().join(place)) {
            let found = words.iter().find(|word| text.contains(**word));
            ensure!(found.is_none(), "{found:?} is in {path}");
        }
    }
    let mode = fs::metadata(agent.state())?.mode();
    ensure!(mode & 0o077 == 0, "{mode:o}");
    pod.remove().await
}

/// What the host has told a process: arguments, environment and mounts.
fn told(process: &Proc) -> String {
    let read = |file: &str| fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
    let all = [read("cmdline"), read("environ"), read("mountinfo")].concat();
    String::from_utf8_lossy(&all).into_owned()
}

fn texts_below(dir: &std::path::Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(texts_below(&path));
        } else if let Ok(bytes) = fs::read(&path) {
            found.push((
                path.display().to_string(),
                String::from_utf8_lossy(&bytes).into_owned(),
            ));
        }
    }
    found
}
