// SPDX-License-Identifier: Apache-2.0

//! Where the programs are that tests run. One that is missing is an error, not a skip.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

/// The cache that `tests/deps/install.sh` fills: `$KILN_CACHE`, else `kiln` in the user's cache.
///
/// # Errors
/// When neither is known.
pub fn cache() -> Result<PathBuf> {
    if let Some(cache) = env::var_os("KILN_CACHE") {
        return Ok(cache.into());
    }
    if let Some(dir) = env::var_os("XDG_CACHE_HOME") {
        return Ok(Path::new(&dir).join("kiln"));
    }
    let home = env::var_os("HOME").context("neither KILN_CACHE nor HOME is set")?;
    Ok(Path::new(&home).join(".cache/kiln"))
}

/// A third-party program: in the cache, else on the `PATH`.
///
/// # Errors
/// When it is in neither, with how to get it.
pub fn program(name: &str) -> Result<PathBuf> {
    let bin = cache()?.join("bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let found = [bin.clone()]
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|dir| dir.join(name))
        .find(|p| p.is_file());
    found.with_context(|| {
        format!(
            "{name} is neither in {} nor on the PATH: run tests/deps/install.sh",
            bin.display()
        )
    })
}

/// The runsc to test with: `$KILN_RUNSC`, for suites on another than the pinned one, else the
/// program `runsc`.
///
/// # Errors
/// When it is not there, with how to get it.
pub fn runsc() -> Result<PathBuf> {
    match env::var_os("KILN_RUNSC") {
        Some(path) => Ok(path.into()),
        None => program("runsc"),
    }
}

/// The directory of the CNI plugins.
///
/// # Errors
/// When it is not there, with how to get it.
pub fn cni_plugins() -> Result<PathBuf> {
    let dirs = [
        cache()?.join("cni"),
        PathBuf::from("/usr/lib/cni"),
        PathBuf::from("/opt/cni/bin"),
    ];
    let found = dirs.into_iter().find(|dir| dir.join("bridge").is_file());
    found.context("no CNI plugins: run tests/deps/install.sh")
}

/// A program of this workspace: in `$KILN_BIN_DIR`, else the newest that was built in the target
/// directory of the running test, by the profile of the test or by `small` (as `make build` does).
///
/// # Errors
/// When it is not there, with how to build it.
pub fn ours(name: &str) -> Result<PathBuf> {
    if let Some(dir) = env::var_os("KILN_BIN_DIR") {
        let path = Path::new(&dir).join(name);
        ensure!(path.is_file(), "{} is not there", path.display());
        return Ok(path);
    }
    let beside = beside_the_test()?;
    let small = beside.with_file_name("small");
    let built = [beside, small]
        .map(|dir| dir.join(name))
        .into_iter()
        .filter(|p| p.is_file());
    let newest = built.max_by_key(|p| p.metadata().and_then(|m| m.modified()).ok());
    newest.with_context(|| format!("{name} is not built: run `make build`"))
}

/// `target/PROFILE`, from `target/PROFILE/PROGRAM` or `target/PROFILE/deps/TEST-HASH`.
fn beside_the_test() -> Result<PathBuf> {
    let exe = env::current_exe().context("find the running program")?;
    let dir = exe.ancestors().skip(1).find(|dir| !dir.ends_with("deps"));
    dir.map(Path::to_owned)
        .context("the running program has no directory")
}

/// The shim of this workspace.
///
/// # Errors
/// When it is not built.
pub fn shim() -> Result<PathBuf> {
    ours("containerd-shim-kiln-v2")
}

/// The first process of warm sandboxes, which is static.
///
/// # Errors
/// When it is not built.
pub fn pause() -> Result<PathBuf> {
    small("kiln-pause", "make build")
}

/// The program that tries to get out of the sandbox that it is run in, which is static.
///
/// # Errors
/// When it is not built.
pub fn probe() -> Result<PathBuf> {
    small("kiln-probe", "make guest")
}

/// The router, which is static.
///
/// # Errors
/// When it is not built.
pub fn router() -> Result<PathBuf> {
    small("kiln-router", "make build")
}

/// A program as it is installed, which `make` builds by the words `how`.
fn small(name: &str, how: &str) -> Result<PathBuf> {
    let path = target_dir()?.join("small").join(name);
    ensure!(
        path.is_file(),
        "{} is not built: run `{how}`",
        path.display()
    );
    Ok(path)
}

/// The shim of this workspace as it is installed on nodes: `$KILN_SHIM`, else the one that was
/// built with profile `small`.
///
/// # Errors
/// When it is not built.
pub fn installed_shim() -> Result<PathBuf> {
    let path = match env::var_os("KILN_SHIM") {
        Some(path) => path.into(),
        None => target_dir()?.join("small/containerd-shim-kiln-v2"),
    };
    if path.is_file() {
        return Ok(path);
    }
    bail!("{} is not built: run `make build`", path.display())
}

/// cargo's target directory, in which the running program is; above that of the program's target,
/// where it was built for one by name.
///
/// # Errors
/// When it cannot be found.
pub fn target_dir() -> Result<PathBuf> {
    let profile = beside_the_test()?;
    // cargo puts this file into both (`cargo-util`, `create_dir_all_excluded_from_backups_atomic`).
    let found = profile.ancestors().skip(1).take(2);
    found
        .filter(|dir| dir.join("CACHEDIR.TAG").is_file())
        .last()
        .map(Path::to_owned)
        .context("the running program is not in cargo's target directory")
}
