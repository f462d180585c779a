// SPDX-License-Identifier: Apache-2.0

//! `kilnctl logs`.

use anyhow::{Context as _, Result};
use futures_util::AsyncReadExt as _;
use kube::api::LogParams;

use super::{Space, find::find};
use crate::{args::users::Logs, output};

/// Bytes that are read at a time.
const CHUNK: usize = 16 << 10;

/// Prints what a sandbox has logged.
///
/// # Errors
/// When there is no such sandbox, it has no Pod, or its log cannot be read.
pub(crate) async fn run(space: &Space, args: &Logs) -> Result<()> {
    let target = find(space, &args.name).await?;
    let target = target.target(args.container.as_deref())?;
    let params = LogParams {
        container: target.container,
        follow: args.follow,
        previous: args.previous,
        tail_lines: args.tail,
        ..LogParams::default()
    };
    let log = space.pods().log_stream(&target.pod, &params).await;
    let mut log = std::pin::pin!(log.map_err(|e| space.explain(e))?);
    let mut chunk = vec![0; CHUNK];
    loop {
        match log.read(&mut chunk).await.context("read the log")? {
            0 => return Ok(()),
            read => output::write_bytes(&chunk[..read]).context("print the log")?,
        }
    }
}
