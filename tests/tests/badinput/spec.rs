// SPDX-License-Identifier: Apache-2.0

//! Specs and bundles.

use std::{fs, os::unix::fs::symlink, path::Path};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::{api::CreateTaskRequest, ttrpc::Code};
use kiln_tests::mini::{Mini, bundle::BundleBuilder, code, ctx};
use serde_json::{Value, json};

use crate::{end, ended, refused, shim, shim_with, spec_is_refused};

pub(crate) async fn hooks_are_refused(mini: &Mini) -> Result<()> {
    let proof = mini.dir().join("a-hook-ran");
    for kind in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
        "poststart",
        "poststop",
    ] {
        let hook = json!({kind: [{"path": "/bin/sh", "args": ["sh", "-c", format!("touch {}", proof.display())]}]});
        let bundle = mini
            .bundle(&format!("hook-{kind}"))
            .sandbox()
            .edit(|s| s["hooks"] = hook);
        spec_is_refused(mini, kind, bundle, Code::INVALID_ARGUMENT).await?;
        ensure!(!proof.exists(), "{kind} ran");
    }
    Ok(())
}

fn with_namespace<'a>(bundle: BundleBuilder<'a>, kind: &str, path: &str) -> BundleBuilder<'a> {
    bundle.edit(|spec| {
        let list = spec["linux"]["namespaces"]
            .as_array_mut()
            .map(std::mem::take)
            .unwrap_or_default();
        let mut list: Vec<Value> = list.into_iter().filter(|ns| ns["type"] != kind).collect();
        list.push(json!({"type": kind, "path": path}));
        spec["linux"]["namespaces"] = list.into();
    })
}

pub(crate) async fn namespaces_of_others_are_refused(mini: &Mini) -> Result<()> {
    for (kind, path) in [
        ("network", "/proc/1/ns/net"),
        ("network", "relative"),
        ("mount", "/proc/1/ns/mnt"),
        ("pid", "/proc/1/ns/pid"),
        ("ipc", "/proc/1/ns/ipc"),
        ("uts", "/proc/1/ns/uts"),
        ("user", "/proc/1/ns/user"),
        ("cgroup", "/proc/1/ns/cgroup"),
    ] {
        let bundle = with_namespace(
            mini.bundle(&format!("ns-{kind}-{}", path.len())).sandbox(),
            kind,
            path,
        );
        spec_is_refused(
            mini,
            &format!("{kind} {path}"),
            bundle,
            Code::INVALID_ARGUMENT,
        )
        .await?;
    }
    let twice = mini.bundle("ns-double").sandbox().edit(|spec| {
        if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
            list.push(json!({"type": "network", "path": "/proc/1/ns/net"}));
        }
    });
    spec_is_refused(mini, "two of a kind", twice, Code::INVALID_ARGUMENT).await
}

fn privileged(bundle: BundleBuilder<'_>) -> BundleBuilder<'_> {
    bundle.edit(|spec| {
        spec["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    })
}

fn host_network(bundle: BundleBuilder<'_>) -> BundleBuilder<'_> {
    bundle.edit(|spec| {
        if let Some(list) = spec["linux"]["namespaces"].as_array_mut() {
            list.retain(|ns| ns["type"] != "network");
        }
    })
}

pub(crate) async fn privileges_need_the_node(mini: &Mini) -> Result<()> {
    spec_is_refused(
        mini,
        "privileged",
        privileged(mini.bundle("privileged").sandbox()),
        Code::PERMISSION_DENIED,
    )
    .await
}

pub(crate) async fn the_hosts_network_needs_the_node(mini: &Mini) -> Result<()> {
    spec_is_refused(
        mini,
        "hostNetwork",
        host_network(mini.bundle("hostnet").sandbox()),
        Code::PERMISSION_DENIED,
    )
    .await
}

pub(crate) async fn a_node_may_allow_both(mini: &Mini) -> Result<()> {
    let kiln = "allow_privileged = true\nallow_host_network = true\n";
    for bundle in [
        privileged(mini.bundle("root-allowed").sandbox()),
        host_network(mini.bundle("net-allowed").sandbox()),
    ] {
        let (bundle, shim) = shim_with(mini, bundle, kiln).await?;
        shim.run(&bundle).await?;
        end(mini, &shim, bundle).await?;
    }
    Ok(())
}

pub(crate) async fn a_listener_and_rdt_are_refused(mini: &Mini) -> Result<()> {
    let listener = mini.bundle("listener").sandbox().edit(|s| {
        s["linux"]["seccomp"] =
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/listener"});
    });
    spec_is_refused(mini, "seccomp listener", listener, Code::INVALID_ARGUMENT).await?;
    let rdt = mini
        .bundle("rdt")
        .sandbox()
        .edit(|s| s["linux"]["intelRdt"] = json!({"closID": "guaranteed"}));
    spec_is_refused(mini, "intelRdt", rdt, Code::INVALID_ARGUMENT).await
}

/// They switch flags, binaries and mounts of runsc; a user must not.
pub(crate) async fn annotations_for_the_runtime_are_dropped(mini: &Mini) -> Result<()> {
    let log = mini.dir().join("debug.log");
    let bundle = mini.bundle("annotated").sandbox().edit(|spec| {
        spec["annotations"]["dev.gvisor.flag.debug-log"] = log.display().to_string().into();
        spec["annotations"]["dev.gvisor.flag.debug"] = "true".into();
        spec["annotations"]["dev.gvisor.flag.network"] = "host".into();
        spec["annotations"]["dev.gvisor.spec.mount.m.source"] = "/etc".into();
        spec["annotations"]["dev.gvisor.tar.rootfs.upper"] = "/etc/passwd".into();
        spec["annotations"]["example.org/mine"] = "kept".into();
    });
    let (bundle, shim) = shim(mini, bundle).await?;
    shim.run(&bundle).await?;
    let spec: Value = serde_json::from_slice(&fs::read(bundle.dir().join("config.json"))?)?;
    let annotations = spec["annotations"].as_object().context("no annotations")?;
    ensure!(
        annotations.keys().all(|k| !k.starts_with("dev.gvisor."))
            && spec["annotations"]["example.org/mine"] == "kept",
        "{annotations:?}"
    );
    ensure!(!log.exists());
    end(mini, &shim, bundle).await
}

pub(crate) async fn broken_specs_are_refused(mini: &Mini) -> Result<()> {
    let good = mini.bundle("broken").sandbox().spec_text();
    let with = |path: &str, value: Value| {
        let mut spec: Value = serde_json::from_str(&good).unwrap_or_default();
        if let Some(place) = spec.pointer_mut(path) {
            *place = value;
        }
        spec.to_string()
    };
    let texts = [
        String::new(),
        "null".to_owned(),
        "[]".to_owned(),
        "\"text\"".to_owned(),
        "{".to_owned(),
        good[..good.len() / 2].to_owned(),
        "[".repeat(100_000),
        with("/linux", json!(5)),
        with("/linux/resources", json!([])),
    ];
    for (n, text) in texts.iter().enumerate() {
        let (bundle, shim) = shim(mini, mini.bundle("broken").sandbox()).await?;
        fs::write(bundle.dir().join("config.json"), text)?;
        let what = format!("text {n}");
        refused(
            &what,
            shim.task()
                .create(ctx(), &shim.create_request(&bundle))
                .await,
            Code::INVALID_ARGUMENT,
        )?;
        fs::write(bundle.dir().join("config.json"), &good)?;
        shim.run(&bundle).await.context(what)?;
        end(mini, &shim, bundle).await?;
    }
    // The shim has nothing to say about these: the runtime has, and it must be a clean end.
    for (n, text) in [with("/process/args", json!([])), with("/root", json!({"path": "nowhere"})), with("/mounts", json!([{"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]}]))].iter().enumerate() {
        let (bundle, shim) = shim(mini, mini.bundle("broken").sandbox()).await?;
        fs::write(bundle.dir().join("config.json"), text)?;
        let made = match code(shim.task().create(ctx(), &shim.create_request(&bundle)).await)? {
            None => {
                ensure!(shim.start("broken", "").await.is_err(), "spec {n} runs");
                shim.remove("broken", "").await?;
                true
            }
            Some(_) => false,
        };
        ended(mini, &shim, bundle).await.with_context(|| format!("spec {n}, made: {made}"))?;
    }
    Ok(())
}

pub(crate) async fn a_huge_spec_is_refused(mini: &Mini) -> Result<()> {
    let bundle = mini
        .bundle("huge")
        .sandbox()
        .edit(|s| s["annotations"]["filler"] = "x".repeat(9 << 20).into());
    let bundle = bundle.write()?;
    let params =
        containerd_shim_protos::protobuf::Message::write_to_bytes(&mini.bootstrap(&bundle, None))?;
    let failed = mini
        .command(&bundle, "start")
        .input(&params)
        .output()
        .await?;
    ensure!(
        !failed.status.success() && failed.errors().contains("larger than"),
        "{failed:?}"
    );
    bundle.remove()?;
    mini.place().expect_gone("huge").await
}

pub(crate) async fn a_cgroup_outside_is_refused(mini: &Mini) -> Result<()> {
    for (n, path) in ["../../escaped", "/a/../../b", "/"].into_iter().enumerate() {
        let bundle = mini
            .bundle(&format!("cgroup-{n}"))
            .sandbox()
            .edit(|s| s["linux"]["cgroupsPath"] = path.into());
        spec_is_refused(mini, path, bundle, Code::INVALID_ARGUMENT).await?;
    }
    Ok(())
}

pub(crate) async fn a_bundle_must_be_there(mini: &Mini) -> Result<()> {
    let (bundle, shim) = shim(mini, mini.bundle("missing").sandbox()).await?;
    for path in ["relative/bundle", "", "."] {
        let create = CreateTaskRequest {
            bundle: path.to_owned(),
            ..shim.create_request(&bundle)
        };
        refused(
            path,
            shim.task().create(ctx(), &create).await,
            Code::INVALID_ARGUMENT,
        )?;
    }
    let create = CreateTaskRequest {
        bundle: "/no/such/bundle".to_owned(),
        ..shim.create_request(&bundle)
    };
    let answer = code(shim.task().create(ctx(), &create).await)?;
    ensure!(
        matches!(
            answer,
            Some(Code::INTERNAL | Code::INVALID_ARGUMENT | Code::NOT_FOUND)
        ),
        "{answer:?}"
    );
    shim.run(&bundle).await?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn a_member_needs_its_own_sandbox(mini: &Mini) -> Result<()> {
    let (bundle, shim) = shim(mini, mini.bundle("own").sandbox()).await?;
    shim.run(&bundle).await?;
    let stray = mini
        .bundle("own-stray")
        .member_of("somebody-else")
        .write()?;
    refused(
        "a member of another",
        shim.task()
            .create(ctx(), &shim.create_request(&stray))
            .await,
        Code::INVALID_ARGUMENT,
    )?;
    stray.remove()?;
    let second = mini.bundle("own-second").sandbox().write()?;
    refused(
        "a second sandbox",
        shim.task()
            .create(ctx(), &shim.create_request(&second))
            .await,
        Code::INVALID_ARGUMENT,
    )?;
    second.remove()?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn a_restore_needs_the_node(mini: &Mini) -> Result<()> {
    let image = mini.dir().join("images/one");
    fs::create_dir_all(&image)?;
    let allowed = mini.dir().join("images/allowed");
    fs::create_dir_all(&allowed)?;
    symlink(&image, allowed.join("link"))?;
    let kiln = format!("restore_dirs = [\"{}\"]\n", allowed.display());
    let outside = image.display().to_string();
    let link = allowed.join("link").display().to_string();
    let climb = format!("{}/../one", allowed.display());
    for (n, path) in [
        outside.as_str(),
        &link,
        &climb,
        "/etc",
        "relative",
        "/no/such/image",
    ]
    .into_iter()
    .enumerate()
    {
        let bundle = mini
            .bundle(&format!("restore-{n}"))
            .sandbox()
            .edit(|s| s["annotations"]["kiln.dev/restore-image"] = path.into());
        let (bundle, shim) = shim_with(mini, bundle, &kiln).await?;
        refused(
            path,
            shim.task()
                .create(ctx(), &shim.create_request(&bundle))
                .await,
            Code::PERMISSION_DENIED,
        )?;
        ended(mini, &shim, bundle).await?;
    }
    Ok(())
}

/// The root file system is mounted in the bundle: not where a link there points to.
pub(crate) async fn a_root_that_is_a_link_is_not_followed(mini: &Mini) -> Result<()> {
    let (bundle, shim) = shim(mini, mini.bundle("linked").sandbox()).await?;
    let victim = mini.dir().join("victim");
    fs::create_dir(&victim)?;
    fs::write(victim.join("mine"), "mine")?;
    fs::remove_dir(bundle.dir().join("rootfs"))?;
    symlink(&victim, bundle.dir().join("rootfs"))?;
    let answer = code(
        shim.task()
            .create(ctx(), &shim.create_request(&bundle))
            .await,
    )?;
    ensure!(answer.is_some(), "made on a link");
    ensure!(is_untouched(&victim)?, "mounted over");
    ended(mini, &shim, bundle).await
}

fn is_untouched(dir: &Path) -> Result<bool> {
    Ok(kiln_tests::mounts::below(dir)?.is_empty()
        && fs::read_to_string(dir.join("mine"))? == "mine")
}
