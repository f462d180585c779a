// SPDX-License-Identifier: Apache-2.0

//! A1, C2 and C3: what users can say to shim and agent, and what others can.

use std::{
    fs::{self, Permissions},
    io::Write as _,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use kiln_agent_api::{AgentError, Shape};
use kiln_tests::{node::Node, process::Proc, tools, wait::SOON};
use serde_json::Value;

use crate::{
    Neighbour, WARM,
    attempts::attacker,
    requests::{bundle, dial_as, run_as},
};

/// Connections that say half a word and then nothing.
const SLOW: usize = 200;

/// Most that the agent may hold, KiB. Measured: 20 MiB (debug build).
const AGENT_RSS: u64 = 64 << 10;

/// Annotations switch no flag, file or sandbox, also where a node passes all of them on.
pub(crate) async fn a1_annotations_choose_nothing(node: &Node, handler: &str) -> Result<()> {
    let neighbour = Neighbour::run(node, handler).await?;
    let log = node.dir().join(node.unique("chosen-log"));
    let log = log.display().to_string();
    let chosen: [(&str, &str); 20] = [
        ("dev.gvisor.flag.network", "host"),
        ("dev.gvisor.flag.debug", "true"),
        ("dev.gvisor.flag.debug-log", &log),
        ("dev.gvisor.flag.debug-command", "boot"),
        ("dev.gvisor.flag.strace", "true"),
        ("dev.gvisor.flag.host-uds", "all"),
        ("dev.gvisor.flag.overlay2", "none"),
        ("dev.gvisor.flag.directfs", "false"),
        ("dev.gvisor.flag.net-raw", "true"),
        ("dev.gvisor.flag.allow-suid", "true"),
        ("dev.gvisor.spec.mount.m.source", "/etc"),
        ("dev.gvisor.spec.mount.m.type", "bind"),
        ("dev.gvisor.spec.mount.kiln-shm.source", "/etc"),
        ("dev.gvisor.spec.mount.kiln-shm.share", "shared"),
        ("dev.gvisor.spec.rootfs.source", "/"),
        ("dev.gvisor.internal.checkpoint.path", "/etc"),
        ("dev.gvisor.tar.rootfs.upper", "/etc/passwd"),
        ("dev.gvisor.bundle.other", "/"),
        ("io.kubernetes.cri.container-type", "container"),
        ("io.kubernetes.cri.sandbox-id", neighbour.pod.id()),
    ];
    let pod = node.pod(handler).with(|config| {
        let pairs = chosen.map(|(key, value)| (key.to_owned(), value.to_owned()));
        config.annotations.extend(pairs);
    });
    let pod = pod.run().await?;
    let container = pod.idle().with(|c| {
        for (key, value) in chosen {
            c.annotations.insert(key.to_owned(), value.to_owned());
        }
    });
    let container = container.start().await?;
    // An adopted sandbox was made without the Pod's spec, which nobody reads then.
    let given = [container.id(), pod.id()];
    let given = &given[..if handler == WARM { 1 } else { 2 }];
    for id in given {
        let text = fs::read_to_string(bundle(node, id).join("config.json"))?;
        ensure!(
            text.contains("io.kubernetes.cri.sandbox-name"),
            "no annotations: {text}"
        );
        let spec: Value = serde_json::from_str(&text)?;
        let annotations = spec["annotations"].as_object().context("no annotations")?;
        for (key, value) in annotations {
            // The node's own hint, which only a sandbox's first container has.
            let is_own = *id == pod.id() && key.starts_with("dev.gvisor.spec.mount.kiln-shm.");
            let is_chosen = chosen.iter().any(|(_, chosen)| value == *chosen);
            ensure!(
                !key.starts_with("dev.gvisor.") || (is_own && !is_chosen),
                "{key}: {value}"
            );
        }
        ensure!(!text.contains(neighbour.pod.id()), "{text}");
    }
    let sentry = pod.sentry()?;
    for flag in [
        "--network=host",
        "--debug",
        "--strace",
        "=all",
        "--overlay2",
        "--directfs",
        "--net-raw=true",
        "--allow-suid",
    ] {
        ensure!(
            !sentry.argv.contains(flag),
            "{flag} is chosen: {}",
            sentry.argv
        );
    }
    ensure!(
        sentry.argv.contains("--host-uds=none") && sentry.argv.contains("--net-raw=false"),
        "{}",
        sentry.argv
    );
    ensure!(!fs::exists(&log)?, "{log} was written");
    ensure!(container.sh("hostname").await?.trim() == pod.hostname());
    pod.remove().await?;
    // A checkpoint of the user's choice is not started from.
    let restored = node
        .pod(handler)
        .annotation("kiln.dev/restore-image", "/etc")
        .run_cold_or_warm()
        .await;
    ensure!(restored.is_err(), "restored from /etc");
    neighbour.remove().await
}

/// Others are refused, by the file's mode and by who they are; and connections that hang or talk
/// nonsense keep nobody waiting.
pub(crate) async fn c2_the_agent_listens_to_root_only(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_some().await?;
    let socket = agent.state().join("a.sock");
    let nobody = dial_as(65534, &socket).await?;
    ensure!(nobody.contains("EACCES"), "{nobody}");
    let mode = |path: &Path| anyhow::Ok(fs::metadata(path)?.permissions().mode() & 0o777);
    ensure!(mode(&socket)? == 0o600 && mode(agent.state())? == 0o700);
    let program = tools::ours("kiln-node-agent")?;
    let ask = async |uid| run_as(uid, &program, ["--report".as_ref(), &socket]).await;
    let root = ask(0).await?;
    ensure!(root.status.success(), "{root:?}");
    let set_mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode));
    set_mode(agent.state(), 0o755)?;
    set_mode(&socket, 0o666)?;
    let nobody = ask(65534).await;
    set_mode(&socket, 0o600)?;
    set_mode(agent.state(), 0o700)?;
    let nobody = nobody?;
    ensure!(!nobody.status.success(), "nobody was told: {nobody:?}");
    let mut slow = Vec::new();
    for n in 0..SLOW {
        let mut stream = UnixStream::connect(&socket)?;
        // A length without what it announces, and something that is no length.
        let word: &[u8] = if n % 2 == 0 {
            &[0, 0x3f, 0xff, 0xff, 0, 0, 0, 1, 1]
        } else {
            b"GET / HTTP/1.1\r\n\r\n"
        };
        // It may hang up before all is written.
        stream.write_all(word).ok();
        slow.push(stream);
    }
    let shape = held(node).await?;
    let long = "x".repeat(300);
    for id in ["../x", "a/b", "", "-x", &long] {
        let answer = agent.acquire(&shape, id).await;
        ensure!(
            matches!(&answer, Err(AgentError::None(why)) if why == "invalid"),
            "{id:?}: {answer:?}"
        );
    }
    let pid = agent.pid().await.context("no agent")?;
    let rss = Proc::find(pid)
        .and_then(|p| p.status("VmRSS"))
        .context("no VmRSS")?;
    ensure!(rss < AGENT_RSS, "{rss} KiB");
    let pod = node.pod(WARM).run().await?;
    attacker(&pod).await?;
    drop(slow);
    pod.remove().await
}

/// Somebody who asks for every sandbox that there is has them destroyed, and Pods start cold.
pub(crate) async fn c3_who_takes_all_costs_no_pod(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_some().await?;
    let shape = held(node).await?;
    let mut taken = Vec::new();
    let start = Instant::now();
    loop {
        match agent.acquire(&shape, "greedy").await {
            Ok(warm) => taken.push(warm.id),
            // What there was has gone with answers that were too late.
            Err(_) if taken.is_empty() && start.elapsed() < SOON => agent.expect_some().await?,
            Err(_) => break,
        }
        ensure!(taken.len() < 64, "there is no end");
    }
    ensure!(!taken.is_empty());
    let pod = node.pod(WARM).run_cold_or_warm().await?;
    ensure!(!taken.contains(&pod.sandbox()), "two have the same sandbox");
    attacker(&pod).await?;
    pod.remove().await?;
    for id in taken {
        node.expect_gone(&id).await?;
    }
    agent.expect_some().await
}

/// The shape of what the agent holds.
async fn held(node: &Node) -> Result<Shape> {
    let report = node.agent()?.report().await?;
    let class = report.classes.iter().find(|c| c.class == "gvisor");
    Ok(Shape::from_json(&class.context("no class")?.shape)?)
}
