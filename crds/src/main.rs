// SPDX-License-Identifier: Apache-2.0

//! Writes the CustomResourceDefinitions into a directory: `kiln-crds DIR`. With `--check` it
//! writes nothing, and fails where a file is not what it would write.

#![forbid(unsafe_code)]

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};

const HEAD: &str = "# SPDX-License-Identifier: Apache-2.0\n# Generated from crds/ by `make manifests`; do not edit.\n";

fn main() -> Result<()> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let checks = args.first().is_some_and(|arg| arg == "--check");
    if checks {
        args.remove(0);
    }
    ensure!(args.len() == 1, "usage: kiln-crds [--check] DIR");
    let dir = Path::new(&args[0]);
    for manifest in kiln_crds::manifests() {
        let path = dir.join(&manifest.file);
        let yaml = serde_saphyr::to_string(&manifest.definition).context("write YAML")?;
        let text = format!("{HEAD}{yaml}");
        if checks {
            let found = fs::read_to_string(&path).unwrap_or_default();
            ensure!(
                found == text,
                "{} is stale: run `make manifests`",
                path.display()
            );
        } else {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
    }
    Ok(())
}
