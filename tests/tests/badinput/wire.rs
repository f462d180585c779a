// SPDX-License-Identifier: Apache-2.0

//! Bytes on the shim's socket that are no calls.

use std::{fs, io::Write, os::unix::fs::PermissionsExt, os::unix::net::UnixStream};

use anyhow::{Context, Result, ensure};
use containerd_shim_protos::ttrpc::{Code, Request};
use kiln_tests::mini::{Mini, Shim, code};

use crate::{end, running};

/// The shim still answers, and in time.
async fn answers(shim: &Shim, id: &str) -> Result<()> {
    shim.state(id, "").await.context("state")?;
    Ok(())
}

/// A frame of ttrpc: length of the data, stream, type (1 is a request), flags
/// (containerd/ttrpc `PROTOCOL.md`).
fn frame(length: u32, stream: u32, kind: u8, data: &[u8]) -> Vec<u8> {
    [
        &length.to_be_bytes()[..],
        &stream.to_be_bytes(),
        &[kind, 0],
        data,
    ]
    .concat()
}

pub(crate) async fn garbage_is_no_end(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "garbage").await?;
    let mode = fs::metadata(shim.socket())?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the socket has mode {mode:o}");
    let mut noise: Vec<u8> = Vec::new();
    let mut seed = 0x2545_f491u32;
    for _ in 0..64 << 10 {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        noise.push((seed >> 24) as u8);
    }
    let messages = [
        noise,
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0; 10],
        vec![0xff; 10],
        frame(5, 1, 1, b"\xff\xff\xff\xff\xff"),
        frame(3, 0, 1, b"abc"),
        frame(3, 2, 1, b"abc"),
        frame(3, 1, 77, b"abc"),
        frame(1000, 1, 1, b"the rest never comes"),
    ];
    for message in &messages {
        for _ in 0..3 {
            let mut stream = UnixStream::connect(shim.socket())?;
            // The shim may hang up before all is written.
            stream.write_all(message).ok();
            drop(stream);
            answers(&shim, bundle.id()).await?;
        }
    }
    end(mini, &shim, bundle).await
}

pub(crate) async fn a_huge_frame_is_no_end(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "frames").await?;
    let process = mini
        .shims_of(bundle.id())
        .into_iter()
        .next()
        .context("no shim")?;
    let before = process.status("VmRSS").context("no RSS")?;
    let mut streams = Vec::new();
    for length in [u32::MAX, 1 << 30, 5 << 20] {
        let mut stream = UnixStream::connect(shim.socket())?;
        stream.write_all(&frame(length, 1, 1, b"little")).ok();
        streams.push(stream);
        answers(&shim, bundle.id()).await?;
    }
    let after = process.status("VmRSS").context("no RSS")?;
    ensure!(
        after < before + (8 << 10),
        "{before} KiB before, {after} KiB after"
    );
    drop(streams);
    end(mini, &shim, bundle).await
}

pub(crate) async fn idle_connections_are_no_end(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "idle").await?;
    let streams = (0..200)
        .map(|_| UnixStream::connect(shim.socket()))
        .collect::<Result<Vec<_>, _>>()?;
    answers(&shim, bundle.id()).await?;
    drop(streams);
    answers(&shim, bundle.id()).await?;
    end(mini, &shim, bundle).await
}

pub(crate) async fn unknown_methods_are_unimplemented(mini: &Mini) -> Result<()> {
    let (bundle, shim) = running(mini, "methods").await?;
    for (service, method) in [
        ("containerd.task.v3.Task", "Fly"),
        ("containerd.task.v9.Task", "State"),
        ("", ""),
    ] {
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            ..Request::default()
        };
        let answer = code(shim.client().request(request).await)?;
        ensure!(
            matches!(
                answer,
                Some(Code::UNIMPLEMENTED | Code::INVALID_ARGUMENT | Code::NOT_FOUND)
            ),
            "{service}/{method}: {answer:?}"
        );
    }
    end(mini, &shim, bundle).await
}
