// SPDX-License-Identifier: Apache-2.0
//! The images made of the real busybox and the real guest program.
//!
//! One test: it writes programs and runs them, which fails (ETXTBSY) when another thread starts a
//! process in between.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flate2::read::GzDecoder;
use kiln_images::{Digest, Images, Layer, Sources, guest};
use serde_json::Value;

const GUEST_APPLETS: [&str; 5] = ["pause", "nginx", "httpd", "nnp", "spam"];

async fn built() -> Images {
    let cache = env::var_os("KILN_CACHE").unwrap_or_else(|| "/nowhere".into());
    let workspace = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    let guest = guest::build(workspace).await.unwrap();
    let mut sources = Sources::in_cache(Path::new(&cache), guest);
    // Large, and no different from any other tree.
    sources.python = PathBuf::from("/nowhere");
    sources.cache = None;
    Images::build(&sources).await.unwrap()
}

/// The files of a layer by path, with their modes; hard links as what they lead to.
fn files(layer: &Layer) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut archive = tar::Archive::new(GzDecoder::new(&layer.bytes[..]));
    let mut files: BTreeMap<String, (u32, Vec<u8>)> = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let mut contents = Vec::new();
        entry.read_to_end(&mut contents).unwrap();
        let file = match entry.link_name().unwrap() {
            Some(target) => files[&target.display().to_string()].clone(),
            None => (entry.header().mode().unwrap(), contents),
        };
        files.insert(path, file);
    }
    files
}

/// The exit code of a program of an image, run on the host with nothing in its PATH.
fn exit_code(program: &[u8], args: &[&str]) -> Option<i32> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(args[0]);
    fs::write(&path, program).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(path);
    command
        .args(&args[1..])
        .env_clear()
        .env("PATH", "/nowhere")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().unwrap().code()
}

#[tokio::test]
#[ignore = "builds the guest program, and needs busybox"]
async fn the_images_of_real_programs_are_sound() {
    let images = built().await;
    let digests = |images: &Images| {
        images
            .all
            .iter()
            .map(|i| i.manifest.digest)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        digests(&images),
        digests(&built().await),
        "two runs must make the same images"
    );
    assert_eq!(images.left_out.len(), 1, "{:?}", images.left_out);
    assert!(images.find("docker.io/library/python:3").is_none());

    for image in &images.all {
        let manifest: Value = serde_json::from_slice(&image.manifest.bytes).unwrap();
        let config: Value = serde_json::from_slice(&image.config.bytes).unwrap();
        assert_eq!(
            manifest["config"]["digest"],
            image.config.digest.to_string()
        );
        for (n, layer) in image.layers.iter().enumerate() {
            let mut tar = Vec::new();
            GzDecoder::new(&layer.bytes[..])
                .read_to_end(&mut tar)
                .unwrap();
            assert_eq!(
                manifest["layers"][n]["digest"],
                Digest::of(&layer.bytes).to_string()
            );
            assert_eq!(
                config["rootfs"]["diff_ids"][n],
                Digest::of(&tar).to_string()
            );
        }
    }

    let busybox = files(
        &images
            .find("docker.io/library/busybox:latest")
            .unwrap()
            .layers[0],
    );
    let shell = &busybox["bin/sh"].1;
    assert_eq!(exit_code(shell, &["sh", "-c", "exit 3"]), Some(3));
    assert_eq!(
        exit_code(shell, &["sh", "-c", "ls /"]),
        Some(127),
        "the shell must look for ls in its PATH"
    );
    assert_eq!(exit_code(&busybox["bin/ls"].1, &["ls", "/"]), Some(0));
    assert_eq!(
        exit_code(&busybox["bin/pgrep"].1, &["pgrep", "no-such-process"]),
        Some(1)
    );

    let guest = files(
        &images
            .find("docker.io/library/kiln-guest:latest")
            .unwrap()
            .layers[1],
    );
    assert!(
        GUEST_APPLETS
            .iter()
            .all(|applet| guest.contains_key(&format!("bin/{applet}")))
    );
    let program = &guest["bin/kiln-guest"].1;
    assert_eq!(exit_code(program, &["exit", "7"]), Some(7));
    assert!(program.len() < 1 << 20, "{} bytes", program.len());

    let setuid = files(
        &images
            .find("registry.k8s.io/e2e-test-images/nonewprivs:1.3")
            .unwrap()
            .layers[0],
    );
    assert_eq!(setuid["nnp"].0, 0o4755);
}
