// SPDX-License-Identifier: Apache-2.0

//! Commands of the demo: each is shown, run, shown with what it printed, and timed.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use kiln_tests::{node::Node, process::Output};
use serde_json::Value;

use crate::{
    manifest::{self, Container},
    screen::Screen,
};

/// Digits of an id that `crictl` shows, and understands where they are unique.
const ID_DIGITS: usize = 13;

/// A person at a node, as it were.
#[derive(Debug)]
pub(crate) struct Session<'a> {
    pub(crate) screen: &'a mut Screen,
    pub(crate) node: &'a Node,
    /// Where the commands are run, and the files are that they name.
    dir: PathBuf,
    timings: Vec<(String, Duration)>,
}

/// A Pod with one container.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    /// The first digits of the sandbox's id.
    pub(crate) pod: String,
    /// The first digits of the container's id.
    pub(crate) container: String,
}

impl<'a> Session<'a> {
    pub(crate) fn new(screen: &'a mut Screen, node: &'a Node) -> Result<Self> {
        let dir = node.dir().join("demo");
        fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        Ok(Self {
            screen,
            node,
            dir,
            timings: Vec::new(),
        })
    }

    /// Shows how long something took, and keeps it for the end.
    pub(crate) fn time(&mut self, what: &str, took: Duration) -> Result<()> {
        self.timings.push((what.to_owned(), took));
        self.screen.took(took)
    }

    /// What took how long.
    pub(crate) fn end(self) -> Vec<(String, Duration)> {
        self.timings
    }

    /// The directory in which commands are run.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a file for commands to name.
    pub(crate) fn file(&self, name: &str, content: &Value) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, format!("{content:#}\n"))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Runs `crictl`, which must succeed. Returns what it printed.
    pub(crate) async fn crictl(&mut self, words: &[&str]) -> Result<String> {
        self.timed_crictl(None, words).await
    }

    /// The same, with its time kept for the end as that of `what`.
    pub(crate) async fn timed_crictl(
        &mut self,
        what: Option<&str>,
        words: &[&str],
    ) -> Result<String> {
        let (output, took) = self.run(words).await?;
        self.screen.output(&output.text())?;
        if !output.status.success() {
            bail!("crictl {}: {}", words.join(" "), output.errors().trim_end());
        }
        match what {
            Some(what) => self.time(what, took)?,
            None => self.screen.took(took)?,
        }
        Ok(output.text())
    }

    /// Runs `crictl`, which must fail, and shows why it does. Returns its words.
    pub(crate) async fn failing_crictl(&mut self, words: &[&str]) -> Result<String> {
        let (output, took) = self.run(words).await?;
        let printed = output.text() + &output.errors();
        let printed: Vec<_> = printed.lines().map(without_time).collect();
        let printed = printed.join("\n");
        self.screen.output(&printed)?;
        self.screen.took(took)?;
        ensure!(
            !output.status.success(),
            "crictl {}: succeeded, and should not",
            words.join(" ")
        );
        Ok(printed)
    }

    async fn run(&mut self, words: &[&str]) -> Result<(Output, Duration)> {
        self.screen.command(&command_line(words))?;
        let start = Instant::now();
        let (output, _) = self
            .screen
            .waiting("running", self.node.crictl(words).dir(&self.dir).output())
            .await;
        Ok((output?, start.elapsed()))
    }

    /// Runs a Pod with one container, step by step.
    pub(crate) async fn start_pod(
        &mut self,
        name: &str,
        handler: &str,
        container: &Container,
    ) -> Result<Running> {
        let pod = manifest::pod(self.node, name);
        let logs = pod["log_directory"]
            .as_str()
            .context("a Pod without logs")?;
        fs::create_dir_all(logs).with_context(|| format!("make {logs}"))?;
        let (pod_file, container_file) =
            (format!("{name}.json"), format!("{}.json", container.name));
        self.file(&pod_file, &pod)?;
        self.file(&container_file, &manifest::container(name, container))?;

        let what = |step: &str| format!("{name}: {step}");
        let pod = self
            .timed_crictl(
                Some(&what("runp")),
                &["runp", "--runtime", handler, &pod_file],
            )
            .await?;
        let pod = short(&pod)?;
        let created = self
            .timed_crictl(
                Some(&what("create")),
                &["create", &pod, &container_file, &pod_file],
            )
            .await?;
        let container = short(&created)?;
        self.timed_crictl(Some(&what("start")), &["start", &container])
            .await?;
        Ok(Running { pod, container })
    }
}

/// The first digits of the id that a command printed.
fn short(printed: &str) -> Result<String> {
    let id = printed.trim().get(..ID_DIGITS);
    id.map(str::to_owned)
        .with_context(|| format!("crictl printed {printed:?} instead of an id"))
}

/// A line of crictl's log without its time: the rest says enough.
fn without_time(line: &str) -> &str {
    match line
        .strip_prefix("time=\"")
        .and_then(|rest| rest.split_once("\" "))
    {
        Some((_, rest)) => rest,
        None => line,
    }
}

/// `crictl` with arguments as one would type them in a shell.
fn command_line(words: &[&str]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@".contains(c);
    let quoted = words.iter().map(|word| match word {
        word if !word.is_empty() && word.chars().all(plain) => (*word).to_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    });
    ["crictl".to_owned()]
        .into_iter()
        .chain(quoted)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_with_special_characters_are_quoted() {
        assert_eq!(
            command_line(&["exec", "abc", "uname", "-a"]),
            "crictl exec abc uname -a"
        );
        assert_eq!(
            command_line(&["sh", "-c", "echo 'a'; b"]),
            r"crictl sh -c 'echo '\''a'\''; b'"
        );
        assert_eq!(command_line(&[""]), "crictl ''");
    }

    #[test]
    fn only_lines_of_the_log_lose_their_time() {
        assert_eq!(
            without_time("time=\"2026-11-23T17:03:42Z\" level=fatal msg=\"x\""),
            "level=fatal msg=\"x\""
        );
        assert_eq!(without_time("time=\"late"), "time=\"late");
        assert_eq!(without_time("cat: no"), "cat: no");
    }

    #[test]
    fn an_id_is_shortened_and_anything_else_refused() {
        assert_eq!(short("0123456789abcdef\n").unwrap(), "0123456789abc");
        short("none\n").unwrap_err();
    }
}
