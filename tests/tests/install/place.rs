// SPDX-License-Identifier: Apache-2.0

//! What is installed on a node of the suite, and how it is told.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use kiln_tests::{
    node::Node,
    process::{Cmd, Output},
    tools,
};
use nix::sys::signal::Signal;

/// The handler that is installed.
pub(crate) const HANDLER: &str = "installed";

/// Directories that the node makes for its first Pod, whatever its handler.
pub(crate) const NODES_OWN: [&str; 2] = ["cni-data", "logs"];

/// How long an installation may take.
pub(crate) const DEADLINE: Duration = Duration::from_secs(300);

/// What is installed on a node, and how.
pub(crate) struct Installation<'a> {
    pub(crate) node: &'a Node,
    pub(crate) dir: PathBuf,
}

impl<'a> Installation<'a> {
    pub(crate) fn new(node: &'a Node, case: &str) -> Result<Self> {
        let dir = node.dir().join(case);
        fs::create_dir_all(dir.join("from"))?;
        let this = Self { node, dir };
        for (name, program) in [
            ("containerd-shim-kiln-v2", tools::shim()?),
            ("kiln-pause", tools::pause()?),
            ("runsc", tools::runsc()?),
        ] {
            symlink(program, this.from(name))?;
        }
        this.configure("")?;
        // containerd is started anew by who started it, the test.
        let wish = this.wish();
        let wait = format!(
            "#!/bin/sh\ntouch {0}\nwhile [ -e {0} ]; do sleep 0.1; done\n",
            wish.display()
        );
        this.script("restart", &wait)?;
        Ok(this)
    }

    pub(crate) fn from(&self, name: &str) -> PathBuf {
        self.dir.join("from").join(name)
    }

    /// There while somebody wants containerd to be started anew.
    pub(crate) fn wish(&self) -> PathBuf {
        self.dir.join("wish")
    }

    pub(crate) fn script(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        fs::remove_file(&path).ok();
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(path)
    }

    /// Writes the installer's configuration. `more` is more of its table.
    pub(crate) fn configure(&self, more: &str) -> Result<()> {
        let at = |name: &str| self.dir.join(name).display().to_string();
        let text = format!(
            "runtime_config = \"{}\"\nsocket = \"{}\"\nstate = \"{}\"\n\
             [install]\ndir = \"{}\"\nruntime_root = \"{}\"\nhandler = \"{HANDLER}\"\n{more}\n\
             [install.containerd]\nsocket = \"{}\"\nrestart = [\"{}\"]\nctr = \"{}\"\n",
            at("etc/runsc.toml"),
            at("no-agent.sock"),
            at("no-agent"),
            at("opt"),
            self.node.dir().join("ri").display(),
            self.node.dir().join("c.sock").display(),
            at("restart"),
            tools::program("ctr")?.display(),
        );
        Ok(fs::write(self.dir.join("agent.toml"), text)?)
    }

    pub(crate) fn containerd_config(&self) -> PathBuf {
        self.node.dir().join("containerd.toml")
    }

    /// Runs `kilnctl node`, and starts containerd anew when it is asked to.
    pub(crate) async fn kilnctl(&self, words: &str) -> Result<Output> {
        let config = self.dir.join("agent.toml");
        let mut command = Cmd::new(&tools::ours("kilnctl")?)
            .args(["node"].into_iter().chain(words.split(' ')))
            .args([Path::new("--config"), &config])
            .deadline(DEADLINE);
        if words.starts_with("enable") {
            command = command.args(["--from".as_ref(), self.dir.join("from").as_os_str()]);
        }
        self.with_restarts(command.output()).await
    }

    /// Does something during which containerd is started anew whenever that is asked for.
    pub(crate) async fn with_restarts<T>(
        &self,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let restarts = async {
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                if self.wish().exists() {
                    self.node.restart_containerd(Signal::SIGTERM).await?;
                    fs::remove_file(self.wish())?;
                }
            }
        };
        tokio::select! {
            done = work => done,
            failed = restarts => failed,
        }
    }

    pub(crate) async fn does(&self, verb: &str) -> Result<String> {
        let output = self.kilnctl(verb).await?;
        let said = format!("{}{}", output.text(), output.errors());
        ensure!(output.status.success(), "{verb}: {said}");
        Ok(said)
    }

    pub(crate) async fn fails(&self, verb: &str, words: &[&str]) -> Result<String> {
        let output = self.kilnctl(verb).await?;
        let said = output.errors();
        ensure!(output.code() == 1, "{verb}: {}{said}", output.text());
        for word in words {
            ensure!(said.contains(word), "no {word:?} in {said}");
        }
        Ok(said)
    }

    /// Every file that an installation might touch, with what is in it.
    pub(crate) fn listing(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut dirs = vec![self.dir.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir)? {
                let path = entry?.path();
                let text = match path.is_file() {
                    true => fs::read(&path)?,
                    false => Vec::new(),
                };
                if path.is_dir() {
                    dirs.push(path.clone());
                }
                found.insert(path, text);
            }
        }
        for entry in fs::read_dir(self.node.dir())? {
            let path = entry?.path();
            let is_config = path.to_string_lossy().contains("toml");
            // What Pods of any handler leave, such as logs, is the node's.
            if is_config {
                found.insert(path.clone(), fs::read(&path)?);
            } else if !NODES_OWN.iter().any(|own| path.ends_with(own)) {
                found.entry(path).or_default();
            }
        }
        Ok(found)
    }

    pub(crate) fn expect_as(&self, before: &BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
        let now = self.listing()?;
        let differs = |path: &&PathBuf| before.get(*path) != now.get(*path);
        let all: Vec<_> = before.keys().chain(now.keys()).filter(differs).collect();
        ensure!(all.is_empty(), "not as before: {all:?}");
        Ok(())
    }

    pub(crate) async fn expect_no_handler(&self) -> Result<()> {
        match self.node.pod(HANDLER).run().await {
            Ok(pod) => {
                pod.remove().await?;
                bail!("a Pod of a handler that should be gone runs")
            }
            Err(e) => {
                let words = format!("{e:#}");
                ensure!(words.contains("no runtime for"), "{words}");
                Ok(())
            }
        }
    }

    /// Runs a Pod by the handler.
    pub(crate) async fn expect_handler(&self) -> Result<()> {
        let pod = self.node.pod(HANDLER).run().await?;
        let container = pod.idle().start().await?;
        let kernel = container.sh("uname -r").await?;
        ensure!(kiln_tests::is_gvisors(&kernel), "{kernel}");
        pod.remove().await
    }
}
