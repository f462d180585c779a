// SPDX-License-Identifier: Apache-2.0
//! Names of images: `HOST/REPOSITORY:TAG`, always in full.

use std::fmt;
use std::str::FromStr;

/// Longest repository path that registries take (OCI distribution specification).
const MAX_REPOSITORY: usize = 255;

/// Longest tag (OCI distribution specification).
const MAX_TAG: usize = 128;

/// A full name of an image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Reference {
    /// The registry's host name, with its port if it has one.
    pub host: String,
    /// The path below the host.
    pub repository: String,
    /// The tag.
    pub tag: String,
}

/// A name that is not of the form `HOST/REPOSITORY:TAG`.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a full image name (HOST/REPOSITORY:TAG)")]
pub struct NotAReference(String);

impl FromStr for Reference {
    type Err = NotAReference;

    fn from_str(text: &str) -> Result<Self, NotAReference> {
        let parts = text
            .split_once('/')
            .and_then(|(host, rest)| Some((host, rest.rsplit_once(':')?)));
        match parts {
            Some((host, (repository, tag)))
                if is_host(host) && is_repository(repository) && is_tag(tag) =>
            {
                Ok(Self {
                    host: host.to_owned(),
                    repository: repository.to_owned(),
                    tag: tag.to_owned(),
                })
            }
            _ => Err(NotAReference(text.to_owned())),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:{}", self.host, self.repository, self.tag)
    }
}

/// Without a dot or a port it would be read as the first part of a path on Docker Hub.
fn is_host(text: &str) -> bool {
    let label =
        |l: &str| !l.is_empty() && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let (name, port) = text
        .split_once(':')
        .map_or((text, None), |(name, port)| (name, Some(port)));
    (name.contains('.') || port.is_some())
        && name.split('.').all(label)
        && port.is_none_or(|p| p.parse::<u16>().is_ok())
}

/// Whether `text` is a repository path: lower-case words, joined by `.`, `_`, `__` or dashes,
/// in parts joined by slashes.
pub(crate) fn is_repository(text: &str) -> bool {
    text.len() <= MAX_REPOSITORY && text.split('/').all(is_path_part)
}

fn is_path_part(part: &str) -> bool {
    let separator = |b: u8| matches!(b, b'.' | b'_' | b'-');
    let bytes = part.as_bytes();
    let edge = |b: Option<&u8>| b.is_some_and(|b| !separator(*b));
    edge(bytes.first())
        && edge(bytes.last())
        && bytes
            .iter()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || separator(*b))
        && bytes
            .chunk_by(|a, b| separator(*a) == separator(*b))
            .all(|run| {
                !separator(run[0])
                    || matches!(run, b"." | b"_" | b"__")
                    || run.iter().all(|b| *b == b'-')
            })
}

/// Whether `text` is a tag.
pub(crate) fn is_tag(text: &str) -> bool {
    let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    let bytes = text.as_bytes();
    bytes.len() <= MAX_TAG
        && bytes.first().is_some_and(word)
        && bytes.iter().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_reads_back_as_written() {
        for text in [
            "docker.io/library/busybox:1.28",
            "localhost:5000/a/b__c/d--e.f:v1_2.3-x",
        ] {
            assert_eq!(text.parse::<Reference>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn short_and_wrong_names_are_refused() {
        let wrong = [
            "",
            "busybox",
            "busybox:1",
            "library/busybox:1",
            "docker.io/busybox",
            "docker.io/Busybox:1",
            "docker.io/:1",
            "docker.io/a//b:1",
            "docker.io/../etc:1",
            "docker.io/a/../b:1",
            "docker.io/a..b:1",
            "docker.io/-a:1",
            "docker.io/a:",
            "docker.io/a:-1",
            "docker.io/a@sha256:1",
            "docker..io/a:1",
            "docker.io:x/a:1",
        ];
        for text in wrong {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
        assert!(!is_tag(&"x".repeat(MAX_TAG + 1)));
        assert!(!is_repository(&"x".repeat(MAX_REPOSITORY + 1)));
    }
}
