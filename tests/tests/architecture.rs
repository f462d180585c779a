// SPDX-License-Identifier: Apache-2.0

//! The arrows of ARCHITECTURE.md: which crate may use which, and no modules that use each other in
//! a circle.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
};

use cargo_metadata::{DependencyKind, MetadataCommand};
use petgraph::{algo::tarjan_scc, graphmap::DiGraphMap};
use syn::{
    Attribute, File, Ident, Item, Meta, UseTree,
    visit::{self, Visit},
};

/// Crates of the product, each with those that it may use.
const ARROWS: [(&str, &[&str]); 11] = [
    ("kiln-host", &[]),
    ("runsc-wrapper", &["kiln-host"]),
    ("kiln-agent-api", &["kiln-host", "runsc-wrapper"]),
    (
        "kiln-shim",
        &["kiln-agent-api", "kiln-host", "runsc-wrapper"],
    ),
    ("kiln-http", &[]),
    ("kiln-crds", &[]),
    (
        "kiln-node-agent",
        &[
            "kiln-agent-api",
            "kiln-crds",
            "kiln-host",
            "kiln-http",
            "kiln-node-install",
            "runsc-wrapper",
        ],
    ),
    (
        "kiln-node-install",
        &["kiln-agent-api", "kiln-crds", "kiln-host", "runsc-wrapper"],
    ),
    ("kiln-controller", &["kiln-crds", "kiln-http"]),
    ("kiln-router", &["kiln-http"]),
    (
        "kilnctl",
        &[
            "kiln-agent-api",
            "kiln-crds",
            "kiln-node-install",
            "runsc-wrapper",
        ],
    ),
];

/// Names of modules that a source file outside its tests refers to.
#[derive(Default)]
struct Mentions(BTreeSet<String>);

impl Mentions {
    fn add(&mut self, module: &Ident) {
        self.0.insert(module.to_string());
    }

    /// Adds the first name after `crate` of each branch of a `use`.
    fn add_roots(&mut self, tree: &UseTree) {
        match tree {
            UseTree::Path(path) => self.add(&path.ident),
            UseTree::Name(name) => self.add(&name.ident),
            UseTree::Rename(rename) => self.add(&rename.ident),
            UseTree::Group(group) => group.items.iter().for_each(|it| self.add_roots(it)),
            UseTree::Glob(_) => {}
        }
    }
}

impl<'ast> Visit<'ast> for Mentions {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(it) => &it.attrs,
            Item::Use(it) => &it.attrs,
            Item::Fn(it) => &it.attrs,
            Item::Impl(it) => &it.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !attributes.iter().any(is_for_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_use_tree(&mut self, tree: &'ast UseTree) {
        match tree {
            UseTree::Path(path) if path.ident == "crate" => self.add_roots(&path.tree),
            _ => visit::visit_use_tree(self, tree),
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let mut segments = path.segments.iter();
        if segments.next().is_some_and(|first| first.ident == "crate")
            && let Some(module) = segments.next()
        {
            self.add(&module.ident);
        }
        visit::visit_path(self, path);
    }
}

fn is_for_tests(attribute: &Attribute) -> bool {
    let Meta::List(list) = &attribute.meta else {
        return false;
    };
    list.path.is_ident("cfg") && list.tokens.to_string() == "test"
}

/// Reads the sources below `dir`, and returns which modules of the crate's root use which.
fn modules_of(dir: &Path) -> io::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut modules: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default();
        let name = name.to_string_lossy().into_owned();
        if !matches!(name.as_str(), "lib" | "main") {
            read(&path, modules.entry(name).or_default())?;
        }
    }
    Ok(modules)
}

fn read(path: &Path, mentions: &mut BTreeSet<String>) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            read(&entry?.path(), mentions)?;
        }
    } else if path.extension().is_some_and(|it| it == "rs") && !path.ends_with("tests.rs") {
        let text = fs::read_to_string(path)?;
        let parsed = syn::parse_file(&text);
        let file: File =
            parsed.map_err(|e| io::Error::other(format!("{}: {e}", path.display())))?;
        let mut found = Mentions::default();
        found.visit_file(&file);
        mentions.append(&mut found.0);
    }
    Ok(())
}

/// Groups of modules each of which uses, directly or not, all others of its group.
fn circles(modules: &BTreeMap<String, BTreeSet<String>>) -> Vec<Vec<&str>> {
    let mut graph = DiGraphMap::<&str, ()>::new();
    for (user, used) in modules {
        for module in used
            .iter()
            .filter(|it| *it != user && modules.contains_key(*it))
        {
            graph.add_edge(user, module, ());
        }
    }
    let groups = tarjan_scc(&graph).into_iter();
    groups.filter(|group| group.len() > 1).collect()
}

#[test]
fn modules_do_not_use_each_other_in_circles() {
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    for (name, _) in ARROWS {
        let package = metadata.packages.iter().find(|it| it.name == name).unwrap();
        let sources = package.manifest_path.parent().unwrap().join("src");
        let modules = modules_of(sources.as_std_path()).unwrap();
        assert_eq!(
            circles(&modules),
            [[""; 0]; 0],
            "modules of {}",
            package.name
        );
    }
}

#[test]
fn crates_use_only_those_below_them() {
    let metadata = MetadataCommand::new().no_deps().exec().unwrap();
    let ours: BTreeSet<_> = metadata
        .packages
        .iter()
        .map(|it| it.name.as_str())
        .collect();
    for (name, allowed) in ARROWS {
        let package = metadata.packages.iter().find(|it| it.name == name).unwrap();
        let used = package
            .dependencies
            .iter()
            .filter(|it| it.kind == DependencyKind::Normal && ours.contains(it.name.as_str()));
        let used: BTreeSet<_> = used.map(|it| it.name.as_str()).collect();
        assert_eq!(used, allowed.iter().copied().collect(), "{name}");
    }
}

#[test]
fn a_circle_is_found() {
    let dir = tempfile::tempdir().unwrap();
    for (file, text) in [
        ("a.rs", "use crate::{b::B, d::{self, D}};"),
        ("b.rs", "fn f() { crate::c::g() }"),
        ("c.rs", "use crate::a;"),
        ("d.rs", "#[cfg(test)] mod tests { use crate::a; }"),
    ] {
        fs::write(dir.path().join(file), text).unwrap();
    }
    let modules = modules_of(dir.path()).unwrap();
    let mut found = circles(&modules);
    found.iter_mut().for_each(|circle| circle.sort_unstable());
    assert_eq!(found, [["a", "b", "c"]]);
}
