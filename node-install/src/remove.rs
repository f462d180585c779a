// SPDX-License-Identifier: Apache-2.0

//! Takes away what was installed, once no Pod needs it.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};

use super::{
    Done, Error, Run, SHIM,
    containerd::Containerd,
    files::{Changes, Wired},
    installation, is_installed, lock,
    wire::{Own, dump_of, target},
};
use kiln_host::fs::remove_dir_if_there;

use crate::{config::Config, exec_dir};

/// Where a runsc of the summer of 2026 or newer keeps the empty network namespace of its gofers
/// (gVisor `runsc/specutils/namespace.go`, `NullNetNSFilename`).
const GOFERS_NETNS: &str = "null-netns";

/// Takes it away, unless Pods run by it: without their handler, containerd would no more exec in
/// them or start their containers anew. Then nothing is changed, and their number is returned.
///
/// # Errors
/// When something cannot be taken away. What was, is noted, and a further run goes on from there.
pub async fn uninstall(config: &Config) -> Result<Done, Error> {
    let install = installation(config)?;
    if !is_installed(config)? {
        remove_empty(config, install)?;
        return Ok(Done {
            words: "nothing was installed".to_owned(),
            ..Done::default()
        });
    }
    let _lock = lock(install)?;
    let mut changes = Changes::begin(&install.dir)?;
    let in_use = users(&install.program(SHIM)).len();
    if in_use > 0 {
        return Ok(Done {
            in_use,
            words: format!("{in_use} Pods run by what is installed, which stays until they end"),
            ..Done::default()
        });
    }
    let wired = changes.record.wired.clone();
    let restarted = wired.is_some();
    if let Some(wired) = wired {
        unwire(&mut changes, install, &wired).await?;
    }
    changes.finish_removal()?;
    remove_empty(config, install)?;
    Ok(Done {
        changed: true,
        restarted,
        in_use,
        words: "nothing of it is left".to_owned(),
    })
}

/// Removes directories that a kubelet makes for an agent, and a runtime for its state, unless
/// others have something in one; and what an agent has left: one that still runs holds nothing any
/// more.
fn remove_empty(config: &Config, install: &super::Install) -> Result<(), Error> {
    let states = fs::read_dir(&install.runtime_root).into_iter().flatten();
    for namespace in states.flatten() {
        remove_state(&namespace.path());
    }
    let of_config = config.runtime_config.parent();
    let dirs = [
        Some(install.dir.as_path()),
        of_config,
        Some(&install.runtime_root),
    ];
    for dir in dirs.into_iter().flatten() {
        fs::remove_dir(dir).ok();
    }
    let exec_dir = exec_dir::of(&config.state);
    exec_dir::unmount(&config.state).map_err(Error::at("unmount", &exec_dir))?;
    remove_dir_if_there(&config.state).map_err(Error::at("remove", &config.state))
}

/// Removes the runtime's state of one namespace of containerd, where no container is left of it.
fn remove_state(dir: &Path) {
    let names = || fs::read_dir(dir).into_iter().flatten().flatten();
    if names().all(|entry| entry.file_name() == GOFERS_NETNS) {
        let netns = dir.join(GOFERS_NETNS);
        // Several lie on each other where sandboxes have started at the same time.
        while umount2(&netns, MntFlags::MNT_DETACH).is_ok() {}
        fs::remove_file(netns).ok();
    }
    fs::remove_dir(dir).ok();
}

/// Takes the handler out of containerd's files, and starts it anew without.
async fn unwire(
    changes: &mut Changes,
    install: &super::Install,
    wired: &Wired,
) -> Result<(), Error> {
    let containerd = Containerd::find(&install.containerd).await?;
    let own = Own::read(&wired.config, containerd.version.0)?;
    let mode = own.mode;
    let names = own.names(&wired.drop_in);
    let without = own.without(&wired.drop_in);
    // A file that somebody has broken since must not end containerd now.
    if wired.config.exists() {
        dump_of(&containerd, &wired.config, &without).await?;
    }
    changes.record.restart_is_due = true;
    changes.save()?;
    // One that names our file and is not known to be ours is left from a record that was lost.
    let target = target(&wired.config);
    let is_lost = names && !changes.record.files.contains_key(&target);
    let is_as_before = is_lost && changes.put_back(&target, &without)?;
    if !is_as_before {
        if is_lost || changes.was_edited(&target)? {
            changes.leave(&target, mode, &without)?;
        } else {
            changes.take_away(&target)?;
        }
    }
    changes.take_away(&wired.drop_in)?;
    containerd.restart().await?;
    changes.record.restart_is_due = false;
    changes.record.wired = None;
    changes.save()
}

/// The processes that run `program`, or ran it when it was replaced. Blocks.
pub(super) fn users(program: &Path) -> Vec<u32> {
    let file = fs::metadata(program).ok().map(|m| (m.dev(), m.ino()));
    let replaced = PathBuf::from(format!("{} (deleted)", program.display()));
    let runs_it = |pid: &u32| {
        let exe = PathBuf::from(format!("/proc/{pid}/exe"));
        let same = fs::metadata(&exe).is_ok_and(|m| Some((m.dev(), m.ino())) == file);
        same || fs::read_link(&exe).is_ok_and(|link| link == program || link == replaced)
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
    pids.filter(runs_it).collect()
}

impl Run<'_> {
    /// Takes earlier runtimes away of which no sandbox runs.
    pub(super) fn remove_old_runtimes(&mut self, current: &Path) -> Result<(), Error> {
        let is_old = |path: &&PathBuf| path.as_path() != current && self.is_own_runsc(path);
        let files = self.changes.record.files.keys();
        let old: Vec<_> = files.filter(is_old).cloned().collect();
        for path in old {
            if users(&path).is_empty() {
                self.changes.take_away(&path)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::{super::Install, *};
    use crate::exec_dir::tests::on_a_tmpfs;

    #[test]
    #[ignore = "needs root"]
    fn what_an_agent_has_mounted_for_its_sandboxes_goes_too() {
        on_a_tmpfs(MsFlags::MS_NOEXEC, |dir| {
            let state = dir.join("agent");
            exec_dir::prepare(&state).unwrap();
            fs::write(exec_dir::of(&state).join("rootfs.erofs"), "").unwrap();
            let install = Install {
                dir: dir.join("kiln"),
                runtime_root: dir.join("runsc"),
                ..Install::default()
            };
            let config = Config {
                state,
                runtime_config: dir.join("runsc.toml"),
                ..Config::default()
            };
            remove_empty(&config, &install).unwrap();
            assert!(!config.state.exists());
        });
    }

    #[test]
    #[ignore = "needs root"]
    fn the_network_of_gofers_goes_with_the_last_container() {
        on_a_tmpfs(MsFlags::empty(), |dir| {
            let state = dir.join("k8s.io");
            fs::create_dir_all(&state).unwrap();
            let (netns, container) = (state.join(GOFERS_NETNS), state.join("a.state"));
            for file in [&netns, &container] {
                fs::write(file, "").unwrap();
            }
            let own = Some("/proc/self/ns/net");
            for _ in 0..2 {
                mount(own, &netns, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
            }
            remove_state(&state);
            assert!(netns.exists() && container.exists());
            fs::remove_file(container).unwrap();
            remove_state(&state);
            assert!(!state.exists());
        });
    }

    #[test]
    fn who_runs_a_program_is_seen_also_when_it_was_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = std::process::Command::new(&program)
            .arg("60")
            .spawn()
            .unwrap();
        assert_eq!(users(&program), [child.id()]);
        fs::copy("/bin/true", dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), &program).unwrap();
        assert_eq!(users(&program), [child.id()]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(users(&program).is_empty());
    }
}
