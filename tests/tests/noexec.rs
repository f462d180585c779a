// SPDX-License-Identifier: Apache-2.0

//! A node whose `/run` is mounted `noexec,nosuid,nodev`, as on Debian and Ubuntu: what sandboxes
//! execute is in a tmpfs of the agent's, in the host's mount namespace or in that of a container.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    agent::holding,
    mounts,
    node::{Node, NodeOpts},
    process::{Cmd, Proc},
    suite::Cases,
    tools,
    wait::{self, SOON},
};
use nix::sys::{
    signal::Signal,
    statvfs::{FsFlags, statvfs},
};
use serde_json::Value;

/// The handler whose Pods adopt.
const HANDLER: &str = "gvisor-warm";

/// How many sandboxes the agent of the suite holds.
const WARM: u32 = 2;

/// What is mounted so.
const RUN: &str = "/run";

/// Becomes a command in a mount namespace of its own, of which the host sees no mount: what the
/// agent has as a container.
const CONTAINER: [&str; 4] = ["unshare", "--mount", "--propagation", "slave"];

/// Becomes a command that may mount nothing.
const POWERLESS: [&str; 5] = [
    "setpriv",
    "--bounding-set",
    "-sys_admin",
    "--inh-caps",
    "-sys_admin",
];

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    macro_rules! alone {
        ($($case:ident),+ $(,)?) => {
            $(cases.add_alone(stringify!($case), $case);)+
        };
    }
    alone!(
        nothing_can_be_executed_from_run,
        preflight_tells_what_must_be_executable,
        sandboxes_boot_from_a_tmpfs_of_the_agents,
        a_pod_adopts_and_another_starts_cold,
        another_agent_takes_up_tmpfs_and_sandboxes,
        a_drain_leaves_no_mount_and_its_pods,
        an_agent_in_a_container_has_the_tmpfs_to_itself,
        an_agent_that_may_not_mount_says_what_to_do,
    );
    // While there is one thread.
    if let Err(e) = mounts::enter_with_noexec(Path::new(RUN)) {
        panic!("{e:#}");
    }
    let opts = || NodeOpts {
        agent: Some(holding(WARM, 2 * WARM)),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}

/// Puts a program into the agent's state, beside the tmpfs.
async fn program_in_state(node: &Node, name: &str) -> Result<PathBuf> {
    let state = node.agent()?.state();
    wait::until_true("the agent's directory", SOON, || state.exists()).await?;
    let program = state.join(name);
    fs::copy("/bin/true", &program).with_context(|| program.display().to_string())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

/// Whether `process` is among those of `before`.
fn is_of(before: &[Proc], process: &Proc) -> bool {
    before.iter().any(|p| p.pid == process.pid)
}

/// The other cases prove something only where the kernel refuses to execute a program in `/run`.
async fn nothing_can_be_executed_from_run(node: &Node) -> Result<()> {
    let state = node.agent()?.state();
    ensure!(state.starts_with(RUN), "{}", state.display());
    let program = program_in_state(node, "program").await?;
    let wanted = FsFlags::ST_NOEXEC | FsFlags::ST_NOSUID | FsFlags::ST_NODEV;
    for dir in [Path::new(RUN), state] {
        let flags = statvfs(dir)?.flags();
        ensure!(flags.contains(wanted), "{}: {flags:?}", dir.display());
    }
    let ran = Cmd::new(&program).output().await;
    fs::remove_file(&program)?;
    let refused = ran
        .as_ref()
        .err()
        .and_then(|e| e.downcast_ref::<io::Error>());
    let kind = refused.map(io::Error::kind);
    ensure!(kind == Some(io::ErrorKind::PermissionDenied), "{ran:?}");
    Ok(())
}

/// kilnctl names the programs that cannot be executed where they lie, and not the agent's state.
async fn preflight_tells_what_must_be_executable(node: &Node) -> Result<()> {
    let dir = node.volume()?;
    let (config, runtime) = (dir.join("containerd.toml"), dir.join("runsc.toml"));
    let preflight = async |shim: &Path, runsc: &Path| -> Result<Vec<Value>> {
        let handler = "plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.gvisor";
        let text = format!(
            "version = 3\n[{handler}]\nruntime_type = 'io.containerd.kiln.v2'\nruntime_path = {shim:?}\n"
        );
        fs::write(&config, text)?;
        fs::write(&runtime, format!("binary_name = {runsc:?}\n"))?;
        let output = Cmd::new(&tools::ours("kilnctl")?)
            .args(["node", "preflight", "-o", "json", "--containerd"])
            .args([tools::program("containerd")?])
            .args(["--containerd-config".as_ref(), config.as_os_str()])
            .args(["--runtime-config".as_ref(), runtime.as_os_str()])
            .output()
            .await?;
        serde_json::from_slice(&output.stdout).with_context(|| output.errors())
    };
    let told = |checks: &[Value], name: &str| -> Result<(String, String)> {
        let found = checks.iter().find(|c| c["check"] == name);
        let found = found.with_context(|| format!("no {name} in {checks:?}"))?;
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        Ok((text("verdict"), text("found")))
    };
    let checks = preflight(&tools::shim()?, &tools::runsc()?).await?;
    for name in ["shim", "runtime", "agent's state"] {
        let (verdict, found) = told(&checks, name)?;
        ensure!(verdict == "ok", "{name}: {found}");
    }
    let (_, found) = told(&checks, "agent's state")?;
    ensure!(found.contains(", noexec: the agent mounts"), "{found}");
    let programs = [
        program_in_state(node, "shim").await?,
        program_in_state(node, "runsc").await?,
    ];
    let checks = preflight(&programs[0], &programs[1]).await;
    for program in &programs {
        fs::remove_file(program)?;
    }
    let checks = checks?;
    for name in ["shim", "runtime"] {
        let (verdict, found) = told(&checks, name)?;
        ensure!(verdict == "missing", "{name}: {found}");
        ensure!(found.contains("mounted noexec"), "{name}: {found}");
    }
    Ok(())
}

/// What an agent with a runtime that is known can do, it does: sandboxes from an image, adopted
/// over the sentry's socket.
async fn sandboxes_boot_from_a_tmpfs_of_the_agents(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let log = agent.log();
    ensure!(
        log.contains("can be adopted, way: Ways { is_known: true, start: Control"),
        "{log}"
    );
    ensure!(!log.contains("adoption from an image"), "{log}");
    let mounted = mounts::below(agent.state())?;
    ensure!(mounted == [agent.state().join("exec")], "{mounted:?}");
    let flags = statvfs(&mounted[0])?.flags();
    ensure!(!flags.contains(FsFlags::ST_NOEXEC), "{flags:?}");
    let wanted = FsFlags::ST_NOSUID | FsFlags::ST_NODEV;
    ensure!(flags.contains(wanted), "{flags:?}");
    let report = agent.report().await?;
    ensure!(report.problem.is_empty(), "{}", report.problem);
    Ok(())
}

async fn a_pod_adopts_and_another_starts_cold(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let before = node.processes();
    let warm = node.pod(HANDLER).run().await?;
    let sentry = warm.sentry()?;
    ensure!(is_of(&before, &sentry), "{sentry:?} is new");
    let container = warm.start_with_gofer().await?;
    ensure!(container.sh("echo $((6 * 7))").await? == "42\n");
    // By the runtime's command: the slots are spent.
    let second = warm.idle().start().await?;
    ensure!(second.sh("echo $((6 * 7))").await? == "42\n");
    let cold = node.pod("gvisor").run().await?;
    let container = cold.idle().start().await?;
    ensure!(container.sh("echo $((6 * 7))").await? == "42\n");
    for pod in [warm, cold] {
        let (id, sandbox) = (pod.id().to_owned(), pod.sandbox());
        pod.remove().await?;
        node.expect_gone(&id).await?;
        node.expect_gone(&sandbox).await?;
    }
    Ok(())
}

/// The tmpfs stays with the sandboxes, and there is one.
async fn another_agent_takes_up_tmpfs_and_sandboxes(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.expect_ready(WARM).await?;
    let before = node.processes();
    let mounted = mounts::below(agent.state())?;
    agent.stop(Signal::SIGKILL).await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await?;
    let now = mounts::below(agent.state())?;
    ensure!(now == mounted && now.len() == 1, "{now:?}");
    let pod = node.pod(HANDLER).run().await?;
    let sentry = pod.sentry()?;
    ensure!(is_of(&before, &sentry), "{sentry:?} is new");
    pod.start_with_gofer().await?;
    pod.remove().await
}

/// A Pod has what it needs of the tmpfs when that is unmounted.
async fn a_drain_leaves_no_mount_and_its_pods(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    let pod = node.pod(HANDLER).run().await?;
    let container = pod.start_with_gofer().await?;
    agent.drain().await?;
    ensure!(!agent.state().exists());
    let mounted = mounts::below(agent.state())?;
    ensure!(mounted.is_empty(), "{mounted:?}");
    ensure!(container.sh("echo $((6 * 7))").await? == "42\n");
    let second = pod.idle().start().await?;
    ensure!(second.sh("echo $((6 * 7))").await? == "42\n");
    let sandbox = pod.sandbox();
    pod.remove().await?;
    node.expect_gone(&sandbox).await?;
    node.run_agent().await?;
    agent.expect_ready(WARM).await
}

/// The agent of a cluster: nobody but itself sees the tmpfs, also not the shims and the runtime's
/// commands that take up, start and delete what is booted with it.
async fn an_agent_in_a_container_has_the_tmpfs_to_itself(node: &Node) -> Result<()> {
    node.agent()?.drain().await?;
    let worked = in_a_container(node).await;
    // On the node, as `kiln-node-agent uninstall` is run there.
    node.agent()?.drain().await?;
    node.run_agent().await?;
    worked.with_context(|| node.agent().map(|a| a.log()).unwrap_or_default())?;
    node.agent()?.expect_ready(WARM).await
}

async fn in_a_container(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    node.run_agent_by(&CONTAINER).await?;
    agent.expect_ready(WARM).await?;
    let seen = mounts::below(agent.state())?;
    ensure!(seen.is_empty(), "{seen:?}");
    let before = node.processes();
    // Its mount namespace ends with it, and the next agent has another.
    agent.stop(Signal::SIGKILL).await?;
    node.run_agent_by(&CONTAINER).await?;
    agent.expect_ready(WARM).await?;
    let pod = node.pod(HANDLER).run().await?;
    let sentry = pod.sentry()?;
    ensure!(is_of(&before, &sentry), "{sentry:?} is new");
    let container = pod.start_with_gofer().await?;
    ensure!(container.sh("echo $((6 * 7))").await? == "42\n");
    pod.remove().await?;
    // With this flag adoptions are by the runtime's command.
    let config = node.dir().join(format!("{HANDLER}.toml"));
    let text = fs::read_to_string(&config)?;
    let changed = text.replace("[runsc_config]\n", "[runsc_config]\nqdisc = \"none\"\n");
    ensure!(changed != text);
    fs::write(&config, &changed)?;
    let adopted = adopts_by_command(node).await;
    fs::write(&config, &text)?;
    adopted
}

async fn adopts_by_command(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    let is_said = || agent.log().contains("start: Command");
    wait::until_true("adoption by command", SOON, is_said).await?;
    agent.expect_ready(WARM).await?;
    let pod = node.pod(HANDLER).run().await?;
    let container = pod.idle().start().await?;
    ensure!(container.sh("echo $((6 * 7))").await? == "42\n");
    pod.remove().await
}

/// Where the tmpfs cannot be mounted, whoever asks is told which directory it is, and what to do.
async fn an_agent_that_may_not_mount_says_what_to_do(node: &Node) -> Result<()> {
    let agent = node.agent()?;
    agent.drain().await?;
    node.run_agent_by(&POWERLESS).await?;
    let dir = agent.state().join("exec").display().to_string();
    let told = wait::until("the agent's word on it", SOON, async || {
        let problem = agent.report().await.ok()?.problem;
        let words = [&dir, "mounted noexec", "CAP_SYS_ADMIN"];
        words.iter().all(|w| problem.contains(w)).then_some(())
    });
    let told = told.await.with_context(|| agent.log());
    agent.drain().await?;
    node.run_agent().await?;
    told?;
    agent.expect_ready(WARM).await
}
