// SPDX-License-Identifier: Apache-2.0

//! What `kilnctl` does with sandboxes.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use kiln_cluster::system::System;
use kiln_tests::{
    process::{Cmd, Output},
    tools,
};
use serde_json::Value;

use crate::env::{Env, NOTHING_WARM, Namespace, get};

/// What claims are made of.
const POOL: &str = "apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxTemplate
metadata: {name: idle}
spec:
  podTemplate:
    spec:
      runtimeClassName: gvisor
      terminationGracePeriodSeconds: 1
      containers:
      - name: main
        image: busybox:1
        command: [sh, -c, 'echo started; exec sleep 1000000']
        resources: {requests: {cpu: 20m, memory: 16Mi}, limits: {cpu: \"1\", memory: 128Mi}}
---
apiVersion: extensions.agents.x-k8s.io/v1beta1
kind: SandboxWarmPool
metadata: {name: idle}
spec: {replicas: 1, sandboxTemplateRef: {name: idle}}
";

/// `kilnctl` in a namespace.
struct Kilnctl<'a> {
    env: &'a Env,
    ns: &'a Namespace<'a>,
}

impl Kilnctl<'_> {
    fn command(&self, words: &[&str]) -> Result<Cmd> {
        let (command, rest) = words.split_first().context("no words")?;
        Ok(Cmd::new(&tools::ours("kilnctl")?)
            .args([command, "-n", &self.ns.name])
            .args(rest)
            .env("KUBECONFIG", self.env.private.cluster().kubeconfig()))
    }

    /// Runs it with something to read, and returns all of what it does.
    async fn with(&self, words: &[&str], input: &str) -> Result<Output> {
        let command = self.command(words)?.input(input.as_bytes());
        command.output().await
    }

    /// What it prints; fails unless it ends with `code`.
    async fn ends(&self, code: i32, words: &[&str]) -> Result<Output> {
        let output = self.with(words, "").await?;
        ensure!(output.code() == code, "{words:?}: {output:?}");
        Ok(output)
    }

    /// What it prints on success.
    async fn says(&self, words: &[&str]) -> Result<String> {
        Ok(self.ends(0, words).await?.text())
    }
}

pub(crate) async fn a_command_runs_in_a_new_sandbox(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, NOTHING_WARM).await?;
    let ns = &env.namespace().await?;
    let kilnctl = Kilnctl { env, ns };
    let script = "dmesg | grep -o 'Starting gVisor'; echo wrong >&2; exit 7";
    let run = ["run", "busybox:1", "--rm", "--", "sh", "-c", script];
    let failed = kilnctl.ends(7, &run).await?;
    ensure!(failed.text().trim() == "Starting gVisor", "{failed:?}");
    ensure!(failed.errors().contains("wrong"), "{failed:?}");
    let lost = ["run", "busybox:not-there", "--rm", "--timeout", "20s"];
    let lost = kilnctl
        .ends(1, &[&lost[..], &["--", "true"]].concat())
        .await?;
    ensure!(
        lost.errors().contains("container main is waiting: "),
        "{lost:?}"
    );

    ns.apply(POOL).await?;
    ns.until_field("sandboxwarmpool/idle", ".status.readyReplicas", |n| {
        n == "1"
    })
    .await?;
    for from in ["--pool", "--template"] {
        let run = ["run", from, "idle", "--rm", "-i", "--", "wc", "-l"];
        let counted = kilnctl.with(&run, "a\nb\nc\n").await?;
        ensure!(counted.text().trim() == "3", "{from}: {counted:?}");
    }
    let made = ["get", "sandboxclaims", "-o", "name"];
    let left = ns.kubectl(made).await?;
    ensure!(left.is_empty(), "{left}");
    ns.kubectl([
        "delete",
        "--wait",
        "sandboxwarmpool,sandboxtemplate,sandboxes",
        "--all",
    ])
    .await?;
    system.end().await
}

pub(crate) async fn a_claim_is_used_suspended_and_removed(env: &Env) -> Result<()> {
    let system = System::enable(&env.private, NOTHING_WARM).await?;
    let ns = &env.namespace().await?;
    let kilnctl = Kilnctl { env, ns };
    ns.apply(POOL).await?;
    let run = ["run", "--template", "idle", "--name", "mine", "--"];
    let kept = kilnctl.ends(0, &[&run[..], &["true"]].concat()).await?;
    ensure!(kept.errors().contains("kilnctl rm mine"), "{kept:?}");

    let listed = kilnctl.says(&["list"]).await?;
    let line = listed.lines().find(|line| line.contains("mine"));
    let cells: Vec<&str> = line.context(listed.clone())?.split_whitespace().collect();
    ensure!(cells[1..4] == ["mine", "True", "False"], "{listed}");
    let list: Value = serde_json::from_str(&kilnctl.says(&["list", "-o", "json"]).await?)?;
    ensure!(list["items"].to_string().contains("\"mine\""), "{list}");
    ensure!(kilnctl.says(&["logs", "mine"]).await?.contains("started"));

    let said = on_a_terminal(
        &kilnctl,
        "exec -it mine -- sh -c 'test -t 0 && echo is-one'",
    )
    .await?;
    ensure!(said.contains("is-one"), "{said:?}");
    // More than any buffer on the way.
    let words = ["exec", "mine", "--", "sh", "-c", "yes | head -c 3000000"];
    ensure!(kilnctl.says(&words).await?.len() == 3_000_000);
    let words = ["exec", "-i", "mine", "--", "wc", "-c"];
    let counted = kilnctl.with(&words, &"x".repeat(3_000_000)).await?;
    ensure!(counted.text().trim() == "3000000", "{counted:?}");

    let (from, to) = (
        env.private.dir().join("kilnctl-from"),
        env.private.dir().join("kilnctl-to"),
    );
    fs::create_dir(&from)?;
    fs::write(from.join("file"), "x".repeat(3_000_000))?;
    let (from, to) = (from.display().to_string(), to.display().to_string());
    kilnctl.says(&["cp", &from, "mine:/tmp/there"]).await?;
    kilnctl.says(&["cp", "mine:/tmp/there", &to]).await?;
    let back = fs::read_to_string(Path::new(&to).join("file"))?;
    ensure!(back.len() == 3_000_000, "{}", back.len());
    let lost = kilnctl.ends(1, &["cp", "mine:/nothing", &to]).await?;
    ensure!(lost.errors().contains("nothing"), "{lost:?}");

    let script = "mkdir /tmp/www; echo forwarded > /tmp/www/index.html; httpd -p 8080 -h /tmp/www";
    kilnctl
        .says(&["exec", "mine", "--", "sh", "-c", script])
        .await?;
    let log = env.private.dir().join("kilnctl-forward.log");
    let forward = kilnctl.command(&["port-forward", "mine", "0:8080"])?;
    let forward = forward.background(&log)?;
    let said = forward.expect("-> 8080").await?;
    let mut words = said.split_whitespace();
    let address = words.find(|w| w.starts_with("127.0.0.1:"));
    // Twice: the first connection must not be the only one.
    for _ in 0..2 {
        let answer = get(None, address.context("no address")?).await;
        ensure!(answer.with_context(|| forward.text())? == "forwarded");
    }
    drop(forward);

    kilnctl.says(&["suspend", "mine"]).await?;
    let refused = kilnctl.ends(1, &["exec", "mine", "--", "true"]).await?;
    ensure!(refused.errors().contains("is suspended"), "{refused:?}");
    kilnctl.says(&["resume", "mine"]).await?;
    kilnctl.says(&["exec", "mine", "--", "true"]).await?;

    kilnctl.says(&["rm", "mine"]).await?;
    let gone = kilnctl.ends(1, &["logs", "mine"]).await?;
    ensure!(gone.errors().contains("no claim or sandbox"), "{gone:?}");
    ns.kubectl([
        "delete",
        "--wait",
        "sandboxwarmpool,sandboxtemplate,sandboxes",
        "--all",
    ])
    .await?;
    system.end().await
}

/// What it says on a terminal, which `script` makes.
async fn on_a_terminal(kilnctl: &Kilnctl<'_>, words: &str) -> Result<String> {
    let (command, rest) = words.split_once(' ').context("one word")?;
    let program = tools::ours("kilnctl")?.display().to_string();
    let words = format!("{program} {command} -n {} {rest}", kilnctl.ns.name);
    Cmd::new(&tools::program("script")?)
        .args(["-qec", &words, "/dev/null"])
        .env("KUBECONFIG", kilnctl.env.private.cluster().kubeconfig())
        .run()
        .await
}
