// SPDX-License-Identifier: Apache-2.0

//! What becomes of a node that somebody changes after it was installed: its agent says so, and
//! puts back what it may.

use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    leaks::GOFERS_NETNS,
    process::{Cmd, Daemon, signal_to},
    tools, wait,
};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::Signal,
};
use serde_json::Value;

use crate::place::{HANDLER, Installation};

/// How long an agent may take to see what has changed, and to put it back.
const PATIENCE: Duration = Duration::from_secs(180);

/// How long it leaves the node alone after it has put something back.
const BRAKE: Duration = Duration::from_secs(60);

/// An agent of the node. It ends with the value.
struct Agent<'a> {
    place: &'a Installation<'a>,
    daemon: Daemon,
    log: PathBuf,
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        if let Some(pid) = self.daemon.pid() {
            signal_to(pid, Signal::SIGKILL).ok();
        }
    }
}

impl<'a> Agent<'a> {
    /// Starts one with the table `[install]`, of which `more` is more.
    fn installing(place: &'a Installation<'_>, more: &str) -> Result<Self> {
        let from = place.dir.join("from");
        place.configure(&format!("from = \"{}\"\n{more}", from.display()))?;
        Self::start(place, |text| text)
    }

    /// Starts one for a handler that others have put there.
    fn reporting(place: &'a Installation<'_>) -> Result<Self> {
        Self::start(place, |text| {
            let end = text.find("[install]").unwrap_or(text.len());
            format!(
                "{}containerd = \"{}\"\nhandler = \"{HANDLER}\"\n",
                &text[..end],
                place.node.socket().display()
            )
        })
    }

    fn start(place: &'a Installation<'_>, edit: impl Fn(String) -> String) -> Result<Self> {
        let text = edit(fs::read_to_string(place.dir.join("agent.toml"))?);
        let (config, log) = (place.dir.join("running.toml"), place.dir.join("agent.log"));
        // It is to hold nothing, which would outlive it.
        let more = format!(
            "pause = \"{}\"\ncgroup = \"/{}/warm\"\n{text}\n[limits]\ntotal = 0\n",
            tools::pause()?.display(),
            place.node.name(),
        );
        fs::write(&config, more)?;
        let args = ["--standalone", "--config"].map(OsStr::new);
        let daemon = Daemon::start(
            &tools::ours("kiln-node-agent")?,
            &[&args[..], &[config.as_os_str()]].concat(),
            &[],
            None,
            place.node.cgroup(),
            &log,
        )?;
        Ok(Self { place, daemon, log })
    }

    /// What `kilnctl node status` says of the handler; nothing while the agent does not listen.
    async fn problem(&self) -> Option<String> {
        let socket = self.place.dir.join("no-agent.sock");
        let output = Cmd::new(&tools::ours("kilnctl").ok()?)
            .args(["node", "status", "--output", "json", "--socket"])
            .args([&socket])
            .output()
            .await
            .ok()?;
        let status: Value = serde_json::from_str(&output.text()).ok()?;
        Some(status["handlerProblem"].as_str()?.to_owned())
    }

    async fn until_said(&self, what: &str) -> Result<()> {
        let said = wait::until(&format!("a word of {what}"), PATIENCE, async || {
            self.problem().await?.contains(what).then_some(())
        });
        said.await.with_context(|| self.tail())
    }

    /// Waits until its log says for the `n`th time that Pods can start.
    async fn until_good(&self, n: usize) -> Result<()> {
        let good = wait::until(&format!("all well for time {n}"), PATIENCE, async || {
            (self.count("can start: Good") >= n).then_some(())
        });
        good.await.with_context(|| self.tail())
    }

    fn count(&self, words: &str) -> usize {
        fs::read_to_string(&self.log)
            .unwrap_or_default()
            .matches(words)
            .count()
    }

    fn tail(&self) -> String {
        self.daemon.tail()
    }

    async fn end(mut self) -> Result<()> {
        self.daemon.stop(Signal::SIGTERM, PATIENCE).await?;
        // It may have been about to try its runtime out.
        let drained = Cmd::new(&tools::ours("kiln-node-agent")?)
            .args(["--drain", "--config"])
            .args([self.place.dir.join("running.toml")])
            .output()
            .await?;
        ensure!(drained.status.success(), "{}", drained.errors());
        Ok(())
    }
}

/// Has containerd's own file say what it did before anything was installed.
fn rewrite(place: &Installation<'_>) -> Result<()> {
    let config = place.containerd_config();
    let text = fs::read_to_string(&config)?;
    let without = text.lines().filter(|line| !line.starts_with("imports"));
    let text: String = without.map(|line| format!("{line}\n")).collect();
    Ok(fs::write(config, text)?)
}

fn shim(place: &Installation<'_>) -> PathBuf {
    place.dir.join("opt/bin/containerd-shim-kiln-v2")
}

/// The runsc that is installed.
fn runsc(place: &Installation<'_>) -> Result<PathBuf> {
    let bin = place.dir.join("opt/bin");
    let mut names = fs::read_dir(&bin)?.flatten().map(|e| e.path());
    let is_runsc = |path: &PathBuf| path.display().to_string().contains("/runsc-");
    names.find(is_runsc).context("no runsc")
}

/// Does `work` beside an agent that has installed, and expects that nothing stays when both have ended.
async fn with_agent(
    place: &Installation<'_>,
    more: &str,
    work: impl AsyncFnOnce(&Agent<'_>) -> Result<()>,
) -> Result<()> {
    let before = place.listing()?;
    let agent = Agent::installing(place, more)?;
    place
        .with_restarts(async {
            agent.until_good(1).await?;
            work(&agent).await
        })
        .await?;
    agent.end().await?;
    taken_away(place, before.keys().cloned().collect()).await
}

/// As config management and image builders do it. One more file, which does not end a Pod.
pub(crate) async fn a_rewritten_configuration_is_wired_again_below_a_pod(
    place: &Installation<'_>,
) -> Result<()> {
    with_agent(place, "", async |agent| {
        let pod = place.node.pod(HANDLER).run().await?;
        let container = pod.idle().start().await?;

        // The containerd that runs has the handler still: it need not be started anew.
        let pid = place.node.containerd_pid().await;
        rewrite(place)?;
        agent.until_said("does not import").await?;
        agent.until_good(2).await?;
        ensure!(place.node.containerd_pid().await == pid, "started anew");

        rewrite(place)?;
        place.node.restart_containerd(Signal::SIGTERM).await?;
        agent.until_said("does not import").await?;
        place.expect_no_handler().await?;
        agent.until_good(3).await?;
        place.expect_handler().await?;

        let said = container.sh("echo still here").await?;
        ensure!(said.trim() == "still here", "exec: {said:?}");
        container.stop(0).await?;
        pod.remove().await
    })
    .await
}

pub(crate) async fn programs_that_were_removed_are_put_back(
    place: &Installation<'_>,
) -> Result<()> {
    with_agent(place, "", async |agent| {
        let pid = place.node.containerd_pid().await;
        fs::remove_file(shim(place))?;
        // Another in its place, too, which fails at whatever the agent has it do meanwhile.
        let runsc = runsc(place)?;
        fs::remove_file(&runsc)?;
        fs::copy("/bin/false", &runsc)?;
        agent.until_said(&place.dir.display().to_string()).await?;
        agent.until_good(2).await?;
        ensure!(place.node.containerd_pid().await == pid, "started anew");
        place.expect_handler().await
    })
    .await
}

pub(crate) async fn who_takes_it_away_again_is_not_followed_at_once(
    place: &Installation<'_>,
) -> Result<()> {
    with_agent(place, "", async |agent| {
        fs::remove_file(shim(place))?;
        agent.until_good(2).await?;
        let repaired = Instant::now();
        fs::remove_file(shim(place))?;
        agent.until_said("is gone").await?;
        agent.until_good(3).await?;
        // It has begun to count when it was done, shortly before that was seen.
        let slack = BRAKE / 6;
        ensure!(
            repaired.elapsed() + slack >= BRAKE,
            "{:?}",
            repaired.elapsed()
        );
        Ok(())
    })
    .await
}

pub(crate) async fn without_repair_it_is_only_said(place: &Installation<'_>) -> Result<()> {
    with_agent(place, "repair = false\n", async |agent| {
        let (shim, runsc) = (shim(place), runsc(place)?);
        fs::rename(&shim, place.dir.join("shim"))?;
        agent.until_said("containerd-shim-kiln-v2 is gone").await?;
        // It has had its chance when it says something else.
        fs::rename(place.dir.join("shim"), &shim)?;
        fs::rename(&runsc, place.dir.join("runsc"))?;
        let name = runsc.file_name().context("no name")?.to_string_lossy();
        agent.until_said(&format!("{name} is gone")).await?;
        ensure!(agent.count("installed: ") == 1, "{}", agent.tail());
        fs::rename(place.dir.join("runsc"), &runsc)?;
        agent.until_good(2).await
    })
    .await
}

/// By `kilnctl node enable`, which is what an agent without `[install]` cannot know.
pub(crate) async fn a_node_set_up_by_hand_is_only_reported(place: &Installation<'_>) -> Result<()> {
    let before = place.listing()?;
    place.does("enable").await?;
    let agent = Agent::reporting(place)?;
    agent.until_good(1).await?;
    fs::rename(shim(place), place.dir.join("shim"))?;
    agent.until_said("containerd-shim-kiln-v2 is gone").await?;
    fs::rename(place.dir.join("shim"), shim(place))?;
    agent.until_good(2).await?;
    rewrite(place)?;
    place.node.restart_containerd(Signal::SIGTERM).await?;
    agent
        .until_said(&format!("containerd has no handler {HANDLER}"))
        .await?;
    place.does("enable").await?;
    agent.until_good(3).await?;
    ensure!(agent.count("installed: ") == 0, "{}", agent.tail());
    agent.end().await?;
    taken_away(place, before.keys().cloned().collect()).await
}

/// As after a reboot: what is in `/run` is gone, and all else is there.
pub(crate) async fn a_node_comes_back_without_what_was_in_run(
    place: &Installation<'_>,
) -> Result<()> {
    let before = place.listing()?;
    let mut agent = Agent::installing(place, "")?;
    place
        .with_restarts(async {
            agent.until_good(1).await?;
            place.expect_handler().await
        })
        .await?;
    agent.daemon.stop(Signal::SIGKILL, PATIENCE).await?;
    place.node.stop_containerd(Signal::SIGKILL).await?;
    let node = place.node.dir();
    unmount_gofers_netns(&node.join("ri"));
    for dir in [
        place.dir.join("no-agent"),
        node.join("ri"),
        node.join("state"),
    ] {
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
        }
    }
    for entry in fs::read_dir(&place.dir)?.flatten() {
        if entry.path().extension().is_some_and(|e| e == "sock") {
            fs::remove_file(entry.path())?;
        }
    }
    let again = Agent::start(place, |text| text)?;
    // It comes before containerd, which it waits for.
    place.node.start_containerd().await?;
    place
        .with_restarts(async {
            again.until_good(2).await?;
            place.expect_handler().await
        })
        .await?;
    again.end().await?;
    taken_away(place, before.keys().cloned().collect()).await
}

/// Fails unless nothing is left when it is taken away, but for the agent's own files.
/// Unmounts what a runtime keeps mounted in its state directory.
fn unmount_gofers_netns(root: &Path) {
    for namespace in fs::read_dir(root).into_iter().flatten().flatten() {
        let netns = namespace.path().join(GOFERS_NETNS);
        while umount2(&netns, MntFlags::MNT_DETACH).is_ok() {}
    }
}

async fn taken_away(place: &Installation<'_>, before: Vec<PathBuf>) -> Result<()> {
    place.does("disable").await?;
    place.expect_no_handler().await?;
    for file in [
        "running.toml",
        "agent.log",
        "no-agent.sock",
        "no-agent.slots",
    ] {
        fs::remove_file(place.dir.join(file))?;
    }
    let now = place.listing()?;
    let left: Vec<_> = now.keys().filter(|p| !before.contains(p)).collect();
    ensure!(left.is_empty(), "left: {left:?}");
    Ok(())
}
