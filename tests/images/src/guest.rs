// SPDX-License-Identifier: Apache-2.0
//! Building the guest program: package `kiln-guest`, linked statically.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;
use tokio::time::timeout;

/// How long a build from nothing may take on a busy machine; it takes 20 s on a quiet one.
const PATIENCE: Duration = Duration::from_secs(600);

/// Why there is no guest program.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// cargo did not run, or not to its end in time.
    #[error("cannot run {cargo:?}")]
    Run {
        /// The program.
        cargo: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The build failed; cargo has said why on stderr.
    #[error("the build of kiln-guest failed")]
    Build,
}

/// Builds the program with cargo in the workspace whose root is `workspace`, and gives its path.
/// What cargo has to say goes to our stderr.
pub async fn build(workspace: &Path) -> Result<PathBuf, GuestError> {
    let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let mut command = Command::new(&cargo);
    command.current_dir(workspace).args([
        "rustc",
        "--quiet",
        "--profile",
        "small",
        "--package",
        "kiln-guest",
    ]);
    // Named, although it is the machine's own: the result lies apart from what a plain build makes.
    command.args([
        "--target",
        &format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
    ]);
    command.args(["--message-format", "json-render-diagnostics", "--"]);
    command.args([
        "-C",
        "target-feature=+crt-static",
        "-C",
        "relocation-model=static",
    ]);
    command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .kill_on_drop(true);
    let output = timeout(PATIENCE, command.output())
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let output = output.map_err(|source| GuestError::Run { cargo, source })?;
    output
        .status
        .success()
        .then(|| executable(&output.stdout))
        .flatten()
        .ok_or(GuestError::Build)
}

/// The path of the program in cargo's messages, which are one JSON object a line.
fn executable(messages: &[u8]) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
    }
    let messages = messages
        .split(|b| *b == b'\n')
        .filter_map(|line| serde_json::from_slice::<Message>(line).ok());
    messages.filter_map(|m| m.executable).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_found_among_the_messages() {
        let messages = br#"{"reason":"compiler-artifact","executable":null}
{"reason":"compiler-artifact","target":{"name":"kiln-guest"},"executable":"/t/kiln-guest"}
{"reason":"build-finished","success":true}
"#;
        assert_eq!(executable(messages), Some("/t/kiln-guest".into()));
        assert_eq!(executable(b"nonsense\n"), None);
    }
}
