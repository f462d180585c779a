// SPDX-License-Identifier: Apache-2.0

//! Stands in for Kata's shim: notes how it was called in the file `calls` beside the name that it
//! was called by, a JSON object a line, and becomes the `containerd-shim-kiln-v2` there, with the
//! same arguments, environment and standard input.

#![forbid(unsafe_code)]

use std::{
    env,
    fs::File,
    io::{self, IsTerminal, Read, Seek, Write},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::Command,
};

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;

fn main() -> Result<()> {
    let called: PathBuf = env::args_os().next().context("no name")?.into();
    let dir = called.parent().context("a name without a directory")?;
    let arguments: Vec<String> = env::args().skip(1).collect();
    let mut input = Vec::new();
    if !io::stdin().is_terminal() {
        io::stdin().read_to_end(&mut input)?;
    }
    let call = json!({
        "arguments": arguments,
        "directory": env::current_dir()?,
        "input": String::from_utf8_lossy(&input),
        "ttrpc": env::var("TTRPC_ADDRESS").ok(),
    });
    let mut calls = File::options()
        .create(true)
        .append(true)
        .open(dir.join("calls"))?;
    calls.write_all(format!("{call}\n").as_bytes())?;

    let mut again = File::from(memfd_create("input", MFdFlags::MFD_CLOEXEC)?);
    again.write_all(&input)?;
    again.rewind()?;
    let shim = dir.join("containerd-shim-kiln-v2");
    let failed = Command::new(&shim).args(arguments).stdin(again).exec();
    Err(failed).with_context(|| format!("run {}", shim.display()))
}
