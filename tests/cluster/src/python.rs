// SPDX-License-Identifier: Apache-2.0

//! Upstream's Python clients, as they are published and `tests/deps/install.sh` installs them.

use std::{env, path::Path};

use anyhow::{Result, ensure};
use kiln_tests::{process::Cmd, tools};

/// A run of the Python program `script` with the client of `version`, as who `kubeconfig` says and
/// with `home` as its home directory. It finds `kubectl`.
///
/// # Errors
/// When the clients are not there, with how to get them.
pub fn client(version: &str, script: &Path, kubeconfig: &Path, home: &Path) -> Result<Cmd> {
    let clients = tools::cache()?.join("python-clients");
    let python = clients.join("venv/bin/python");
    ensure!(
        python.is_file(),
        "no {}: run tests/deps/install.sh",
        python.display()
    );
    let mut path = tools::program("kubectl")?
        .with_file_name("")
        .into_os_string();
    path.push(":");
    path.push(env::var_os("PATH").unwrap_or_default());
    Ok(Cmd::new(&python)
        .args(["-B".as_ref(), script.as_os_str()])
        .env("PYTHONPATH", clients.join(version))
        .env("KUBECONFIG", kubeconfig)
        .env("HOME", home)
        .env("PATH", path)
        .env("NO_PROXY", "*"))
}
