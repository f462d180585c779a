// SPDX-License-Identifier: Apache-2.0

//! The documents of the repository: links between them lead somewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
};

use pulldown_cmark::{Event, Parser, Tag, TagEnd};

/// Longest that the first page may be, in lines.
const README_LINES: usize = 150;

/// The headings of a document, as anchors, and the destinations of its links.
#[derive(Default)]
struct Document {
    anchors: BTreeSet<String>,
    links: Vec<String>,
}

impl Document {
    fn read(path: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(path)?;
        let mut document = Self::default();
        let mut heading: Option<String> = None;
        for event in Parser::new_ext(&text, pulldown_cmark::Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    document
                        .anchors
                        .extend(heading.take().as_deref().map(anchor));
                }
                Event::Text(words) | Event::Code(words) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&words);
                    }
                }
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    document.links.push(dest_url.to_string());
                }
                _ => {}
            }
        }
        Ok(document)
    }
}

/// Returns the anchor of a heading as code forges make it: lower case, dashes for blanks, no
/// punctuation.
fn anchor(heading: &str) -> String {
    heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

/// Resolves `..` in `path` by name.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir => {}
            _ => clean.push(part),
        }
    }
    clean
}

/// Returns all documents below the repository's root, except what was built.
fn documents() -> io::Result<BTreeMap<PathBuf, Document>> {
    let root = clean(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let mut found = BTreeMap::new();
    for directory in ["", "docs", "tests", "tests/deps", "deploy/helm/kiln"] {
        for entry in fs::read_dir(root.join(directory))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let document = Document::read(&path)?;
                found.insert(path, document);
            }
        }
    }
    Ok(found)
}

#[test]
fn links_lead_somewhere() {
    let documents = documents().unwrap();
    let mut broken = Vec::new();
    for (path, document) in &documents {
        for link in &document.links {
            if link.contains("://") {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => clean(&path.with_file_name(file)),
            };
            let leads = target.exists()
                && (fragment.is_empty()
                    || documents
                        .get(&target)
                        .is_some_and(|target| target.anchors.contains(fragment)));
            if !leads {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert!(documents.len() > 15, "documents are not found");
    assert_eq!(broken, Vec::<String>::new());
}

#[test]
fn every_page_is_in_the_index() {
    let documents = documents().unwrap();
    let root = clean(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let index = &documents[&root.join("docs/README.md")];
    let indexed: BTreeSet<_> = index
        .links
        .iter()
        .map(|link| link.split('#').next().unwrap_or_default())
        .collect();
    for path in documents
        .keys()
        .filter(|path| path.parent() == Some(&root.join("docs")))
    {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name == "README.md" || indexed.contains(name), "{name}");
    }
}

#[test]
fn the_first_page_is_short() {
    let root = clean(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let lines = fs::read_to_string(root.join("README.md"))
        .unwrap()
        .lines()
        .count();
    assert!(lines <= README_LINES, "{lines} lines");
}
