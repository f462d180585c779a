// SPDX-License-Identifier: Apache-2.0

//! Our binary under the name of a handler of Kata's, with a stand-in for Kata's shim: what
//! containerd asks for reaches that as it was asked, and what the node lacks is one clear error.

use std::{fs, process::ExitCode};

use anyhow::{Context, Result, ensure};
use kiln_tests::{
    node::{Kata, Node, NodeOpts},
    suite::Cases,
};
use serde_json::Value;

const HANDLER: &str = "kata";

fn main() -> ExitCode {
    let mut cases = Cases::<Node>::new();
    cases.add_alone("a_pod_is_the_other_shims", a_pod_is_the_other_shims);
    cases.add_alone("what_is_missing_is_named", what_is_missing_is_named);
    let opts = || NodeOpts {
        kata: Some(Kata::Standin),
        ..NodeOpts::default()
    };
    cases.run(move || Node::start(opts()))
}

/// How the stand-in was called with `action`, for this Pod if it is given.
fn calls(node: &Node, action: &str, pod: Option<&str>) -> Result<Vec<Value>> {
    let text = fs::read_to_string(node.dir().join("kata/calls"))?;
    let calls: Vec<Value> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let is_it = |call: &Value| {
        let arguments = call["arguments"].as_array();
        let has = |word: &str| arguments.is_some_and(|all| all.iter().any(|a| a == word));
        has(action) && pod.is_none_or(has)
    };
    Ok(calls.into_iter().filter(is_it).collect())
}

async fn a_pod_is_the_other_shims(node: &Node) -> Result<()> {
    // containerd asks every handler what it can do, and tells it its options.
    let asked = calls(node, "-info", None)?;
    let is_ours = |call: &Value| {
        call["input"]
            .as_str()
            .is_some_and(|i| i.contains("kata.toml"))
    };
    ensure!(asked.iter().any(is_ours), "{asked:?}");

    let pod = node.pod(HANDLER).run().await?;
    let id = pod.id().to_owned();
    let container = pod
        .script("echo from $(hostname); sleep 3600")
        .start()
        .await?;
    container
        .logged(&format!("from {}", pod.hostname()))
        .await?;
    let ran = container.exec(["/bin/sh", "-c", "exit 7"]).await?;
    ensure!(ran.code == 7, "{}", ran.code);

    let started = calls(node, "start", Some(&id))?;
    let start = started.first().context("start did not reach it")?;
    ensure!(started.len() == 1, "{started:?}");
    let directory = start["directory"].as_str().unwrap_or_default();
    ensure!(directory.ends_with(&id), "{start}");
    // In the input is the handler's configuration, and without it the Pod would not run.
    let input = start["input"].as_str().unwrap_or_default();
    ensure!(input.contains("kata.toml"), "{start}");
    let socket = start["ttrpc"].as_str().unwrap_or_default();
    ensure!(socket.ends_with("c.sock.ttrpc"), "{start}");
    // The server is the stand-in's, and nothing of ours under Kata's name stays beside it.
    let ours = |p: &kiln_tests::process::Proc| p.argv.contains("containerd-shim-kata");
    let stays: Vec<_> = node.processes().into_iter().filter(ours).collect();
    ensure!(stays.is_empty(), "{stays:?}");

    pod.remove().await?;
    node.expect_gone(&id).await?;
    let deleted = calls(node, "delete", Some(&id))?;
    ensure!(!deleted.is_empty(), "delete did not reach it");
    Ok(())
}

async fn what_is_missing_is_named(node: &Node) -> Result<()> {
    let file = node.dir().join("kata/kata.toml");
    let works = fs::read_to_string(&file)?;
    let started = calls(node, "start", None)?.len();
    fs::write(
        &file,
        "shim = ['/no/shim']\nconfig = ['/no/config']\nkvm = '/no/kvm'\n",
    )?;
    let refused = node.pod(HANDLER).run().await;
    fs::write(&file, works)?;
    let words = format!("{:#}", refused.err().context("it ran")?);
    for name in [
        "this node cannot run Kata: /no/kvm: ",
        "virtualization",
        "Kata's shim is not at /no/shim",
        "Kata's configuration is not at /no/config",
    ] {
        ensure!(words.contains(name), "no {name:?} in {words}");
    }
    ensure!(
        calls(node, "start", None)?.len() == started,
        "it was started"
    );
    // And it works again.
    node.pod(HANDLER).run().await?.remove().await
}
