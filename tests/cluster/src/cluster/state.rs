// SPDX-License-Identifier: Apache-2.0

//! What is known of a running cluster, in a file: written anew at every step, so that a start
//! that was cut off can be taken away.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use kiln_tests::process::{Cmd, Proc, signal_to, tail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::layout::Layout;

/// A different one after every start of the machine: pids mean nothing across it.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// The state.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct State {
    boot: String,
    /// Whether it has come up as a whole.
    pub(super) is_complete: bool,
    /// The host's end of the pair of links.
    pub(super) link: Option<String>,
    /// What these files in /proc/sys held before.
    pub(super) sysctls: BTreeMap<String, String>,
    /// Directories outside of the cluster's that were not there before.
    pub(super) new_dirs: Vec<PathBuf>,
    /// What was started.
    pub(super) processes: Vec<Process>,
}

/// A program of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The program's name.
    pub name: String,
    /// Its pid.
    pub pid: u32,
    /// When it was started, in ticks: another process may get its pid later.
    started: Option<u64>,
}

impl Process {
    /// Whether it runs.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.started.is_some() && Proc::find(self.pid).and_then(|p| p.started()) == self.started
    }

    /// The command that it was started by: its arguments and its environment (proc(5)).
    pub(super) fn command(&self) -> Result<Cmd> {
        let strings = |file: &str| -> Result<Vec<String>> {
            let path = format!("/proc/{}/{file}", self.pid);
            let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
            Ok(text.split_terminator('\0').map(str::to_owned).collect())
        };
        let words = strings("cmdline")?;
        let (program, args) = words.split_first().context("a process without a command")?;
        let mut command = Cmd::new(Path::new(program)).args(args);
        for variable in strings("environ")? {
            if let Some((key, value)) = variable.split_once('=') {
                command = command.env(key, value);
            }
        }
        Ok(command)
    }
}

impl State {
    /// That of a cluster of which nothing is there yet.
    pub(super) fn new(layout: &Layout) -> Result<Self> {
        let state = Self {
            boot: boot(),
            ..Self::default()
        };
        state.save(layout)?;
        Ok(state)
    }

    /// What was saved; that of a cluster of which nothing runs when there is nothing, or when the
    /// machine was started anew since.
    pub(super) fn load(layout: &Layout) -> Self {
        let saved = fs::read(layout.state()).ok();
        let state: Option<Self> = saved.and_then(|text| serde_json::from_slice(&text).ok());
        state.filter(|s| s.boot == boot()).unwrap_or_default()
    }

    pub(super) fn save(&self, layout: &Layout) -> Result<()> {
        let (path, new) = (layout.state(), layout.at("state.json.new"));
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("write {}", path.display()))
    }

    pub(super) fn add(&mut self, name: &str, pid: u32) {
        let started = Proc::find(pid).and_then(|p| p.started());
        self.processes.push(Process {
            name: name.to_owned(),
            pid,
            started,
        });
    }

    /// Takes one out that is to be started anew.
    pub(super) fn take(&mut self, name: &str) -> Option<Process> {
        let place = self.processes.iter().position(|p| p.name == name)?;
        Some(self.processes.remove(place))
    }

    /// Moves this process to where one of these is.
    pub(super) fn join(&self, name: &str) -> Result<()> {
        let process = self.processes.iter().find(|p| p.name == name);
        let pid = process.with_context(|| format!("no {name}"))?.pid;
        join_all(&fs::read_to_string(format!("/proc/{pid}/cgroup"))?)
    }

    /// Fails when one has ended, with the end of its log.
    pub(super) fn expect_running(&self, layout: &Layout) -> Result<()> {
        match self.processes.iter().find(|p| !p.is_running()) {
            Some(dead) => bail!(
                "{} has ended:\n{}",
                dead.name,
                end_of(&layout.log(&dead.name))
            ),
            None => Ok(()),
        }
    }

    /// Kills all, the last first, so that none sees to what another has lost.
    pub(super) fn kill(&self) -> Result<()> {
        for process in self.processes.iter().rev().filter(|p| p.is_running()) {
            signal_to(process.pid, Signal::SIGKILL)?;
        }
        Ok(())
    }
}

/// Moves this process where another is, in every hierarchy, by the other's `/proc/PID/cgroup`.
fn join_all(cgroups: &str) -> Result<()> {
    let mount = Path::new("/sys/fs/cgroup");
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            bail!("{line:?} names no cgroup");
        };
        let hierarchy = match controllers {
            "" if mount.join("unified").exists() => "unified",
            controllers => controllers.trim_start_matches("name="),
        };
        let dir = mount.join(hierarchy).join(path.trim_start_matches('/'));
        let procs = dir.join("cgroup.procs");
        // A hierarchy that is mounted nowhere holds nobody back.
        if procs.exists() {
            fs::write(&procs, "0").with_context(|| format!("join {}", dir.display()))?;
        }
    }
    Ok(())
}

fn boot() -> String {
    fs::read_to_string(BOOT).unwrap_or_default()
}

/// The last lines of a log.
fn end_of(log: &Path) -> String {
    let text = tail(log);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_that_another_process_has_got_is_not_ours() {
        let mut state = State::default();
        state.add("this test", std::process::id());
        assert!(state.processes[0].is_running());
        state.processes[0].started = state.processes[0].started.map(|t| t + 1);
        assert!(!state.processes[0].is_running());
    }

    #[test]
    fn nothing_runs_of_before_a_reboot() {
        let dir = Path::new("/tmp").join(format!("kiln-state-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let layout = Layout::new(&dir, "c");
        let mut state = State::new(&layout).unwrap();
        state.add("this test", std::process::id());
        state.save(&layout).unwrap();
        assert_eq!(State::load(&layout).processes, state.processes);
        state.boot = "an earlier one".to_owned();
        state.save(&layout).unwrap();
        assert_eq!(State::load(&layout).processes, []);
        fs::remove_dir_all(&dir).unwrap();
    }
}
