// SPDX-License-Identifier: Apache-2.0

//! The ServiceAccounts of Agent Sandbox: what runs as one has its rights and no others.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Where the controller's objects are.
pub const NAMESPACE: &str = "agent-sandbox-system";

/// The controller's account.
pub const CONTROLLER: &str = "agent-sandbox-controller";

/// The account of the nodes' agents.
pub const AGENT: &str = "kiln-node-agent";

/// The directory of the manifests.
#[must_use]
pub fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy")
}

/// What to tell `kubectl apply` for the accounts and their rights.
#[must_use]
pub fn rights() -> [String; 4] {
    let [namespace, rbac] =
        ["namespace", "rbac"].map(|file| format!("{}/base/{file}.yaml", deploy().display()));
    ["-f".to_owned(), namespace, "-f".to_owned(), rbac]
}

/// Writes to `dir` the administrator's kubeconfig with the credentials of `account` in it. `more`
/// is said of its token.
///
/// # Errors
/// When `kubectl` fails, or the file cannot be written.
pub async fn kubeconfig(
    kubectl: impl AsyncFn(&[&str]) -> Result<String>,
    dir: &Path,
    account: &str,
    more: &[String],
) -> Result<PathBuf> {
    let mut token = vec![
        "-n",
        NAMESPACE,
        "create",
        "token",
        account,
        "--duration=24h",
    ];
    token.extend(more.iter().map(String::as_str));
    let token = kubectl(&token).await?;
    let config = kubectl(&["config", "view", "--raw", "-ojson"]).await?;
    let mut config: Value = serde_json::from_str(&config)?;
    let user = config
        .pointer_mut("/users/0/user")
        .context("a kubeconfig without a user")?;
    *user = json!({"token": token.trim()});
    let path = dir.join(format!("{account}.conf"));
    fs::write(&path, config.to_string())?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(path)
}
