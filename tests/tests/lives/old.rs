// SPDX-License-Identifier: Apache-2.0

//! How containerds other than the newest start a shim and speak to it, and what the binary
//! prints.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{
    api::{self, StateResponse},
    protobuf::Message,
    ttrpc::{Code, Request},
    types::introspection::RuntimeInfo,
};
use kiln_tests::{
    mini::{Config, Mini, NAMESPACE, Runtime, bundle::Bundle, options_message},
    process::{Cmd, Output},
};
use serde_json::json;

use crate::{end, gone};

/// A containerd that does nothing but tell its version.
fn containerd(mini: &Mini, words: &str) -> Result<PathBuf> {
    let path = mini.dir().join(format!("containerd-{}", words.len()));
    fs::write(&path, format!("#!/bin/sh\necho '{words}'\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// `start` as containerd before 2.3 runs it: with the handler's options on standard input.
async fn start(
    mini: &Mini,
    bundle: &Bundle,
    version: &str,
    config: &std::path::Path,
) -> Result<Output> {
    let containerd = containerd(mini, version)?;
    let options = options_message(config).write_to_bytes()?;
    let output = mini
        .command_of(&containerd, bundle, "start")
        .input(&options)
        .output()
        .await?;
    ensure!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    Ok(output)
}

/// Lives through a whole life by the service name of old.
async fn live(mini: &Mini, bundle: Bundle, address: &str, config: &std::path::Path) -> Result<()> {
    let shim = mini.connect(&bundle, address, config).await?;
    let output = shim.run(&bundle).await?;
    output.stdout.read_until("here\n").await?;
    let state = task_v2(
        &shim,
        "State",
        &api::StateRequest {
            id: bundle.id().to_owned(),
            ..api::StateRequest::default()
        },
    )
    .await?;
    let state = StateResponse::parse_from_bytes(&state)?;
    ensure!(
        state.status.enum_value() == Ok(api::Status::RUNNING),
        "{state}"
    );
    end(mini, &shim, bundle).await
}

/// A call of `containerd.task.v2.Task`.
async fn task_v2(
    shim: &kiln_tests::mini::Shim,
    method: &str,
    message: &impl Message,
) -> Result<Vec<u8>> {
    let request = Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: method.to_owned(),
        payload: message.write_to_bytes()?,
        timeout_nano: 60_000_000_000,
        ..Request::default()
    };
    Ok(shim.client().request(request).await?.payload)
}

pub(crate) async fn containerd_1_7_gets_an_address(mini: &Mini) -> Result<()> {
    let config = mini.config(Runtime::Runsc, &Config::default())?;
    let bundle = mini
        .bundle("seventeen")
        .sandbox()
        .script("echo here; sleep 3600")
        .write()?;
    let version = "containerd github.com/containerd/containerd v1.7.28 b98a3aace656320842a23f4a392a33f46af97866";
    let output = start(mini, &bundle, version, &config).await?;
    let address = output.text();
    ensure!(
        address.starts_with("unix:///") && address.ends_with(|c: char| c.is_ascii_alphanumeric()),
        "{address:?}"
    );
    ensure!(fs::read_to_string(bundle.dir().join("address"))? == address);

    // A second container of the Pod is sent to the same shim.
    let member = mini
        .bundle("seventeen-c")
        .member_of("seventeen")
        .script("echo here")
        .write()?;
    let shim = mini.connect(&bundle, &address, &config).await?;
    shim.run(&bundle).await?;
    ensure!(start(mini, &member, version, &config).await?.text() == address);
    ensure!(mini.shims_of("seventeen-c").is_empty());
    let output = shim.run(&member).await?;
    output.stdout.read_until("here\n").await?;
    shim.end(member.id()).await?;
    gone(mini, member).await?;
    let state = task_v2(
        &shim,
        "State",
        &api::StateRequest {
            id: "seventeen".to_owned(),
            ..api::StateRequest::default()
        },
    )
    .await?;
    ensure!(
        StateResponse::parse_from_bytes(&state)?.status.enum_value() == Ok(api::Status::RUNNING)
    );
    end(mini, &shim, bundle).await
}

pub(crate) async fn containerd_2_1_gets_json(mini: &Mini) -> Result<()> {
    let config = mini.config(Runtime::Runsc, &Config::default())?;
    let bundle = mini
        .bundle("twentyone")
        .sandbox()
        .script("echo here; sleep 3600")
        .write()?;
    let output = start(
        mini,
        &bundle,
        "containerd github.com/containerd/containerd/v2 v2.1.9 abc",
        &config,
    )
    .await?;
    let reply: serde_json::Value =
        serde_json::from_slice(&output.stdout).with_context(|| output.text())?;
    let address = reply["address"].as_str().context("no address")?.to_owned();
    ensure!(
        reply == json!({"version": 3, "address": address, "protocol": "ttrpc"}),
        "{reply}"
    );
    live(mini, bundle, &address, &config).await
}

pub(crate) async fn task_v2_answers_too(mini: &Mini) -> Result<()> {
    let config = mini.config(Runtime::Runsc, &Config::default())?;
    let bundle = mini
        .bundle("second")
        .sandbox()
        .script("echo here; sleep 3600")
        .write()?;
    let shim = mini.shim(&bundle, &config).await?;
    let create = api::CreateTaskRequest {
        stdout: String::new(),
        ..shim.create_request(&bundle)
    };
    task_v2(&shim, "Create", &create).await?;
    task_v2(
        &shim,
        "Start",
        &api::StartRequest {
            id: "second".to_owned(),
            ..api::StartRequest::default()
        },
    )
    .await?;
    let unknown = Request {
        service: "containerd.task.v2.Task".to_owned(),
        method: "Fly".to_owned(),
        ..Request::default()
    };
    let refused = kiln_tests::mini::code(shim.client().request(unknown).await)?;
    ensure!(
        matches!(
            refused,
            Some(Code::NOT_FOUND | Code::UNIMPLEMENTED | Code::INVALID_ARGUMENT)
        ),
        "{refused:?}"
    );
    end(mini, &shim, bundle).await
}

pub(crate) async fn info_tells_the_runtime(mini: &Mini) -> Result<()> {
    for (name, runtime) in Runtime::ALL {
        let options = options_message(&mini.config(runtime, &Config::default())?);
        let info = Cmd::new(mini.binary())
            .args(["-info"])
            .input(&options.write_to_bytes()?)
            .output()
            .await?;
        ensure!(
            info.status.success() && info.stderr.is_empty(),
            "{name}: {info:?}"
        );
        let info = RuntimeInfo::parse_from_bytes(&info.stdout)?;
        ensure!(
            info.name == "io.containerd.kiln.v2" && !info.version.version.is_empty(),
            "{name}: {info}"
        );
        let features: serde_json::Value = serde_json::from_slice(&info.features.value)?;
        ensure!(features["ociVersionMin"].is_string(), "{name}: {features}");
        // Else a kubelet would send Pods with user namespaces, which are refused.
        ensure!(
            features["linux"]["mountExtensions"].is_null(),
            "{name}: {features}"
        );
    }
    let version = Cmd::new(mini.binary()).args(["-v"]).run().await?;
    ensure!(version.contains("containerd-shim-kiln-v2"), "{version}");
    Ok(())
}

pub(crate) async fn a_failed_start_says_why_and_leaves_nothing(mini: &Mini) -> Result<()> {
    let bundle = mini.bundle("fails").sandbox().write()?;
    fs::remove_file(bundle.dir().join("config.json"))?;
    let params = mini.bootstrap(&bundle, None).write_to_bytes()?;
    let failed = mini
        .command(&bundle, "start")
        .input(&params)
        .output()
        .await?;
    ensure!(
        !failed.status.success() && failed.errors().contains("config.json"),
        "{failed:?}"
    );
    ensure!(mini.shims_of("fails").is_empty());

    // A message for another container than the command line names.
    let other = mini.bundle("other").sandbox().write()?;
    let params = mini.bootstrap(&other, None).write_to_bytes()?;
    let failed = mini
        .command(&bundle, "start")
        .input(&params)
        .output()
        .await?;
    ensure!(
        !failed.status.success() && failed.errors().contains(&format!("{NAMESPACE}/other")),
        "{failed:?}"
    );
    gone(mini, other).await?;
    gone(mini, bundle).await
}
