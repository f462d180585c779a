// SPDX-License-Identifier: Apache-2.0
//! What an image is made of, for those who look for known holes in it: a bill of materials in
//! CycloneDX 1.6 (<https://cyclonedx.org/docs/1.6/json/>).

use std::collections::{BTreeMap, HashMap};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Node, Package, PackageId};
use serde_json::{Value, json};

use crate::digest::Digest;

/// Programs by architecture and name.
pub(crate) type Found = BTreeMap<&'static str, BTreeMap<&'static str, Vec<u8>>>;

/// What cargo knows of the workspace that this was built in, as far as it is for Linux. (Crates do
/// not differ by its architecture.)
///
/// # Errors
/// cargo's.
pub fn workspace() -> Result<Metadata, cargo_metadata::Error> {
    let options = ["--locked", "--filter-platform", "x86_64-unknown-linux-gnu"];
    MetadataCommand::new()
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .other_options(options.map(str::to_owned))
        .exec()
}

/// The bill of an image: its programs with their digests and, in those that are of `workspace`,
/// the crates that are linked into them. The same image has the same bill.
pub(crate) fn bill(image: &str, tag: &str, programs: &Found, workspace: &Metadata) -> Value {
    let of_one = |architecture: &str, (name, bytes): (&&str, &Vec<u8>)| {
        json!({
            "type": "application",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": Digest::of(bytes).hex()}],
            "properties": [{"name": "kiln:architecture", "value": architecture}],
            "components": linked(name, workspace).map(crate_of).collect::<Vec<_>>(),
        })
    };
    let components = programs
        .iter()
        .flat_map(|(architecture, all)| all.iter().map(|program| of_one(architecture, program)));
    json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": image, "version": tag}},
        "components": components.collect::<Vec<_>>(),
    })
}

/// The packages that a program of the workspace consists of, by name and version; none for
/// another's.
fn linked<'a>(program: &str, workspace: &'a Metadata) -> impl Iterator<Item = &'a Package> {
    let is_it = |p: &&Package| p.targets.iter().any(|t| t.is_bin() && t.name == program);
    let nodes = workspace.resolve.iter().flat_map(|r| &r.nodes);
    let nodes: HashMap<&PackageId, &Node> = nodes.map(|n| (&n.id, n)).collect();
    let packages: HashMap<_, _> = workspace.packages.iter().map(|p| (&p.id, p)).collect();
    let mut found = BTreeMap::new();
    let mut next: Vec<_> = workspace.workspace_packages();
    next.retain(is_it);
    while let Some(package) = next.pop() {
        if found
            .insert((&*package.name, &package.version), package)
            .is_some()
        {
            continue;
        }
        let needs = nodes.get(&package.id).into_iter().flat_map(|n| &n.deps);
        let needs = needs.filter(|d| d.dep_kinds.iter().any(|k| k.kind == DependencyKind::Normal));
        next.extend(needs.filter_map(|d| packages.get(&d.pkg)));
    }
    found.into_values()
}

/// A package as a component, by its package URL (<https://github.com/package-url/purl-spec>).
fn crate_of(package: &Package) -> Value {
    let mut component = json!({
        "type": "library",
        "name": package.name,
        "version": package.version,
        "purl": format!("pkg:cargo/{}@{}", package.name, package.version),
    });
    if let Some(license) = &package.license {
        // The old way to write OR, which SPDX expressions do not have.
        component["licenses"] = json!([{"expression": license.replace('/', " OR ")}]);
    }
    component
}
