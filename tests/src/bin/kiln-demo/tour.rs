// SPDX-License-Identifier: Apache-2.0

//! The chapters of the demo, in their order. What they claim they check.

use std::{fs, net::SocketAddr, path::Path, time::Instant};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    process::{Cmd, Proc},
    tools,
    wait::{self, SOON},
};
use nix::sys::utsname::uname;

use crate::{
    http,
    manifest::{Container, Sandbox},
    posture::{OWN_NAMESPACES, Posture},
    screen::Screen,
    session::{Running, Session},
};

/// About the first chapter.
pub(crate) const START: &str = "A containerd with its own directory, network namespace and cgroup, with our \
    shim as its handler `gvisor`. It pulls images from a registry on its loopback, which serves what was \
    made on this machine: nothing comes from the network.";

/// What the Python Pod runs.
const PYTHON: &str = "\
import os, platform
print('Python', platform.python_version(), 'on kernel', platform.release())
primes = [n for n in range(2, 10000) if all(n % d for d in range(2, int(n ** 0.5) + 1))]
print(len(primes), 'primes below 10000, the last of them', primes[-1])
print('processes to be seen:', [int(p) for p in os.listdir('/proc') if p.isdigit()])";

/// Where the port of the web server is forwarded from.
const FORWARDED: u16 = 8080;

/// Says what the demo runs with.
pub(crate) async fn versions(screen: &mut Screen, shim: &Path) -> Result<()> {
    for (program, flag) in [
        ("containerd", "--version"),
        ("runsc", "--version"),
        ("crictl", "--version"),
    ] {
        let printed = Cmd::new(&tools::program(program)?)
            .args([flag])
            .run()
            .await?;
        screen.text(printed.lines().next().unwrap_or_default())?;
    }
    let printed = Cmd::new(shim).args(["-v"]).run().await?;
    screen.text(&format!("{} ({})", printed.trim(), shim.display()))
}

/// All chapters that are about Pods, until they are gone.
///
/// # Errors
/// What failed, or did not hold.
pub(crate) async fn pods(session: &mut Session<'_>, sandbox: &Sandbox) -> Result<()> {
    let handler = sandbox.runtime_class();
    let first = from_manifest(session, sandbox).await?;
    kernel(session, &first).await?;
    exec(session, &first).await?;
    let python = script(session, handler).await?;
    stats(session, &first).await?;
    let web = port_forward(session, handler).await?;
    isolation(session, &first).await?;
    layer(session, &first)?;
    teardown(session, &[first, python, web]).await
}

async fn from_manifest(session: &mut Session<'_>, sandbox: &Sandbox) -> Result<Running> {
    let container = sandbox.container()?;
    let about = format!(
        "The container of deploy/examples/sandbox.yaml: image {image}, command {} \"{}\". A kubelet would turn \
         its runtimeClassName into --runtime {class}.",
        container.command.join(" "),
        container.args.join(" "),
        image = container.image,
        class = sandbox.runtime_class(),
    );
    session
        .screen
        .chapter("Run the Sandbox of the example", &about)?;
    session.crictl(&["pull", &container.image]).await?;
    let running = session
        .start_pod(&sandbox.metadata.name, sandbox.runtime_class(), container)
        .await?;
    session.crictl(&["ps"]).await?;
    Ok(running)
}

async fn kernel(session: &mut Session<'_>, first: &Running) -> Result<()> {
    session.screen.chapter(
        "Look at its kernel",
        "The container has gVisor's kernel, not this machine's: the start of its dmesg says so.",
    )?;
    let banner = session.crictl(&["exec", &first.container, "dmesg"]).await?;
    ensure!(
        banner.contains("Starting gVisor"),
        "the container's dmesg is not gVisor's"
    );
    let inside = session
        .crictl(&["exec", &first.container, "uname", "-a"])
        .await?;
    let host = uname()
        .context("ask for the host's kernel")?
        .release()
        .to_string_lossy()
        .into_owned();
    ensure!(
        !inside.contains(&host),
        "the container sees the host's kernel, {host}"
    );
    session
        .screen
        .check(&format!("this machine's own kernel is {host}"))
}

async fn exec(session: &mut Session<'_>, first: &Running) -> Result<()> {
    session.screen.chapter(
        "Run commands in it",
        "Over the sentry's control socket, without starting runsc. Output, errors and exit code come back.",
    )?;
    let greeting = "echo hello from $(hostname), process $$";
    session
        .timed_crictl(
            Some("exec"),
            &["exec", &first.container, "sh", "-c", greeting],
        )
        .await?;
    let words = session
        .failing_crictl(&["exec", &first.container, "sh", "-c", "exit 7"])
        .await?;
    ensure!(
        words.contains("exit code 7"),
        "the exit code is not told: {words}"
    );
    session.screen.check("the exit code of the command is told")
}

async fn script(session: &mut Session<'_>, handler: &str) -> Result<Running> {
    session.screen.chapter(
        "Run a script in Python",
        "Untrusted code of the usual kind: a Pod that runs a script and ends.",
    )?;
    session.screen.text("The script:")?;
    session.screen.output(PYTHON)?;
    session
        .timed_crictl(Some("pull of python"), &["pull", "python"])
        .await?;
    let container = Container {
        name: "script".to_owned(),
        image: "python".to_owned(),
        command: vec!["python3".to_owned(), "-c".to_owned(), PYTHON.to_owned()],
        args: Vec::new(),
    };
    let running = session.start_pod("python", handler, &container).await?;
    let start = Instant::now();
    let (node, id) = (session.node, running.container.clone());
    let ends = wait::until("end of the script", SOON, async || {
        let state = node.crictl([
            "inspect",
            "--output",
            "go-template",
            "--template",
            "{{.status.state}}",
            &id,
        ]);
        state
            .run()
            .await
            .is_ok_and(|state| state.contains("EXITED"))
            .then_some(())
    });
    session.screen.waiting("the script runs", ends).await.0?;
    session.screen.text("The script has ended.")?;
    session.time("python: from its start to its end", start.elapsed())?;
    let log = session.crictl(&["logs", &running.container]).await?;
    ensure!(
        log.contains("9973"),
        "the script did not do its work: {log}"
    );
    session
        .crictl(&["ps", "--all", "--state", "exited"])
        .await?;
    Ok(running)
}

async fn stats(session: &mut Session<'_>, first: &Running) -> Result<()> {
    let about =
        "What a kubelet asks for every ten seconds. crictl waits a second between two samples.";
    session
        .screen
        .chapter("Ask for its resource usage", about)?;
    session
        .timed_crictl(
            Some("stats, with a second between samples"),
            &["stats", &first.container],
        )
        .await?;
    Ok(())
}

async fn port_forward(session: &mut Session<'_>, handler: &str) -> Result<Running> {
    session.screen.chapter(
        "Forward a port to a web server",
        "A third Pod serves HTTP on its port 80. gVisor listens on no port of the host, which is why \
         port-forward fails with its own shim; ours carries the bytes to the sentry.",
    )?;
    session.crictl(&["pull", "nginx"]).await?;
    let container = Container {
        name: "server".to_owned(),
        image: "nginx".to_owned(),
        command: Vec::new(),
        args: Vec::new(),
    };
    let running = session.start_pod("web", handler, &container).await?;

    let ports = format!("{FORWARDED}:80");
    session
        .screen
        .command(&format!("crictl port-forward {} {ports} &", running.pod))?;
    let forwarding = session
        .node
        .crictl(["port-forward", &running.pod, &ports])
        .output();
    session
        .screen
        .command(&format!("curl -i http://127.0.0.1:{FORWARDED}/"))?;
    let address = SocketAddr::from(([127, 0, 0, 1], FORWARDED));
    let netns = session.node.netns();
    let start = Instant::now();
    let answer = wait::until("an answer", SOON, async || {
        http::get(netns, address)
            .await
            .ok()
            .filter(|a| !a.is_empty())
    });
    let answer = tokio::select! {
        answer = answer => answer?,
        ended = forwarding => anyhow::bail!("crictl port-forward has ended: {}", ended?.errors()),
    };
    session.screen.output(&answer.replace('\r', ""))?;
    session.time("port-forward and the first answer", start.elapsed())?;
    ensure!(
        answer.contains(" 200 "),
        "the web server did not answer with 200"
    );
    Ok(running)
}

async fn isolation(session: &mut Session<'_>, first: &Running) -> Result<()> {
    session.screen.chapter(
        "Try to look out",
        "What is on the host is not there for the container.",
    )?;
    let secret = session.dir().join("secret");
    fs::write(&secret, "of the host\n").with_context(|| format!("write {}", secret.display()))?;
    let path = secret.to_string_lossy().into_owned();
    session
        .failing_crictl(&["exec", &first.container, "cat", &path])
        .await?;
    session
        .screen
        .check("a file of the host, which has just been written, is not there")?;

    let processes = session.crictl(&["exec", &first.container, "ps"]).await?;
    let (inside, outside) = (
        processes.lines().count().saturating_sub(1),
        Proc::all().len(),
    );
    ensure!(
        !processes.contains("containerd") && inside < 5,
        "processes of the host are to be seen"
    );
    session.screen.check(&format!(
        "{inside} processes are to be seen; the host has {outside}"
    ))?;

    session
        .failing_crictl(&[
            "exec",
            &first.container,
            "mount",
            "-t",
            "tmpfs",
            "none",
            "/mnt",
        ])
        .await?;
    session.screen.check("mounting is refused")?;
    session
        .failing_crictl(&["exec", &first.container, "ping", "-c", "1", "127.0.0.1"])
        .await?;
    session.screen.check("raw sockets are refused")?;

    session.screen.text(
        "And who broke out of gVisor's kernel would be in the sentry, a process of the host that:",
    )?;
    let sentry = runtime_processes(session, first, "runsc-sandbox");
    let sentry = sentry.first().context("no sentry is to be seen")?;
    let posture = Posture::of(sentry.pid)?;
    ensure!(posture.is_filtered(), "no seccomp filter is on");
    session
        .screen
        .check("has a seccomp filter on its system calls")?;
    ensure!(posture.gets_no_privileges(), "it may get new privileges");
    session.screen.check("cannot get new privileges")?;
    ensure!(posture.is_no_admin(), "it has CAP_SYS_ADMIN");
    let (few, all) = (
        posture.capabilities.count_ones(),
        Posture::of(std::process::id())?.capabilities.count_ones(),
    );
    session.screen.check(&format!(
        "has {few} of root's {all} capabilities, CAP_SYS_ADMIN not among them"
    ))?;
    ensure!(
        posture.own_namespaces == OWN_NAMESPACES,
        "it shares namespaces with the host: has {:?}",
        posture.own_namespaces
    );
    session.screen.check(&format!(
        "has its own namespaces: {}",
        posture.own_namespaces.join(", ")
    ))?;
    ensure!(posture.root.len() < 5, "its root has {:?}", posture.root);
    session.screen.check(&format!(
        "sees only {} of the file system",
        posture.root.join(" and ")
    ))
}

/// Processes of runsc for a Pod: the sandbox's bear its id, gofers that of the container they serve.
fn runtime_processes(session: &Session<'_>, pod: &Running, name: &str) -> Vec<Proc> {
    let is_of_pod = |p: &Proc| {
        [&pod.pod, &pod.container]
            .iter()
            .any(|id| p.argv.contains(*id))
    };
    let all = session.node.processes().into_iter();
    all.filter(|p| p.argv.starts_with(name) && is_of_pod(p))
        .collect()
}

fn layer(session: &mut Session<'_>, first: &Running) -> Result<()> {
    session.screen.chapter(
        "What one Pod costs",
        "One shim per Pod is all that we add. gVisor's own shim has one per container, and a `runsc wait` \
         beside each.",
    )?;
    let shims = session.node.shims_of(&first.pod);
    let [shim] = &shims[..] else {
        anyhow::bail!("not one shim, but {shims:?}")
    };
    let rows = [
        ("shim", vec![shim.clone()]),
        ("sentry", runtime_processes(session, first, "runsc-sandbox")),
        ("gofers", runtime_processes(session, first, "runsc-gofer")),
    ];
    session.screen.line(&format!(
        "\n   {:<8} {:>10} {:>8} {:>10} {:>10}",
        "", "processes", "threads", "RSS", "anonymous"
    ))?;
    for (name, processes) in rows {
        let sum = |field: &str| {
            processes
                .iter()
                .filter_map(|p| p.status(field))
                .sum::<u64>()
        };
        // The kernel counts in KiB.
        let megabytes = |field: &str| format!("{:.1} MB", sum(field) as f64 * 1024.0 / 1e6);
        session.screen.line(&format!(
            "   {name:<8} {:>10} {:>8} {:>10} {:>10}",
            processes.len(),
            sum("Threads"),
            megabytes("VmRSS"),
            megabytes("RssAnon"),
        ))?;
    }
    Ok(())
}

async fn teardown(session: &mut Session<'_>, pods: &[Running]) -> Result<()> {
    session.screen.chapter(
        "Take everything away",
        "The container of the first Pod by hand, then all Pods.",
    )?;
    let first = pods.first().context("no Pods")?;
    session
        .timed_crictl(Some("stop"), &["stop", &first.container])
        .await?;
    session
        .timed_crictl(Some("rm"), &["rm", &first.container])
        .await?;
    let mut words = vec!["rmp", "--force"];
    words.extend(pods.iter().map(|pod| pod.pod.as_str()));
    session
        .timed_crictl(Some("rmp of three Pods"), &words)
        .await?;
    let (clean, _) = session
        .screen
        .waiting("looking for leftovers", session.node.check_for_leaks())
        .await;
    clean.context("something of the Pods is left")?;
    session.screen.line("")?;
    for kind in [
        "no process of theirs runs",
        "nothing of theirs is mounted",
        "no cgroup of theirs is there",
        "no network interface of theirs is there",
        "no socket and no state file of containerd, shim or runsc is there",
    ] {
        session.screen.check(kind)?;
    }
    Ok(())
}
