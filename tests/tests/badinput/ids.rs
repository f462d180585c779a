// SPDX-License-Identifier: Apache-2.0

//! Names that could be paths, flags or worse.

use anyhow::{Result, ensure};
use containerd_shim_protos::{
    api::{self, CreateTaskRequest},
    protobuf::Message,
    ttrpc::Code,
};
use kiln_tests::mini::{Mini, ctx, exec_request};

use crate::{end, refused, running, state_of};

fn bad_ids() -> Vec<String> {
    let fixed = [
        "../x", "..", ".", "a/b", "/etc", "a\0b", "a b", "-rf", "--root=/", "_x", "a\nb", "é",
        "x*", "a%2fb",
    ];
    fixed
        .into_iter()
        .map(str::to_owned)
        .chain(["x".repeat(300), "x".repeat(77)])
        .collect()
}

pub(crate) async fn ids_that_are_no_names_start_no_shim(mini: &Mini) -> Result<()> {
    let bundle = mini.bundle("carrier-of-ids").sandbox().write()?;
    let grpc = mini.dir().join("c.sock").display().to_string();
    // A command line holds no zero bytes.
    for id in bad_ids()
        .into_iter()
        .filter(|id| !id.contains('\0'))
        .chain([String::new()])
    {
        for action in ["start", "delete"] {
            let mut params = mini.bootstrap(&bundle, None);
            params.instance_id = id.clone();
            let command = kiln_tests::process::Cmd::new(mini.binary())
                .dir(bundle.dir())
                .cgroup(mini.place().cgroup());
            let flags = [
                "-namespace",
                "k8s.io",
                "-address",
                &grpc,
                "-publish-binary",
                "/bin/false",
                "-id",
                &id,
                action,
            ];
            let failed = command
                .args(flags)
                .input(&params.write_to_bytes()?)
                .output()
                .await?;
            ensure!(
                !failed.status.success() && failed.stdout.is_empty(),
                "{action} {id:?}: {failed:?}"
            );
            ensure!(
                failed.errors().contains("id"),
                "{action} {id:?}: {}",
                failed.errors()
            );
        }
    }
    bundle.remove()?;
    mini.place().expect_gone("carrier-of-ids").await
}

pub(crate) async fn namespaces_that_are_no_names_start_no_shim(mini: &Mini) -> Result<()> {
    let bundle = mini.bundle("carrier-of-names").sandbox().write()?;
    let grpc = mini.dir().join("c.sock").display().to_string();
    for namespace in ["", "../x", "a/b", "-x"] {
        let mut params = mini.bootstrap(&bundle, None);
        params.namespace = namespace.to_owned();
        let command = kiln_tests::process::Cmd::new(mini.binary())
            .dir(bundle.dir())
            .cgroup(mini.place().cgroup());
        let flags = [
            "-namespace",
            namespace,
            "-address",
            &grpc,
            "-publish-binary",
            "/bin/false",
            "-id",
            bundle.id(),
            "start",
        ];
        let failed = command
            .args(flags)
            .input(&params.write_to_bytes()?)
            .output()
            .await?;
        ensure!(
            !failed.status.success() && failed.stdout.is_empty(),
            "{namespace:?}: {failed:?}"
        );
    }
    bundle.remove()?;
    mini.place().expect_gone("carrier-of-names").await
}

pub(crate) async fn ids_that_are_no_names_make_no_container(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "named").await?;
    let member = mini.bundle("named-member").member_of("named").write()?;
    for id in bad_ids().into_iter().chain([String::new()]) {
        let create = CreateTaskRequest {
            id: id.clone(),
            ..shim.create_request(&member)
        };
        refused(
            &format!("create {id:?}"),
            shim.task().create(ctx(), &create).await,
            Code::INVALID_ARGUMENT,
        )?;
        refused(
            &format!("state {id:?}"),
            shim.task().state(ctx(), &state_of(&id, "")).await,
            Code::INVALID_ARGUMENT,
        )?;
        refused(
            &format!("kill {id:?}"),
            shim.kill(&id, "", 9).await,
            Code::INVALID_ARGUMENT,
        )?;
        let delete = api::DeleteRequest {
            id: id.clone(),
            ..api::DeleteRequest::default()
        };
        refused(
            &format!("delete {id:?}"),
            shim.task().delete(ctx(), &delete).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    member.remove()?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn ids_that_are_no_names_make_no_exec(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "exec-ids").await?;
    for id in bad_ids().into_iter().chain([String::new()]) {
        let exec = exec_request("exec-ids", &id, &["true"]);
        refused(
            &format!("exec {id:?}"),
            shim.task().exec(ctx(), &exec).await,
            Code::INVALID_ARGUMENT,
        )?;
        if !id.is_empty() {
            refused(
                &format!("state {id:?}"),
                shim.task().state(ctx(), &state_of("exec-ids", &id)).await,
                Code::INVALID_ARGUMENT,
            )?;
        }
    }
    end(mini, &shim, bundle).await
}
