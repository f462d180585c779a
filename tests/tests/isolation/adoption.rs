// SPDX-License-Identifier: Apache-2.0

//! W1 to W3: a sandbox that was there before its Pod knows nothing, shares nothing and is used
//! once.

use std::{collections::BTreeSet, env, fs, os::unix::fs::MetadataExt, time::Duration};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt, TryStreamExt, future::try_join_all, stream};
use kiln_tests::{node::Node, process::Proc};

use crate::{
    HELD, WARM,
    attempts::{attacker, attempt, try_all, with_probe},
    posture::gofer,
    up,
};

/// How many Pods W1 runs unless `$KILN_ADOPTIONS` says it.
const ADOPTIONS: usize = 30;

/// How many at a time: neither one that goes nor one that runs may be met.
const AT_A_TIME: usize = 3;

/// How long one of them may take, the rest of the case aside.
const EACH: Duration = Duration::from_secs(2);

/// Where a Pod could leave something for the next one.
const PLACES: [&str; 5] = [
    "/tmp/token",
    "/dev/shm/token",
    "/root/token",
    "/run/token",
    "/etc/token",
];

/// How many Pods W1 runs.
fn adoptions() -> Result<usize> {
    match env::var("KILN_ADOPTIONS") {
        Ok(count) => count.parse().context("read KILN_ADOPTIONS"),
        Err(_) => Ok(ADOPTIONS),
    }
}

/// How long W1 may take beyond what any case may.
pub(crate) fn w1_time() -> Duration {
    // The case itself says what is wrong with the number.
    EACH * u32::try_from(adoptions().unwrap_or(ADOPTIONS)).unwrap_or(u32::MAX)
}

/// No token of one Pod is seen by another, and no sandbox, boot or process is seen twice.
pub(crate) async fn w1_a_sandbox_serves_one_pod(node: &Node) -> Result<()> {
    let pods = stream::iter(0..adoptions()?).map(|n| serve(node, n));
    let served: Vec<_> = pods.buffer_unordered(AT_A_TIME).try_collect().await?;
    let (mut sandboxes, mut boots, mut sentries) =
        (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    for (sandbox, boot, sentry) in served {
        ensure!(sandboxes.insert(sandbox.clone()), "{sandbox} again");
        ensure!(boots.insert(boot.clone()), "boot {boot} again");
        ensure!(sentries.insert(sentry), "sentry {sentry:?} again");
    }
    Ok(())
}

/// Runs a Pod that looks for tokens and leaves its own; returns its sandbox, boot and sentry.
async fn serve(node: &Node, n: usize) -> Result<(String, String, (u32, Option<u64>))> {
    let pod = up(node, WARM).await?;
    let container = pod.idle().start().await?;
    let look = format!(
        "cat {} 2>/dev/null; ls -A /tmp /dev/shm /root /run; hostname; env; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' ' '; cat /proc/net/unix",
        PLACES.join(" ")
    );
    let leave = PLACES.map(|p| format!("echo $T > {p}")).join("; ");
    // Without the exec's streams, which would not end else.
    let stay = "setsid sh -c 'sleep 3600; :' $T >/dev/null 2>&1 & \
         TOKEN=$T sleep 3600 >/dev/null 2>&1 &";
    // The script itself, which is looked at too, has no token in it.
    let token = format!("T=token; T=$T-of-{n}");
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let found = container
        .sh(&format!("{look}; {token}; {leave}; {stay} {boot}"))
        .await?;
    ensure!(!found.contains("token-of-"), "Pod {n} sees {found}");
    let boot = found.lines().last().context("no boot id")?.to_owned();
    let sentry = pod.sentry()?;
    let sandbox = pod.sandbox();
    let known = (sandbox.clone(), boot, (sentry.pid, sentry.started()));
    pod.remove().await?;
    node.expect_gone(&sandbox).await?;
    Ok(known)
}

/// Two Pods, of one pool where there is one, differ in all that is random, and begin with nothing.
pub(crate) async fn w2_two_sandboxes_share_nothing(node: &Node, handler: &str) -> Result<()> {
    let pods = try_join_all([up(node, handler), up(node, handler)]).await?;
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
        ensure!(domain == Some(pod.hostname()), "{uname:?}");
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

/// Names, secrets and volumes of a Pod are in no sandbox but its own, and there with its
/// container only.
pub(crate) async fn w3_what_is_the_pods_comes_with_the_pod(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_some().await?;
    let secret = node.unique("secret-of-a-pod");
    let volume = node.volume()?;
    fs::write(volume.join("token"), &secret)?;
    let pod = up(node, WARM).await?;
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
    for process in Proc::all() {
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
