// SPDX-License-Identifier: Apache-2.0

//! What `kiln-probe` reports of its attempts inside a sandbox.

use anyhow::{Context, Result, bail, ensure};
use kiln_tests::{
    pod::{Container, ContainerBuilder, Pod},
    tools,
    wait::{self, SOON},
};
use serde::Deserialize;

/// How an attempt went.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Attempt {
    attempt: String,
    args: Vec<String>,
    /// Whether it succeeded.
    pub(crate) done: bool,
    /// The name of the kernel's error.
    pub(crate) error: String,
    /// What was seen.
    pub(crate) found: String,
}

impl Attempt {
    /// Fails when the attempt succeeded.
    pub(crate) fn fails(&self) -> Result<()> {
        ensure!(!self.done, "this must not succeed: {self:?}");
        Ok(())
    }

    /// Fails unless the kernel gave one of these errors.
    pub(crate) fn fails_with(&self, errors: &[&str]) -> Result<()> {
        self.fails()?;
        ensure!(
            errors.contains(&self.error.as_str()),
            "not refused by {errors:?}: {self:?}"
        );
        Ok(())
    }

    /// What was found by an attempt that succeeded.
    pub(crate) fn finds(&self) -> Result<&str> {
        ensure!(self.done, "this must succeed: {self:?}");
        Ok(&self.found)
    }

    /// The attempt as it was asked for.
    fn words(&self) -> String {
        [std::slice::from_ref(&self.attempt), self.args.as_slice()]
            .concat()
            .join(" ")
    }
}

/// Where the probe is in a container.
pub(crate) const PROBE: &str = "/probe";

/// Adds the probe to a container.
pub(crate) fn with_probe<'p, 'n>(
    container: ContainerBuilder<'p, 'n>,
) -> Result<ContainerBuilder<'p, 'n>> {
    Ok(container.mount_read_only(&tools::probe()?, PROBE))
}

/// A container in which the probe can be run.
pub(crate) async fn attacker<'p, 'n>(pod: &'p Pod<'n>) -> Result<Container<'p, 'n>> {
    with_probe(pod.idle())?.start().await
}

/// Makes attempts, each as words of a command line, in one process in `container`.
pub(crate) async fn try_all<A: AsRef<str>>(
    container: &Container<'_, '_>,
    attempts: &[A],
) -> Result<Vec<Attempt>> {
    let mut command = vec![PROBE.to_owned()];
    for (n, attempt) in attempts.iter().enumerate() {
        if n > 0 {
            command.push("--".to_owned());
        }
        command.extend(attempt.as_ref().split(' ').map(str::to_owned));
    }
    let ran = container.exec(&command).await?;
    if ran.code != 0 {
        bail!("the probe has ended with {}: {ran:?}", ran.code);
    }
    let made = reports(&ran.stdout)?;
    ensure!(
        made.len() == attempts.len(),
        "{} of {} attempts were made",
        made.len(),
        attempts.len()
    );
    for (report, asked) in made.iter().zip(attempts) {
        ensure!(report.words() == asked.as_ref(), "{report:?}");
    }
    Ok(made)
}

/// Makes one attempt.
pub(crate) async fn attempt(container: &Container<'_, '_>, words: &str) -> Result<Attempt> {
    let made = try_all(container, &[words]).await?;
    made.into_iter().next().context("no attempt was made")
}

/// The report of the one attempt that is a container's process. containerd logs it in its own time,
/// which may be after the container's end.
pub(crate) async fn reported(container: &Container<'_, '_>) -> Result<Attempt> {
    container.ended().await?;
    let made = wait::until("the probe's report", SOON, async || {
        reports(&container.log())
            .ok()
            .filter(|made| !made.is_empty())
    });
    let made = made
        .await
        .with_context(|| format!("log: {:?}", container.log()))?;
    ensure!(made.len() == 1, "{made:?}");
    made.into_iter().next().context("no report")
}

/// The reports in what a probe has printed.
fn reports(text: &str) -> Result<Vec<Attempt>> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).with_context(|| format!("read {line:?}")))
        .collect()
}
