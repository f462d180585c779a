// SPDX-License-Identifier: Apache-2.0

//! Stands in for a containerd of another version: `--version` prints what is in the file `version`
//! beside this program; with a path, it listens there until it is killed, and never answers.

#![forbid(unsafe_code)]

use std::{
    env, fs,
    io::{self, Write},
    os::unix::net::UnixListener,
    thread,
};

use anyhow::{Context, Result};

fn main() -> Result<()> {
    let argument = env::args_os().nth(1).context("no argument")?;
    if argument == "--version" {
        let version = env::current_exe()?.with_file_name("version");
        return Ok(io::stdout().write_all(&fs::read(version)?)?);
    }
    let _listener = UnixListener::bind(&argument)?;
    loop {
        thread::park();
    }
}
